"""MMLU as its authors publish it, and the prompts made of it.

A folder with ``dev/``, ``val/`` and ``test/``; in each ``<subject>_<split>.csv``, without a header,
a question a line: question, four choices, the letter of the right one. The examples shown before a
question are the first of its subject's ``dev`` file.
(Hendrycks et al. 2021, "Measuring Massive Multitask Language Understanding".)
"""

from __future__ import annotations

import csv
import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..finetune.errors import BadInput

__all__ = ["CATEGORIES", "LETTERS", "SPLITS", "Item", "Mmlu", "Subject", "prompt", "read_mmlu"]

LETTERS = "ABCD"
SPLITS = ("val", "test", "dev")
OTHER = "other"

# The four categories in which the authors report their 57 subjects.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "humanities": tuple(
        """
        formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy
        prehistory professional_law world_religions
        """.split()
    ),
    "social sciences": tuple(
        """
        econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy
        """.split()
    ),
    "STEM": tuple(
        """
        abstract_algebra anatomy astronomy college_biology college_chemistry
        college_computer_science college_mathematics college_physics computer_security
        conceptual_physics electrical_engineering elementary_mathematics high_school_biology
        high_school_chemistry high_school_computer_science high_school_mathematics
        high_school_physics high_school_statistics machine_learning
        """.split()
    ),
    OTHER: tuple(
        """
        business_ethics clinical_knowledge college_medicine global_facts human_aging management
        marketing medical_genetics miscellaneous nutrition professional_accounting
        professional_medicine virology
        """.split()
    ),
}
_CATEGORY_OF = {subject: name for name, subjects in CATEGORIES.items() for subject in subjects}


@dataclass(frozen=True)
class Item:
    """A question, its four choices, and which of them is right (0 to 3)."""

    question: str
    choices: tuple[str, str, str, str]
    answer: int


@dataclass(frozen=True)
class Subject:
    """A subject's questions, and the examples that are shown before each."""

    name: str
    items: tuple[Item, ...]
    examples: tuple[Item, ...]

    @property
    def category(self) -> str:
        """One of :data:`CATEGORIES`; a subject of your own is ``other``."""
        return _CATEGORY_OF.get(self.name, OTHER)


@dataclass(frozen=True)
class Mmlu:
    """What is asked: subjects by name, of one split."""

    split: str
    shots: int
    subjects: tuple[Subject, ...]

    def __len__(self) -> int:
        return sum(len(subject.items) for subject in self.subjects)

    @property
    def digest(self) -> str:
        """Hex SHA-256 of every question and example, in order."""
        return hashlib.sha256(repr((self.split, self.shots, self.subjects)).encode()).hexdigest()


def read_mmlu(
    folder: str | Path,
    split: str = "val",
    shots: int = 5,
    subjects: Sequence[str] | None = None,
    limit: int | None = None,
) -> Mmlu:
    """Questions of a split, and the examples before them, from a folder of CSV files.

    Args:
        folder: holds ``dev/``, and ``val/`` or ``test/``.
        split: which questions are asked: val, test or dev.
        shots: how many of ``dev``'s examples are shown; 0 needs no ``dev/``.
        subjects: only these.
        limit: the first so many questions of each subject.

    Raises:
        BadInput: a folder or file that is missing, or that is not as published, with its line.
    """
    folder = Path(folder).expanduser()
    if split not in SPLITS:
        raise BadInput(f"split is {split!r}; it may be {', '.join(SPLITS)}")
    if shots < 0 or (limit is not None and limit < 1):
        raise BadInput("the number of shots must be 0 or more, that of questions 1 or more")
    if split == "dev" and shots:
        raise BadInput("the examples come from dev, whose answers they show: ask it with 0 shots")
    place = folder / split
    if not place.is_dir():
        there = [name for name in SPLITS if (folder / name).is_dir()]
        has = f"it has {', '.join(there)}" if there else "it should hold dev/, val/ and test/"
        raise BadInput(f"there is no folder {place}: {folder} is not MMLU's ({has})")
    files = {p.name.removesuffix(f"_{split}.csv"): p for p in place.glob(f"*_{split}.csv")}
    if not files:
        raise BadInput(f"{place} holds no file <subject>_{split}.csv")
    for name in subjects or ():
        if name not in files:
            near = difflib.get_close_matches(name, files, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there is {', '.join(files)}"
            raise BadInput(f"{place} has no subject {name}{hint}")
    found = []
    for name in sorted(subjects or files):
        items = _read_csv(files[name])
        examples = _read_csv(folder / "dev" / f"{name}_dev.csv") if shots else []
        if len(examples) < shots:
            raise BadInput(
                f"{folder / 'dev' / f'{name}_dev.csv'} has {len(examples)} examples, {shots} are "
                "to be shown: lower the number of shots"
            )
        found.append(Subject(name, tuple(items[:limit]), tuple(examples[:shots])))
    return Mmlu(split, shots, tuple(found))


def _read_csv(path: Path) -> list[Item]:
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise BadInput(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 (byte {error.start})") from None
    rows = csv.reader(text.splitlines(keepends=True), strict=True)
    items = []
    try:
        for row in rows:
            if row:
                items.append(_item(row, f"{path}:{rows.line_num}"))
    except csv.Error as error:
        raise BadInput(f"{path}:{rows.line_num}: not CSV ({error})") from None
    if not items:
        raise BadInput(f"{path} is empty")
    return items


def _item(row: list[str], where: str) -> Item:
    if len(row) != 6:
        raise BadInput(
            f"{where}: {len(row)} columns; expected six: question, four choices, the letter"
        )
    question, *choices, letter = row
    if letter.strip() not in tuple(LETTERS):
        header = "; the published files have no header" if where.endswith(":1") else ""
        raise BadInput(f"{where}: the answer is {letter!r}; expected A, B, C or D{header}")
    if not question.strip():
        raise BadInput(f"{where}: the question is empty")
    a, b, c, d = (choice.strip() for choice in choices)
    return Item(question.strip(), (a, b, c, d), LETTERS.index(letter.strip()))


# --- prompts ------------------------------------------------------------------------------------


def prompt(subject: Subject, item: Item, shots: int | None = None) -> str:
    """The text before the letter, in the layout in which MMLU's figures are published.

    One line names the subject, the examples follow with their letters, then the question; it ends
    in ``Answer:``, without a blank.

    Args:
        shots: how many of the subject's examples; all if None.
    """
    examples = subject.examples if shots is None else subject.examples[:shots]
    topic = subject.name.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
    shown = "".join(f"{_asked(e)} {LETTERS[e.answer]}\n\n" for e in examples)
    return head + shown + _asked(item)


def _asked(item: Item) -> str:
    choices = "".join(f"{x}. {c}\n" for x, c in zip(LETTERS, item.choices, strict=True))
    return f"{item.question}\n{choices}Answer:"
