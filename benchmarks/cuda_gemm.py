"""What the fused GEMMs cost: SASS for 8 weights, tensor cores, shared memory, modelled times.

No GPU is needed and none is used. The launchers run in the emulator, a few CTAs of each grid; what
it counts of PTX becomes SASS for each device's architecture (docs/emulator_model.md), and these the
bars that the kernels are held to. Busy shares are *modelled*; modelled times on all shapes and
devices, beside dequantization and a dense product, are cuda_dispatch.py's.

    python benchmarks/cuda_gemm.py                      # the bars
    python benchmarks/cuda_gemm.py --rank -M 64         # every tile and split, by modelled time
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda_common
import cuda_decode
import numpy as np
import torch
from cuda_common import BITS, SHAPES, Bar
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from qlora_kernels import cuda
from qlora_kernels.emulator.devices import Device, get_device
from qlora_kernels.emulator.launch import Region, launch
from qlora_kernels.emulator.model import Modelled, Work, model
from qlora_kernels.emulator.runtime import EmulatedRuntime, _parsed
from tests.cuda import gemm_launchers as launchers
from tests.cuda.launchers import FORWARD, INPUT_GRAD, SOURCES, Quantized

LARGE = SHAPES["70B gate up"]
PASSES = {FORWARD: "forward", INPUT_GRAD: "dX"}


def tiles(pass_: int) -> list[tuple[int, ...]]:
    """What gemm_tiles.h lists as compiled, but for the tile that takes any shape."""
    text = (SOURCES / "gemm_tiles.h").read_text()
    name = "kLinearTiles" if pass_ == FORWARD else "kInputGradTiles"
    listed = re.search(rf"{name}\[\] = \{{(.*?)\n\}};", text, re.DOTALL)
    assert listed is not None
    return [tuple(map(int, t.split(","))) for t in re.findall(r"\{([\d, ]+)\}", listed.group(1))]


# --- one launch, a few of its blocks ---


@dataclass
class Kernel:
    """One kernel of a call: counts of the whole grid, from representative blocks."""

    name: str
    work: Work
    dynamic: Any
    warps: float  # of the whole grid
    main_loop: dict[str, float] = field(default_factory=dict)  # SASS by pipe, whole grid
    wavefronts: float = 0.0
    conflicts: float = 0.0  # wavefronts beyond the fewest


def is_gemm(name: str) -> bool:
    return re.search(r"gemm_(linear|linear_pairs|input_grad)I", name) is not None


class Sampler:
    """An engine for `EmulatedRuntime`: runs the blocks that tell what the whole grid does.

    Blocks of one split do the same work wherever they are; splits differ by a step, and LoRA is the
    first one's (forward) or the last one's (dX). So of each split the first block is run, and
    stands for all of its plane.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.kernels: list[Kernel] = []

    def __call__(self, request: Any) -> Any:
        kernel = _parsed(request.ptx).kernel(request.kernel)
        packed = bytearray(kernel.param_bytes)
        for param, value in zip(kernel.params, request.arguments, strict=True):
            packed[param.offset : param.offset + param.size] = value
        regions = [
            Region(b.address, b.size, b.address, b.name, dtype=b.dtype, shape=b.shape)
            for b in request.buffers
        ]
        gx, gy, gz = request.grid
        plane = gx * gy
        planes = range(gz) if is_gemm(kernel.name) else [0]
        times_a_plane = gz / len(planes)
        shared_rows = np.array([
            re.match(r"(ld|st)\.shared|ldmatrix", i.opcode) is not None for i in kernel.instructions
        ])  # fmt: skip
        samples, wavefronts, conflicts, result = [], 0.0, 0.0, None
        for z in planes:
            result = launch(
                kernel, request.grid, request.block, bytes(packed), regions,
                shared_bytes=request.shared, device=self.device, checks=("counts",),
                blocks=[z * plane], trust_regions=True, registers=request.registers,
            )  # fmt: skip
            times = times_a_plane * plane
            samples.append((result.counts, times))
            chosen = result.counts.instructions[shared_rows]
            wavefronts += float(chosen["wavefronts"].sum()) * times
            excess = chosen["wavefronts"].sum() - chosen["wavefronts_ideal"].sum()
            conflicts += float(excess) * times
        what = SimpleNamespace(
            ptx=request.ptx, kernel=kernel.name, blocks=plane * gz, shared=request.shared,
            threads=math.prod(request.block),
        )  # fmt: skip
        found = cuda_common.counted(self.device, what, samples)
        self.kernels.append(
            Kernel(
                kernel.name, found.work, found.dynamic, found.warps, main_loop(found.dynamic),
                wavefronts, conflicts,
            )
        )  # fmt: skip
        return result


