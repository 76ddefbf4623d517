"""The code of docs/emulator.md runs as it stands there;
the fixture and the listing do what it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from qlora_kernels.emulator import toolchain
from qlora_kernels.emulator.testing import Emulator, emulator  # noqa: F401

pytest.importorskip("qlora_kernels.emulator.engine").library()
missing = toolchain.available("nvcc")
PAGE = Path(__file__).parents[2] / "docs" / "emulator.md"


@pytest.mark.skipif(missing is not None, reason=str(missing))
def test_the_page(emulator: Emulator, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    names["test_scale"](emulator)
    assert len(blocks[0].strip().splitlines()) <= 13
    out = capsys.readouterr().out
    assert re.search(r"^ *\d+ .* 4  +if \(i < n\) x\[i\] \*= a;$", out, re.M), out
    page = names["page"]
    assert page.startswith("<!doctype html>") and "x[i] *= a" in page and page.count("<tr") > 4


def test_the_fixture_runs_ptx(emulator: Emulator) -> None:  # noqa: F811
    from ptx_kernels import kernel_text

    body = ".reg .b64 %rd<4>; ld.param.u64 %rd1, [p0]; st.global.u32 [%rd1], 3; ret;"
    y = np.zeros(1, np.uint32)
    result = emulator.ptx(kernel_text(body, ".param .u64 p0"))[1, 1](y)
    assert y[0] == 3 and emulator.results == [result]


@pytest.mark.skipif(missing is not None, reason=str(missing))
def test_the_pages_of_the_model_and_of_the_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/emulator_model.md and docs/emulator_runtime.md, with the sources that they speak of."""
    kernel = """
    extern "C" __global__ void decode(const float* x, float* y) {
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      y[i] = 2.f * x[i];
    }
    """
    launcher = """
    __global__ void scale(const float* x, float* y, float a, int n) {
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i < n) y[i] = a * x[i];
    }
    extern "C" int launch_scale(const float* x, float* y, float a, int n, cudaStream_t stream) {
      scale<<<(n + 127) / 128, 128, 0, stream>>>(x, y, a, n);
      return cudaGetLastError();
    }
    """
    monkeypatch.chdir(tmp_path)
    Path("kernel.cu").write_text(kernel)
    Path("kernels.cu").write_text(launcher)
    (tmp_path / "build").mkdir()
    compiled = toolchain.compile_library("kernels.cu", ["sm_80"])
    Path("build/libkernels.so").write_bytes(compiled.read_bytes())
    values = np.ones(256, np.float32)
    names: dict = {"grid": 2, "block": 128, "weights": 256, "out": tmp_path}
    names["args"] = [values, np.zeros_like(values)]
    for name in ("emulator_model.md", "emulator_runtime.md"):
        page = PAGE.parent / name
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
        assert blocks
        for block in blocks:
            exec(compile(block, str(page), "exec"), names)
    assert names["work"] and names["rt"].launches[0].grid == (8, 1, 1)
