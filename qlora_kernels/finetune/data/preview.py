"""One row as it will be trained: its trained tokens in colour."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qlora_kernels.finetune.data.types import IGNORE

if TYPE_CHECKING:
    from rich.text import Text

TRAINED = "bold green"
UNTRAINED = "dim"
SPECIAL = " on grey23"


def preview(row: Mapping[str, Any], tokenizer: Any, max_tokens: int = 1000) -> Text:
    """A row of :class:`Samples` as a ``rich.text.Text``.

    Trained tokens are green, the others dim, special tokens on a grey ground; samples that are
    packed into the row are set apart by a line.
    """
    from rich.text import Text

    text = Text()
    special = set(tokenizer.all_special_ids)
    starts = {0}
    for length in row.get("segments", ()):
        starts.add(max(starts) + length)
    tokens = list(zip(row["input_ids"], row["labels"], strict=True))[:max_tokens]
    runs = groupby(
        enumerate(tokens),
        key=lambda item: (
            max(s for s in starts if s <= item[0]),
            item[1][1] != IGNORE,
            int(item[1][0]) in special,
        ),
    )
    segment = 0
    for (start, trained, is_special), run in runs:
        if start != segment:
            text.append("\n— next sample in this row —\n", UNTRAINED)
            segment = start
        ids = [int(token) for _, (token, _) in run]
        style = (TRAINED if trained else UNTRAINED) + (SPECIAL if is_special else "")
        text.append(
            tokenizer.decode(ids, clean_up_tokenization_spaces=False, skip_special_tokens=False),
            style,
        )
    if len(row["input_ids"]) > max_tokens:
        text.append(f"\n… and {len(row['input_ids']) - max_tokens:,} tokens more", UNTRAINED)
    return text
