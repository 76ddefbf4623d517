"""What the CPU's kernels allocate for themselves while they run, which no trace of ops sees.

Of linear layers with many rows: x and dY with LoRA's columns behind them and in the dtype of the
matmuls, a panel of decoded weights, and the results of one where they are not written in place
(``csrc/linear_cpu.cpp``, whose sizes these are). Of few rows they are nothing.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["linear_buffers"]

PANEL_BYTES, LONG_SIDE = 8 << 20, 2048


def _lines(line: int, rows: int, step: int, most: int) -> int:
    """Rows (or columns) of a panel, each of ``line`` bytes."""
    wanted = max(PANEL_BYTES // line, min(rows, LONG_SIDE))
    return min(-(-wanted // step) * step, most)


def linear_buffers(func: Any, args: Any) -> int:
    """Bytes at their most within a call of ``linear_4bit`` or its backward; 0 of other ops."""
    ops = torch.ops.qlora_kernels
    if func is ops.linear_4bit.default:
        return _forward(*args)
    if func is ops.linear_4bit_backward.default:
        return _backward(*args)
    return 0


def _elements(m: int, n: int, k: int, blocksize: int, compute: torch.dtype) -> torch.dtype | None:
    """The dtype that torch multiplies, where the layer goes by panels."""
    from .. import cpu

    bf16 = compute == torch.bfloat16 and cpu.isa() == "avx512_bf16"
    try:
        route = cpu.linear_route(m, n, k, blocksize, bf16)
    except ImportError:  # plain torch: its own allocations are ops, which a trace sees
        return None
    return None if route != "panel" else torch.bfloat16 if bf16 else torch.float32


def _forward(x: Any, packed: Any, absmax: Any, codebook: Any, blocksize: int, *rest: Any) -> int:
    n, bias, lora_a, _, lora_s, _, compute = rest[3:10]
    k, m = x.shape[-1], x.numel() // max(1, x.shape[-1])
    element = _elements(m, n, k, blocksize, compute)
    if element is None or m == 0:
        return 0
    r = lora_a.shape[0] if lora_a is not None else lora_s.shape[-1] if lora_s is not None else 0
    size, width = element.itemsize, k + r
    wide = m * width * size if r or x.dtype != element else 0
    rows = _lines(width * size, m, 16, n)
    result = 0 if x.dtype == element and bias is None else m * rows * size
    return wide + rows * width * size + result


def _backward(dy: Any, packed: Any, absmax: Any, codebook: Any, blocksize: int, *rest: Any) -> int:
    k, x, lora_a, lora_b, _, _, compute, dx_dtype, need_dx, need_da, _ = rest[3:14]
    n, m = dy.shape[-1], dy.numel() // max(1, dy.shape[-1])
    element = _elements(m, n, k, blocksize, compute)
    if element is None or m == 0:
        return 0
    r = lora_b.shape[-1] if lora_b is not None else 0
    size, width = element.itemsize, n + r
    wide = m * width * size if r or dy.dtype != element else 0
    adapters = (n * r + m * r) * size
    if need_da and x is not None:
        adapters += r * k * size + (m * k * size if x.dtype != element else 0)
    gradient = 0
    if need_dx:
        inner = width if lora_a is not None else n
        columns = _lines(inner * size, m, 64, k)
        gradient = inner * columns * size + (0 if dx_dtype == element else m * columns * size)
    return wide + max(adapters if r else 0, gradient)
