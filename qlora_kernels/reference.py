"""The truth that every kernel answers to, in plain torch: slow, readable, checked by eye.

What each function gives for the inputs that people forget:

* an all-zero block: absmax 0, every value the code of 0 (``0 / 1e-38`` is 0), and +-0 back;
* a denormal absmax below 1e-38: its values are divided by 1e-38, not by themselves;
* an infinity: absmax is infinity, ``1 / inf`` is 0, so finite values take the code of 0 and the
  infinity itself is ``inf * 0 = NaN``;
* NaN: absmax is NaN, the whole block is NaN when dequantized; a NaN compares above every
  threshold nowhere and below none, and takes the *last* rank;
* a ragged last block (fewer values than the blocksize): divided by its absmax, not multiplied by
  the reciprocal, and the absmax stored is at least 1e-38;
* an odd count: the unused low nibble is the code of 0.

All of them are what bitsandbytes 0.50.2 does on a CPU. Two things are ours: the nested offset is
summed in one stated order (:func:`mean_in_order`), where the peer's depends on its threads, and a
NaN among the nested scales takes code 0, as the peer's x86 conversion happens to give.
"""

from __future__ import annotations

import torch

from .formats import (
    MIN_ABSMAX,
    NESTED_BLOCKSIZE,
    Format,
    get_format,
    nested_code,
    nested_thresholds,
)


