"""Checkpoints: whole or absent, nothing in them that could run, damage noticed."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections import OrderedDict
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from qlora_kernels.finetune import checkpoint
from qlora_kernels.finetune.checkpoint import (
    CheckpointStore,
    DamagedCheckpoint,
    load_state,
    replace_file,
    save_state,
)
from qlora_kernels.finetune.errors import BadInput, RunError


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run")


def fill(folder):
    (folder / "a.txt").write_text("one")
    (folder / "inner").mkdir()
    (folder / "inner" / "b.bin").write_bytes(b"two" * 1000)


def written(store, *steps):
    for step in steps:
        store.write(step, fill)
    return store


@contextmanager
def files_no_larger_than(size):
    """The kernel itself refuses larger ones: as near to a full disk as a test comes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- states -------------------------------------------------------------------------------------


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_state_comes_back_as_it_was(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": whole}, 1: {"exp_avg": whole[1]}},
        "param_groups": [{"lr": 1 / 3, "betas": (0.9, 0.999), "params": [0, 1], "foreach": None}],
        "text": "ü",
        "empty": {},
        "flag": True,
        "strided": whole.t(),
        "bf16": torch.randn(5).bfloat16(),
        "same again": whole,
    }
    save_state(tmp_path, "optimizer", state)
    assert same(load_state(tmp_path, "optimizer"), state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["optimizer.json", "optimizer.safetensors"]


def test_states_without_tensors_and_of_numpy_are_json_alone(tmp_path):
    save_state(tmp_path, "scheduler", {"lr": np.float64(1e-3), "last": [float("inf"), 1e-310]})
    assert load_state(tmp_path, "scheduler") == {"lr": 1e-3, "last": [float("inf"), 1e-310]}
    assert not (tmp_path / "scheduler.safetensors").exists()


def test_real_optimizers_go_on_to_the_bit(tmp_path):
    def steps(optimizer, parameter, count):
        for _ in range(count):
            optimizer.zero_grad()
            (parameter**2).sum().backward()
            optimizer.step()

    for cls in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor):
        one, other = (torch.nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6)) for _ in range(2))
        straight = cls([one], lr=0.1)
        steps(straight, one, 5)
        first = cls([other], lr=0.1)
        steps(first, other, 2)
        save_state(tmp_path, cls.__name__, first.state_dict())
        second = cls([other], lr=0.1)
        second.load_state_dict(load_state(tmp_path, cls.__name__))
        steps(second, other, 3)
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "state, where",
    [
        ({"a": {"b": {1, 2}}}, "s.a.b is a set"),
        ({"a": [None, print]}, "s.a.1 is a builtin_function"),
        ({(1, 2): 3}, "s has a key of tuple"),
    ],
)
def test_what_only_a_pickle_could_hold_is_refused(tmp_path, state, where):
    with pytest.raises(TypeError, match=where):
        save_state(tmp_path, "s", state)


def test_a_subclass_of_dict_comes_back_as_a_dict(tmp_path):
    save_state(tmp_path, "s", OrderedDict(b=1, a=2))
    assert list(load_state(tmp_path, "s").items()) == [("b", 1), ("a", 2)]


@pytest.mark.parametrize(
    "text", ["", "{", '{"tensor": "absent"}', '{"pickle": "x"}', '{"a": 1, "b": 2}', "{}"]
)
def test_a_state_that_cannot_be_read_is_damage(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match="s"):
        load_state(tmp_path, "s")


def test_truncated_tensors_are_damage(tmp_path):
    save_state(tmp_path, "s", {"w": torch.arange(100.0)})
    file = tmp_path / "s.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(DamagedCheckpoint, match="cannot be read"):
        load_state(tmp_path, "s")


# --- one file -----------------------------------------------------------------------------------


def test_a_file_is_the_old_one_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    path.write_text("old")

    def half(aside):
        assert path.read_text() == "old"
        aside.write_text("ne")
        raise OSError(errno.EIO, "the cable fell out")

    with pytest.raises(RunError, match="the cable fell out"):
        replace_file(path, half)
    assert path.read_text() == "old"
    replace_file(path, lambda aside: aside.write_text("new"))
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"]


def test_a_file_that_the_disk_cannot_hold(tmp_path):
    path = tmp_path / "big"
    path.write_text("old")
    with (
        files_no_larger_than(1 << 14),
        pytest.raises(RunError, match=r"big could not be written: the disk is full \([\d,]+ MB"),
    ):
        replace_file(path, lambda aside: aside.write_bytes(bytes(1 << 16)))
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# --- the folder of a run ------------------------------------------------------------------------


def test_written_checkpoints_are_found_in_order_and_intact(store):
    assert store.steps() == [] and store.latest() == (None, [])
    written(store, 10, 9, 100)
    (store.folder / "checkpoint-x").mkdir()
    (store.folder / "checkpoint-7").write_text("a file")
    assert store.steps() == [9, 10, 100]
    assert store.latest() == (100, [])
    assert (store.path(9) / "inner" / "b.bin").read_bytes() == b"two" * 1000


