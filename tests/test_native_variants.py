"""The kernels in builds of their own: under sanitizers, and AVX-512 where the machine has none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_kernels import cpu

ROOT = Path(__file__).resolve().parent.parent
SWEEP = ROOT / "tests" / "native" / "sweep.py"


# The software's own instructions.
needs_avx2 = pytest.mark.skipif(
    "avx2" not in cpu.available_isas(), reason="the machine has no AVX2"
)


def sweep(library: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SWEEP), *args],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "QLORA_KERNELS_OPS": str(library),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=1200,
    )


def gcc_file(name: str) -> str:
    """Where the compiler keeps a library; it prints the bare name when it has none."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no compiler {compiler}")
    command = [compiler, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"{compiler} has no {name} to load first")
    return path


@pytest.fixture(scope="module")
def sanitizer() -> dict[str, str]:
    """The environment under which a plain Python runs a sanitized library."""
    # libstdc++ as well: the sanitizer wants to see throw when it starts, and Python brings none.
    return {
        "LD_PRELOAD": f"{gcc_file('libasan.so')} {gcc_file('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little when it ends
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def test_kernels_are_clean_under_sanitizers(
    native_variant: Callable[[str], Path], sanitizer: dict[str, str]
) -> None:
    result = sweep(native_variant("sanitize"), "--rounds", "25", **sanitizer)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]
    assert "portable: 25 rounds" in result.stdout


@pytest.mark.full
def test_kernels_are_clean_under_sanitizers_at_length(
    native_variant: Callable[[str], Path], sanitizer: dict[str, str]
) -> None:
    result = sweep(native_variant("sanitize"), "--rounds", "400", "--seed", "1", **sanitizer)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]


def test_sanitizer_stops_a_planted_overrun(
    native_variant: Callable[[str], Path], sanitizer: dict[str, str]
) -> None:
    result = sweep(native_variant("sanitize"), "--overrun", **sanitizer)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr
    assert "WRITE of size 4" in result.stderr


@needs_avx2
@pytest.mark.parametrize("isa", ["avx512", "avx512_bf16"])
def test_avx512_kernels_in_software(native_variant: Callable[[str], Path], isa: str) -> None:
    result = sweep(native_variant("emulated"), "--isa", isa, "--rounds", "30")
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]
    assert f"{isa}: 30 rounds" in result.stdout


@pytest.mark.full
@needs_avx2
@pytest.mark.parametrize("isa", ["avx512", "avx512_bf16"])
def test_avx512_kernels_in_software_at_length(
    native_variant: Callable[[str], Path], isa: str
) -> None:
    result = sweep(native_variant("emulated"), "--isa", isa, "--rounds", "400", "--seed", "1")
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]
