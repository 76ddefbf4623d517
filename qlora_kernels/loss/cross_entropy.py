"""Cross entropy straight from the hidden states: the logits of a large vocabulary are never held.

**What.** For row i with hidden state h, output matrix W [V, H], label y:

    z_j = softcap(scale * (h . W_j + b_j))           softcap(z) = c * tanh(z / c), or z
    loss = logsumexp(z) - z_y
    dloss/dh = scale * (sum_j p_j f_j W_j - f_y W_y)     p = softmax(z), f = 1 - tanh(z / c)^2, or 1

**How.** sum_j p_j W_j is attention with the hidden states as queries and W as keys and values, so
it takes the same online softmax: one walk over W in panels of a few hundred words, two matmuls a
panel, a running maximum m, a running sum of exp(z - m), and a running sum of exp(z - m) W. Loss
and gradient come out of that one walk, in the forward pass; the backward pass multiplies by what
comes from above. What is held is one tile of logits (rows x panel, a few MB), whatever V is.
Rows whose label is ``ignore_index`` are left out beforehand and cost nothing. Rows are taken in
the order of their labels, so that each panel's own rows lie together.

m need not be the exact maximum, only near it: a row is rescaled when its new maximum lies more
than ``_SLACK`` above m, which after the first panel is rare. exp(_SLACK) * V stays far inside
fp32, and a common factor of numerator and denominator costs no precision.

**Precision.** Sums, softmax and gradient are in fp32 (fp64 for fp64 inputs). 16-bit operands are
multiplied as such where the hardware does that natively, and as fp32 where it does not (torch's
bf16 matmul is an order of magnitude slower than fp32 there): W is then widened a panel at a time.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["head_cross_entropy", "linear_cross_entropy"]

Reduction = Literal["mean", "sum", "none"]

# A row is rescaled when its maximum grows by more than this. exp(30) = 1e13, and times a
# vocabulary of 1e6 still 1e19 times below the largest fp32.
_SLACK = 30.0
# With fp16 operands exp(z - m) itself has to stay below 65504, and so does a panel's sum of it.
_SLACK_FP16 = 0.0
# Stands in for a maximum of -inf (a panel whose words are all masked by a bias of -inf).
_LOWEST = -1e30
# Rows that are walked through W together. More rows read W fewer times, but their tile leaves
# the cache.
_MAX_ROWS = 2048
# Bytes that one step of the walk should touch (tile of logits, panel of W), by measurement: less
# pays for the Python of a step, more leaves the caches.
_STEP_BYTES = 2 << 20
# The same on an accelerator, where launches cost more and caches do not decide.
_STEP_BYTES_DEVICE = 256 << 20
# Bytes of logits held at once when W is trained too (see _walk_rows).
_ROW_CHUNK_BYTES = 64 << 20

_calls: collections.Counter[int] = collections.Counter()
"""Executions of the op, by the number that its caller gave (0: nobody in particular)."""


# --------------------------------------------------------------------------- dtypes and tiles


@functools.cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies ``dtype`` natively, and torch was not told otherwise."""
    cpu = torch.cpu.get_capabilities()
    level = torch.backends.cpu.get_cpu_capability()
    if cpu["architecture"] == "x86_64" and "AVX512" not in level:  # forced by ATEN_CPU_CAPABILITY
        return False
    names = {
        torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
        torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
    }
    return any(cpu.get(name) for name in names[dtype])


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the matmuls' operands: that of ``F.linear``, or wider where that is faster."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if device == "cpu" and dtype in (torch.bfloat16, torch.float16) and not _cpu_multiplies(dtype):
        return torch.float32
    return dtype


def _sum_dtype(compute: torch.dtype) -> torch.dtype:
    return torch.float64 if compute == torch.float64 else torch.float32


