"""The compiled interpreter, through ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from .errors import EmulatorError

__all__ = ["isa", "library", "op_ids"]


class Region(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("host", ctypes.c_void_p),
        ("initialized", ctypes.c_void_p),
        ("read_sectors", ctypes.c_void_p),
        ("written_sectors", ctypes.c_void_p),
        ("writable", ctypes.c_uint32),
        ("tracked", ctypes.c_uint32),
        ("sectors_read", ctypes.c_uint64),
        ("sectors_written", ctypes.c_uint64),
    ]


class Program(ctypes.Structure):
    _fields_ = [
        *[(n, ctypes.c_void_p) for n in ("inst", "block", "lists", "constants", "special")],
        *[
            (n, ctypes.c_int32)
            for n in (
                "n_inst",
                "n_block",
                "n_special",
                "n_lists",
                "register_bytes",
                "n_pred",
                "n_rows",
                "local_bytes",
                "shared_granule",
                "constant_bytes",
                "has_taint",
                "n_taint_init",
            )
        ],
        ("taint_init", ctypes.c_void_p),
        ("followed", ctypes.c_void_p),
    ]


class Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("checks", ctypes.c_uint32),
        ("params", ctypes.c_void_p),
        ("param_bytes", ctypes.c_uint64),
        ("param_base", ctypes.c_uint64),
        ("regions", ctypes.c_void_p),
        ("n_regions", ctypes.c_uint64),
        ("static_shared", ctypes.c_uint32),
        ("dynamic_shared", ctypes.c_uint32),
        ("shared_map", ctypes.c_void_p),
        ("shared_total", ctypes.c_uint32),
        ("max_resident", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("budget", ctypes.c_uint64),
        ("late", ctypes.c_void_p),
        ("quantum", ctypes.c_uint32),
        ("cooperative", ctypes.c_uint32),
        ("block_list", ctypes.c_void_p),
        ("n_blocks", ctypes.c_uint64),
        ("counts", ctypes.c_void_p),
        ("reports", ctypes.c_void_p),
        ("max_reports", ctypes.c_uint64),
        ("n_reports", ctypes.c_uint64),
        ("print", ctypes.c_void_p),
        ("print_size", ctypes.c_uint64),
        ("print_used", ctypes.c_uint64),
        ("totals", ctypes.c_uint64 * 8),
        ("window", ctypes.c_uint32),
        ("smid_count", ctypes.c_uint32),
    ]


def _path() -> Path:
    given = os.environ.get("EMULATOR_LIBRARY")
    return Path(given) if given else Path(__file__).resolve().parent.parent / "_emulator.so"


@functools.cache
def library() -> ctypes.CDLL:
    """The engine. Raises `EmulatorError` where it was not built."""
    path = _path()
    if not path.is_file():
        raise EmulatorError(
            f"the emulator's engine {path} is not there: build it with `make build` (it needs a "
            f"C++20 "
            "compiler and CMake), or set EMULATOR_LIBRARY to where it is"
        )
    lib = ctypes.CDLL(str(path))
    lib.emu_op_name.restype = lib.emu_isa.restype = ctypes.c_char_p
    lib.emu_launch.argtypes = [ctypes.POINTER(Program), ctypes.POINTER(Launch)]
    from .decode import BLOCK, INST
    from .launch import COUNT, REPORT

    mine = [
        INST.itemsize,
        BLOCK.itemsize,
        ctypes.sizeof(Region),
        COUNT.itemsize,
        REPORT.itemsize,
        ctypes.sizeof(Program),
        ctypes.sizeof(Launch),
    ]
    theirs = [lib.emu_sizes(k) for k in range(len(mine))]
    if mine != theirs:
        raise EmulatorError(
            f"{path} is of another version than this package ({theirs}, {mine}): rebuild it"
        )
    return lib


@functools.cache
def op_ids() -> dict[str, int]:
    """The engine's operations by name."""
    lib = library()
    return {lib.emu_op_name(k).decode(): k for k in range(lib.emu_op_count())}


def isa() -> str:
    """The instruction set that the engine runs with: portable, avx2 or avx512."""
    return library().emu_isa().decode()
