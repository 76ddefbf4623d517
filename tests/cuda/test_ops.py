"""The ops' own tests on CUDA's kernels in the emulator, as the first GPU will run them.

In a process of their own, in which the CPU's ops are CUDA's (`tests/conftest.py`). What only
repeats small tests on large tensors is left to a real GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
LARGE = ("equal_the_reference", "4128", "out_and_views", "compile", "export", "same_bits")


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="make test-gpu runs them on the GPU here")
def test_the_tests_of_the_ops(emulated_library: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    chosen = " and ".join(["emulated", *(f"not {name}" for name in LARGE)])
    environment = {
        **os.environ,
        "QLORA_KERNELS_TEST_DEVICES": "emulated",
        "QLORA_KERNELS_CUDA_EMULATED": str(emulated_library),
    }
    ran = subprocess.run(
        [*command, "-k", chosen, TESTS / "test_linear.py", TESTS / "test_quantize.py"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:]
    count = re.search(r"(\d+) passed", ran.stdout)
    assert count and int(count[1]) >= 40 and "skipped" not in ran.stdout, ran.stdout[-400:]
