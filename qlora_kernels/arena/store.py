"""The votes, in SQLite: what was shown to whom, and what they said.

A vote names a *showing*, by a token that only that rater was given; so a vote for a pair that was
never shown has nothing to name, and one that is sent twice finds itself there. Each is on the disk
(``synchronous=FULL``) before it is acknowledged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..evaluate.records import Reply
from ..finetune.errors import BadInput
from .pairing import Shown, choose

__all__ = ["BETTER", "GUESSES", "NotShown", "Showing", "Store", "Vote", "VotedOtherwise"]

SCHEMA = 1
BETTER = ("left", "right", "tie")
GUESSES = ("left", "right", "neither", "unsure")

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE replies (
    id INTEGER PRIMARY KEY,
    question_id TEXT NOT NULL,   -- JSON: a number and its digits as text are different ids
    category TEXT,
    question TEXT NOT NULL,
    model TEXT NOT NULL,
    reply TEXT NOT NULL,
    UNIQUE (question_id, model)
) STRICT;
CREATE TABLE showings (
    token TEXT PRIMARY KEY,
    rater TEXT NOT NULL,
    left_id INTEGER NOT NULL REFERENCES replies (id),
    right_id INTEGER NOT NULL REFERENCES replies (id),
    asked TEXT,                  -- whose reply the rater was asked to find; NULL where not asked
    shown REAL NOT NULL,         -- seconds since 1970
    skipped INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX showings_of_a_rater ON showings (rater);
CREATE TABLE votes (
    token TEXT PRIMARY KEY REFERENCES showings (token),
    better TEXT NOT NULL CHECK (better IN ('left', 'right', 'tie')),
    guess TEXT CHECK (guess IN ('left', 'right', 'neither', 'unsure')),
    voted REAL NOT NULL
) STRICT;
"""


class NotShown(Exception):
    """A vote for something that this rater was never shown."""


class VotedOtherwise(Exception):
    """A second, different vote on what was voted on already."""


@dataclass(frozen=True)
class Showing:
    """A question and two replies, as one rater sees them."""

    token: str
    question: str
    left: str
    right: str
    asked: str | None


@dataclass(frozen=True)
class Vote:
    """A vote with everything that belongs to it.

    Attributes:
        rater: a name made of the rater's secret, which it does not give away.
        better: one of :data:`BETTER`.
        asked: whose reply was to be found; guess: one of :data:`GUESSES`. None where not asked.
    """

    question_id: int | str
    category: str | None
    left: str
    right: str
    rater: str
    better: str
    asked: str | None
    guess: str | None
    voted: float


