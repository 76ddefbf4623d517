"""Streams, graphs and devices: an op runs on the stream that is current, shares nothing with what
runs beside it, and can be captured.

In the emulator a stream's work is queued (``order="deferred"``) and runs, at a synchronisation, in
an order that the seed draws within what streams allow: a workspace that two calls share, or a
launch on another stream than the caller's, shows as a result that depends on the seed. Matmuls that
are torch's do not wait there, so the large path joins on a real GPU only.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from qlora_kernels import cuda, formats
from qlora_kernels.formats import get_format

from .conftest import REAL, Gpu
from .test_linear import Case

FUSED = tuple(r for r in cuda.routes() if r != "large")
ROUTES = cuda.routes() if REAL else FUSED
BF16 = torch.bfloat16
SMALL = "rtx3050-laptop"  # few multiprocessors, and so few CTAs
# What an op may ask of the runtime: what does not wait, and takes no memory. The last two lines
# are the emulator's own way to know the tensors.
HARMLESS = {
    "launch", "cudaFuncSetAttribute", "cudaDeviceGetAttribute", "cudaGetDevice", "cudaMemsetAsync",
    "cudaHostRegister", "cudaHostUnregister", "cudaPointerGetAttributes",
    "cudart_stub_uninitialized",
}  # fmt: skip


class Streams:
    """torch's streams and graphs on a GPU; without one, the stand-in's by the same names."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def new(self):
        if REAL:
            return torch.cuda.Stream()
        stream = ctypes.c_void_p()
        assert self.gpu.lib.cudaStreamCreateWithFlags(ctypes.byref(stream), 1) == 0
        return stream

    @contextlib.contextmanager
    def on(self, stream) -> Iterator[None]:
        if REAL:
            with torch.cuda.stream(stream):
                yield
            return
        self.gpu.lib.qlk_emulated_stream(stream)
        try:
            yield
        finally:
            self.gpu.lib.qlk_emulated_stream(None)

    def wait(self) -> None:
        """For everything; what the calls were given may go now."""
        if REAL:
            torch.cuda.synchronize()
        else:
            self.gpu.lib.qlk_emulated_release()

    @contextlib.contextmanager
    def capture(self, replay: list[Callable[[], None]]) -> Iterator[None]:
        """Adds to ``replay`` what runs the captured work once more, and waits for it."""
        stream = self.new()
        if REAL:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                yield
            replay.append(lambda: (graph.replay(), torch.cuda.synchronize()))
            return
        lib = self.gpu.lib
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        assert lib.cudaStreamBeginCapture(stream, 0) == 0
        with self.on(stream):
            yield
        assert lib.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
        assert lib.cudaGraphInstantiate(ctypes.byref(ready), graph, 0) == 0

        def run() -> None:
            assert lib.cudaGraphLaunch(ready, stream) == 0
            assert lib.cudaStreamSynchronize(stream) == 0

        replay.append(run)


class Step:
    """A layer's forward and the gradient of x, its tensors on the device.

    ``like``: another step on the same weight, of other inputs."""

    def __init__(self, gpu: Gpu, m: int, like: Step | None = None) -> None:
        case = Case(m, 72, 256, 16, bias=True)
        self.gpu, self.scaling = gpu, case.scaling
        if like is None:
            self.layer = gpu.weight(case.packed, case.state), *gpu(case.a, case.b, case.bias)
        else:
            self.layer, case.x, case.dy = like.layer, -case.x, -case.dy
        self.weight, self.a, self.b, self.bias = self.layer
        self.x, self.dy, self.s = gpu(case.x, case.dy, case.saved_s())

    def forward(self) -> tuple[Tensor, ...]:
        return self.gpu.ops.linear_4bit(
            self.x, *self.weight, 72, self.bias, self.a, self.b, None, self.scaling, BF16
        )

    def backward(self) -> tuple[Tensor, ...]:
        results = self.gpu.ops.linear_4bit_backward(
            self.dy, *self.weight, 256, self.x, self.a, self.b, self.s, self.scaling, BF16, BF16,
            True, False, False,
        )  # fmt: skip
        return results[0], results[3]


def cpu(results: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.cpu().clone() for t in results]


@pytest.fixture(params=ROUTES)
def route(request) -> str:
    return request.param


@pytest.fixture
def make(make_gpu) -> Callable[..., Gpu]:
    """As ``make_gpu``, all routes but one off."""

    def one(route: str, **options) -> Gpu:
        gpu = make_gpu(SMALL, **options)
        gpu.lib.qlk_cuda_disable(0, cuda.disabled_mask("all") & ~_bit(route))
        return gpu

    return one


def _bit(route: str) -> int:
    return 0 if route == "large" else cuda.disabled_mask(route)


def rows(route: str) -> int:
    """That the route takes on any device, alone."""
    return {"decode_simt": 1, "decode_mma": 9, "gemm": 16, "large": 64}[route]