def _tile(rows: int, width: int, device: str) -> int:
    """Words in a panel, so that a step touches about ``_STEP_BYTES``: a multiple of 64."""
    budget = _STEP_BYTES if device == "cpu" else _STEP_BYTES_DEVICE
    words = budget // (4 * (rows + width))
    return max(256, words // 64 * 64)


# --------------------------------------------------------------------------- the walk


class _Matmul:
    """``hidden @ panel.T`` and ``total += tile @ panel``, in buffers that every step reuses.

    Operands are in ``compute``, results in the dtype of the sums. CUDA accumulates 16-bit
    operands into fp32 results; elsewhere torch rounds the product to 16 bits once.
    """

    def __init__(self, rows: int, tile: int, weight: Tensor, compute: torch.dtype):
        self.compute, self.sums = compute, _sum_dtype(compute)
        self.direct = compute == self.sums
        self.mixed = not self.direct and weight.device.type == "cuda"
        new = functools.partial(torch.empty, device=weight.device)
        width = weight.shape[1]
        self._logits = new(rows * tile, dtype=self.sums)
        self._panel = new(tile, width, dtype=compute) if weight.dtype != compute else None
        if not self.direct:
            self._rounded = new(rows * tile, dtype=compute)
        if not self.direct and not self.mixed:
            self._product = new(rows, width, dtype=compute)

    def panel(self, weight: Tensor, start: int, end: int) -> Tensor:
        """``weight[start:end]`` in the dtype of the matmuls."""
        panel = weight[start:end]
        return panel if self._panel is None else self._panel[: end - start].copy_(panel)

    def logits(self, hidden: Tensor, panel: Tensor) -> Tensor:
        """``hidden @ panel.T``."""
        shape = hidden.shape[0], panel.shape[0]
        size = shape[0] * shape[1]
        out = self._logits[:size].view(shape)
        if self.direct:
            return torch.mm(hidden, panel.t(), out=out)
        if self.mixed:
            return torch.mm(hidden, panel.t(), out_dtype=self.sums, out=out)
        return out.copy_(torch.mm(hidden, panel.t(), out=self._rounded[:size].view(shape)))

    def add(self, total: Tensor, tile: Tensor, panel: Tensor) -> None:
        """``total += tile @ panel``."""
        if self.direct:
            total.addmm_(tile, panel)
            return
        rounded = self._rounded[: tile.numel()].view(tile.shape).copy_(tile)
        if self.mixed:
            torch.addmm(total, rounded, panel, out_dtype=self.sums, out=total)
        else:
            total.add_(torch.mm(rounded, panel, out=self._product[: tile.shape[0]]))


def _shape_logits(z: Tensor, bias: Tensor | None, softcap: float, scale: float) -> Tensor | None:
    """Raw products to logits, in place; the tanh where there is a cap, for its derivative."""
    if bias is not None:
        z.add_(bias)
    if scale != 1.0:
        z.mul_(scale)
    if not softcap:
        return None
    tanh = torch.tanh(z.div_(softcap))
    torch.mul(tanh, softcap, out=z)
    return tanh


def _walk_panels(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    grad: Tensor | None,
    softcap: float,
    scale: float,
    tile: int,
    matmul: _Matmul,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One walk over W for a block of rows that are sorted by label.

    Args:
        hidden: ``[R, H]`` in the dtype of the matmuls.
        labels: int64 ``[R]``, ascending, each in ``[0, V)``.
        grad: ``[R, H]`` zeros in the dtype of the sums, filled with dloss/dh; or None.

    Returns:
        ``[R]`` each: the loss, z_y - max z, the entropy of the prediction (zeros unless wanted).
    """
    rows, vocab, sums = hidden.shape[0], weight.shape[0], matmul.sums
    slack = _SLACK_FP16 if matmul.compute == torch.float16 else _SLACK
    new = functools.partial(torch.zeros, rows, device=hidden.device, dtype=sums)
    total, weighted, target, slope = new(), new(), new(), new()
    edges = torch.arange(0, vocab + tile, tile, device=labels.device)
    firsts = torch.searchsorted(labels, edges).tolist()  # the rows whose label is in each panel
    top = torch.full_like(total, -math.inf)  # the highest logit so far
    base = torch.full_like(total, _LOWEST)  # m of the head of this file
    for i, start in enumerate(range(0, vocab, tile)):
        end = min(start + tile, vocab)
        panel = matmul.panel(weight, start, end)
        z = matmul.logits(hidden, panel)
        tanh = _shape_logits(z, None if bias is None else bias[start:end], softcap, scale)

        own = slice(firsts[i], firsts[i + 1])
        if own.start < own.stop:
            at = (labels[own] - start).unsqueeze(1)
            target[own] = z[own].gather(1, at).squeeze(1)
            if tanh is not None:
                slope[own] = tanh[own].gather(1, at).squeeze(1)

        highest = z.amax(1)
        top = torch.maximum(top, highest)
        if start == 0:
            base = highest.clamp(min=_LOWEST)
        elif bool((highest - base > slack).any()):
            raised = torch.maximum(base, highest)
            shrink = torch.exp(base - raised)
            if want_entropy:
                weighted.add_((base - raised) * total)
            for running in (total, weighted):
                running.mul_(shrink)
            if grad is not None:
                grad.mul_(shrink.unsqueeze(1))
            base = raised
        z.sub_(base.unsqueeze(1))
        if want_entropy:
            exps = torch.exp(z)
            # 0 * -inf is 0 here: a word that cannot come adds nothing to the entropy.
            weighted.add_(torch.linalg.vecdot(exps, z.clamp_(min=_LOWEST)))
        else:
            exps = z.exp_()
        total.add_(exps.sum(1))
        if grad is not None:
            if tanh is not None:
                exps.addcmul_(exps, tanh.square_(), value=-1.0)
            matmul.add(grad, exps, panel)
    log_total = total.log()
    loss = log_total + base - target
    if grad is not None:
        grad.div_(total.unsqueeze(1))
        chosen = weight.index_select(0, labels).to(sums)
        grad.sub_(chosen if not softcap else chosen.mul_((1 - slope.square()).unsqueeze(1)))
        if scale != 1.0:
            grad.mul_(scale)
    entropy = log_total - weighted / total if want_entropy else weighted
    return loss, target - top, entropy


def _walk_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float,
    scale: float,
    rows: int,
    compute: torch.dtype,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same when W is trained: its gradient needs finished probabilities, so a chunk of rows
    is held with its whole vocabulary, and taken through three matmuls.

    Returns the loss ``[R]``, and dloss/dh ``[R, H]``, dloss/dW ``[V, H]``, dloss/db ``[V]`` (of
    the sum of the losses) in the dtype of the sums.
    """
    sums = _sum_dtype(compute)
    wide = weight.to(compute)
    new = functools.partial(torch.zeros, device=hidden.device, dtype=sums)
    loss, grad = new(hidden.shape[0]), new(hidden.shape)
    grad_weight, grad_bias = new(weight.shape), new(weight.shape[0])
    for start in range(0, hidden.shape[0], rows):
        at = slice(start, start + rows)
        z = torch.mm(hidden[at], wide.t()).to(sums)
        tanh = _shape_logits(z, bias, softcap, scale)
        index = labels[at].unsqueeze(1)
        norm = z.logsumexp(1, keepdim=True)
        loss[at] = (norm - z.gather(1, index)).squeeze(1)
        z.sub_(norm).exp_().scatter_add_(1, index, z.new_full((1, 1), -1.0).expand_as(index))
        if tanh is not None:
            z.addcmul_(z, tanh.square_(), value=-1.0)
        if scale != 1.0:
            z.mul_(scale)
        if want_bias:
            grad_bias.add_(z.sum(0))
        if compute == sums:
            torch.mm(z, wide, out=grad[at])
            grad_weight.addmm_(z.t(), hidden[at])
        else:
            z = z.to(compute)
            grad[at] = torch.mm(z, wide)
            grad_weight.add_(torch.mm(z.t(), hidden[at]))
    return loss, grad, grad_weight, grad_bias


# --------------------------------------------------------------------------- the op


@torch.library.custom_op("qlora_kernels::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    softcap: float,
    scale: float,
    compute: torch.dtype,
    rows: int,
    tile: int,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    want_entropy: bool,
    counter: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses and gradients of rows ``hidden [T, H]``; ``softcap`` 0 for none.

    Returns, in this order: loss ``[T]`` (0 where ignored), z_y - max z ``[T]``, entropy ``[T]``,
    the gradient of each row's own loss ``[T, H]`` in the dtype of ``hidden``, and the gradients
    of the sum of the losses in W ``[V, H]`` and b ``[V]``. What is not wanted has no elements.
    """
    _calls[counter] += 1
    vocab, width = weight.shape
    sums = _sum_dtype(compute)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        kept = (labels != ignore_index).nonzero().squeeze(1)
        values, order = labels[kept].sort()
        kept = kept[order]
        if len(values) and not 0 <= int(values[0]) <= int(values[-1]) < vocab:
            bad = int(values[0]) if int(values[0]) < 0 else int(values[-1])
            raise IndexError(
                f"label {bad} is outside the vocabulary of {vocab} words (and is not ignore_index "
                f"{ignore_index}); does the tokenizer belong to this model?"
            )
        new = functools.partial(torch.zeros, device=hidden.device)
        loss, margin = new(len(labels), dtype=sums), new(len(labels), dtype=sums)
        entropy = new(len(labels) if want_entropy else 0, dtype=sums)
        grad = new(hidden.shape if want_hidden else (0, width), dtype=hidden.dtype)
        grad_weight = new(weight.shape if want_weight else (0, width), dtype=weight.dtype)
        grad_bias = new(
            vocab if want_bias else 0, dtype=weight.dtype if bias is None else bias.dtype
        )
        outputs = (loss, margin, entropy, grad, grad_weight, grad_bias)
        if not len(kept):
            return outputs
        wide_bias = None if bias is None else bias.to(sums)

        if want_weight or want_bias:
            rows = rows or max(16, _ROW_CHUNK_BYTES // (4 * vocab))
            chosen = hidden.index_select(0, kept).to(compute)
            parts = _walk_rows(
                chosen, weight, wide_bias, values, softcap, scale, rows, compute, want_bias
            )
            loss[kept] = parts[0]
            if want_hidden:
                grad[kept] = parts[1].to(grad.dtype)
            if want_weight:
                grad_weight.copy_(parts[2])
            if want_bias:
                grad_bias.copy_(parts[3])
            return outputs

        # Equal blocks of rows: a last block of a few rows would walk all of W for them.
        blocks = -(-len(kept) // (rows or _MAX_ROWS))
        rows = -(-len(kept) // blocks)
        tile = min(tile or _tile(rows, width, hidden.device.type), vocab)
        matmul = _Matmul(rows, tile, weight, compute)
        for start in range(0, len(kept), rows):
            at = kept[start : start + rows]
            chosen = hidden.index_select(0, at).to(compute)
            block = chosen.new_zeros(chosen.shape, dtype=sums) if want_hidden else None
            results = _walk_panels(
                chosen, weight, wide_bias, values[start : start + rows], block,
                softcap, scale, tile, matmul, want_entropy,
            )  # fmt: skip
            loss[at], margin[at] = results[0], results[1]
            if want_entropy:
                entropy[at] = results[2]
            if block is not None:
                grad[at] = block.to(grad.dtype)
    return outputs


@_linear_cross_entropy.register_fake
def _(
    hidden, weight, bias, labels, ignore_index, softcap, scale, compute, rows, tile,
    want_hidden, want_weight, want_bias, want_entropy, counter,
):  # fmt: skip
    sums = _sum_dtype(compute)
    count, (vocab, width) = labels.shape[0], weight.shape
    return (
        hidden.new_empty(count, dtype=sums),
        hidden.new_empty(count, dtype=sums),
        hidden.new_empty(count if want_entropy else 0, dtype=sums),
        hidden.new_empty((count if want_hidden else 0, width)),
        weight.new_empty((vocab if want_weight else 0, width)),
        (weight if bias is None else bias).new_empty(vocab if want_bias else 0),
    )


def _keep_for_backward(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:])
    ctx.wants = inputs[10:13]


def _backward(ctx, grad_loss, *_):
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "linear_cross_entropy computes its first derivatives in the forward pass and has no "
            "second ones (create_graph=True); use torch.nn.functional.cross_entropy on the logits"
        )
    if grad_loss is None:
        return (None,) * 15
    hidden, weight, bias = ctx.saved_tensors
    wants_hidden, wants_weight, wants_bias = ctx.wants
    # The gradients of W and b are sums over rows, so every row must have the same factor:
    # linear_cross_entropy sees to it.
    factor = grad_loss[0] if len(grad_loss) else grad_loss.sum()
    return (
        (hidden * grad_loss.unsqueeze(1)).to(hidden.dtype) if wants_hidden else None,
        (weight * factor).to(weight.dtype) if wants_weight else None,
        (bias * factor).to(bias.dtype) if wants_bias else None,
        *[None] * 12,
    )


_linear_cross_entropy.register_autograd(_backward, setup_context=_keep_for_backward)


# --------------------------------------------------------------------------- functions


def _reduce(
    losses: Tensor, labels: Tensor, ignore_index: int, reduction: str, num_items: Any
) -> Tensor:
    if reduction == "none":
        return losses
    if num_items is not None:
        return losses.sum() / (
            num_items.to(losses.device) if isinstance(num_items, Tensor) else num_items
        )
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (labels != ignore_index).sum()


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight is {weight.dtype} {list(weight.shape)}; expected a floating-point matrix "
            "[vocabulary, width] (for a quantized output layer use head_cross_entropy)"
        )
    if hidden.shape[-1:] != weight.shape[1:] or not hidden.is_floating_point():
        raise ValueError(
            f"hidden is {hidden.dtype} {list(hidden.shape)}; expected floating point with a last "
            f"dimension of {weight.shape[1]}, the width of weight"
        )
    _check_labels(hidden, labels)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {list(bias.shape)}; expected [{weight.shape[0]}]")
    for name, tensor in (("weight", weight), ("labels", labels), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}")


def _check_labels(hidden: Tensor, labels: Tensor) -> None:
    if labels.shape != hidden.shape[:-1] or labels.is_floating_point():
        raise ValueError(
            f"labels are {labels.dtype} {list(labels.shape)}; expected integers "
            f"{list(hidden.shape[:-1])}, one a row of hidden"
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items: Tensor | float | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> Tensor:
    """Cross entropy of ``logit_scale * (hidden @ weight.T + bias)``, the logits never held.

    Equal to ``F.cross_entropy`` on those logits (soft-capped where asked), in value and in the
    gradients of ``hidden``, ``weight`` and ``bias``, each computed only where it is required.
    Labels are *not* shifted.

    Args:
        hidden: ``[..., H]``, fp64, fp32, bf16 or fp16.
        weight: ``[V, H]``, any of these.
        labels: integers ``[...]``, in ``[0, V)`` or ``ignore_index``.
        bias: ``[V]``.
        reduction: ``"mean"`` over the labels that are not ignored (NaN if there are none, as in
            torch), ``"sum"``, or ``"none"``: ``[...]``, 0 where ignored.
        num_items: the sum is divided by this in place of the number of labels: the labels of all
            micro-batches together, so that accumulated gradients equal those of one large batch.
        softcap: c of ``c * tanh(z / c)``, applied last (Gemma).
        logit_scale: a factor of the logits (Cohere; Granite's is ``1 / logits_scaling``).
        chunk_tokens: rows taken together; chunk_vocab: words in a panel. Chosen if None.

    Returns:
        A scalar, or ``[...]``, in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
        IndexError: a label outside the vocabulary.
    """
    _check(hidden, weight, labels, bias)
    return _reduced(
        hidden, weight, labels, bias, ignore_index, reduction, num_items,
        softcap, logit_scale, chunk_tokens, chunk_vocab,
    )[0]  # fmt: skip


def _reduced(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Any = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
    want_entropy: bool = False,
    counter: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`linear_cross_entropy` with its by-products: z_y - max z, and the entropy."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; it may be 'mean', 'sum' or 'none'")
    for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
        if value is not None and not (math.isfinite(value) and value != 0):
            raise ValueError(f"{name} is {value}; it must be finite and not 0")
    grad = torch.is_grad_enabled()
    want = [grad and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    if reduction == "none" and (want[1] or want[2]):
        # Rows may get different factors from above, which one sum over rows cannot take.
        def head(rows: Tensor) -> Tensor:
            return nn.functional.linear(rows, weight, bias)

        losses = head_cross_entropy(
            hidden, head, labels, ignore_index=ignore_index, reduction="none",
            softcap=softcap, logit_scale=logit_scale, chunk_tokens=chunk_tokens,
        )  # fmt: skip
        return losses, torch.zeros_like(losses), torch.zeros_like(losses)
    losses, margin, entropy, *_ = _linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1), ignore_index,
        float(softcap or 0.0), float(logit_scale), _compute_dtype(hidden, weight),
        chunk_tokens or 0, chunk_vocab or 0, *want, want_entropy, counter,
    )  # fmt: skip
    shaped = losses.view(labels.shape)
    loss = _reduce(shaped, labels, ignore_index, reduction, num_items)
    return loss, margin.view(labels.shape), entropy.view(labels.shape) if want_entropy else entropy


def head_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items: Tensor | float | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """The same for any output layer: quantized, with LoRA, with hooks, more than one matrix.

    ``head`` maps ``[rows, H]`` to logits ``[rows, V]``. Chunks of rows go through it under
    gradient checkpointing, so one chunk's logits are held at a time, and whatever ``head`` trains
    gets its gradient; the price is that each chunk's logits are computed twice.
    """
    _check_labels(hidden, labels)
    flat, index = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    kept = (index != ignore_index).nonzero().squeeze(1)
    rows = chunk_tokens or 256

    def losses_of(chunk: Tensor, targets: Tensor) -> Tensor:
        z = head(chunk)
        z = z if z.dtype == torch.float64 else z.float()
        if logit_scale != 1.0:
            z = z * logit_scale
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        return nn.functional.cross_entropy(z, targets, reduction="none")

    parts = []
    for start in range(0, len(kept), rows):
        at = kept[start : start + rows]
        chunk, targets = flat.index_select(0, at), index[at]
        if torch.is_grad_enabled():
            parts.append(checkpoint(losses_of, chunk, targets, use_reentrant=False))
        else:
            parts.append(losses_of(chunk, targets))
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    # Adding 0 * hidden ties a batch without labels to the graph: its gradient is 0, not missing.
    losses = (flat[:, 0] * 0.0).to(wide)
    if parts:
        losses = losses.index_copy(0, kept, torch.cat(parts).to(wide))
    return _reduce(losses.view(labels.shape), labels, ignore_index, reduction, num_items)
