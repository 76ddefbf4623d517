"""A paged optimizer where memory is short: its states are in a mapped file, which a limit on the
process's own memory does not count and the system may write out and drop at any moment.

The limit is ``RLIMIT_DATA``, which the kernel holds every process to (no rights, no control group
needed): anonymous memory and private mappings count, pages of a shared file do not, as they need
not stay. Three runs of one training are forked: free, paged below the limit with its pages thrown
out between the steps, and unpaged below the same limit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource")

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import ctypes, hashlib, json, mmap, os, resource, sys, traceback
import torch
from qlora_kernels import optim

torch.set_num_threads(1)
MiB, N, FOLDER = 1 << 20, 16 << 20, sys.argv[1]
ROOM = 96 * MiB  # above what is there before the states: an update takes half, they take 128
libc = ctypes.CDLL(None, use_errno=True)

def limit():
    lines = open("/proc/self/status").read().splitlines()
    now = next(int(l.split()[1]) * 1024 for l in lines if l.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + ROOM, now + ROOM))

def resident():
    # of the states' mappings, by the system
    total, inside = 0, False
    for line in open("/proc/self/smaps"):
        word = line.split()[0]
        if not word.endswith(":"):
            inside = FOLDER in line
        elif inside and word == "Rss:":
            total += int(line.split()[1]) * 1024
    return total

def throw_out(t):
    begin, size = t.data_ptr(), t.numel() * t.element_size()
    # MADV_PAGEOUT writes pages and drops them; before Linux 5.4 MADV_DONTNEED, which unmaps them.
    if libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), 21):
        assert libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), 4) == 0

def train(kind, limited):
    p = torch.linspace(-1, 1, N).bfloat16().requires_grad_()
    p.grad = torch.empty_like(p)
    options = {"paging_folder": FOLDER} if kind is optim.PagedAdamW else {}
    optimizer = kind([p], lr=1e-2, weight_decay=0.1, **options)
    if limited:
        limit()
    seen = []
    for step in range(2):
        p.grad.copy_(p).mul_(step - 1.5).add_(step)
        optimizer.step()
        if options:
            before = resident()
            for name in ("state1", "state2"):
                throw_out(optimizer.state[p][name])
            seen.append((before, resident()))
    digest = hashlib.sha256()
    for t in (p.detach(), optimizer.state[p]["state1"], optimizer.state[p]["state2"]):
        digest.update(t.view(torch.uint8).numpy())
    return digest.hexdigest(), seen

def forked(work):
    sys.stdout.flush()
    if os.fork() == 0:
        try:
            print(json.dumps(work()))
        except BaseException as error:
            print(json.dumps(f"died: {type(error).__name__}: {error}".splitlines()[0]))
        sys.stdout.flush()
        os._exit(0)
    os.wait()

def limit_is_held():
    limit()
    try:
        mmap.mmap(-1, 2 * ROOM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return False
    except OSError:
        return True

forked(limit_is_held)
forked(lambda: train(optim.AdamW, False))
forked(lambda: train(optim.PagedAdamW, True))
forked(lambda: train(optim.AdamW, True))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_paged_states_survive_a_limit_that_ends_the_unpaged_run(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    held, free, paged, unpaged = map(json.loads, done.stdout.splitlines())
    if not held:
        pytest.skip("this system holds no process to RLIMIT_DATA")
    assert "died" in unpaged and "allocate memory" in unpaged, unpaged
    assert paged[0] == free[0], "the same bits, and nothing lost on the way"
    for before, after in paged[1]:
        assert before > 120 << 20 and after < before // 10, "written out and dropped"
