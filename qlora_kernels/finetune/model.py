"""The model's side files, read with errors that name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import BadInput

__all__ = ["load_tokenizer"]


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model's folder.

    Raises:
        BadInput: it is missing, or cannot be read.
    """
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in names):
        raise BadInput(
            f"{folder} holds no tokenizer ({', '.join(names)}): copy that of the base model there"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise BadInput(f"the tokenizer in {folder} cannot be read: {error}") from error