class Store:
    """A file of votes, open. One writer at a time inside a process; several processes may read.

    Args:
        path: the file.
        create: makes it if it is not there.

    Raises:
        BadInput: no such file, no file of votes, one of another version.
    """

    def __init__(self, path: str | Path, create: bool = False) -> None:
        self.path = Path(path).expanduser()
        if not create and not self.path.is_file():
            raise BadInput(f"there is no file {self.path}: `qlora arena --replies ...` makes it")
        if not self.path.parent.is_dir():
            raise BadInput(f"there is no folder {self.path.parent}")
        self.lock = threading.Lock()
        self.active: list[int] = []  # replies that are shown in this run
        try:
            self.db = sqlite3.connect(
                self.path, timeout=30, check_same_thread=False, isolation_level=None
            )
            self.db.row_factory = sqlite3.Row
            self.db.execute("PRAGMA journal_mode=WAL")
            self.db.execute("PRAGMA synchronous=FULL")
            self.db.execute("PRAGMA foreign_keys=ON")
            self._prepare(create)
        except sqlite3.Error as error:
            raise BadInput(f"{self.path} cannot be used as a file of votes: {error}") from error

    def _prepare(self, create: bool) -> None:
        with self._transaction():
            tables = {r[0] for r in self.db.execute("SELECT name FROM sqlite_master")}
            if not tables and create:
                for statement in _TABLES.split(";\n"):
                    if statement.strip():
                        self.db.execute(statement)
                self.db.execute("INSERT INTO meta VALUES ('schema', ?)", (str(SCHEMA),))
            elif "meta" not in tables or "votes" not in tables:
                raise BadInput(f"{self.path} is an SQLite file of something else")
            (version,) = self.db.execute("SELECT value FROM meta WHERE name='schema'").fetchone()
            if version != str(SCHEMA):
                raise BadInput(f"{self.path} has schema {version}, this version reads {SCHEMA}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self.lock:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self.db.execute("ROLLBACK")
                raise
            self.db.execute("COMMIT")

    def close(self) -> None:
        """Closes the file."""
        with self.lock:
            self.db.close()

    # -- what is compared --

    def add(self, replies: Sequence[Reply]) -> None:
        """Takes replies in, and shows these and no others from now on.

        Raises:
            BadInput: one differs from what was voted on under the same question and model, or no
                question has replies of two models.
        """
        active = []
        with self._transaction():
            for reply in replies:
                name = json.dumps(reply.question_id)
                question = reply.question
                if reply.history:
                    before = [f"{m['role']}: {m['content']}" for m in reply.history]
                    question = "\n\n".join([*before, f"user: {question}"])
                row = self.db.execute(
                    "SELECT id, reply, question FROM replies WHERE question_id=? AND model=?",
                    (name, reply.model),
                ).fetchone()
                if row is None:
                    row_id = self.db.execute(
                        "INSERT INTO replies (question_id, category, question, model, reply) "
                        "VALUES (?, ?, ?, ?, ?)",
                        (name, reply.category, question, reply.model, reply.reply),
                    ).lastrowid
                elif (row["reply"], row["question"]) != (reply.reply, question):
                    raise BadInput(
                        f"{self.path} holds another reply of {reply.model} to question "
                        f"{reply.question_id}: votes on other replies belong in a file of their own"
                    )
                else:
                    row_id = row["id"]
                active.append(row_id)
            rows = self._replies(active)
            if not any(len(models) > 1 for models in _by_question(rows).values()):
                raise BadInput("no question has replies of two models: there is nothing to compare")
        self.active = active

    def _replies(self, ids: Sequence[int]) -> list[sqlite3.Row]:
        wanted = set(ids)
        rows = self.db.execute("SELECT * FROM replies ORDER BY id")
        return [row for row in rows if row["id"] in wanted]

    def models(self) -> list[str]:
        """Names of all models that have replies here."""
        return [r[0] for r in self.db.execute("SELECT DISTINCT model FROM replies ORDER BY model")]

    # -- raters --

    def next(self, rater: str, asked: str | None) -> Showing | None:
        """What a rater sees next; again what they saw last, if they have not voted on it.

        Args:
            rater: the secret of their browser.
            asked: whose reply they are asked to find.

        Returns:
            None if they have seen every pair.
        """
        with self._transaction():
            row = self.db.execute(
                "SELECT s.* FROM showings s LEFT JOIN votes v USING (token) "
                "WHERE s.rater=? AND v.token IS NULL AND s.skipped=0 ORDER BY s.rowid DESC",
                (rater,),
            ).fetchone()
            active = set(self.active)
            if row is not None and {row["left_id"], row["right_id"]} <= active:
                return self._showing(row["token"])
            replies = {
                question: [(r["id"], r["model"]) for r in rows]
                for question, rows in _by_question(self._replies(self.active)).items()
            }
            past = [
                Shown(r["left_id"], r["right_id"], r["rater"] == rater, bool(r["counts"]))
                for r in self.db.execute(
                    "SELECT s.left_id, s.right_id, s.rater, "
                    # An unanswered showing may still be answered; an old one will not be.
                    "(v.token IS NOT NULL OR (s.skipped=0 AND s.shown > ?)) AS counts "
                    "FROM showings s LEFT JOIN votes v USING (token)",
                    (time.time() - 600,),
                )
            ]
            pair = choose(replies, past)
            if pair is None:
                return None
            token = secrets.token_urlsafe(18)
            self.db.execute(
                "INSERT INTO showings (token, rater, left_id, right_id, asked, shown) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (token, rater, *pair, asked, time.time()),
            )
            return self._showing(token)

    def _showing(self, token: str) -> Showing:
        row = self.db.execute(
            "SELECT l.question, l.reply, r.reply, s.asked FROM showings s "
            "JOIN replies l ON l.id=s.left_id JOIN replies r ON r.id=s.right_id WHERE s.token=?",
            (token,),
        ).fetchone()
        return Showing(token, row[0], row[1], row[2], row[3])

    def vote(self, rater: str, token: str, better: str, guess: str | None) -> tuple[str, str]:
        """Records a vote; the names of the left and the right model.

        The same vote again changes nothing and answers the same.

        Raises:
            NotShown: this rater was not shown that.
            VotedOtherwise: the showing has another vote already.
            ValueError: no such answer.
        """
        if better not in BETTER or guess not in (*GUESSES, None):
            raise ValueError(f"better is one of {BETTER}, guess one of {GUESSES}")
        with self._transaction():
            row = self.db.execute(
                "SELECT s.asked, l.model AS left, r.model AS right FROM showings s "
                "JOIN replies l ON l.id=s.left_id JOIN replies r ON r.id=s.right_id "
                "WHERE s.token=? AND s.rater=?",
                (token, rater),
            ).fetchone()
            if row is None:
                raise NotShown("you were not shown such a pair")
            if (row["asked"] is None) != (guess is None):
                raise ValueError("guess belongs to a showing that asks for one, and only there")
            there = self.db.execute("SELECT * FROM votes WHERE token=?", (token,)).fetchone()
            if there is None:
                self.db.execute(
                    "INSERT INTO votes VALUES (?, ?, ?, ?)", (token, better, guess, time.time())
                )
            elif (there["better"], there["guess"]) != (better, guess):
                raise VotedOtherwise("you have voted on this pair already, otherwise")
            return row["left"], row["right"]

    def skip(self, rater: str, token: str) -> None:
        """Lets a rater pass a pair by; they do not see it again, and no vote is counted.

        Raises:
            NotShown: this rater was not shown that.
        """
        with self._transaction():
            done = self.db.execute(
                "UPDATE showings SET skipped=1 WHERE token=? AND rater=? "
                "AND token NOT IN (SELECT token FROM votes)",
                (token, rater),
            )
            if done.rowcount == 0:
                raise NotShown("you were not shown such a pair, or have voted on it")

    def progress(self, rater: str) -> tuple[int, int]:
        """How many votes a rater has given, and how many pairs there are for them in all."""
        with self.lock:
            (mine,) = self.db.execute(
                "SELECT COUNT(*) FROM votes JOIN showings USING (token) WHERE rater=?", (rater,)
            ).fetchone()
            groups = _by_question(self._replies(self.active)).values()
        return mine, sum(len(g) * (len(g) - 1) // 2 for g in groups)

    # -- afterwards --

    def votes(self) -> list[Vote]:
        """All votes, in the order in which they came."""
        with self.lock:
            rows = self.db.execute(
                "SELECT l.question_id, l.category, l.model AS left, r.model AS right, s.rater, "
                "v.better, s.asked, v.guess, v.voted FROM votes v JOIN showings s USING (token) "
                "JOIN replies l ON l.id=s.left_id JOIN replies r ON r.id=s.right_id "
                "ORDER BY v.rowid"
            ).fetchall()
        return [
            Vote(
                json.loads(r["question_id"]),
                r["category"],
                r["left"],
                r["right"],
                "rater-" + hashlib.sha256(r["rater"].encode()).hexdigest()[:8],
                r["better"],
                r["asked"],
                r["guess"],
                r["voted"],
            )
            for r in rows
        ]


def _by_question(rows: Sequence[sqlite3.Row]) -> dict[str, list[sqlite3.Row]]:
    found: dict[str, list[sqlite3.Row]] = {}
    for row in rows:
        found.setdefault(row["question_id"], []).append(row)
    return found
