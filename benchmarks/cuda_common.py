"""What the CUDA benchmarks share: arguments, a sampled launch as work of its grid, bars, JSON.

None of them needs a GPU or uses one. Launchers run in the emulator, a few blocks of each grid; what
it counts of PTX becomes each device's SASS, wavefronts and sectors, and a model makes times of them
(docs/emulator_model.md). What a file says is counted, or modelled, and never measured.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

from qlora_kernels.emulator import sass, toolchain  # noqa: E402
from qlora_kernels.emulator.devices import Device, get_device  # noqa: E402
from qlora_kernels.emulator.model import (  # noqa: E402
    Work,
    l1_cycles_of,
    wavefronts_of,
    work_of,
)

DEVICES = ("a100", "h100", "h200", "rtx4090")
SHAPES = {  # out, in
    "7B q k v o": (4096, 4096), "7B gate up": (11008, 4096), "7B down": (4096, 11008),
    "70B q o": (8192, 8192), "70B k v": (1024, 8192), "70B gate up": (28672, 8192),
    "70B down": (8192, 28672),
}  # fmt: skip
BITS = {False: 4.5, True: 4.127}  # a weight, blocks of 64: fp32 scales, nested ones
#: Of the tensor cores' data sheet that cuBLAS reaches, here and in `cuda_step.py`. Large products
#: come to 75 to 85% on an A100; results are also given at 0.6 to 1.
EFFICIENCY = 0.8


# --- arguments ------------------------------------------------------------------------------------


def parser(
    doc: str, devices: Sequence[str] = DEVICES, shapes: Sequence[str] = tuple(SHAPES)
) -> argparse.ArgumentParser:
    """``--quick``, ``--devices``, ``--shapes`` (if there are any) and ``--out``."""
    found = argparse.ArgumentParser(description=doc.split("\n")[0])
    found.add_argument("--quick", action="store_true", help="one device and one shape")
    found.add_argument("--devices", nargs="+", default=list(devices), metavar="DEVICE")
    if shapes:
        found.add_argument(
            "--shapes", nargs="+", choices=list(SHAPES), default=list(shapes), metavar="SHAPE",
            help=f"of {', '.join(repr(s) for s in SHAPES)}",
        )  # fmt: skip
    name = Path(sys.argv[0]).stem
    found.add_argument("--out", type=Path, default=HERE / "results" / f"{name}.json")
    return found


def parse(found: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Ends the process, in words, where there is no CUDA compiler or a device is not known."""
    args = found.parse_args(argv)
    if missing := toolchain.available():
        print(missing)
        raise SystemExit(0)
    for name in args.devices:
        try:
            get_device(name)
        except ValueError as error:
            found.error(str(error))
    torch.set_num_threads(1)
    if args.quick:
        args.devices = args.devices[:1]
        if "shapes" in args:
            args.shapes = args.shapes[:1]
        if args.out == found.get_default("out"):  # what is kept is of a whole run
            args.out = args.out.with_name(f"{args.out.stem}-quick.json")
    return args


# --- a launch of which some blocks ran ------------------------------------------------------------


@dataclass
class Counted:
    """A launch: its grid's work from that of the blocks that were executed."""

    name: str
    work: Work
    dynamic: Any
    warps: float
    registers: int


def counted(
    device: Device,
    launch: Any,
    samples: Iterable[tuple[Any, float]] | None = None,
    *,
    blocks: float | None = None,
    dram_read: float = 0.0,
    dram_write: float = 0.0,
    l2_bytes: float | None = None,
) -> Counted:
    """The work of a launch's grid.

    Args:
        launch: has ``ptx``, ``kernel`` (mangled), ``threads``, ``blocks``, ``shared``, ``counts``.
        samples: counts of executed blocks, and how many blocks of the grid each stands for;
            ``launch.counts`` for all of them by default.
        blocks: of the grid, where it is not the launch's own.
        l2_bytes: between blocks and L2; what the samples moved by default, L1 serving what a block
            reads again.
    """
    blocks = blocks or launch.blocks
    samples = [(launch.counts, blocks)] if samples is None else list(samples)
    function = sass.load(launch.ptx, device.target)[launch.kernel]
    use = toolchain.assemble(launch.ptx, device.target).resources[launch.kernel]
    warps = math.ceil(launch.threads / 32)
    executions: dict[int, float] = {}
    sectors = passes = l1 = 0.0
    for counts, times in samples:
        lines = counts.by_ptx_line()
        for line, n in lines.items():
            executions[line] = executions.get(line, 0.0) + n * times
        one = function.dynamic(lines, warps)
        passes += wavefronts_of(counts, one) * times
        l1 += l1_cycles_of(counts, device) * times
        for r in counts.regions:
            sectors += 32.0 * (r["distinct_read"] + r["sectors_written"]) * times
    dynamic = function.dynamic(executions, warps * blocks)
    work = work_of(
        launch.kernel, dynamic, device, blocks=blocks, threads=launch.threads,
        registers=use.registers, shared=use.shared + launch.shared, dram_read=dram_read,
        dram_write=dram_write, l2_bytes=sectors if l2_bytes is None else l2_bytes,
        wavefronts=passes, l1_cycles=l1,
    )  # fmt: skip
    work.barriers = use.barriers
    return Counted(launch.kernel, work, dynamic, warps * blocks, use.registers)


