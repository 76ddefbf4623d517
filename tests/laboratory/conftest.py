"""A small LLaMA, trained here on the repository's own pages, in 16 bits and from nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_kernels.formats import FORMATS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Formats that are learned or derived are registered: not for other tests."""
    known = dict(FORMATS)
    yield
    FORMATS.clear()
    FORMATS.update(known)


@pytest.fixture(scope="session")
def pages(tmp_path_factory) -> Path:
    """The documentation of this repository as one text."""
    path = tmp_path_factory.mktemp("text") / "pages.txt"
    path.write_text("\n".join(p.read_text() for p in sorted((ROOT / "docs").glob("*.md"))))
    return path


@pytest.fixture(scope="session")
def trained(pages, tmp_path_factory) -> Path:
    """The folder of a model that was trained for thirty steps. Not to be written to."""
    from qlora_kernels.laboratory.models import self_trained

    folder = tmp_path_factory.mktemp("models") / "self-trained"
    return self_trained(folder, steps=30, text=str(pages), say=lambda text: None)
