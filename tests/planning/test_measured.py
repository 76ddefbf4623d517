"""The plan beside real steps on the CPU: their peaks, and their pace."""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("measure.py")


linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone counts the peak anew")


@linux
def test_the_peak_of_a_small_step_is_the_planned_one():
    """What the other test does, with one small model, in this process."""
    spec = importlib.util.spec_from_file_location("measure", SCRIPT)
    measure = importlib.util.module_from_spec(spec)
    sys.modules["measure"] = measure
    spec.loader.exec_module(measure)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        peak = measure.measured_peak(measure.llama(layers=4), measure.recipe())
    finally:
        torch.set_num_threads(threads)
        del sys.modules["measure"]
    assert peak.predicted > 100e6 and abs(peak.error) < 0.1


@pytest.mark.full
def test_a_forecast_is_what_a_whole_model_takes():
    """The calibration's first layers against all of them, in CPU seconds of one thread, for other
    processes may run; the median of three."""
    import time

    from qlora_kernels.planning import calibrate
    from qlora_kernels.planning.models import find_model
    from qlora_kernels.planning.recipe import Recipe

    recipe = Recipe(256, 1, 1, 16, optim="adamw_torch", activation_checkpointing=False,
                    dtype="float32")  # fmt: skip
    config = find_model("smollm2-135m")[1]
    threads, clock = torch.get_num_threads(), time.perf_counter
    torch.set_num_threads(1)
    try:
        time.perf_counter = time.process_time
        whole = calibrate.small_model(config, recipe, config.num_hidden_layers)
        step = calibrate.stepper(whole, recipe, recipe.shape)
        step()
        seconds = statistics.median(calibrate._timed(step) for _ in range(3))
        forecast = calibrate.calibrate(config, recipe)
    finally:
        torch.set_num_threads(threads)
        time.perf_counter = clock
    assert forecast.seconds == pytest.approx(seconds, rel=0.15)


@linux
@pytest.mark.full
def test_peaks_of_real_steps_are_the_planned_ones():
    """Fourteen configurations, within 10% each."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], check=True, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    errors = {}
    for line in done.stdout.splitlines():
        if "planned" in line:
            errors[line[:24].strip()] = float(line.split()[-1].rstrip("%")) / 100
    assert len(errors) >= 12
    assert {name: e for name, e in errors.items() if abs(e) > 0.1} == {}
