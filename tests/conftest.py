"""What every test has: seeded randomness, its own number of threads, the shared data's folder."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores already
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same random numbers whatever ran before, and torch's settings put back afterwards."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Data that lies beside the repository, where it does."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@functools.cache
def _build_variant(kind: str) -> tuple[Path | None, str]:
    # One architecture in full, and its PTX, which is what the emulator runs.
    os.environ.setdefault("QLORA_KERNELS_CUDA_ARCHITECTURES", "80")
    command = [sys.executable, "setup.py", "--quiet", "build_variant", f"--kind={kind}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        return None, result.stdout + result.stderr
    name = {
        "sanitize": "_ops.abi3.so",
        "emulated": "_ops_emulated.so",
        "cuda": "_ops_cuda_emulated.so",
    }[kind]
    if kind == "cuda":
        kind += "-".join(os.environ["QLORA_KERNELS_CUDA_ARCHITECTURES"].split())
    return ROOT / "build" / f"{kind}-{sysconfig.get_config_var('SOABI')}" / name, ""


@pytest.fixture(scope="session")
def native_variant() -> Callable[[str], Path]:
    """``native_variant("emulated" | "sanitize")``: that build of ``_ops``, made first if need be;
    ``"cuda"``: ``_ops_cuda_emulated.so``, beside it the ``_ops_cuda.abi3.so`` of the same objects.

    Load a build of ``_ops`` in a process of its own, through ``QLORA_KERNELS_OPS``. Skips where the
    machine cannot build it; a compile error is a failure.
    """

    def build(kind: str) -> Path:
        library, words = _build_variant(kind)
        missing = (
            "needs SIMDe",
            "needs an x86",
            "nvcc was found neither",
            "nvcc is installed without",
        )
        if library is None and any(reason in words for reason in missing):
            pytest.skip(words.strip().splitlines()[-1])
        assert library is not None, words[-4000:]
        return library

    return build
