"""The ops on Triton's kernels by ``set_backend``: results, errors, opcheck, compilation."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qlora_kernels
from qlora_kernels import backend, ops
from qlora_kernels import functional as F4
from qlora_kernels.nn import LoraLinear4bit

lib = torch.ops.qlora_kernels
PAGE = Path(__file__).parents[2] / "docs" / "triton.md"
N, K, RANK = 48, 128, 8


@pytest.fixture
def on_triton(make_triton_gpu):
    gpu = make_triton_gpu("a100")
    with qlora_kernels.set_backend("triton"):
        yield gpu


def names(gpu: Any) -> set[str]:
    return {launch.name for launch in gpu.launches}


def weight(dtype: torch.dtype = torch.bfloat16) -> tuple[tuple, torch.Tensor]:
    w = torch.randn(N, K, dtype=dtype) / K**0.5
    packed, state = F4.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    return (packed.reshape(-1), *state.weight_args()), F4.dequantize_4bit(packed, state)


def operands(m: int = 5, dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
    return SimpleNamespace(
        x=torch.randn(m, K, dtype=dtype), dy=torch.randn(m, N, dtype=dtype),
        a=torch.randn(RANK, K) / K**0.5, b=torch.randn(N, RANK), bias=torch.randn(N),
    )  # fmt: skip


def test_the_code_of_the_page(make_triton_gpu) -> None:
    """docs/triton.md's, as it stands there."""
    make_triton_gpu("a100")
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    said = block.replace("    ...", "    used = qlora_kernels.get_backend()")
    names: dict = {}
    exec(said, names)
    assert said != block and names["used"] == "triton" != qlora_kernels.get_backend()


def test_a_training_step_runs_on_tritons_kernels(on_triton) -> None:
    """Forward and backward of a layer, against the CPU's kernels on the same bytes."""
    layer = LoraLinear4bit(K, N, r=RANK, quant_type="nf4").to(torch.bfloat16)
    torch.nn.init.normal_(layer.lora_B, std=0.1)
    assert {"quantize", "dequantize"} & {n.split("_")[0] for n in names(on_triton)}
    o = operands(9)
    trained = [layer.lora_A, layer.lora_B, layer.bias]

    def step() -> list[torch.Tensor]:
        x = o.x.clone().requires_grad_()
        y = layer(x)
        grads = torch.autograd.grad(y, [x, *trained], o.dy)
        return [y.detach(), *grads]

    before = len(on_triton.launches)
    got = step()
    assert len(on_triton.launches) > before
    before = len(on_triton.launches)
    with qlora_kernels.set_backend("auto"):
        want = step()
    assert len(on_triton.launches) == before, "the CPU's tensors did not get the CPU's kernels back"
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.float(), w.float(), rtol=0.02, atol=0.05)