def test_every_file_and_folder_is_synced_before_the_rename(store, monkeypatch):
    calls = []
    for name in ("_sync", "_rename"):
        real = getattr(checkpoint, name)

        def spy(path, *rest, name=name, real=real):
            calls.append((name, path.name))
            real(path, *rest)

        monkeypatch.setattr(checkpoint, name, spy)
    store.write(1, fill)
    names = [name for _, name in calls]
    rename = calls.index(("_rename", f".writing-{os.getpid()}-checkpoint-1"))
    assert {"a.txt", "b.bin", "manifest.json", "inner"} <= set(names[:rename])
    assert calls[rename - 1] == ("_sync", f".writing-{os.getpid()}-checkpoint-1")
    assert calls[rename + 1 :] == [("_sync", "run")]


@pytest.mark.parametrize(
    "error, told",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (OSError(errno.EIO, "Input/output error"), "\\[Errno 5\\] Input"),
    ],
)
def test_a_write_that_fails_leaves_the_others_as_they_were(store, error, told):
    written(store, 1, 2)

    def failing(folder):
        fill(folder)
        raise error

    with pytest.raises(RunError, match=f"checkpoint-3 could not be written: {told}"):
        store.write(3, failing)
    assert store.steps() == [1, 2] and store.latest() == (2, [])
    assert sorted(p.name for p in store.folder.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_tensors_that_the_disk_cannot_hold(store):
    """safetensors writes from Rust, and tells it in words of its own."""
    written(store, 1)
    with (
        files_no_larger_than(1 << 14),
        pytest.raises(RunError, match="checkpoint-2 could not be written: the disk is full"),
    ):
        store.write(2, lambda folder: save_state(folder, "s", {"w": torch.zeros(1 << 16)}))
    assert store.latest() == (1, [])


def test_rotation(store):
    written(store, 1, 2, 3, 4, 5)
    store.rotate(None)
    assert store.steps() == [1, 2, 3, 4, 5]
    store.rotate(2, protect=1)
    assert store.steps() == [1, 4, 5]
    store.rotate(1)
    assert store.steps() == [5]
    assert [p.name for p in store.folder.iterdir()] == ["checkpoint-5"]


def test_a_checkpoint_is_gone_at_once_and_deleted_afterwards(store, monkeypatch):
    written(store, 1, 2)

    def killed(path):
        assert store.steps() == [2]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_delete", killed)
        with pytest.raises(KeyboardInterrupt):
            store.remove(1)
    (store.folder / ".writing-1-checkpoint-3").mkdir()
    (store.folder / ".writing-1-figures.json").write_text("half")
    store.sweep()
    assert [p.name for p in store.folder.iterdir()] == ["checkpoint-2"]


def damage(store, step, how):
    path = store.path(step) / "inner" / "b.bin"
    manifest = store.path(step) / "manifest.json"
    if how == "a byte":
        content = bytearray(path.read_bytes())
        content[1000] ^= 1
        path.write_bytes(content)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "missing":
        path.unlink()
    elif how == "no manifest":
        manifest.unlink()
    elif how == "half a manifest":
        manifest.write_text(manifest.read_text()[:30])
    elif how == "another manifest":
        manifest.write_text("[1, 2]")
    elif how == "from the future":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 99}))


@pytest.mark.parametrize(
    "how, told",
    [
        ("a byte", r"b\.bin is not what was written"),
        ("truncated", r"b\.bin is not what was written"),
        ("missing", r"lacks inner"),
        ("no manifest", r"manifest\.json cannot be read"),
        ("half a manifest", r"manifest\.json cannot be read"),
        ("another manifest", "is not a manifest"),
        ("from the future", "later version"),
    ],
)
def test_damage_is_noticed_and_the_one_before_is_taken(store, how, told):
    written(store, 1, 2)
    damage(store, 2, how)
    with pytest.raises(DamagedCheckpoint, match=told):
        store.verify(2)
    step, (wrong,) = store.latest()
    assert step == 1 and "checkpoint-2" in wrong


def test_putting_aside_keeps_the_files(store):
    written(store, 3)
    assert store.put_aside(3, "damaged").name == "damaged-checkpoint-3"
    written(store, 3)
    aside = store.put_aside(3, "damaged")
    assert aside.name == "damaged-checkpoint-3-1" and (aside / "a.txt").read_text() == "one"
    assert store.steps() == []


def test_one_process_at_a_time(store):
    child = (
        "import sys; from qlora_kernels.finetune.checkpoint import CheckpointStore\n"
        f"with CheckpointStore({str(store.folder)!r}).lock():\n"
        "    print('held', flush=True); sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", child]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(BadInput, match="another process is writing to"), store.lock():
                pass
            other.kill()  # who is killed lets go
            other.wait()
            with store.lock():
                pass
        finally:
            other.kill()


def test_a_folder_with_nothing_in_it_is_taken_away_again(store):
    with store.lock():
        store.forget()
    assert not store.folder.exists()
    with store.lock():
        (store.folder / "mine.txt").write_text("kept")
        store.forget()
    assert (store.folder / "mine.txt").exists()
