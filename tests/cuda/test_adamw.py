"""The AdamW kernel against optim.py's formulas in torch: states and codes to the bit."""

from __future__ import annotations

import ctypes
import functools
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qlora_kernels import cuda, ops, optim, paging
from qlora_kernels.emulator import runtime

from ..conftest import EMULATED
from .conftest import REAL, Gpu
from .test_streams import Streams

PAGE = Path(__file__).parents[2] / "docs" / "optimizer.md"
SIZES = [1, 255, 256, 257, 4097, 4352, 70001]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _nearest_roots(monkeypatch) -> None:
    """torch's root on a CPU, MKL's, is off by an ulp here and there; NumPy's is IEEE's."""
    monkeypatch.setattr(optim, "_root", lambda v: torch.from_numpy(np.sqrt(v.cpu().numpy())))


def driver(gpu: Gpu) -> paging.Driver:
    """Managed memory of the stand-in runtime, as CPU tensors on its addresses."""

    def wrap(block: paging.Block, begin: int, size: int) -> Tensor:
        memory = (ctypes.c_uint8 * size).from_address(block.address + begin)
        memory.block = block
        return torch.frombuffer(memory, dtype=torch.uint8)

    return paging.Driver(gpu.lib, 0, wrap, lambda: None)


@functools.cache
def _defined() -> torch.library.Library:
    """optim.py's own op, in the emulated namespace too."""
    library = torch.library.Library(EMULATED, "FRAGMENT")
    library.define(optim.SCHEMA)
    return library


@pytest.fixture
def on_gpu(monkeypatch, make_gpu) -> Iterator[Callable[..., Gpu]]:
    """``on_gpu(...)``: a GPU whose kernel optim.py uses for the parameters at ``gpu.mine``: in the
    emulator those are on the CPU as the others are."""

    made: list[Gpu] = []

    def make(**options) -> Gpu:
        for gpu in made:
            gpu.lib.qlk_cuda_paging_forget()
        made[:] = [gpu := make_gpu(**options)]
        gpu.mine = set()
        if not REAL:
            _defined()
            kernel = optim.Kernel(gpu.ops.adamw_, gpu.ops.adamw_capturable_, driver(gpu))
            monkeypatch.setattr(
                optim, "kernel_for", lambda p: kernel if p.data_ptr() in gpu.mine else None
            )
        return gpu

    yield make
    for gpu in made:  # the streams of one runtime are nothing to the next
        gpu.lib.qlk_cuda_paging_forget()


def random(sizes: list[int], dtype: torch.dtype, seed: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, generator=g) * 10.0 ** (i % 5 - 2)).to(dtype) for i, n in enumerate(sizes)
    ]