def main_loop(dynamic: Any) -> dict[str, float]:
    """SASS by pipe of the loop with the matrix instructions that issues most.

    A loop is a strongly connected set of blocks: ptxas enters dX's at two places, which makes it no
    natural loop.
    """
    blocks = dynamic.function.blocks
    rows = [b.index for b in blocks for _ in b.successors]
    columns = [s for b in blocks for s in b.successors]
    graph = csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(blocks), len(blocks)))
    _, labels = connected_components(graph, connection="strong")
    best: dict[str, float] = {}
    for label in set(labels):
        pipes = dynamic.pipes(np.flatnonzero(labels == label))
        if pipes["tensor"] and sum(pipes.values()) > sum(best.values()):
            best = dict(pipes)
    return best


# --- a call ---


@dataclass
class Call:
    """What one call of a launcher costs, modelled on one device."""

    device: str
    pass_: int
    m: int
    n: int
    k: int
    rank: int
    nested: bool
    tile: tuple[int, ...]
    splits: int
    kernels: list[Kernel]
    times: list[Modelled]

    @property
    def gemm(self) -> Kernel:
        return next(k for k in self.kernels if is_gemm(k.name))

    @property
    def gemm_time(self) -> Modelled:
        return next(t for k, t in zip(self.kernels, self.times, strict=True) if is_gemm(k.name))

    @property
    def seconds(self) -> float:
        return sum(t.time for t in self.times)

    @property
    def eights(self) -> float:
        """Groups of 8 weights a lane, counted once however many rows of tiles decode them."""
        return self.n * self.k / 256

    def sass(self, pipe: str | None = None) -> float:
        """Warp instructions of the main loop for 8 weights a lane (of all rows of tiles)."""
        loop = self.gemm.main_loop
        return (loop.get(pipe, 0.0) if pipe else sum(loop.values())) / self.eights


_cache: dict[Any, Any] = {}


def library(pass_: int) -> Path:
    name = "gemm_linear" if pass_ == FORWARD else "gemm_input_grad"
    return launchers.library(f"{name}.cu", f"{name}_f16.cu", "gemm_lora.cu")


