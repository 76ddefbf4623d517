"""Meeting a first GPU: kernels are checked at first use, and a wrong one is left out, in words."""

from __future__ import annotations

import ctypes
import json
import warnings

import pytest
import torch

from qlora_kernels import cuda, tune
from qlora_kernels.finetune.errors import BadInput, RunError

FUSED = [r for r in cuda.routes() if r != "large"]
pytestmark = pytest.mark.skipif(not FUSED, reason="no fused kernel is compiled in")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("QLORA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.delenv("QLORA_KERNELS_DISABLE", raising=False)


class Wrong:
    """A namespace of ops in which one route's results are off by a little, as of a wrong index."""

    def __init__(self, gpu, name: str) -> None:
        self.gpu, self.name, self.calls = gpu, name, 0

    def __getattr__(self, op: str):
        real = getattr(self.gpu.ops, op)

        def run(*args):
            self.calls += 1
            result = real(*args)
            if op == self.name:
                first = result[0] if isinstance(result, tuple) else result
                first.view(-1)[7] += 1
            return result

        return run


def settle(gpu, namespace=None, who="a GPU, driver 1, build 2") -> int:
    lib = cuda.bind(gpu.lib)
    return cuda.settle(namespace or gpu.ops, lib, gpu.device, who, (torch.bfloat16,))


def test_right_kernels_stay_on_and_are_checked_once(gpu, tmp_path) -> None:
    counted = Wrong(gpu, "nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert settle(gpu, counted) == 0
        calls = counted.calls
        assert calls > 0
        assert settle(gpu, counted) == 0 and counted.calls == calls, "read from the cache"
        settle(gpu, counted, "a GPU, driver 2, build 2")
    assert counted.calls == 2 * calls, "another driver is another check"
    kept = json.loads((tmp_path / "checks.json").read_text())
    assert set(kept) == {"a GPU, driver 1, build 2", "a GPU, driver 2, build 2"}
    assert kept["a GPU, driver 1, build 2"] == {route: [] for route in FUSED}


@pytest.mark.parametrize("op", ["linear_4bit", "linear_4bit_backward", "dequantize_4bit"])
def test_wrong_kernel_is_switched_off_with_a_report(gpu, op) -> None:
    with pytest.warns(UserWarning, match="switched off on this GPU") as caught:
        mask = settle(gpu, Wrong(gpu, op))
    assert mask == cuda.disabled_mask(",".join(FUSED))
    words = str(caught[0].message)
    assert "Please report" in words and "a GPU, driver 1" in words and "differ" in words
    # The layer goes on without it.
    before = len(gpu.kernels)
    layer = tune.Layer(gpu.ops, gpu.device, 64, 128, 0)
    layer.run(torch.randn(16, 128).to(gpu.device, torch.bfloat16), False)
    assert all("dequantize" in name for name in gpu.kernels[before:])


def test_kernel_that_fails_to_launch_is_switched_off(gpu) -> None:
    class Fails(Wrong):
        def __getattr__(self, op: str):
            if op == "linear_4bit":
                raise RuntimeError("an illegal instruction was encountered")
            return super().__getattr__(op)

    with pytest.warns(UserWarning, match="illegal instruction"):
        assert settle(gpu, Fails(gpu, "nothing")) != 0


def test_user_switches_off(gpu, monkeypatch) -> None:
    monkeypatch.setenv("QLORA_KERNELS_SELF_CHECK", "0")
    monkeypatch.setenv("QLORA_KERNELS_DISABLE", "gemm")
    assert settle(gpu) == cuda.disabled_mask("gemm")
    monkeypatch.setenv("QLORA_KERNELS_DISABLE", "gemm,gemmm")
    with pytest.raises(ValueError, match="QLORA_KERNELS_DISABLE: there is no kernel 'gemmm'"):
        settle(gpu)


def test_a_cache_that_cannot_be_used_costs_a_check_only(gpu, tmp_path, monkeypatch) -> None:
    (tmp_path / "checks.json").write_text("{ half a file")
    assert settle(gpu) == 0
    monkeypatch.setenv("QLORA_KERNELS_CACHE", "/proc/no-such-folder")
    assert settle(gpu, who="another") == 0


def test_first_use_is_told_once_and_again_where_it_could_not_run(gpu) -> None:
    lib, told, answers = cuda.bind(gpu.lib), [], [0, 1]

    def first_use(device: int) -> int:
        told.append(device)
        layer.run(x, False)  # the check runs layers itself
        return answers[len(told) - 1]

    callback = cuda._CALLBACK(first_use)
    layer = tune.Layer(gpu.ops, gpu.device, 64, 128, 0)
    x = torch.randn(16, 128).to(gpu.device, torch.bfloat16)
    lib.qlk_cuda_on_first_use(ctypes.cast(callback, ctypes.c_void_p))
    try:
        for _ in range(4):
            layer.run(x, False)
    finally:
        lib.qlk_cuda_on_first_use(None)
        cuda.watch()
    assert told == [0, 0]


def test_tuning_keeps_the_quickest_and_uses_it(gpu) -> None:
    lib = cuda.bind(gpu.lib)
    layer = tune.Layer(gpu.ops, gpu.device, 128, 256, 8)
    ran: list[str] = []

    def plans(m, n, k, **options):
        return cuda.candidates("h100", m, n, k, **options)

    def clock(work) -> float:
        before = len(gpu.kernels)
        work()
        ran.append(" ".join(gpu.kernels[before:]))
        return 1.0 if "dequantize" in ran[-1] else 2.0  # as if torch's matmul were quicker

    try:
        entries = tune.tune(lib, layer, plans, clock, [16], 8, gpu.device)
        assert [e["plan"]["route"] for e in entries] == ["large", "large"]
        if gpu.runtime is not None:
            assert any("gemm" in names.lower() or "linear" in names for names in ran)
            before = len(gpu.kernels)
            layer.run(torch.randn(16, 256).to(torch.bfloat16), False)
            assert all("dequantize" in name for name in gpu.kernels[before:])
        cuda.write_cache("tuned.json", {"me": entries})
        assert cuda.apply_tuned(lib, 0, "me") == 2
        assert cuda.apply_tuned(lib, 0, "another GPU") == 0
    finally:
        lib.qlk_cuda_forget_tuned(0)


def test_tuning_passes_over_what_fails() -> None:
    plans = cuda.candidates("h100", 16, 4096, 4096)

    def time(plan: cuda.Plan) -> float:
        if plan.route != "large":
            raise RuntimeError("too many resources requested")
        return 1.0

    assert tune.quickest(plans, time)[0].route == "large"
    with pytest.raises(RunError, match="no kernel ran"):
        tune.quickest(plans[:1], time)
    with pytest.raises(BadInput, match="is not OUTxIN"):
        tune.parse_shape("4096")
    assert tune.parse_shape("11008x4096") == (11008, 4096)