def pair(gpu: Gpu, values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters on the GPU, and the same ones for torch's arithmetic."""
    mine = [gpu(v.clone()).requires_grad_() for v in values]
    gpu.mine |= {p.data_ptr() for p in mine}
    return mine, [v.clone().requires_grad_() for v in values]


def same(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach().cpu(), b.detach()
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def train(gpu: Gpu, optimizers, params, grads: list[Tensor]) -> None:
    for optimizer, own, move in zip(optimizers, params, (gpu, lambda g: g.clone()), strict=True):
        for p, g in zip(own, grads, strict=True):
            p.grad = move(g)
        optimizer.step()


def check(optimizers, params, before: list[Tensor]) -> None:
    """States to the bit; p too, or, with 8-bit states, within the bound of adamw.cu's head."""
    one, other = optimizers
    for a, b, old in zip(*params, before, strict=True):
        mine, theirs = one.state[a], other.state[b]
        for name in theirs:
            if isinstance(theirs[name], Tensor):
                assert same(mine[name], theirs[name]), (name, a.numel())
        if theirs["state1"].dtype == torch.float32:
            assert same(a, b), a.numel()
            continue
        got, want = a.detach().cpu().double(), b.detach().double()
        changed = (
            want - old.double()
        ).abs() + 0.01 * old.double().abs()  # decay goes the other way
        kind = torch.finfo(b.dtype)
        rounding = kind.eps * want.abs().clamp(min=kind.smallest_normal)
        assert ((got - want).abs() <= 2.0**-21 * changed + rounding).all()


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", ops.FLOATS, ids=str)
def test_as_torchs_arithmetic(on_gpu, dtype, bits) -> None:
    gpu = on_gpu()
    params = pair(gpu, random(SIZES, dtype))
    optimizers = [optim.AdamW(p, optim_bits=bits, **OPTIONS) for p in params]
    for t in range(3):
        before = [p.detach().clone() for p in params[1]]
        grads = random(SIZES, dtype, seed=9 + t)
        if t == 1:
            grads = [torch.where(torch.arange(g.numel()) % 3 == 0, 0, g) for g in grads]
        train(gpu, optimizers, params, grads)
        check(optimizers, params, before)
        with torch.no_grad():  # differences within the bound do not add up
            for a, b in zip(*params, strict=True):
                a.copy_(b)
    if not REAL:
        # Small tensors have 32-bit states even so.
        assert len(gpu.kernels) == 3 * (1 if bits == 32 else 2)
        assert all("adamw<" in name for name in gpu.kernels)


@pytest.mark.parametrize("bits", [32, 8])
def test_more_tensors_than_a_launch_takes(on_gpu, bits) -> None:
    gpu = on_gpu()
    sizes = [1 + 37 * i for i in range(61)] + [4096 + 13 * i for i in range(62)]
    params = pair(gpu, random(sizes, torch.bfloat16))
    optimizers = [optim.AdamW(p, optim_bits=bits, **OPTIONS) for p in params]
    before = [p.detach().clone() for p in params[1]]
    train(gpu, optimizers, params, random(sizes, torch.bfloat16, seed=2))
    check(optimizers, params, before)
    if not REAL:
        assert len(gpu.kernels) == (3 if bits == 32 else 4)


@pytest.mark.parametrize("bits", [32, 8])
def test_more_tiles_than_blocks_reside(on_gpu, bits) -> None:
    """Each block walks over several tiles, of tensors that may be empty: at either end, in between,
    and all of them."""
    gpu = on_gpu(device="rtx3050-laptop")  # 32 blocks
    sizes = [0, 4096 * 33 + 5, 0, 0, 5000, 4096 * 2, 0]
    params = pair(gpu, random(sizes, torch.bfloat16))
    optimizers = [optim.AdamW(p, optim_bits=bits, **OPTIONS) for p in params]
    before = [p.detach().clone() for p in params[1]]
    train(gpu, optimizers, params, random(sizes, torch.bfloat16, seed=2))
    check(optimizers, params, before)
    if gpu.runtime:
        assert {launch.grid[0] for launch in gpu.runtime.launches} == {32}


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_unaligned_views(on_gpu, dtype, bits) -> None:
    """Parameters, gradients and states that start anywhere; what lies around them stays."""
    gpu = on_gpu()
    n, off = 5000, 3
    values, grads = random([n], dtype)[0], random([n], dtype, seed=5)[0]
    room = gpu(torch.full((n + 2 * off,), 7.0, dtype=dtype))
    room[off : off + n] = gpu(values)
    mine = room[off : off + n].requires_grad_()
    gpu.mine.add(mine.data_ptr())
    theirs = values.clone().requires_grad_()
    params = [mine], [theirs]
    optimizers = [optim.AdamW(p, optim_bits=bits, **OPTIONS) for p in params]
    before = [theirs.detach().clone()]
    grad_room = gpu(torch.zeros(n + off, dtype=dtype))
    grad_room[off:] = gpu(grads)
    theirs.grad, mine.grad = grads.clone(), grad_room[off:]
    for optimizer in optimizers:
        optimizer.step()
    check(optimizers, params, before)
    assert (room.detach()[:off] == 7).all() and (room.detach()[off + n :] == 7).all()


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("which", ["p", "grad", "state1", "state2"])
def test_one_unaligned_of_four(on_gpu, which, bits) -> None:
    gpu = on_gpu()
    params = pair(gpu, random([5000], torch.float32))
    optimizers = [optim.AdamW(p, optim_bits=bits, **OPTIONS) for p in params]
    train(gpu, optimizers, params, random([5000], torch.float32, seed=2))
    (mine,), (theirs,) = params
    with torch.no_grad():
        theirs.copy_(mine)
    before, states = [theirs.detach().clone()], optimizers[0].state[mine]

    def aside(t: Tensor) -> Tensor:
        room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        return room[1:].copy_(t.detach())

    (grad,) = random([5000], torch.float32, seed=3)
    mine.grad, theirs.grad = gpu(grad.clone()), grad
    if which == "p":
        mine.data = aside(mine)
        gpu.mine.add(mine.data_ptr())
    elif which == "grad":
        mine.grad = aside(mine.grad)
    else:
        states[which] = aside(states[which])
    for optimizer in optimizers:
        optimizer.step()
    check(optimizers, params, before)


@pytest.mark.parametrize("bits", [32, 8])
def test_gradients_that_are_not_finite(on_gpu, bits) -> None:
    """fp32 states go the way of IEEE's arithmetic; 8-bit states lose the value and nothing else.
    1e25 is finite, its square is not."""
    gpu = on_gpu()
    params = pair(gpu, random([8192], torch.float32))
    optimizers = [optim.AdamW(p, optim_bits=bits, **OPTIONS) for p in params]
    for t in range(2):
        before = [p.detach().clone() for p in params[1]]
        (grad,) = random([8192], torch.float32, seed=t)
        bad = [float("nan"), float("inf"), -float("inf"), 1e25, -0.0]
        grad[torch.tensor([5, 300, 301, 4000, 8191])] = torch.tensor(bad)
        train(gpu, optimizers, params, [grad])
        if bits == 8:
            check(optimizers, params, before)
            assert params[0][0].isfinite().all()
            for i in (5, 300, 301, 4000):
                assert params[0][0][i] == before[0][i]
        else:
            assert all(same(a, b) for a, b in zip(*params, strict=True))
        with torch.no_grad():
            params[0][0].copy_(params[1][0])


def test_hard_values_of_8_bit_states(on_gpu) -> None:
    """Blocks of zeros, of denormals, of one large value among tiny ones of either sign."""
    gpu = on_gpu()
    params = pair(gpu, random([4096 + 100], torch.float32))
    optimizers = [optim.AdamW8bit(p, lr=1e-2, eps=1e-8) for p in params]
    for t in range(3):
        before = [p.detach().clone() for p in params[1]]
        (grad,) = random([4096 + 100], torch.float32, seed=t)
        grad[:256] = 0
        grad[256:512] *= 1e-38
        grad[512:768] *= 1e-12
        grad[600] = 1e8
        grad[768:1024] = torch.logspace(-12, 3, 256) * torch.tensor([1, -1]).repeat(128)
        grad[1024:1280] = -0.0
        train(gpu, optimizers, params, [grad])
        check(optimizers, params, before)
        with torch.no_grad():
            params[0][0].copy_(params[1][0])


def test_zeros_of_8_bit_states(on_gpu) -> None:
    """m = -0 has zero's code, not the smallest negative one; and 0 / 0, of a value without a
    gradient where eps is 0, leaves p as it is."""
    gpu = on_gpu()
    params = pair(gpu, random([4096], torch.float32))
    options = {"lr": 1e-2, "betas": (0.0, 0.5), "weight_decay": 0.0}
    optimizers = [optim.AdamW8bit(p, **options) for p in params]
    for grad in (-torch.ones(4096), torch.where(torch.arange(4096) % 2 == 0, -0.0, 1.0)):
        before = [p.detach().clone() for p in params[1]]
        train(gpu, optimizers, params, [grad])
        check(optimizers, params, before)
        with torch.no_grad():
            params[0][0].copy_(params[1][0])
    zero = int((optim.nested_code() == 0).nonzero()[0])
    assert (optimizers[0].state[params[0][0]]["state1"][::2] == zero).all()

    (mine,), _ = pair(gpu, random([4096], torch.float32))
    before = mine.detach().clone()
    mine.grad = gpu(torch.where(torch.arange(4096) % 2 == 0, 0.0, 1.0))
    optim.AdamW8bit([mine], eps=0.0, weight_decay=0.0).step()
    assert torch.equal(mine[::2], before[::2]) and (mine[1::2] < before[1::2]).all()


def test_every_boundary_between_codes(on_gpu) -> None:
    """Values on, just below and just above each boundary, and each code itself: one step from
    states of zero with beta1 = 0 leaves m = g and v = (1 - beta2) g^2."""
    gpu = on_gpu()
    code = optim.nested_code()
    middles = (code[1:] + code[:-1]) / 2
    near = [middles, torch.nextafter(middles, torch.tensor(2.0)),
            torch.nextafter(middles, torch.tensor(-2.0)), code]  # fmt: skip
    values = torch.cat(near)
    unsigned = optim.unsigned_code()
    middles = (unsigned[1:] + unsigned[:-1]) / 2
    values = torch.cat([values, middles.sqrt(), unsigned.sqrt(),
                        torch.logspace(-30, 0, 500), -torch.logspace(-30, 0, 500)])  # fmt: skip
    rows = torch.nn.functional.pad(values, (0, -values.numel() % 255)).view(-1, 255)
    grad = torch.cat([rows, torch.ones(len(rows), 1)], 1).reshape(-1)  # absmax is 1
    grad = torch.nn.functional.pad(grad, (0, max(0, 4096 - grad.numel())))
    params = pair(gpu, [torch.zeros_like(grad)])
    optimizers = [optim.AdamW8bit(p, lr=1e-2, betas=(0.0, 0.5)) for p in params]
    train(gpu, optimizers, params, [grad])
    check(optimizers, params, [torch.zeros_like(grad)])
    m = optim.dequantize_state(optimizers[0].state[params[0][0]]["state1"].cpu(), code,
                               optimizers[0].state[params[0][0]]["absmax1"].cpu())  # fmt: skip
    assert ((grad < 0) == (m < 0)).all()


def test_search_tables_find_the_nearest_code() -> None:
    """Words of the tables, decoded as adamw.cu does, on a value of every bucket and its ends."""
    maps = optim.state_maps().numpy().view(np.uint32)
    each = maps.size // 2
    for i, (dropped, signs) in enumerate(((17, (1, -1)), (16, (1,)))):
        code = maps[i * each :][:256].view(np.float32)
        search = maps[i * each + 256 :][: optim._SEARCH]
        sizes = np.unique(np.concatenate([
            np.arange(0x34000000, 0x3F800001, 1 << 10, dtype=np.uint32),
            np.arange(0x34000000, 0x3F800001, 1 << dropped, dtype=np.uint32) - np.uint32(1),
        ]))[1:]  # fmt: skip
        for sign in signs:
            bits = sizes if sign > 0 else ~sizes
            bucket = (sizes >> dropped) - (0x34000000 >> dropped)
            words = search[bucket + (optim._SEARCH // 2 if sign < 0 else 0)]
            found = (words + (bits << np.uint32(24 - dropped))) >> np.uint32(24)
            values = torch.from_numpy(sizes.view(np.float32)) * sign
            want = torch.empty(values.numel(), dtype=torch.uint8)
            middles = optim._middles(torch.from_numpy(code.copy()))
            want = torch.bucketize(values, middles).numpy()
            zero = int(np.searchsorted(code, 0.0))
            if sign < 0:
                want = np.minimum(want, zero - 1)
            assert (found == want).all()


def test_search_table_refuses_a_code_too_fine() -> None:
    with pytest.raises(ValueError, match="two boundaries"):
        optim.search_table(optim.unsigned_code().numpy(), 19, False)
    tiny = np.sort(np.concatenate([[0, 1e-9], np.linspace(0.1, 1, 254)])).astype(np.float32)
    with pytest.raises(ValueError, match="below 2"):
        optim.search_table(tiny, 16, False)


def test_groups_steps_and_what_the_kernel_does_not_take(on_gpu) -> None:
    """Options and steps of their own; not contiguous, or a gradient of another dtype: torch's."""
    gpu = on_gpu()
    values = random([4100, 5000, 64], torch.bfloat16)
    params = pair(gpu, values)
    turned = torch.randn(40, 30)
    odd = [gpu(turned.clone()).T.requires_grad_(), turned.clone().T.requires_grad_()]
    gpu.mine.add(odd[0].data_ptr())
    optimizers = [
        optim.AdamW([{"params": [p[0], p[2]], "lr": 0.1}, {"params": [p[1], o]}])
        for p, o in zip(params, odd, strict=True)
    ]
    for t in range(3):
        grads = random([4100, 5000, 64], torch.bfloat16, seed=t)
        turned_grad = torch.randn(30, 40)
        for p, o, move in zip(params, odd, (gpu, lambda g: g.clone()), strict=True):
            for one, g in zip(p, grads, strict=True):
                one.grad = move(g)
            if t == 1:
                p[2].grad = None  # its step falls behind
            o.grad = move(turned_grad)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in [*zip(*params, strict=True), tuple(odd)]:
        assert same(a, b)
    assert optimizers[0].state[params[0][2]]["step"] == 2


def test_results_do_not_depend_on_the_order_of_warps_and_blocks(on_gpu) -> None:
    results = []
    for seed in range(4):
        gpu = on_gpu(seed=seed)
        (mine, _) = pair(gpu, random([70001, 5000], torch.float32))
        optimizer = optim.AdamW8bit(mine, **OPTIONS)
        for p, g in zip(mine, random([70001, 5000], torch.float32, seed=3), strict=True):
            p.grad = gpu(g)
        optimizer.step()
        results.append([*(p.detach().cpu() for p in mine),
                        *(optimizer.state[p][n].cpu() for p in mine
                          for n in ("state1", "state2", "absmax1", "absmax2"))])  # fmt: skip
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- paged ---------------------------------------------------------------------------------------

PLENTY = 1 << 40


@pytest.mark.parametrize(
    ("want", "size", "figures"),
    [
        ("managed", 100, (True, True, 1000, 1000)),
        ("managed", 1700, (True, True, 1000, 1000)),  # device and host together
        ("pinned", 1900, (True, True, 1000, 1000)),  # nine tenths of 2000 are 1800
        ("managed", 800, (True, False, 1000, PLENTY)),
        ("pinned", 1000, (True, False, 1000, PLENTY)),  # Windows: the device has to hold it all
        ("pinned", 1, (False, False, PLENTY, PLENTY)),
        ("pinned", 1, (True, True, 0, 0)),
    ],
)
def test_where_states_go(want, size, figures) -> None:
    names = ("managed", "concurrent", "device_free", "host_free")
    assert paging.choose(size, **dict(zip(names, figures, strict=True))) == want


def test_host_free_is_within_the_machine() -> None:
    total = next(int(line.split()[1]) for line in open("/proc/meminfo") if "MemTotal" in line)
    assert 0 < paging.host_free() < total * 1024


@pytest.fixture(autouse=True)
def _no_notice_yet(monkeypatch) -> None:
    monkeypatch.setattr(paging, "_NOTICED", False)


def managed(gpu: Gpu) -> list[int]:
    """Sizes of the managed allocations that the stand-in has."""
    return [b.size for b in gpu.runtime.buffers if b.kind == "managed"]


@pytest.mark.parametrize("bits", [32, 8])
def test_paged_states_are_managed_fetched_and_freed(on_gpu, bits) -> None:
    gpu = on_gpu()
    sizes = [5000 + i for i in range(130)]
    params = pair(gpu, random(sizes, torch.float32))
    optimizers = [optim.AdamW(p, optim_bits=bits, is_paged=True, **OPTIONS) for p in params]
    for t in range(2):
        before = [p.detach().clone() for p in params[1]]
        train(gpu, optimizers, params, random(sizes, torch.float32, seed=t))
        check(optimizers, params, before)
        with torch.no_grad():
            for a, b in zip(*params, strict=True):
                a.copy_(b)
    state = optimizers[0].state[params[0][0]]
    assert state["state1"].device.type == gpu.device.type and not state["state1"].is_pinned()
    if REAL:
        return
    assert len(managed(gpu)) == len(sizes)
    calls = gpu.runtime.calls
    assert calls.count("cudaMemPrefetchAsync") == 2 * len(sizes), "one range a parameter"
    step = calls[calls.index("cudaMemPrefetchAsync") :]
    launches = [i for i, c in enumerate(step) if c == "launch"][:3]
    ahead = [step[:i].count("cudaMemPrefetchAsync") for i in launches]
    assert ahead == [120, 130, 130], "fetched one launch ahead"
    del state, optimizers, params
    assert managed(gpu) == []


def test_no_prefetch_where_memory_is_not_shared(on_gpu, monkeypatch) -> None:
    gpu = on_gpu()
    if REAL:
        pytest.skip("of the stand-in's devices")
    params = pair(gpu, random([5000], torch.float32))
    optimizers = [optim.PagedAdamW(p, **OPTIONS) for p in params]
    before = [params[1][0].detach().clone()]
    table = runtime.device_attribute
    monkeypatch.setattr(runtime, "device_attribute", lambda d, a: 0 if a == 89 else table(d, a))
    train(gpu, optimizers, params, random([5000], torch.float32))
    check(optimizers, params, before)
    assert managed(gpu) and "cudaMemPrefetchAsync" not in gpu.runtime.calls
    monkeypatch.setattr(runtime, "device_attribute", table)


# --- graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("where", ["device", "paged"])
def test_a_captured_step_takes_the_next_one_at_each_replay(on_gpu, where, bits) -> None:
    """t, bias correction and learning rate are those of the replay; 65 tensors are two launches;
    some are a step behind."""
    gpu = on_gpu()
    sizes, late = [5000, *[4096 + i for i in range(64)]], (3, 64)
    params = pair(gpu, random(sizes, torch.bfloat16))
    lr = gpu(torch.tensor(1e-2))
    paged = where == "paged"
    kind = functools.partial(optim.AdamW, optim_bits=bits, weight_decay=0.1)
    optimizers = [
        kind(params[0], lr=lr, is_paged=paged, capturable=True),
        kind(params[1], lr=1e-2),
    ]
    rate = float(lr)

    def grads(seed: int) -> None:
        for i, g in enumerate(random(sizes, torch.bfloat16, seed=seed)):
            for p, move in zip((params[0][i], params[1][i]), (gpu, lambda g: g), strict=True):
                if p.grad is None or seed < 2:
                    p.grad = None if seed == 0 and i in late else move(g.clone())
                else:
                    p.grad.copy_(g)

    for seed in (0, 1):  # states and gradients are there before the capture
        grads(seed)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr if optimizer is optimizers[0] else rate
            optimizer.step()
    streams, replay = Streams(gpu), []
    calls = len(gpu.runtime.calls) if gpu.runtime else 0
    before = [p.detach().cpu().clone() for p in params[0]]
    with streams.capture(replay):
        optimizers[0].step()
    if gpu.runtime:
        assert not {"cudaMemPrefetchAsync", "cudaMallocManaged"} & set(gpu.runtime.calls[calls:])
    assert all(same(p, old) for p, old in zip(params[0], before, strict=True)), "nothing ran yet"
    for t in (2, 3, 4):
        grads(t)
        lr.fill_(1e-2 / t)
        optimizers[1].param_groups[0]["lr"] = float(lr)
        before = [p.detach().clone() for p in params[1]]
        replay[0]()
        optimizers[1].step()
        check(optimizers, params, before)
        with torch.no_grad():
            for a, b in zip(*params, strict=True):
                a.copy_(b)
    taken = [int(optimizers[0].state[p]["step"]) for p in params[0]]
    assert taken == [optimizers[1].state[p]["step"] for p in params[1]]
    assert taken == [4 if i in late else 5 for i in range(len(sizes))]
    streams.wait()


def test_the_devices_scalars_are_the_hosts_to_the_bit(on_gpu) -> None:
    """Few steps and many, betas of every kind, a learning rate in a tensor and as a number."""
    gpu = on_gpu()
    steps = [0, 1, 2, 3, 8, 999, 1000, 65_535, 1_000_000, 2**24 - 2]
    for betas in ((0.9, 0.999), (0.0, 0.5), (0.95, 0.99999), (1 - 2**-24, 0.98)):
        for rate in (1e-3, 2e-4, 0.0):
            for given in (gpu(torch.tensor(rate)), None):
                n = len(steps)
                ones = [gpu(torch.ones(8)) for _ in range(4 * n)]
                t = [gpu(torch.tensor(float(s))) for s in steps]
                scratch = gpu(torch.empty(n, 8))
                options = [rate if given is None else 7.0, *betas, 1e-8, 0.1]
                lists = [ones[i * n : (i + 1) * n] for i in range(4)]
                gpu.ops.adamw_capturable_(*lists, [], [], None, t, given, options, scratch, False)
                lr = rate if given is None else float(given)
                group = {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.1}
                want = torch.tensor([optim._scalars(group, s + 1) for s in steps])
                assert torch.equal(scratch.cpu(), want), (betas, rate, given)
                assert [int(s) for s in t] == [s + 1 for s in steps]


def test_the_graph_of_the_page(on_gpu, monkeypatch, capsys) -> None:
    """docs/optimizer.md's, as it stands there, torch's graph being the stand-in's."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (text,) = [b for b in blocks if "CUDAGraph" in b]
    gpu = on_gpu()
    if not REAL:
        streams = Streams(gpu)

        class Graph:
            def __init__(self) -> None:
                self.runs: list[Callable[[], None]] = []

            def replay(self) -> None:
                self.runs[0]()

        mine = torch.zeros(1)
        gpu.mine.add(mine.data_ptr())
        kernel = optim.kernel_for(mine)
        monkeypatch.setattr(optim, "kernel_for", lambda p: kernel)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: streams.capture(graph.runs))
    names = {"device": gpu.device}
    exec(compile(blocks[0] + text, str(PAGE), "exec"), names)
    assert capsys.readouterr().out.splitlines()[-1] == "3.0"
    # One step against the ones, two along them at half the rate: bias corrections of steps 1 to 3.
    theirs = [torch.nn.Parameter(torch.zeros(64, 64))]
    plain = optim.AdamW8bit(theirs)
    for rate, gradient in ((2e-4, 1.0), (1e-4, -1.0), (1e-4, -1.0)):
        plain.param_groups[0]["lr"] = float(torch.tensor(rate))
        theirs[0].grad = torch.full((64, 64), gradient)
        monkeypatch.setattr(optim, "kernel_for", lambda p: None)
        plain.step()
    torch.testing.assert_close(names["params"][0].cpu(), theirs[0], rtol=1e-6, atol=0)
    if not REAL:
        streams.wait()


def test_a_capture_that_could_not_be_replayed_is_refused(on_gpu, monkeypatch) -> None:
    gpu = on_gpu()
    params, _ = pair(gpu, random([5000], torch.float32))
    params[0].grad = gpu(torch.ones(5000))
    plain, fresh = optim.AdamW(params), optim.AdamW(params, capturable=True)
    plain.step()
    before = len(gpu.kernels)
    monkeypatch.setattr(optim, "_capturing", lambda p: True)
    with pytest.raises(RuntimeError, match=r"learning rate and bias correction.*capturable=True"):
        plain.step()
    with pytest.raises(RuntimeError, match="take a step before the capture"):
        fresh.step()
    assert not fresh.state[params[0]] and plain.state[params[0]]["step"] == 1
    plain.param_groups[0]["capturable"] = True
    with pytest.raises(RuntimeError, match="take a step before the capture"):
        plain.step()
    monkeypatch.setattr(optim, "_capturing", lambda p: False)
    plain.step()
    assert plain.state[params[0]]["step"] == torch.tensor(2.0)
    assert len(gpu.kernels) == (before + 2 if gpu.runtime else 0), "the clock, and the update"
    monkeypatch.setattr(optim, "_capturing", lambda p: True)
    plain.step()
    plain.state[params[0]]["state1"] = torch.zeros(5000, device="meta")
    with pytest.raises(RuntimeError, match="lie in the host's memory"):
        plain.step()


def waits_for_its_own_and_no_more(pending) -> None:
    """Of three queued launches each waits for its own states, but not for the next one's; those
    wait for the launch before it, but not for itself."""

    def needs(op) -> set:
        found: set = set()
        new = set(op.after)
        while new:
            found |= new
            new = set().union(*(one.after for one in new)) - found
        return found

    fetches = [op for op in pending if op.what == "cudaMemPrefetchAsync"]
    launches = [op for op in pending if "adamw" in op.what]
    assert len(launches) == 3 and len(fetches) == 150
    parts = [set(fetches[60 * i : 60 * (i + 1)]) for i in range(3)]
    for i, launch in enumerate(launches):
        awaited = needs(launch)
        assert parts[i] <= awaited, "runs before its states are there"
        for later in parts[i + 1 :]:
            assert not later & awaited, "waits for what it does not need"
        for fetch in parts[i]:
            before = {n for n, one in enumerate(launches) if one in needs(fetch)}
            assert before == set(range(i - 1)), "what it pushes out may be in use, or it comes late"


def test_launches_wait_for_what_is_fetched(on_gpu) -> None:
    """In any order that streams and events allow, with three launches on a stream of the test's."""
    if REAL:
        pytest.skip("of the stand-in's orders")
    sizes = [300 + i for i in range(150)]
    want: list[Tensor] = []
    for seed in range(4):
        gpu = on_gpu(order="deferred", seed=seed)
        params = pair(gpu, random(sizes, torch.float32))
        optimizer = optim.PagedAdamW(params[0], **OPTIONS)
        for p, g in zip(params[0], random(sizes, torch.float32, seed=4), strict=True):
            optimizer.state[p] = optimizer._start(p)
            p.grad = g
        gpu.runtime.synchronize()
        stream = gpu.runtime.stream(blocking=False)
        gpu.lib.qlk_emulated_stream(stream)
        optimizer.step()
        waits_for_its_own_and_no_more(gpu.runtime._pending)
        order: list[str] = []
        for op in gpu.runtime._pending:
            run = op.run
            op.run = lambda run=run, what=op.what, to=order: (to.append(what), run())
        gpu.lib.qlk_emulated_release()
        gpu.lib.qlk_emulated_stream(None)
        fetched = launched = 0
        for what in order:
            fetched += what == "cudaMemPrefetchAsync"
            if "adamw" in what:
                launched += 1
                assert fetched >= min(60 * launched, 150)
            assert fetched <= 60 * (launched + 2), "no more than a launch ahead of the next"
        assert launched == 3
        got = [p.detach().clone() for p in params[0]]
        want = want or got
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        del optimizer, params


@pytest.mark.parametrize("fails", [1, 2])
def test_an_allocation_that_fails_falls_to_the_host(on_gpu, monkeypatch, fails) -> None:
    """The ``fails``-th managed allocation: its parameter's states lie on the host, all of them, are
    copied for the update, and it is said once."""
    if REAL:
        pytest.skip("a real driver cannot be told to fail")
    gpu = on_gpu(strict=False)
    allocate, count = gpu.runtime._allocate, []

    def planted(size: int, kind: str) -> int:
        count.append(kind)
        if kind == "managed" and count.count("managed") == fails:
            raise runtime._Refused(runtime.OUT_OF_MEMORY, "planted")
        return allocate(size, kind)

    monkeypatch.setattr(gpu.runtime, "_allocate", planted)
    sizes = [5000, 6000, 7000]
    params = pair(gpu, random(sizes, torch.float32))
    takes = optim.AdamW._kernel_takes  # what is on the host is, to a GPU, on another device

    def on_device(t: Tensor) -> bool:
        return gpu.runtime._find(t.data_ptr()) is not None

    monkeypatch.setattr(
        optim.AdamW,
        "_kernel_takes",
        lambda self, p, state: takes(self, p, state) and on_device(state["state1"]),
    )
    optimizers = [optim.PagedAdamW8bit(p, **OPTIONS) for p in params]
    before = [p.detach().clone() for p in params[1]]
    with pytest.warns(UserWarning, match="more of managed memory .* are not to be had") as said:
        train(gpu, optimizers, params, random(sizes, torch.float32, seed=2))
    assert len(said) == 1
    check(optimizers, params, before)
    assert len(managed(gpu)) == 2
    for i, p in enumerate(params[0]):
        states = [t for t in optimizers[0].state[p].values() if isinstance(t, Tensor)]
        inside = [on_device(t) for t in states]
        assert len(states) == 4 and set(inside) == {i != fails - 1}


def test_no_room_at_all_leaves_no_state(on_gpu, monkeypatch) -> None:
    gpu = on_gpu(strict=False)
    params, _ = pair(gpu, random([5000], torch.float32))
    optimizer = optim.PagedAdamW(params)
    params[0].grad = gpu(torch.ones(5000))

    def nothing(*_, **__):
        raise MemoryError("planted")

    monkeypatch.setattr(paging, "zeros", nothing)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert not optimizer.state[params[0]]
    monkeypatch.undo()


@pytest.mark.parametrize("bits", [32, 8])
def test_state_dict_of_managed_states(on_gpu, bits, tmp_path) -> None:
    gpu = on_gpu()
    values = random([5000, 70], torch.float32)
    whole, parts = pair(gpu, values)[0], pair(gpu, values)[0]
    one = optim.AdamW(whole, optim_bits=bits, is_paged=True)
    first = optim.AdamW(parts, optim_bits=bits, is_paged=True)

    def go(optimizer, params, seed):
        for p, g in zip(params, random([5000, 70], torch.float32, seed=seed), strict=True):
            p.grad = gpu(g)
        optimizer.step()

    go(one, whole, 1), go(one, whole, 2)
    go(first, parts, 1)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = optim.AdamW(parts, optim_bits=bits, is_paged=True)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    if not REAL:
        state = second.state[parts[0]]
        assert gpu.runtime._find(state["state1"].data_ptr()).kind == "managed"
    go(second, parts, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    for a, b in zip(whole, parts, strict=True):
        for name, t in one.state[a].items():
            other = second.state[b][name]
            assert torch.equal(t, other) if isinstance(t, Tensor) else t == other


def test_bad_arguments_are_named(on_gpu) -> None:
    gpu = on_gpu()
    p, g, s = gpu(torch.ones(300), torch.ones(300), torch.zeros(300))
    eight = gpu(torch.zeros(300, dtype=torch.uint8))
    scales, maps = gpu(torch.zeros(2)), gpu(optim.state_maps())

    def call(p=p, g=(g,), s1=s, s2=s, a1=(), a2=(), maps=None, scalars=(0.5,) * 8):
        gpu.ops.adamw_([p], list(g), [s1], [s2], list(a1), list(a2), maps, list(scalars), False)

    bad = {
        "grads, state1 and state2 must be lists of 1": {"g": ()},
        "grad must be contiguous with 300 values": {"g": (g[:299],)},
        "grad must be contiguous": {"g": (g.half(),)},
        "state1 must be contiguous": {"s1": eight},
        "state2 must be contiguous": {"s2": s[::2]},
        "absmax1 and absmax2 must be lists of 0": {"a1": (scales,)},
        "absmax1 and absmax2 must be lists of 1": {"maps": maps},
        "absmax2 must be contiguous with 2 values": {
            "maps": maps, "s1": eight, "s2": eight, "a1": (scales,), "a2": (scales[:1],)
        },
        "maps must be contiguous with 6408 values": {
            "maps": maps[1:], "s1": eight, "s2": eight, "a1": (scales,), "a2": (scales,)
        },
        "scalars must be beta1": {"scalars": (1.0,)},
        "p must be float32, bfloat16 or float16": {"p": p.double()},
    }  # fmt: skip
    for words, arguments in bad.items():
        with pytest.raises(RuntimeError, match=words):
            call(**arguments)
    assert gpu.kernels == []
    gpu.ops.adamw_([p[:0]], [g[:0]], [s[:0]], [s[:0]], [], [], None, [0.5] * 8, False)
    assert gpu.kernels == []

    t, scratch = gpu(torch.zeros(()), torch.empty(1, 8))

    def capturable(g=(g,), t=(t,), lr=None, options=(0.5,) * 5, scratch=scratch):
        lists = ([p], list(g), [s], [s.clone()], [], [], None, list(t))
        gpu.ops.adamw_capturable_(*lists, lr, list(options), scratch, False)

    bad = {
        "grads, state1 and state2 must be lists of 1": {"g": ()},
        "t must be a list of 1 tensors": {"t": ()},
        "t must be contiguous with 1 values": {"t": (gpu(torch.zeros(2)),)},
        "t must be contiguous": {"t": (gpu(torch.zeros((), dtype=torch.int64)),)},
        "lr must be contiguous with 1 values": {"lr": gpu(torch.zeros((), dtype=torch.float64))},
        "options must be lr, beta1": {"options": (0.5,) * 4},
        "scratch must be contiguous with 8 values": {"scratch": scratch[:, :7]},
    }  # fmt: skip
    for words, arguments in bad.items():
        with pytest.raises(RuntimeError, match=words):
            capturable(**arguments)
    assert gpu.kernels == []


def test_opcheck(_cuda_ops_on_the_cpu) -> None:
    """What is written is what the schema says, in eager mode and compiled; of both ops, with both
    kinds of states."""
    _defined()
    space = torch.ops.qlora_kernels
    override = torch.library.Library(ops.NAMESPACE, "IMPL")
    emulated = getattr(torch.ops, EMULATED).adamw_capturable_.default
    override.impl("adamw_capturable_", emulated, "CPU", allow_override=True)
    try:
        p, g, m, v = (torch.randn(n) for n in (300, 300, 300, 300))
        v.abs_()
        codes = torch.randint(0, 255, (2, 300), dtype=torch.uint8).unbind()
        scales = torch.rand(2, 2).unbind()
        step = optim._scalars({"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0}, 3)
        for lists in (
            ([p], [g], [m], [v], [], [], None),
            ([p], [g], [codes[0]], [codes[1]], [scales[0]], [scales[1]], optim.state_maps()),
        ):
            torch.library.opcheck(space.adamw_.default, (*lists, step, False))
            more = ([torch.ones(())], torch.tensor(0.1), [0.0, 0.9, 0.99, 1e-8, 0.0])
            args = (*lists, *more, torch.empty(1, 8), False)
            torch.library.opcheck(space.adamw_capturable_.default, args)
    finally:
        override._destroy()


# --- the check at first use ----------------------------------------------------------------------


class Planted:
    """A namespace of ops in which one result of one op is off by an ulp, as of a wrong index."""

    def __init__(self, gpu: Gpu, op: str = "", argument: int = 0, fails: bool = False) -> None:
        self.gpu, self.op, self.argument, self.fails = gpu, op, argument, fails
        self.calls = 0

    def __getattr__(self, op: str):
        def run(*args):
            self.calls += 1
            if op == self.op and self.fails:
                raise RuntimeError("an illegal instruction was encountered")
            getattr(self.gpu.ops, op)(*args)
            if op == self.op and args[self.argument]:
                t = args[self.argument][1]
                t[77 % t.numel()] += 1 if t.dtype == torch.uint8 else 1e-3

        return run


@pytest.fixture
def settle(on_gpu, tmp_path, monkeypatch) -> Callable[..., bool]:
    """``settle(namespace, who)``: what the first use of AdamW on a device finds."""
    monkeypatch.setenv("QLORA_KERNELS_CACHE", str(tmp_path))
    gpu = on_gpu()

    def run(namespace=None, who: str = "a GPU, driver 1, build 2") -> bool:
        return cuda.settle_other("adamw", optim.check, namespace or gpu.ops, gpu.device, who)

    run.gpu = gpu
    return run


def test_a_right_kernel_passes_its_check_once(settle, tmp_path) -> None:
    """What is known of the linear layers' kernels is kept beside it, and the other way round."""
    counted, who = Planted(settle.gpu), "a GPU, driver 1, build 2"
    cuda.write_cache("checks.json", {who: {"gemm": []}, "another": {"gemm": ["wrong"]}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert settle(counted)
        calls = counted.calls
        assert calls == 12 and settle(counted) and counted.calls == calls, "read from the cache"
        assert settle(counted, "a GPU, driver 2, build 2")
    assert counted.calls == 2 * calls, "another driver is another check"
    kept = json.loads((tmp_path / "checks.json").read_text())
    assert kept[who] == {"gemm": [], "adamw": []} and kept["another"] == {"gemm": ["wrong"]}
    found = cuda.checked(who, ("gemm", "decode_mma"), lambda: {"gemm": ["w"], "decode_mma": []})
    assert found == {"gemm": ["w"], "decode_mma": []}, "one of the two was not there"
    assert cuda.read_cache("checks.json")[who] == {"adamw": [], **found}


@pytest.mark.parametrize("op", ["adamw_", "adamw_capturable_"])
@pytest.mark.parametrize("argument", [0, 2, 3, 4, 5], ids=["p", "m", "v", "absmax1", "absmax2"])
def test_a_wrong_kernel_is_switched_off_with_a_report(settle, op, argument) -> None:
    with pytest.warns(UserWarning, match="switched off on this GPU: adamw") as caught:
        assert not settle(Planted(settle.gpu, op, argument))
    words = str(caught[0].message)
    name = ("p", "", "state1", "state2", "absmax1", "absmax2")[argument]
    assert f"{name} of 4099: 1 of " in words
    assert "torch's arithmetic" in words and "Please report" in words and "driver 1" in words
    with pytest.warns(UserWarning, match="switched off"):
        assert not settle(), "as the cache says, and says again"


def test_a_kernel_that_fails_to_launch_is_switched_off(settle, monkeypatch) -> None:
    with pytest.warns(UserWarning, match="illegal instruction"):
        assert not settle(Planted(settle.gpu, "adamw_", fails=True))
    monkeypatch.setenv("QLORA_KERNELS_SELF_CHECK", "0")
    assert settle()


def test_parameters_go_on_without_a_kernel_that_is_wrong(settle, monkeypatch) -> None:
    """kernel_for() asks once in a process, and not while a graph is captured."""
    gpu, capturing, asked = settle.gpu, [True], []

    def planted(*_):
        asked.append(1)
        return ["wrong"]

    monkeypatch.setattr(cuda, "_PASSED", {})
    monkeypatch.setattr(cuda, "library", lambda: gpu.lib)
    monkeypatch.setattr(cuda, "identity_of", lambda *_: "a GPU, driver 3")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    device = torch.device("cuda", 0)
    assert cuda.passes("adamw", planted, device) and not asked
    capturing[0] = False
    with pytest.warns(UserWarning, match="switched off on this GPU: adamw"):
        assert not cuda.passes("adamw", planted, device)
    assert not cuda.passes("adamw", planted, device) and len(asked) == 1

    def unready(*_):
        raise OSError("no such library")

    monkeypatch.setattr(cuda, "_PASSED", {})
    monkeypatch.setattr(cuda, "identity_of", unready)
    with pytest.warns(UserWarning, match="adamw was not checked: no such library"):
        assert cuda.passes("adamw", planted, device)


def test_switched_off_by_name(monkeypatch) -> None:
    assert cuda.enabled("adamw") and cuda.disabled_mask("adamw") == 0
    for names in ("adamw", "gemm, adamw", "all"):
        monkeypatch.setenv("QLORA_KERNELS_DISABLE", names)
        assert not cuda.enabled("adamw")
        cuda.disabled_by_user()
    monkeypatch.setenv("QLORA_KERNELS_DISABLE", "adam")
    with pytest.raises(ValueError, match="adamw, and all"):
        cuda.disabled_by_user()