@functools.cache
def _sources() -> str:
    """What a count depends on besides the question and the kernels."""
    emulator = HERE.parent / "qlora_kernels" / "emulator"
    files = [emulator / f"{name}.py" for name in ("sass", "model", "devices", "launch")]
    files += [HERE / "cuda_gemm.py", HERE / "cuda_decode.py"]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


@functools.cache
def _kernels(library: Path) -> str:
    return toolchain.device_code_digest(library)


def remembered(library: Path, make: Callable[[], Any], *question: Any) -> Any:
    """``make()``, or what it gave when the same was asked of the same kernels and sources: a run
    that was broken off goes on where it was."""
    key = repr((_sources(), _kernels(library), toolchain.tool_version("ptxas"), question))
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = toolchain.cache_dir() / "counts" / name
    try:
        return pickle.loads(path.read_bytes())
    except (OSError, pickle.PickleError, EOFError, AttributeError):
        pass
    found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        pickle.dump(found, file)
    os.replace(file.name, path)
    return found


# --- what it is compared with ---------------------------------------------------------------------


def dense_seconds(
    device: Device, m: int, n: int, k: int, efficiency: float = EFFICIENCY, launch: float = 1.0
) -> float:
    """A dense bf16 product: its bytes at DRAM's pace or its products at cuBLAS's."""
    moved = 2.0 * (n * k + m * k + m * n)
    products = 2.0 * m * n * k / (efficiency * device.tensor["bf16"])
    return max(moved / device.dram_read, products) + launch * device.launch


def dequantized_seconds(
    device: Device, m: int, n: int, k: int, nested: bool = True, efficiency: float = EFFICIENCY
) -> float:
    """Dequantization at DRAM speed (4 bits in, 16 out), then the dense product."""
    moved = n * k * (BITS[nested] / 8 + 2.0)
    dense = dense_seconds(device, m, n, k, efficiency)
    return moved / device.dram_read + 0.45 * device.launch + dense


# --- the report -----------------------------------------------------------------------------------


@dataclass
class Bar:
    """A count or a modelled figure, its limit, and what bounds it where it is missed."""

    what: str
    value: float
    limit: float
    why: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        mark = "met   " if self.met else "MISSED"
        tail = f"  {self.why}" if self.why and not self.met else ""
        return f"  {mark} {self.what:64} {self.value:7.2f} {sign} {self.limit:.2f}{tail}"


def print_bars(bars: Sequence[Bar], *, met: bool = True) -> None:
    """How many are met, and each; only the missed ones with ``met=False``."""
    held = sum(b.met for b in bars)
    print(
        f"\n{held} of {len(bars)} bars met" + ("" if met or held == len(bars) else "; the others:")
    )
    for bar in bars:
        if met or not bar.met:
            print(bar)
    sys.stdout.flush()


def _short(value: Any) -> Any:
    """Five digits are more than a model knows, and keep what is committed small."""
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(v) for v in value]
    if isinstance(value, float) or hasattr(value, "dtype"):
        return float(f"{float(value):.5g}")
    return value


def write(args: argparse.Namespace, bars: Sequence[Bar], **figures: Any) -> Path:
    """The figures and bars as JSON, a line a figure, with what they depend on."""
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "quick")}
    out = {
        "benchmark": Path(sys.argv[0]).stem,
        "what": "modelled from counts of the emulator; no GPU was there",
        "nvcc": toolchain.tool_version("nvcc"),
        "settings": settings,
        "bars": [{**asdict(b), "met": b.met} for b in bars],
        **figures,
    }
    lines = []
    for key, value in out.items():
        value = _short(value)
        if isinstance(value, list) and value:
            rows = ",\n  ".join(json.dumps(v) for v in value)
            lines.append(f" {json.dumps(key)}: [\n  {rows}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"\nwrote {args.out}")
    return args.out