def tensors(pass_: int, m: int, n: int, k: int, rank: int, nested: bool, lora: torch.dtype) -> Any:
    """Zeros of the right sizes: what is counted does not depend on values."""
    key = (pass_, m, n, k, rank, nested, lora)
    if key not in _cache:
        _cache.clear()
        q = Quantized(
            torch.zeros(n * k // 2, dtype=torch.uint8), torch.zeros(n * k // 64),
            torch.zeros(16), 64, (n, k),
        )  # fmt: skip
        if nested:
            q.absmax = torch.zeros(n * k // 64, dtype=torch.uint8)
            q.nested_absmax = torch.zeros(-(-n * k // 64 // 256))
            q.nested_code, q.offset = torch.zeros(256), torch.zeros(1)
        x = torch.zeros(m, k if pass_ == FORWARD else n, dtype=torch.bfloat16)
        a = torch.zeros(rank, k, dtype=lora) if rank else None
        b = torch.zeros(n, rank, dtype=lora) if rank else None
        _cache[key] = (q, x, a, b)
    return _cache[key]


def call(
    device: str, pass_: int, m: int, n: int, k: int, tile: Sequence[int], splits: int,
    rank: int = 0, nested: bool = True, lora: torch.dtype = torch.float32,
) -> Call:  # fmt: skip
    q, x, a, b = tensors(pass_, m, n, k, rank, nested, lora)
    gpu = get_device(device)
    sampler = Sampler(gpu)
    with EmulatedRuntime(device, library=library(pass_), engine=sampler, strict=False) as rt:
        launcher = launchers.Launcher(rt)
        run = launcher.linear if pass_ == FORWARD else launcher.input_grad
        run(q, x, tile, splits, a=a, b=b)
        if launcher.status:
            raise SystemExit(
                f"the launcher refused {tile} x {splits}: {launcher.status} {rt.errors}"
            )
    # DRAM moves each input once and the result once: x and partial sums stay in L2, whose rows of
    # tiles read a weight at about the same time. What L2 does not hold is added.
    weight = n * k * BITS[nested] / 8
    ins, outs = (k, n) if pass_ == FORWARD else (n, k)
    lora_bytes = 4 if lora == torch.float32 else 2
    partial = splits * m * outs * 4.0 if splits > 1 else 0.0
    spilled = partial if partial > gpu.l2_bytes / 2 else 0.0
    times = []
    for i, kernel in enumerate(sampler.kernels):
        w = kernel.work
        if is_gemm(kernel.name):
            w.dram_read = weight + (0 if rank else m * ins * 2.0) + rank * outs * lora_bytes
            w.dram_write = spilled if splits > 1 else m * outs * 2.0
        elif "lora_partial" in kernel.name:
            w.dram_read = m * ins * 2.0 + rank * ins * lora_bytes
        elif "sum_splits" in kernel.name:
            w.dram_read, w.dram_write = spilled, m * outs * 2.0
        times.append(model(w, gpu, launch=1.0 if i == 0 else 0.45))  # as in a graph
    return Call(device, pass_, m, n, k, rank, nested, tuple(tile), splits, sampler.kernels, times)


# --- the ranking ---


def choices(device: Device, pass_: int, m: int, n: int, k: int) -> Iterable[tuple[Any, int]]:
    """Tiles that fit the device and the rows, with splits that may pay."""
    ins, outs = (k, n) if pass_ == FORWARD else (n, k)
    for tile in tiles(pass_):
        tm, tn, tk = tile[:3]
        if tk < 128 or tm > 2 * max(16, m):
            continue
        if shared_bytes(tile, pass_) > device.sm.shared_optin:
            continue
        step = tk if pass_ == FORWARD else tn
        grid = math.ceil(m / tm) * math.ceil(outs / (tn if pass_ == FORWARD else tk))
        for splits in (1, 2, 3, 4, 6, 8, 12, 16):
            if splits == 1 or (grid * splits <= 4 * device.sms and ins >= 2 * splits * step):
                yield tile, splits


def shared_bytes(tile: Sequence[int], pass_: int) -> int:
    tm, tn, tk, _, stages = tile
    stage = tm * (tk if pass_ == FORWARD else tn) * 2 + tn * tk // 2
    return stages * stage + (0 if pass_ == FORWARD else 2 * tn * tk * 2)


def ranked(device: str, pass_: int, m: int, n: int, k: int, **options: Any) -> list[Call]:
    gpu = get_device(device)
    calls = [call(device, pass_, m, n, k, t, s, **options) for t, s in choices(gpu, pass_, m, n, k)]
    return sorted(calls, key=lambda c: c.seconds)


# --- bars ---


#: A tile for each number of rows: what the ranking picks on A100 for the large shapes.
FORWARD_TILES = {16: (16, 128, 256, 4, 2), 32: (32, 128, 256, 4, 2), 64: (64, 128, 128, 4, 3),
                 256: (96, 128, 128, 4, 2)}  # fmt: skip
GRAD_TILES = {16: (16, 32, 256, 4, 4), 32: (32, 32, 256, 4, 3), 64: (64, 32, 256, 4, 4),
              256: (128, 64, 256, 8, 3)}  # fmt: skip


def full_wave(
    device: str, pass_: int, m: int, tile: Sequence[int], contraction: int = 8192
) -> Call:
    """A grid of exactly the blocks that are resident at once: neither tail nor splits are seen."""
    tm, tn, tk = tile[:3]
    width = tn if pass_ == FORWARD else tk
    shape = (width, contraction) if pass_ == FORWARD else (contraction, width)
    one = call(device, pass_, m, *shape, tile, 1)
    resident = one.gemm_time.occupancy.blocks * get_device(device).sms
    tiles_n = max(1, resident // math.ceil(m / tm))
    out = tiles_n * width
    return call(device, pass_, m, *((out, contraction) if pass_ == FORWARD else (contraction, out)),
                tile, 1)  # fmt: skip


def tensor_cycles(device: Device, m: int) -> float:
    """Cycles of a partition's tensor core for 8 weights a lane and m rows."""
    flops = 2.0 * 256 * (-(-m // 8) * 8)
    rate = device.tensor["bf16"] * device.mma_sync / device.sms / device.clock / 4
    return flops / rate


def bars(nested: bool = True) -> list[Bar]:
    found: list[Bar] = []
    forward, grad = {}, {}
    for m in (16, 32, 64, 256):
        forward[m] = full_wave("a100", FORWARD, m, FORWARD_TILES[m])
        grad[m] = full_wave("a100", INPUT_GRAD, m, GRAD_TILES[m])
    for name in ("a100", "h100", "rtx4090"):
        gpu = get_device(name)
        slots = gpu.slots_per_8_weights(BITS[nested])
        for m in (16, 32, 64):
            if cuda.choose(name, m, *LARGE)[0].route == "decode_mma":  # what runs there
                f = cuda_decode.measure(
                    cuda_decode.weight(*LARGE), name, m, cuda_decode.MMA, False, 0
                )
                found.append(
                    Bar(f"forward, M = {m}, {name}, decode_mma: SASS for 8 weights / slots",
                        f["loop_slots"], 0.80, f"bound by {f['bound']}")
                )  # fmt: skip
                continue
            need = tensor_cycles(gpu, m)
            why = f"ALU pipe: {2 * forward[m].sass('alu'):.0f} cycles; "
            why += f"tensor cores: {need:.0f} of {slots:.0f} cycles" + (
                ": compute-bound, the slots are not what it waits for" if need > slots else ""
            )
            found.append(
                Bar(f"forward, M = {m}, {name}: SASS for 8 weights / issue slots",
                    forward[m].sass() / slots, 0.80, why)
            )  # fmt: skip
    for m in (16, 32, 64, 256):
        found.append(Bar(f"forward, M = {m}: conflicts / wavefronts",
                         forward[m].gemm.conflicts / forward[m].gemm.wavefronts, 0.02))  # fmt: skip
        found.append(Bar(f"dX, M = {m}: conflicts / wavefronts",
                         grad[m].gemm.conflicts / grad[m].gemm.wavefronts, 0.02))  # fmt: skip
        found.append(Bar(f"dX, M = {m}: SASS for 8 weights / forward's",
                         grad[m].sass() / forward[m].sass(), 1.35))  # fmt: skip
    busy = {}
    for pass_, calls in ((FORWARD, forward), (INPUT_GRAD, grad)):
        t = calls[256].gemm_time
        busy[pass_] = t.utilisation("tensor cores")
    why = ", ".join(
        f"{n} {v / forward[256].gemm_time.kernel:.0%}"
        for n, v in sorted(forward[256].gemm_time.terms.items(), key=lambda i: -i[1])[:4]
    )
    found.append(Bar("forward, M = 256, a100: tensor cores busy, a full wave", busy[FORWARD], 0.8,
                     why, at_least=True))  # fmt: skip
    why = ", ".join(
        f"{n} {v / grad[256].gemm_time.kernel:.0%}"
        for n, v in sorted(grad[256].gemm_time.terms.items(), key=lambda i: -i[1])[:4]
    )
    found.append(Bar("dX, M = 256, a100: tensor cores busy / forward's",
                     busy[INPUT_GRAD] / busy[FORWARD], 0.70, why, at_least=True))  # fmt: skip
    for pass_, chosen in ((FORWARD, FORWARD_TILES), (INPUT_GRAD, GRAD_TILES)):
        for m in (16, 256):
            plain, lora = (call("a100", pass_, m, 4096, 4096, chosen[m], 4 if m < 64 else 1, rank=r,
                                lora=torch.bfloat16) for r in (0, 64))  # fmt: skip
            issued = [sum(sum(k.work.pipes.values()) for k in c.kernels) for c in (plain, lora)]
            moved = 2 * 4096 * 64 * 2 / (4096 * 4096 * BITS[nested] / 8)
            found.append(Bar(
                f"{PASSES[pass_]}, M = {m}, 4096 x 4096: all SASS with LoRA r = 64 / without",
                issued[1] / issued[0], 1.05,
                f"r / K alone is {64 / 4096:.1%} for S and again for S B; A and B in bf16 are "
                f"{moved:.0%} of the weight's bytes; modelled time x "
                f"{lora.seconds / plain.seconds:.2f}",
            ))  # fmt: skip
    return found


def main() -> int:
    parser = cuda_common.parser(__doc__, shapes=[s for s in SHAPES if s != "70B k v"])
    parser.add_argument("--rank", action="store_true", help="rank every tile and split instead")
    parser.add_argument("-M", type=int, nargs="*", default=[16, 64, 256], help="rows")
    parser.add_argument("-r", type=int, default=0, help="LoRA's rank")
    args = cuda_common.parse(parser)
    if args.rank:
        shapes = {name: SHAPES[name] for name in args.shapes}
        for device in args.devices:
            for name, (n, k) in shapes.items():
                for pass_ in PASSES:
                    for m in args.M:
                        for c in ranked(device, pass_, m, n, k, rank=args.r)[:5]:
                            print(
                                f"{device} {name} {PASSES[pass_]} M {m} {c.tile} x {c.splits}: "
                                f"{c.seconds * 1e6:.1f} us, {c.gemm_time.bottleneck}"
                            )
        return 0
    print("Bars (counts of SASS on sm_80; busy shares are modelled):")
    found = bars()
    cuda_common.print_bars(found)
    cuda_common.write(args, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
