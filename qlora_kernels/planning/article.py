"""The table of the QLoRA article (arXiv:2305.14314, figure 6), recomputed from configurations.

The article's training memory, batch 1, 512 tokens, LoRA of rank 64 on all linear layers, with the
4-bit model's own share, in MiB and GiB (which its "MB" and "GB" turn out to be).

**The model's share** is taken to be what torch's caching allocator has reserved once the model is
there: linear layers in NF4 with double quantization (4.127 bits), embeddings, output layer and
adapters in fp32, and the holes that quantization leaves: each weight is on the GPU in fp32, with a
copy, while it is quantized. The holes are found by running that sequence through
:class:`~.allocator.CachingAllocator`; there is no constant to fit.

How this was found, since a search can find what is not there: 144 ways to load (bits, dtypes,
copies, adapters; reserved or allocated; MB of 2^20 or 10^6) were tried against the four figures,
and this is the one within 1% on all. Its neighbours (other numbers of copies) agree within 0.7% on
13B, 33B and 65B, and are 1.5 to 2% off on 7B alone, whose weights of 8 MiB share segments of 20. So
three figures support the bits, the dtypes and the unit; the fourth only picked the copies.

**The rest**: fp32 gradients and two fp32 moments, 12 bytes for each of LoRA's parameters, and
checkpointed activations, the bf16 input of each layer (512 x hidden x 2 bytes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .allocator import MIB, CachingAllocator
from .models import MODELS, Model

__all__ = ["ARTICLE", "ArticleRow", "article_table", "full_finetuning"]

ARTICLE = {
    "llama-7b": (5046, 6.9),
    "llama-13b": (8476, 11.3),
    "llama-33b": (19302, 24.7),
    "llama-65b": (37074, 45.0),
}
"""Of each model: the 4-bit model's MB and all GB, as the article prints them."""

RANK, LENGTH, BLOCK, NESTED = 64, 512, 64, 256
FP32, BF16 = 4, 2


@dataclass(frozen=True)
class ArticleRow:
    """One model: recomputed parts in bytes, beside what the article prints."""

    name: str
    weights: int
    embeddings: int
    adapters: int
    holes: int
    gradients: int
    optimizer: int
    inputs: int
    article_base_mb: int
    article_total_gb: float

    @property
    def base(self) -> int:
        return self.weights + self.embeddings + self.adapters + self.holes

    @property
    def total(self) -> int:
        return self.base + self.gradients + self.optimizer + self.inputs

    @property
    def base_error(self) -> float:
        """Relative, ours against the article's."""
        return self.base / MIB / self.article_base_mb - 1

    @property
    def total_error(self) -> float:
        return self.total / 2**30 / self.article_total_gb - 1

    def to_json(self) -> dict[str, Any]:
        names = ("weights", "embeddings", "adapters", "holes", "gradients", "optimizer", "inputs")
        return {
            "model": self.name,
            **{f"{n}_bytes": getattr(self, n) for n in names},
            "base_mib": self.base / MIB,
            "total_gib": self.total / 2**30,
            "article_base_mb": self.article_base_mb,
            "article_total_gb": self.article_total_gb,
            "base_error": self.base_error,
            "total_error": self.total_error,
        }


def _layer(m: Model) -> list[tuple[int, int]]:
    kv = m.hidden // m.heads * m.kv_heads
    attention = [(m.hidden, m.hidden), (kv, m.hidden), (kv, m.hidden), (m.hidden, m.hidden)]
    return [*attention, (m.inner, m.hidden), (m.inner, m.hidden), (m.hidden, m.inner)]


def _quantize(device: CachingAllocator, values: int) -> int:
    """What quantizing one weight does to the allocator; the bytes that stay."""
    copies = [device.allocate(values * FP32) for _ in range(2)]
    blocks = -(-values // BLOCK)
    absmax = device.allocate(blocks * FP32)
    kept = [values // 2, 16 * FP32, FP32, 256 * FP32, blocks, -(-blocks // NESTED) * FP32]
    packed, *small = kept
    device.allocate(packed)
    device.allocate(small[0])  # the codebook
    shifted = device.allocate(blocks * FP32)  # absmax, less its mean
    for size in small[1:]:
        device.allocate(size)
    for block in (absmax, shifted, *copies):
        device.free(block)
    return sum(kept)


def _row(name: str) -> ArticleRow:
    m, device = MODELS[name], CachingAllocator()
    words = m.words * m.hidden * FP32
    weights = embeddings = adapters = 0
    shapes = _layer(m)
    device.allocate(words)
    for _ in range(m.layers):
        weights += sum(_quantize(device, n * k) for n, k in shapes)
        for _ in range(2):  # norms
            device.allocate(m.hidden * FP32)
            embeddings += m.hidden * FP32
    device.allocate(words)
    embeddings += 2 * words
    for _ in range(m.layers):
        for n, k in shapes:
            for features in (k, n):
                device.allocate(RANK * features * FP32)
                adapters += RANK * features * FP32
    return ArticleRow(
        name, weights, embeddings, adapters,
        holes=device.reserved - weights - embeddings - adapters,
        gradients=adapters, optimizer=2 * adapters,
        inputs=m.layers * LENGTH * m.hidden * BF16,
        article_base_mb=ARTICLE[name][0], article_total_gb=ARTICLE[name][1],
    )  # fmt: skip


def article_table() -> list[ArticleRow]:
    """All four models."""
    return [_row(name) for name in ARTICLE]


def full_finetuning(name: str = "llama-65b") -> int:
    """Bytes of finetuning all of a model in 16 bits: weights and gradients, and Adam's moments in
    fp32, 12 for each parameter; the article says "more than 780 GB" of 65B."""
    from .models import parameters_of

    return 12 * parameters_of(MODELS[name])