def test_two_streams_at_once_forward_and_backward_interleaved(make, route) -> None:
    """Two steps on one weight, a stream each: as if the other were not there."""
    gpu = make(route)
    one = Step(gpu, rows(route))
    steps = (one, Step(gpu, rows(route), like=one))
    want = [cpu((*s.forward(), *s.backward())) for s in steps]
    orders = set()
    for seed in range(2):
        gpu = make(route, order="deferred", seed=seed)
        streams = Streams(gpu)
        one = Step(gpu, rows(route))
        steps = (one, Step(gpu, rows(route), like=one))
        places = [streams.new() for _ in steps]
        before = len(gpu.kernels)
        results: list[list[Tensor]] = [[], []]
        for work in ("forward", "backward"):
            for i, (step, place) in enumerate(zip(steps, places, strict=True)):
                with streams.on(place):
                    results[i] += getattr(step, work)()
        assert not gpu.runtime or len(gpu.kernels) == before, "nothing waits for anything"
        streams.wait()
        for mine, theirs in zip(results, want, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(cpu(tuple(mine)), theirs, strict=True))
        if gpu.runtime:
            launches = gpu.runtime.launches
            assert {launch.stream for launch in launches} == {p.value for p in places}
            orders.add(tuple(launch.stream for launch in launches))
    assert REAL or len(orders) > 1, "the emulator ran them in one order only"


def test_a_captured_step_follows_its_inputs_at_each_replay(make, route) -> None:
    gpu = make(route, order="deferred")
    streams, step = Streams(gpu), Step(gpu, rows(route))
    replay: list[Callable[[], None]] = []
    if REAL:  # cuBLAS makes its workspace at the first call
        step.forward(), step.backward()
        torch.cuda.synchronize()
    calls = len(gpu.runtime.calls) if gpu.runtime else 0
    with streams.capture(replay):
        results = (*step.forward(), *step.backward())
    if gpu.runtime:
        made = set(gpu.runtime.calls[calls:])
        streaming = {n for n in made if n.startswith(("cudaStream", "cudaGraph"))}
        assert made - streaming <= HARMLESS
        assert not gpu.kernels, "nothing runs while it is captured"
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        step.x.copy_(torch.randn(step.x.shape))
        step.dy.copy_(torch.randn(step.dy.shape))
        replay[0]()
        seen.append((step.x.clone(), step.dy.clone(), cpu(results)))
    streams.wait()
    gpu = make(route)
    again = Step(gpu, rows(route))
    for x, dy, got in seen:
        again.x, again.dy = x, dy
        want = cpu((*again.forward(), *again.backward()))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not torch.equal(seen[0][2][0], seen[1][2][0])


class Quantization:
    """quantize, nested scales and dequantize, one after the other."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.codebook, self.thresholds, self.codes = gpu(*get_format("nf4").tensors())
        self.limits, self.nested_code = gpu(formats.nested_thresholds(), formats.nested_code())

    def __call__(self, w: Tensor) -> tuple[Tensor, ...]:
        ops = self.gpu.ops
        packed, absmax = ops.quantize_4bit(w, self.thresholds, self.codes, 64)
        scales, nested, offset = ops.quantize_absmax(absmax, self.limits, None)
        weight = (packed, scales, self.codebook, 64, nested, self.nested_code, offset)
        return (*weight[:2], nested, offset, ops.dequantize_4bit(*weight, list(w.shape), w.dtype))


def test_quantization_is_captured_and_replayed(make_gpu) -> None:
    """No scale is read on the host."""
    gpu = make_gpu(order="deferred")
    streams, replay, quantization = Streams(gpu), [], Quantization(gpu)
    w = gpu(torch.randn(20_000))
    with streams.capture(replay):
        results = quantization(w)
    assert not gpu.kernels
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        w.copy_(torch.randn(20_000) * seed)
        replay[0]()
        seen.append((w.clone(), cpu(results)))
    streams.wait()
    quantization = Quantization(make_gpu())
    for values, got in seen:
        want = cpu(quantization(values))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not torch.equal(seen[0][1][4], seen[1][1][4])


def test_a_second_device_is_a_device_of_its_own(make) -> None:
    """Its kernels have asked it for shared memory, its routes are switched apart, and a stream of
    another device is refused."""
    if REAL and torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    route = FUSED[-1]
    gpu = make(route, devices=2)
    want = cpu(Step(gpu, rows(route)).forward())
    streams = Streams(gpu)
    of_the_first = streams.new()
    lib = gpu.lib
    if REAL:
        gpu.device = torch.device("cuda:1")
    else:
        assert lib.cudaSetDevice(1) == 0
    step = Step(gpu, rows(route))
    try:
        lib.qlk_cuda_disable(1, cuda.disabled_mask("all") & ~_bit(route))
        got = cpu(step.forward())
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        if not REAL:
            assert not any("dequantize" in name for name in gpu.kernels)
            lib.qlk_cuda_disable(1, cuda.disabled_mask("all"))
            before = len(gpu.kernels)
            step.forward()
            assert all("dequantize" in name for name in gpu.kernels[before:])
            lib.qlk_cuda_disable(1, 0)
            with streams.on(of_the_first), pytest.raises(RuntimeError, match="resource handle"):
                step.forward()
            assert "is device 0's, the current device is 1" in str(gpu.runtime.errors[0])
            gpu.runtime.errors.clear()
            streams.wait()
    finally:
        lib.qlk_cuda_disable(1, 0)
        if not REAL:
            lib.cudaSetDevice(0)
