"""The command line of `qlora serve`: what it refuses, and one that runs."""

from __future__ import annotations

import argparse
import re

import pytest

pytest.importorskip("fastapi")
from qlora_kernels.finetune.errors import BadInput
from qlora_kernels.serve import command
from qlora_kernels.serve.adapters import load_served


def run(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words))


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "--model, --adapter, or both"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--model", "m", "--adapter", "a=b", "--adapter", "a=c"], "the name a is taken"),
        (["--model", "x/m", "--adapter", "m=b"], "the name m is taken"),
        (["--model", "m", "--adapter", "a b=c"], "not NAME=FOLDER"),
        (["--model", "m", "--adapter", "a="], "not NAME=FOLDER"),
        (["--model", "m", "--name", "a b"], "--name a b"),
        (["--model", "m", "--max_batch", "0"], "max_batch is 0"),
        (["--model", "m", "--max_queue", "-1"], "max_queue is -1"),
        (["--model", "m", "--port", "99999"], "port is 99999"),
        (["--model", "m", "--api-key", ""], "the API key"),
        (["--model", "m", "--host", "0.0.0.0"], "give --api-key, or QLORA_API_KEY"),
        (["--model", "m", "--host", "::"], "give --api-key, or QLORA_API_KEY"),
    ],
)
def test_what_cannot_be(words, told, monkeypatch):
    monkeypatch.delenv(command.KEY, raising=False)
    with pytest.raises(BadInput, match=re.escape(told)):
        run("--port", "0", *words)


def test_names():
    assert command.base_name("x/SmolLM2 135M/", [], None) == "SmolLM2-135M"
    assert command.base_name(None, ["a=b"], None) == "base"
    assert command.parse_adapters(["a=x/y", "x/z"], "base") == {"a": "x/y", "z": "x/z"}


def test_limits_that_do_not_fit_the_model(served):
    from qlora_kernels.serve.engine import Engine

    with pytest.raises(BadInput, match="the model takes 256"):
        Engine(served.model, context=512)
    with pytest.raises(BadInput, match="cache_tokens is 100"):
        Engine(served.model, cache_tokens=100)


def test_adapters_that_cannot_be_served(
    tiny_model, adapters, make_adapter, tmp_path, make_tiny_model
):
    dora = make_adapter(tiny_model, tmp_path / "dora", 1, use_dora=True)
    full = make_adapter(tiny_model, tmp_path / "full", 1, modules_to_save=["lm_head"])
    for folder, what in [(dora, "DoRA"), (full, "trained in full")]:
        with pytest.raises(BadInput, match=rf"{what}.* at .*qlora merge"):
            load_served(str(tiny_model), {"a": str(folder)}, dtype="float32")
    other = make_tiny_model(tmp_path / "other", hidden_size=32)
    for names in ("one",), ("two.b", "one"):
        with pytest.raises(BadInput, match=f"the adapter {names[0]}.*of another model"):
            load_served(str(other), {n: str(adapters[n]) for n in names}, dtype="float32")


def test_a_base_without_a_template_takes_its_finetunes(adapters, tiny_model, tmp_path):
    import shutil

    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    tuned = shutil.copytree(adapters["one"], tmp_path / "tuned")
    for path in tiny_model.glob("*token*"):
        shutil.copy(path, tuned)
    (tuned / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    served = load_served(str(base), {"one": str(tuned)}, dtype="float32")
    template = served.tokenizers["one"].chat_template
    assert served.tokenizers[""].chat_template == template == "{{ messages[-1].content }}"
    # The base is the adapter's where none is given.
    assert load_served(None, {"one": str(adapters["one"])}, dtype="float32").mixer is not None
    alone = load_served(str(tiny_model), {}, dtype="float32")
    assert alone.mixer is None and alone.adapters == {}


def test_the_command_serves_until_it_is_interrupted(tiny_model, adapters, monkeypatch, capsys):
    """In this process: the server's `run` is handed the socket, and asks over it."""
    from qlora_kernels.serve import guard

    asked = {}

    class Server:
        def __init__(self, app):
            self.app = app

        def run(self, sockets):
            asked["address"] = sockets[0].getsockname()
            asked["key"], asked["local"] = self.app.api_key, self.app.local

    monkeypatch.setattr(guard, "make_server", Server)
    monkeypatch.setenv(command.KEY, "secret")
    words = ["--model", str(tiny_model), "--name", "tiny", "--dtype", "float32", "--port", "0"]
    words += ["--adapter", f"one={adapters['one']}", "--host", "0.0.0.0", "--cache_tokens", "512"]
    assert run(*words) == 0
    assert (asked["key"], asked["local"]) == ("secret", False)
    host, port = asked["address"]
    assert f"tiny, one at http://{host}:{port}\n" in capsys.readouterr().out
