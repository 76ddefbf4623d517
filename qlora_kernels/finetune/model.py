"""The model's side files, read with errors that name them; what tells one model from another."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from .errors import BadInput

__all__ = ["fingerprint_model", "load_tokenizer"]


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


def fingerprint_model(folder: Path) -> str:
    """A digest of the configuration, of every weight file's size and header, and of a thousand
    samples of its contents: reading all of a large model would take longer than loading it."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json" and "token" not in path.name:
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
                for position in range(0, size, max(4096, size // 1000)):
                    file.seek(position)
                    digest.update(file.read(4096))
    return digest.hexdigest()