def quantize(
    w: torch.Tensor, fmt: Format | str = "nf4", blocksize: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blockwise 4-bit quantization of ``w`` (any shape, fp32, bf16 or fp16; read row-major).

    Returns:
        ``(packed, absmax)``: uint8 ``[(n + 1) // 2]``, the earlier value in the high nibble, and
        fp32 ``[ceil(n / blocksize)]``.
    """
    _, thresholds, codes = get_format(fmt).tensors()
    normalized, absmax = normalize(w.cpu(), blocksize)
    # rank = number of thresholds below the value; NaN, which is below nothing, gets all 15.
    rank = (~(normalized[:, None] <= thresholds)).sum(1)
    return pack(codes[rank]), absmax


def pack(code: torch.Tensor) -> torch.Tensor:
    """uint8 ``[n / 2]`` from uint8 codes ``[n]``: the earlier one in the high nibble."""
    return (code[0::2] << 4) | code[1::2]


def normalize(w: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``w`` over its block's absmax, clamped to [-1, 1], and the absmax; on ``w``'s device.

    Returns:
        fp32 ``[n]``, with a zero appended where n is odd, and fp32 ``[ceil(n / blocksize)]``.
    """
    w = w.detach().reshape(-1).float()
    n, full = w.numel(), w.numel() // blocksize * blocksize

    head = w[:full].view(-1, blocksize)
    absmax = head.abs().amax(1) if full else w.new_empty(0)
    reciprocal = 1.0 / absmax.clamp(min=MIN_ABSMAX)
    normalized = (head * reciprocal[:, None]).clamp(-1, 1).reshape(-1)
    if full < n:
        last = w[full:].abs().max().clamp(min=MIN_ABSMAX)
        absmax = torch.cat([absmax, last[None]])
        normalized = torch.cat([normalized, (w[full:] / last).clamp(-1, 1)])
    if n % 2:
        normalized = torch.cat([normalized, normalized.new_zeros(1)])
    return normalized, absmax


def normalize_scaled(
    w: torch.Tensor, blocksize: int, tensor_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`normalize` with scales of one byte (int8 ``[blocks]``), for research.

    E8M0, where there is no ``tensor_scale``: the smallest power of two that is not below the
    block's absmax, 2^127 at most, NaN for an infinity or a NaN. E4M3: ``absmax / tensor_scale``
    rounded to nearest even, NaN where that is beyond 448; the scale is that times
    ``tensor_scale``, rounded to fp32. Values are multiplied by the reciprocal of the *rounded*
    scale (at least 1e-38), divided by it in a ragged last block.
    """
    w = w.detach().reshape(-1).float()
    n = w.numel()
    rows = torch.nn.functional.pad(w, (0, -n % blocksize)).view(-1, blocksize)
    absmax = rows.abs().amax(1)
    if tensor_scale is None:
        bits = absmax.view(torch.int32)
        byte = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
        byte = torch.where(bits <= 0x00400000, 0, byte.clamp(max=254))
        stored = torch.where(absmax.isfinite(), byte, 255).to(torch.uint8).view(torch.int8)
    else:
        ratio = absmax / tensor_scale.reshape(())
        stored = ratio.to(torch.float8_e4m3fn).view(torch.int8)
        stored = torch.where(ratio < 464, stored, 0x7F)  # torches differ: some saturate
    scale = byte_scales(stored, tensor_scale)
    divisor = torch.where(scale < MIN_ABSMAX, MIN_ABSMAX, scale)
    normalized = rows * (1.0 / divisor)[:, None]
    if n % blocksize:
        normalized[-1] = rows[-1] / divisor[-1]
    normalized = normalized.clamp(-1, 1).reshape(-1)[:n]
    if n % 2:
        normalized = torch.cat([normalized, normalized.new_zeros(1)])
    return normalized, stored


def tensor_scale(w: torch.Tensor) -> torch.Tensor:
    """The fp32 scalar that E4M3 scales are multiples of: the largest finite magnitude takes 448,
    E4M3's largest."""
    finite = torch.where(w.isfinite(), w, 0).detach()
    return (finite.abs().amax().float() / 448).clamp(min=MIN_ABSMAX)


def byte_scales(stored: torch.Tensor, tensor_scale: torch.Tensor | None) -> torch.Tensor:
    """fp32 scales from bytes (int8): of E8M0, or of E4M3 times ``tensor_scale``."""
    if tensor_scale is None:
        return stored.view(torch.float8_e8m0fnu).float()
    return stored.view(torch.float8_e4m3fn).float() * tensor_scale.reshape(())


def mean_in_order(absmax: torch.Tensor) -> torch.Tensor:
    """fp32 mean of ``absmax`` (fp32, 1-D), summed in float64 in the one order of this project.

    Groups of 256 (the last padded with zeros) are each summed as a halving tree: ``s[i] += s[i +
    128]``, then 64, ... 1. Their sums are grouped by 256 and summed in the same way until one is
    left, which is divided by the count and rounded to fp32. A CTA, a vector register and NumPy
    all do that cheaply. Of n positive values the result is within ``8 * log256(n) * 2**-53``
    relative, plus the final rounding, of the exact mean.
    """
    sums = absmax.double()
    while True:
        pad = -sums.numel() % NESTED_BLOCKSIZE
        tree = torch.cat([sums, sums.new_zeros(pad)]).view(-1, NESTED_BLOCKSIZE)
        while tree.shape[1] > 1:
            half = tree.shape[1] // 2
            tree = tree[:, :half] + tree[:, half:]
        sums = tree.reshape(-1)
        if sums.numel() == 1:
            return (sums[0] / absmax.numel()).float()


def quantize_absmax(
    absmax: torch.Tensor,
    offset: torch.Tensor | None = None,
    thresholds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantization (QLoRA section 3): 8-bit codes for the fp32 scales.

    Args:
        absmax: fp32 ``[blocks]``.
        offset: what is subtracted first; :func:`mean_in_order` unless given.
        thresholds: fp32 ``[255]`` of the scale code; the dynamic code's unless given.

    Returns:
        ``(codes uint8 [blocks], nested_absmax fp32 [ceil(blocks / 256)], offset fp32 [])``.
    """
    offset = mean_in_order(absmax) if offset is None else offset
    centred = absmax - offset
    pad = -centred.numel() % NESTED_BLOCKSIZE
    rows = torch.cat([centred, centred.new_zeros(pad)]).view(-1, NESTED_BLOCKSIZE)
    # fmax: a NaN scale does not become its group's nested absmax.
    nested_absmax = torch.fmax(rows.abs(), torch.zeros(())).amax(1)
    normalized = (rows * (1.0 / nested_absmax)[:, None]).clamp(-1, 1)
    thresholds = nested_thresholds() if thresholds is None else thresholds
    codes = torch.bucketize(normalized, thresholds).to(torch.uint8)
    # A group of zeros has no reciprocal: code 0, as for NaN. Its nested absmax gives back zeros.
    codes[normalized.isnan() | (nested_absmax == 0)[:, None]] = 0
    return codes.view(-1)[: absmax.numel()], nested_absmax, offset


def dequantize_absmax(
    codes: torch.Tensor,
    nested_absmax: torch.Tensor,
    offset: torch.Tensor,
    code: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 scales ``float32(code[a] * nested_absmax) + offset``: two roundings, never an fma."""
    code = nested_code() if code is None else code
    group = torch.arange(codes.numel(), device=codes.device) // NESTED_BLOCKSIZE
    return code[codes.long()] * nested_absmax[group] + offset


def dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``round_to_dtype(codebook[q] * absmax)`` in ``shape``; fp32 product, rounded once."""
    n = torch.Size(shape).numel()
    q = torch.stack([packed >> 4, packed & 15], 1).view(-1)[:n]
    block = torch.arange(n) // blocksize
    return (codebook[q.long()] * absmax[block]).to(dtype).view(shape)


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 1.0,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``x W^T + bias + scaling (x A^T) B^T`` with float64 sums, rounded once to ``x.dtype``.

    ``w`` is the dequantized weight ``[N, K]``. Inputs are rounded to ``compute_dtype`` first, as
    every kernel does; what a kernel may differ by is its own head's bound.
    """
    dtype = compute_dtype or x.dtype
    xc, wc = x.to(dtype).double(), w.to(dtype).double()
    y = xc @ wc.T
    if bias is not None:
        y = y + bias.to(dtype).double()
    if lora_a is not None and lora_b is not None:
        s = xc @ lora_a.to(dtype).double().T
        y = y + scaling * (s @ lora_b.to(dtype).double().T)
    return y.to(x.dtype)


def linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Gradients of :func:`linear`, by formula, in float64: ``x``, ``bias``, ``lora_a``, ``lora_b``.

    ``dX = dY W + s (dY B) A``, ``dA = s (dY B)^T X``, ``dB = s dY^T (X A^T)``, ``dbias = sum dY``.
    """
    dy2, x2 = dy.double().reshape(-1, dy.shape[-1]), x.double().reshape(-1, x.shape[-1])
    grads = {"x": dy2 @ w.double(), "bias": dy2.sum(0)}
    if lora_a is not None and lora_b is not None:
        a, b = lora_a.double(), lora_b.double()
        ds = scaling * (dy2 @ b)
        grads["x"] = grads["x"] + ds @ a
        grads["lora_a"] = ds.T @ x2
        grads["lora_b"] = scaling * (dy2.T @ (x2 @ a.T))
    grads["x"] = grads["x"].view(x.shape)
    return grads
