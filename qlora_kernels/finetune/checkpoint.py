"""Checkpoints that are complete or absent, hold no pickle, and say what they belong to.

A checkpoint is a folder ``checkpoint-<step>``. It is written under another name, every file and
the folder are synced, and one rename makes it appear; it goes away by one rename too, before its
files are deleted. So whatever kills the process, and whenever, each ``checkpoint-<step>`` that is
there is whole. ``manifest.json`` in it, written last, holds size and SHA-256 of every other file:
what a disk or a copy damaged later is noticed as well.

States of optimizers and schedulers are trees of numbers and tensors: the tree goes into JSON, the
tensors into safetensors (:func:`save_state`, :func:`load_state`). Nothing that is read back can run
code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import BadInput, RunError

__all__ = [
    "CheckpointStore",
    "DamagedCheckpoint",
    "load_state",
    "read_json",
    "replace_file",
    "save_state",
    "write_json",
]

MANIFEST = "manifest.json"
VERSION = 1


class DamagedCheckpoint(BadInput):
    """A checkpoint whose files are not those that were written."""


# --- the file system, in four verbs -------------------------------------------------------------
#
# Every change that a crash could cut in two goes through these (the tests count and kill here).


def _sync(path: Path) -> None:
    """Until this returns, what was written to a file, or the names in a folder, may be lost."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some file systems cannot sync a folder; there is nothing better to be had on them.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(fd)


def _rename(old: Path, new: Path) -> None:
    os.rename(old, new)


def _replace(old: Path, new: Path) -> None:
    os.replace(old, new)


def _delete(path: Path) -> None:
    shutil.rmtree(path)


def write_json(path: Path, value: Any) -> None:
    """``value`` as JSON, floats with all their digits. Not atomic: see :func:`replace_file`."""
    path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    """Raises DamagedCheckpoint where the file is absent or no JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}") from error


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """``write(aside)`` a file, then make it ``path`` in one step: the old one or the new is there.

    Raises:
        RunError: it could not be written; an old ``path`` is as it was.
    """
    # The suffix stays: matplotlib and others tell the format by it.
    aside = path.with_name(f".writing-{os.getpid()}-{path.name}")
    with _writing(path):
        try:
            write(aside)
            _sync(aside)
            _replace(aside, path)
            _sync(path.parent)
        finally:
            aside.unlink(missing_ok=True)


# What a system answers when a disk, a quota or a process's largest file is full.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def _writing(what: Path) -> Iterator[None]:
    """Errors of writing as one :class:`RunError` that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors writes from Rust and has the number in its words only, in one form or another.
        words = str(error)
        told = (f"(os error {n})" in words or f"code: {n}," in words for n in _FULL)
        if getattr(error, "errno", None) in _FULL or any(told):
            free = shutil.disk_usage(what.parent).free / 1e6
            reason = f"the disk is full ({free:,.0f} MB free)"
        else:
            reason = str(error)
        raise RunError(f"{what} could not be written: {reason}") from error


# --- trees of tensors ---------------------------------------------------------------------------


