"""One server for all: a tiny model, two adapters, a real port."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


def _make_adapter(model, folder, seed, **settings):
    import torch
    from peft import LoraConfig, get_peft_model

    from qlora_kernels.integrations.transformers import load_quantized_model

    torch.manual_seed(seed)
    base = load_quantized_model(model, dtype=torch.float32)
    base.name_or_path = str(model)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_adapter():
    """``make_adapter(model, folder, seed, **settings)``: a LoRA adapter with random weights."""
    return _make_adapter


@pytest.fixture(scope="session")
def adapters(tiny_model, tmp_path_factory):
    """Two adapters, of which the second adapts other modules, by name."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": _make_adapter(tiny_model, folder / "one", 1),
        "two.b": _make_adapter(tiny_model, folder / "two", 2, target_modules=["q_proj", "up_proj"]),
    }


@pytest.fixture(scope="session")
def served(tiny_model, adapters):
    from qlora_kernels.serve.adapters import load_served

    return load_served(str(tiny_model), {n: str(f) for n, f in adapters.items()}, dtype="float32")


@contextmanager
def running(app) -> Iterator[str]:
    """An ASGI application under uvicorn, in a thread; its address."""
    from qlora_kernels.serve.guard import listen, make_server

    listener = listen("127.0.0.1", 0)
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started and thread.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    assert server.started
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def run_app():
    return running


@pytest.fixture(scope="session")
def live(served):
    """The server: ``url``, ``engine``, ``mixer``."""
    from qlora_kernels.serve.app import Server, create_app
    from qlora_kernels.serve.engine import Engine
    from qlora_kernels.serve.guard import Guard

    engine = Engine(served.model, served.mixer, max_batch=4, max_queue=4, cache_tokens=1024)
    server = Server(engine, "tiny", served.adapters, served.tokenizers)
    with running(Guard(create_app(server), max_body=20_000)) as url:
        yield SimpleNamespace(url=url, engine=engine, mixer=served.mixer, app=server)
    assert not engine.alive


@pytest.fixture
def slow(live):
    """Each step takes 20 ms more: there is time to do something while a reply is made."""
    handle = live.engine.model.register_forward_pre_hook(lambda *a: time.sleep(0.02))
    yield
    handle.remove()


@pytest.fixture
def idle(live):
    """``idle()`` waits until no request runs; and the test leaves none."""

    def wait(seconds: float = 10.0) -> dict:
        until = time.monotonic() + seconds
        while live.engine.jobs and time.monotonic() < until:
            time.sleep(0.01)
        assert not live.engine.jobs
        return live.engine.state()

    wait()
    yield wait
    wait()
