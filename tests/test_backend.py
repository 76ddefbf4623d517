"""Which kernels a GPU's tensors get, and what is said where they cannot be had."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import qlora_kernels
from qlora_kernels import BackendError, backend, ops
from qlora_kernels import functional as F4


@pytest.fixture(autouse=True)
def _auto():
    yield
    qlora_kernels.set_backend("auto")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_a_name_that_is_none() -> None:
    with pytest.raises(ValueError, match="one of auto, cuda, triton, cpu, got 'rocm'"):
        qlora_kernels.set_backend("rocm")
    assert qlora_kernels.get_backend() == "auto"


def test_set_at_once_and_for_a_while() -> None:
    qlora_kernels.set_backend("cpu")
    assert qlora_kernels.get_backend() == "cpu"
    with qlora_kernels.set_backend("auto"):
        assert qlora_kernels.get_backend() == "auto"
    assert qlora_kernels.get_backend() == "cpu"
    with pytest.raises(ZeroDivisionError), qlora_kernels.set_backend("auto"):
        raise ZeroDivisionError
    assert qlora_kernels.get_backend() == "cpu"


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_that_cannot_run_says_why_and_what_can(name, monkeypatch) -> None:
    why = qlora_kernels.backends()
    if why[name] is None:
        pytest.skip(f"{name} can run here")
    with pytest.raises(BackendError) as raised:
        qlora_kernels.set_backend(name)
    words = str(raised.value)
    assert words.startswith(f"backend '{name}' cannot run here: {why[name]}")
    assert words.endswith("What can: " + ", ".join(n for n, w in why.items() if w is None))
    assert qlora_kernels.get_backend() == "auto"


def test_without_triton_everything_else_works_and_the_error_names_the_package() -> None:
    done = python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, qlora_kernels as q\n"
        "packed, state = q.functional.quantize_4bit(torch.randn(64, 64), quant_type='nf4')\n"
        "assert q.functional.dequantize_4bit(packed, state).shape == (64, 64)\n"
        "try: q.set_backend('triton')\n"
        "except q.BackendError as e: print(e)\n"
        "try: import qlora_kernels.triton\n"
        "except ImportError as e: print(e)\n"
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "Triton is not installed (pip install triton)" in first and "What can: " in first
    assert "not installed: pip install triton" in second


def test_the_package_does_not_import_triton() -> None:
    done = python("import sys, qlora_kernels; assert 'triton' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_the_environment_chooses() -> None:
    done = python("import qlora_kernels as q; print(q.get_backend())", QLORA_KERNELS_BACKEND="cpu")
    assert done.stdout == "cpu\n", done.stderr
    done = python("import qlora_kernels", QLORA_KERNELS_BACKEND="opencl")
    assert "QLORA_KERNELS_BACKEND: backend must be one of" in done.stderr


def test_cpu_leaves_a_gpu_without_kernels(monkeypatch) -> None:
    """What a GPU's tensor would be told; CPU tensors go on."""
    registered: dict = {}

    def register(table, key):
        registered.update({(name, key): fn for name, fn in table.items()})
        return torch.library.Library(ops.NAMESPACE, "IMPL")

    monkeypatch.setattr(backend, "_register", register)
    with qlora_kernels.set_backend("cpu"):
        packed, state = F4.quantize_4bit(torch.randn(64, 64), quant_type="nf4")
        assert F4.dequantize_4bit(packed, state).shape == (64, 64)
    assert {name for name, _ in registered} == set(backend.OPS)
    with pytest.raises(BackendError, match=r"linear_4bit .*set_backend\('cpu'\).*move the tensors"):
        registered["linear_4bit", "CUDA"](packed)


def test_every_op_that_has_a_schema_has_a_backend() -> None:
    names = {schema.partition("(")[0] for schema in ops.SCHEMAS}
    assert names - set(backend.OPS) == {"adamw_"}  # the optimizer's formulas are torch's elsewhere


@pytest.mark.parametrize(
    "capability, executed",
    [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), False),
     ((10, 3), False), ((11, 0), False), ((12, 0), True)],
)  # fmt: skip
def test_auto_takes_triton_only_where_its_code_was_executed(capability, executed) -> None:
    assert backend.executed_on(capability) == executed
