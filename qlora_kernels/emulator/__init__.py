"""Compiled GPU kernels executed, checked and costed on a CPU.

The emulator takes the PTX that nvcc and Triton emit and runs it, one warp of 32 lanes a step. It
finds what compute-sanitizer finds and counts what a profiler counts. It imports nothing of the rest
of the package::

    from qlora_kernels.emulator import Module, emulate

    kernel = Module.from_cuda("scale.cu", target="sm_90").kernel("scale")
    result = emulate(kernel, grid=4, block=256, args=[x, y, 1000], device="h100")
    result.reports          # what the checkers found; [] if nothing
    result.counts           # what ran and what it moved

**Loading.** ``Module.from_ptx(text)``, ``Module.from_cuda(source_or_path, target)``,
``Module.from_library(path)`` (a compiled ``.so``), ``Module.from_triton(jit_function, signature,
constants, target)``. ``module.kernels`` maps names to `Kernel`; ``module.kernel(name)`` takes the
mangled name or a part of it that only one kernel has. A `Kernel` has

- ``name``, ``params`` (`Param`: name, offset, size, align, pointer), ``param_bytes``
- ``static_shared``, ``uses_dynamic_shared``, ``max_threads``, ``required_threads``, ``min_blocks``
- ``instructions``: one `Instruction` for each PTX instruction that may run, device functions that
  are called included, in the order of the text: ``opcode``, ``text``, ``ptx_line`` (from 1),
  ``loc`` (`Location`: file, line, column; None without ``-lineinfo``), ``block``
- ``blocks``: basic blocks, as (first, last) indices into ``instructions``

**Running.** ``emulate(kernel, grid, block, args, device=, checks=, seed=, shared_bytes=, ...)``
takes NumPy arrays, torch tensors and numbers. Each tensor is a region of its own, far from all
others, so that an index out of bounds never lands in a neighbour. ``launch`` is the layer
below, for
those who have argument bytes already (the CUDA runtime's stand-in)::

    launch(kernel, grid, block, arguments: bytes, regions: list[Region], shared_bytes=0,
           device=..., checks=..., seed=0, budget=None, cooperative=False) -> Result

`Region`: ``base`` (the device's address), ``size``, ``host`` (where the bytes are), ``name``,
``writable``, ``dtype``, ``shape``, ``initialized`` (None: all of it; else a uint8 array, a byte for
each byte, that the launch reads and updates), ``index`` (of the kernel's parameter, if any).

**Checks**, by name or as a set: ``bounds`` (always on), ``align`` (always on), ``uninit``,
``races``, ``sync``, ``counts``. ``checks=True`` is all, ``checks=False`` only those always on.

**A `Result`** has ``reports`` (a list of `Report`: kind, message, kernel, ptx_line, loc, block,
thread, address, argument, index), ``counts``, ``printed``, and ``ok``; ``emulate`` raises
`KernelError` for what stops a kernel (a wild address, a deadlock, the budget) and, by default,
also when a checker reported something.

**Counts** has

- ``instructions``: a structured array, a row for each of ``kernel.instructions``: ``warps`` and
  ``threads`` (executions of a warp, active lanes summed), ``bytes`` (that lanes asked for),
  ``requests`` (warp accesses of memory), ``sectors`` (32-byte global sectors), ``sectors_ideal``
  (the fewest for those bytes), ``wavefronts`` and ``wavefronts_ideal`` (shared memory), ``flops``
  (of matrix instructions, per warp), ``taken`` (lanes that took a branch)
- ``by_line()``: the same summed over source lines; ``by_ptx_line()``: warp executions by PTX line
- ``regions``: for each region ``sectors_read``, ``sectors_written`` (moved between SM and L2) and
  ``distinct_read``, ``distinct_written`` (each sector once: what DRAM must move at least)
- ``total``: sums, with ``blocks``, ``threads_launched``, ``barriers`` and ``thread_instructions``

The compiled interpreter is ``csrc/emulator/`` (``_emulator.so``, plain C ABI, loaded by ctypes).
"""

from __future__ import annotations

from . import decode, devices
from .decode import Kernel, Param
from .errors import EmulatorError, KernelError, LaunchError, PtxError
from .launch import (
    CHECKS,
    Counts,
    Module,
    Region,
    Report,
    Result,
    emulate,
    emulate_orders,
    launch,
    uninitialized,
)
from .ptx import Location

__all__ = [
    "CHECKS",
    "Counts",
    "EmulatorError",
    "Kernel",
    "KernelError",
    "LaunchError",
    "Location",
    "Module",
    "Param",
    "PtxError",
    "Region",
    "Report",
    "Result",
    "decode",
    "devices",
    "emulate",
    "emulate_orders",
    "launch",
    "uninitialized",
]