def _encode(value: Any, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        # safetensors refuses storage that tensors share; a part of a storage is as good as shared.
        if tensor.untyped_storage().nbytes() != tensor.nbytes or any(
            tensor.data_ptr() == other.data_ptr() for other in tensors.values()
        ):
            tensor = tensor.clone()
        tensors[where] = tensor
        return {"tensor": where}
    if isinstance(value, list):
        return [_encode(v, f"{where}.{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [_encode(v, f"{where}.{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, int)):
                raise TypeError(f"{where} has a key of {type(key).__name__}: {key!r}")
        return {"dict": [[k, _encode(v, f"{where}.{k}", tensors)] for k, v in value.items()]}
    raise TypeError(
        f"{where} is a {type(value).__name__}, which a checkpoint without pickles cannot hold"
    )


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "tuple":
            return tuple(_decode(v, tensors) for v in content)
        if kind == "dict":
            return {k: _decode(v, tensors) for k, v in content}
        raise ValueError(f"unknown kind {kind!r}")
    return value


def save_state(folder: Path, name: str, state: Any) -> None:
    """A tree of dicts, lists, tuples, numbers, strings and tensors as ``<name>.json`` and, where it
    has tensors, ``<name>.safetensors``.

    Raises:
        TypeError: it holds something else; the message says where.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, name, tensors)
    write_json(folder / f"{name}.json", tree)
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")


def load_state(folder: Path, name: str) -> Any:
    """What :func:`save_state` wrote; tensors on the CPU.

    Raises:
        DamagedCheckpoint: files that are absent, or do not belong together.
    """
    tree = read_json(folder / f"{name}.json")
    file = folder / f"{name}.safetensors"
    try:
        return _decode(tree, load_file(file) if file.is_file() else {})
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{folder / name} cannot be read: {error!r}") from error


# --- the folder of a run ------------------------------------------------------------------------

_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointStore:
    """The checkpoints of one run, in its folder. One process at a time: see :meth:`lock`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, ascending."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(p.name) for p in self.folder.iterdir() if p.is_dir())
        return sorted(int(m[1]) for m in found if m)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder; a killed process lets go of it by itself.

        Raises:
            BadInput: another process holds it.
        """
        try:
            import fcntl
        except ImportError:  # not a Unix
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "a+") as file:
            try:
                # Of the process, not of the file: workers of a data loader do not inherit it.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BadInput(
                    f"another process is writing to {self.folder}: wait for it, stop it, or give "
                    "another output_dir"
                ) from error
            yield

    def forget(self) -> None:
        """Takes the folder away again where nothing has come into it."""
        if [p.name for p in self.folder.iterdir()] == [".lock"]:
            shutil.rmtree(self.folder)

    def sweep(self) -> None:
        """Deletes what a killed process left half-written or half-deleted."""
        for path in self.folder.glob(".writing-*"):
            _delete(path) if path.is_dir() else path.unlink()
        for path in self.folder.glob(".deleting-*"):
            _delete(path)

    def write(self, step: int, fill: Callable[[Path], None]) -> Path:
        """Makes ``checkpoint-<step>`` of what ``fill(folder)`` writes into an empty folder.

        Raises:
            RunError: it could not be written; all other checkpoints are as they were.
        """
        final = self.path(step)
        aside = self.folder / f".writing-{os.getpid()}-{final.name}"
        with _writing(final):
            try:
                aside.mkdir(parents=True)
                fill(aside)
                files = sorted(p for p in aside.rglob("*") if p.is_file())
                manifest = {
                    "version": VERSION,
                    "step": step,
                    "files": {str(p.relative_to(aside)): _digest(p) for p in files},
                }
                write_json(aside / MANIFEST, manifest)
                for path in [*files, aside / MANIFEST]:
                    _sync(path)
                for path in [p for p in aside.rglob("*") if p.is_dir()]:
                    _sync(path)
                _sync(aside)
                _rename(aside, final)
                _sync(self.folder)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
        return final

    def remove(self, step: int) -> None:
        """Deletes a checkpoint; killed in the middle, it is either whole or gone."""
        path = self.path(step)
        aside = self.folder / f".deleting-{os.getpid()}-{path.name}"
        _rename(path, aside)
        _sync(self.folder)
        _delete(aside)

    def rotate(self, keep: int | None, protect: int | None = None) -> None:
        """Deletes the oldest checkpoints but ``keep`` (at least the newest stays; all, if None);
        that of step ``protect`` stays as well."""
        if keep is None or keep <= 0:
            return
        steps = self.steps()
        for step in steps[:-keep]:
            if step != protect:
                self.remove(step)

    def put_aside(self, step: int, why: str) -> Path:
        """Renames a checkpoint so that it is none any more, and keeps its files."""
        for number in range(1000):
            suffix = f"-{number}" if number else ""
            path = self.folder / f"{why}-{self.path(step).name}{suffix}"
            if not path.exists():
                _rename(self.path(step), path)
                _sync(self.folder)
                return path
        raise RunError(f"{self.folder} holds a thousand {why} checkpoints")

    def verify(self, step: int) -> None:
        """Raises DamagedCheckpoint where a file is absent, or not what was written."""
        path = self.path(step)
        manifest = read_json(path / MANIFEST)
        try:
            version, files = manifest["version"], dict(manifest["files"])
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedCheckpoint(f"{path / MANIFEST} is not a manifest ({error!r})") from error
        if version > VERSION:
            raise DamagedCheckpoint(
                f"{path} was written by a later version (format {version}, this one reads "
                f"{VERSION})"
            )
        for name, digest in files.items():
            file = path / name
            if not file.is_file():
                raise DamagedCheckpoint(f"{path} lacks {name}")
            if _digest(file) != digest:
                raise DamagedCheckpoint(f"{file} is not what was written (its checksum differs)")

    def latest(self) -> tuple[int | None, list[str]]:
        """The newest intact checkpoint's step, and what is wrong with newer ones."""
        wrong = []
        for step in reversed(self.steps()):
            try:
                self.verify(step)
            except DamagedCheckpoint as error:
                wrong.append(str(error))
            else:
                return step, wrong
        return None, wrong


def _digest(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
