"""Text in windows of tokens: some to train on, some held out to measure on."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..finetune.data.prepare import PYTHON_DOCS
from ..finetune.errors import BadInput, bad_input

__all__ = ["Windows", "read_windows"]


@dataclass(frozen=True)
class Windows:
    """Tokens, int64 ``[n, length]`` each. No window shares text with another.

    Attributes:
        train: to train on.
        validation: to choose a learning rate by.
        test: to report on.
        source: what it was read from.
        digest: of all tokens, to tell texts apart.
    """

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor
    source: str
    digest: str

    @property
    def length(self) -> int:
        return self.test.shape[1]


def read_windows(
    source: str, tokenizer: Any, length: int = 128, test: int = 16, validation: int = 8
) -> Windows:
    """Windows of a text file, or of ``python-docs``: what the installed Python's standard library
    says of itself, one question and answer for each documented object.

    Of python-docs, a tenth of the objects is held out; of a file, the last fifth. Held-out windows
    are spread evenly over that.

    Args:
        length: tokens a window.
        test, validation: how many windows, at most.

    Raises:
        BadInput: no such file, not UTF-8, too short for the windows asked for.
    """
    if length < 2 or test < 2 or validation < 1:
        raise BadInput("a window has at least 2 tokens, and at least 2 windows are tested on")
    known, held = _python_docs() if source == PYTHON_DOCS else _from_file(source)
    train = _cut(tokenizer, known, length)
    rest = _cut(tokenizer, held, length)
    if len(train) < 1 or len(rest) < test + validation:
        raise BadInput(
            f"{source} gives {len(rest)} windows of {length} tokens to measure on (and "
            f"{len(train)} to train on); {test + validation} are asked for: lower --windows or "
            "--length, or give a longer text"
        )
    # The two kinds of held-out windows take turns, both spread over all that is held out.
    at = np.linspace(0, len(rest) - 1, test + validation).round().astype(int)
    chosen = np.linspace(0, test + validation - 1, validation).round().astype(int)
    is_validation = np.isin(np.arange(test + validation), chosen)
    rows = torch.from_numpy(at)
    digest = hashlib.sha256(train.numpy().tobytes() + rest[rows].numpy().tobytes()).hexdigest()
    return Windows(
        train,
        rest[rows[torch.from_numpy(is_validation)]],
        rest[rows[torch.from_numpy(~is_validation)]],
        source,
        digest[:16],
    )


def _python_docs() -> tuple[str, str]:
    from ..finetune.python_docs import examples

    with bad_input("text"):
        found = examples()
    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for example in found:
        group = str(example.group)
        if group in seen:  # each object is asked about twice, with one answer
            continue
        seen.add(group)
        words = "\n".join(str(message["content"]) for message in example.messages)
        parts[int(group[:8], 16) % 10 == 0].append(words)
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])


def _from_file(source: str) -> tuple[str, str]:
    path = Path(source).expanduser()
    if not path.is_file():
        names = [PYTHON_DOCS]
        if path.parent.is_dir():
            names += [str(path.parent / p.name) for p in path.parent.iterdir() if p.is_file()]
        near = difflib.get_close_matches(str(path), names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadInput(f"text: there is no file {path}{hint} (python-docs needs none)")
    try:
        words = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 (byte {error.start})") from error
    cut = words.rfind("\n", 0, len(words) * 4 // 5) + 1 or len(words) * 4 // 5
    return words[:cut], words[cut:]


def _cut(tokenizer: Any, words: str, length: int) -> torch.Tensor:
    ids = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(ids, dtype=torch.int64)
    return ids[: ids.numel() // length * length].view(-1, length)
