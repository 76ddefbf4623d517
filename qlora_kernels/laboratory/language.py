"""What a format loses of a language model: perplexity, and KL divergence from the 16-bit model.

The unit of every interval is the window of text: tokens of one window depend on each other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..statistics import bootstrap_interval, detectable_difference, mean_interval, paired_difference

__all__ = ["Reference", "losses", "perplexity", "versus"]


@torch.no_grad()
def _log_probabilities(model: Any, row: Tensor) -> Tensor:
    """fp32 ``[length - 1, vocabulary]``: what the model says of each next token."""
    logits = model(input_ids=row[None].to(model.device)).logits[0, :-1]
    return logits.float().log_softmax(-1)


def losses(model: Any, windows: Tensor) -> list[float]:
    """The mean loss of each window's tokens, in nats; ``windows`` int64 ``[n, length]``."""
    found = []
    for row in windows:
        said = _log_probabilities(model, row)
        found.append(-float(said.gather(1, row[1:, None].to(said.device)).double().mean()))
    return found


class Reference:
    """What the 16-bit model says of each window, kept in a temporary file, to compare with.

    Args:
        model: the 16-bit model, as it is now.
        windows: int64 ``[n, length]``.
    """

    def __init__(self, model: Any, windows: Tensor) -> None:
        self.windows = windows
        self.losses: list[float] = []
        self._file = tempfile.TemporaryFile()
        self._said: np.memmap | None = None
        for i, row in enumerate(windows):
            said = _log_probabilities(model, row)
            if self._said is None:
                shape = (len(windows), *said.shape)
                self._said = np.memmap(self._file, np.float32, "w+", shape=shape)
            self._said[i] = said.cpu().numpy()
            self.losses.append(
                -float(said.gather(1, row[1:, None].to(said.device)).double().mean())
            )

    def compare(self, model: Any) -> tuple[list[float], list[float]]:
        """``model``'s losses, and its KL divergence from the 16-bit one (the sum over the
        vocabulary of ``p16 log(p16 / p)``, the mean of a window's tokens); nats, one a window."""
        assert self._said is not None
        loss, divergence = [], []
        for i, row in enumerate(self.windows):
            said = _log_probabilities(model, row)
            theirs = torch.from_numpy(np.array(self._said[i])).to(said.device)
            loss.append(-float(said.gather(1, row[1:, None].to(said.device)).double().mean()))
            # Sums of fp32 differences of near equals: in float64 a token at a time, of vocabulary.
            each = (theirs.exp() * (theirs - said)).sum(-1, dtype=torch.float64)
            divergence.append(float(each.mean()))
        return loss, divergence

    def close(self) -> None:
        """Gives the file back."""
        self._said = None
        self._file.close()


def _exp_mean(values: np.ndarray, axis: int | None = None) -> Any:
    return np.exp(values.mean(axis))


def perplexity(losses: Sequence[float]) -> dict[str, float]:
    """exp of the mean loss of equally long windows, with its interval."""
    low, high = bootstrap_interval(losses, _exp_mean)
    return {"value": float(np.exp(np.mean(losses))), "low": low, "high": high}


def mean_of(values: Sequence[float]) -> dict[str, float]:
    """A mean with its interval."""
    low, high = mean_interval(values)
    return {"value": float(np.mean(values)), "low": low, "high": high}


def versus(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The mean difference, paired, its interval, and the smallest one that was to be seen."""
    mean, low, high = paired_difference(ours, theirs)
    seen = detectable_difference(np.subtract(ours, theirs))
    return {"mean": mean, "low": low, "high": high, "detectable": seen}