BAD: dict[str, Any] = {
    "x's features": lambda w, o: lib.linear_4bit(
        o.x[:, :64], *w, N, None, None, None, None, 1.0, torch.bfloat16
    ),
    "x's dtype": lambda w, o: lib.linear_4bit(
        o.x.double(), *w, N, None, None, None, None, 1.0, torch.bfloat16
    ),
    "bias": lambda w, o: lib.linear_4bit(
        o.x, *w, N, o.bias[:7], None, None, None, 1.0, torch.bfloat16
    ),
    "lora_a": lambda w, o: lib.linear_4bit(
        o.x, *w, N, None, o.a[:3], o.b, None, 1.0, torch.bfloat16
    ),
    "lora_a alone": lambda w, o: lib.linear_4bit(
        o.x, *w, N, None, o.a, None, None, 1.0, torch.bfloat16
    ),
    "absmax": lambda w, o: lib.dequantize_4bit(
        w[0], w[1][:-1], *w[2:], [N, K], torch.bfloat16
    ),
    "packed": lambda w, o: lib.dequantize_4bit(*w, [N, K + 2], torch.bfloat16),
    "dtype": lambda w, o: lib.dequantize_4bit(*w, [N, K], torch.float64),
    "blocksize": lambda w, o: lib.dequantize_4bit(*w[:3], 48, *w[4:], [N, K], torch.bfloat16),
    "empty": lambda w, o: F4.quantize_4bit(torch.empty(0)),
    "integers": lambda w, o: F4.quantize_4bit(torch.zeros(64, dtype=torch.int32)),
    "absmax's dtype": lambda w, o: lib.quantize_absmax(
        torch.ones(4, dtype=torch.float16), torch.zeros(255), None
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_has_the_errors_of_plain_torch(on_triton, name) -> None:
    w, o = weight()[0], operands()
    before = len(on_triton.launches)
    with pytest.raises((ValueError, TypeError, RuntimeError)) as triton_error:
        BAD[name](w, o)
    assert len(on_triton.launches) == before, "a kernel ran before the check"
    with (
        _overridden(ops.PLAIN),
        pytest.raises((ValueError, TypeError, RuntimeError)) as plain_error,
    ):
        BAD[name](w, o)
    assert str(triton_error.value) == str(plain_error.value)
    assert triton_error.type is plain_error.type


class _overridden:
    def __init__(self, table: dict) -> None:
        self.table = table

    def __enter__(self) -> None:
        self.library = backend._register(self.table, "CPU")

    def __exit__(self, *_: Any) -> None:
        self.library._destroy()


def test_opcheck(on_triton) -> None:
    """Schema, autograd registration and fakes. (AOT's dynamic shapes: the graph test below.)"""
    w, o = weight()[0], operands(3)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    dense = torch.randn(4, 64)
    tables = qlora_kernels.formats.NF4.tensors()[1:]
    limits = qlora_kernels.formats.nested_thresholds()
    for op, args, kwargs in (
        (lib.quantize_4bit.default, (dense, *tables, 64), {}),
        (lib.quantize_4bit_scaled.default, (dense, *tables, 64, None), {}),
        (lib.quantize_absmax.default, (torch.rand(300), limits, None), {}),
        (lib.dequantize_4bit.default, (*w, [N, K], torch.bfloat16), {}),
        (lib.dequantize_4bit.out, w, {"out": torch.empty(N, K, dtype=torch.bfloat16)}),
        (
            lib.linear_4bit.default,
            (o.x, *w, N, o.bias, o.a, o.b, None, 0.5, torch.bfloat16),
            {},
        ),
    ):
        torch.library.opcheck(op, args, kwargs, test_utils=checks)


def test_a_compiler_sees_the_kernels_of_a_linear_layer(on_triton) -> None:
    """Forward and backward are traced down to launches; dequantization stays one node."""
    from torch._dynamo.backends.common import aot_autograd

    w, _ = weight()
    o = operands(5)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def layer(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return lib.linear_4bit(x, *w, N, o.bias, a, b, None, 0.5, torch.bfloat16)[0]

    compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    results = []
    for run in (layer, compiled):
        x, a, b = (t.clone().requires_grad_() for t in (o.x, o.a, o.b))
        y = run(x, a, b)
        results.append([y.detach(), *torch.autograd.grad(y, [x, a, b], o.dy)])
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain, rtol=0.02, atol=0.02)
    assert len(graphs) == 2, "forward and backward"
    for graph in graphs:
        targets = [str(node.target) for node in graph.graph.nodes]
        assert any("triton_kernel_wrapper" in t for t in targets), targets
        assert not any("linear_4bit" in t for t in targets), targets


def test_auto_checks_tritons_kernels_and_goes_on_without_those_that_are_wrong(
    on_triton, monkeypatch
) -> None:
    right = backend._triton_ops()

    def wrong(*args: Any) -> tuple:
        y, s = right["linear_4bit"](*args)
        return y + 1, s

    device = torch.device("cpu", 0)
    monkeypatch.setattr("qlora_kernels.cuda._CHECKED_ROWS", {"triton": (1,)})
    monkeypatch.setattr("qlora_kernels.cuda._CHECK_SHAPES", ((16, 64),))
    assert backend.check_triton(device) == []
    monkeypatch.setattr(backend, "_triton_ops", lambda: {**right, "linear_4bit": wrong})
    backend._auto_takes_triton.cache_clear()
    with pytest.warns(UserWarning, match="do not compute what they should(?s:.*)values differ"):
        assert not backend._auto_takes_triton("cpu", 0)
    monkeypatch.setattr(backend, "_triton_ops", lambda: right)
    backend._auto_takes_triton.cache_clear()
    assert backend._auto_takes_triton("cpu", 0)
    backend._auto_takes_triton.cache_clear()


def test_an_op_without_cuda_kernels_goes_where_auto_says(on_triton, monkeypatch) -> None:
    w, want = weight()
    for takes in (True, False):
        monkeypatch.setattr(backend, "_auto_takes_triton", lambda kind, index, t=takes: t)
        before = len(on_triton.launches)
        got = backend._auto("dequantize_4bit")(*w, [N, K], torch.bfloat16)
        assert torch.equal(got, want) and (len(on_triton.launches) > before) == takes


def test_the_backend_names_tritons_device(on_triton) -> None:
    assert backend.triton_device() == "cpu"
    assert qlora_kernels.backends()["triton"] is None
    assert set(backend._triton_ops()) == set(backend.OPS) == set(ops.PLAIN)
    assert all(name.partition(".")[0] in dir(ops.torch.ops.qlora_kernels) for name in backend.OPS)
