"""``qlora bench`` from its words to its files: what it measures, models, refuses and draws."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from qlora_kernels.bench import (
    command,
    contenders,
    gpu_model,
    measure,
    report,
    results,
    shapes,
    work,
)
from qlora_kernels.emulator.devices import get_device
from qlora_kernels.finetune.errors import BadInput

QUICK = ["--quick", "--device", "cpu", "--threads", "1", "--no-plots"]


@pytest.fixture(autouse=True)
def threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One small run of every op."""
    path = tmp_path_factory.mktemp("bench") / "run.json"
    words = [*QUICK, "--shapes", "64x128", "--rows", "1", "6", "--dtypes", "fp32"]
    code = command.run([*words, "--peers", "torch", "--rank", "4", "--output", str(path)])
    return code, path


# --- measuring ----------------------------------------------------------------------------------


def test_every_op_is_checked_and_timed(measured):
    code, path = measured
    result = results.read(path)
    assert code == 0 and result["complete"] and result["kind"] == "measured"
    assert [line["op"] for line in result["lines"]] == [
        "quantize", "dequantize", "forward", "forward", "lora", "lora", "dx", "train", "optimizer",
    ]  # fmt: skip
    for line in result["lines"]:
        assert not line["failed"] and any(n.startswith("qlora") for n in line["contenders"])
        assert line["limit_seconds"] > 0 and line["control"] in result["limits"]
        for entry in line["contenders"].values():
            (samples,) = entry["rounds"]
            assert len(samples) == 2 and entry["seconds"]["min"] == min(samples)
    assert set(result["limits"]) == {"read", "copy", "matmul float32"}
    assert result["machine"]["torch"] == torch.__version__


def test_plots_are_drawn_without_a_display(measured, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    result = results.read(measured[1])
    result["lines"] = [line for line in result["lines"] if line["op"] in ("forward", "train")]
    drawn = report.draw(result, tmp_path / "run.json")
    assert [p.name for p in drawn] == [
        "run-forward-64x128-fp32-sweep.png", "run-forward-64x128-fp32-roofline.png",
        "run-train-64x128-fp32-roofline.png",  # of one number of rows: no sweep
    ]  # fmt: skip
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in drawn)


def test_a_finished_result_is_not_replaced_unasked(measured):
    words = [*QUICK, "--output", str(measured[1])]
    with pytest.raises(BadInput, match="is there and finished: --overwrite"):
        command.run(words)
    measured[1].with_name("notes.json").write_text("mine")
    with pytest.raises(BadInput, match="no result of this version: --overwrite replaces it"):
        command.run([*QUICK, "--output", str(measured[1].with_name("notes.json"))])


def test_the_same_result_compared_with_itself_has_not_changed(measured, capsys):
    words = ["compare", str(measured[1]), str(measured[1]), "--fail-on-regression"]
    assert command.run(words) == 0
    assert "0 slower, 0 quicker" in capsys.readouterr().out


def slowed(path, by, name):
    result = json.loads(path.read_text())
    for line in result["lines"]:
        for entry in line["contenders"].values():
            entry["rounds"] = [[s * by(line) for s in [1e-3, 1.01e-3, 1.02e-3, 1.03e-3] * 2]]
    for limit in result["limits"].values():
        limit["rounds"] = [[1.0, 1.01, 1.02]]
    other = path.with_name(name)
    other.write_text(json.dumps(result))
    return str(other)


def test_a_regression_fails_where_it_is_asked_to(measured, capsys):
    before = slowed(measured[1], lambda line: 1.0, "a.json")
    after = slowed(measured[1], lambda line: 1.3 if line["op"] == "dx" else 1.0, "b.json")
    assert command.run(["compare", before, after]) == 0
    out = str(measured[1].with_name("changes.json"))
    assert command.run(["compare", before, after, "--fail-on-regression", "--json", out]) == 1
    assert "slower: dx 64x128 M=6 fp32 nf4/64" in capsys.readouterr().out
    changes = json.loads(open(out).read())["changes"]
    slower = [c for c in changes if c["verdict"] == "slower"]
    assert {c["key"] for c in slower} == {"dx 64x128 M=6 fp32 nf4/64"}
    assert command.run(["compare", after, before, "--fail-on-regression"]) == 0  # quicker


CONTENDERS = work.contenders


def run_line(case, tmp_path, monkeypatch, **fields):
    """One line through the round loop; ``fields`` change its first contender."""

    def planted(*args, **kwargs):
        first, *rest = CONTENDERS(*args, **kwargs)
        yield dataclasses.replace(first, **{k: v(first) for k, v in fields.items()})
        yield from rest

    monkeypatch.setattr(work, "contenders", planted)
    path = tmp_path / f"{case.op}.json"
    result = measure.start(path, "measured", "cpu", "wall", 1, {})
    pace = work.Pace("wall", 2, 1.0, quick=True)
    cpu = torch.device("cpu")
    measure.measure(result, path, [case], cpu, ["cpu"], ["torch"], pace, 2, 1, True)
    return result["lines"][0]


LAYER = shapes.Layer("64x128", 64, 128)


@pytest.mark.parametrize("case", [
    work.Case("forward", LAYER, m=3, dtype="fp32"),
    work.Case("lora", LAYER, m=20, dtype="bf16", rank=4),
    work.Case("dx", LAYER, m=6, dtype="fp32"),
], ids=lambda c: c.op)  # fmt: skip
def test_a_planted_wrong_contender_is_reported_and_not_timed(case, tmp_path, monkeypatch):
    calls = []

    def wrong(first):
        def run(i):
            calls.append(i)
            return first.run(i) * 1.05

        return run

    line = run_line(case, tmp_path, monkeypatch, run=wrong)
    assert list(line["failed"]) == ["qlora cpu"] and "qlora cpu" not in line["contenders"]
    assert calls == [0], "called for the check, in the first round alone"
    (name,) = line["contenders"]
    assert name.startswith("torch") and len(line["contenders"][name]["rounds"]) == 2


def test_wrong_bytes_and_wrong_gradients_are_found(tmp_path, monkeypatch):
    quantize = work.Case("quantize", LAYER)

    def flipped(first):
        def run(i):
            packed, state = first.run(i)
            packed = packed.clone()
            packed.view(-1)[-1] ^= 1
            return packed, state

        return run

    line = run_line(quantize, tmp_path, monkeypatch, run=flipped)
    assert "1 of 4096 bytes are not the reference's" in line["failed"]["qlora cpu"]
    train = work.Case("train", LAYER, m=6, dtype="fp32", rank=4)

    def no_scaling(first):
        def run(i):
            dx, da, db = first.run(i)
            return dx, da, 2 * db

        return run

    line = run_line(train, tmp_path, monkeypatch, run=no_scaling)
    assert line["failed"]["qlora cpu"].startswith("dB: ")


def test_a_run_that_was_broken_off_goes_on(tmp_path, monkeypatch, capsys):
    path = tmp_path / "r.json"
    cases = [work.Case("forward", LAYER, m=m, dtype="fp32") for m in (1, 6)]
    pace = work.Pace("wall", 2, 1.0, quick=True)

    def go():
        result = measure.start(path, "measured", "cpu", "wall", 1, {"a": 1})
        options = (cases, torch.device("cpu"), ["cpu"], [], pace, 2, 1, True)
        measure.measure(result, path, *options)
        return result

    real, seen = work.run, []

    def counted(case, *args, **kwargs):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(case.m)
        return real(case, *args, **kwargs)

    monkeypatch.setattr(work, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        go()
    before = results.read(path)
    assert not before["complete"] and [line["rounds_done"] for line in before["lines"]] == [2, 1]
    monkeypatch.setattr(work, "run", real)
    after = go()
    assert "going on with" in capsys.readouterr().err
    assert after["complete"] and [line["rounds_done"] for line in after["lines"]] == [2, 2]
    kept = [r["lines"][0]["contenders"]["qlora cpu"]["rounds"] for r in (before, after)]
    assert kept[0] == kept[1] and len(after["limits"]["read"]["rounds"]) == 2


def test_a_peer_that_does_not_run_here_is_reported(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("built for another torch")

    monkeypatch.setattr(contenders, "Peer", refuse)
    case = work.Case("forward", LAYER, m=6, dtype="fp32")
    weight = contenders.Weight(64, 128, torch.device("cpu"))
    pace = work.Pace("wall", 2, 1.0, quick=True)
    race = work.run(case, weight, torch.device("cpu"), ["cpu"], ["bitsandbytes"], pace)
    assert race.failed == {"bitsandbytes": "RuntimeError: built for another torch"}
    assert list(race.samples) == ["qlora cpu"]


@pytest.mark.full
def test_every_peer_and_dtype_is_within_its_bound(tmp_path):
    path = tmp_path / "all.json"
    words = [*QUICK, "--shapes", "192x320", "80x1024", "--rows", "1", "6", "40", "--dtypes",
             *work.DTYPES, "--blocksizes", "64", "128", "--output", str(path)]  # fmt: skip
    assert command.run(words) == 0
    assert not any(line["failed"] for line in results.read(path)["lines"])


# --- modelled -----------------------------------------------------------------------------------


def test_a_gpu_that_is_not_here_is_modelled_and_said_to_be(tmp_path, capsys):
    path = tmp_path / "h100.json"
    assert command.run(["--device", "H100", "--output", str(path), "--no-plots"]) == 0
    out = capsys.readouterr().out
    assert "h100: MODELLED from the emulator's counts, never measured" in out
    assert "forward (modelled)" in out
    result = results.read(path)
    assert result["kind"] == "modelled" and result["device"] == "h100"
    by_key = {line["key"]: line for line in result["lines"]}
    one = by_key["forward 4096x4096 M=1 bf16 nf4/64"]
    route = one["contenders"]["qlora cuda"]["route"]
    assert route == "decode_mma" and one["control"] == "read"
    for line in result["lines"]:  # nobody beats what the device allows
        for name, entry in line["contenders"].items():
            assert entry["seconds"]["median"] > 0.99 * line["limit_seconds"], (line["key"], name)
    assert any("not counted" in why for line in result["lines"] for why in line["failed"].values())


def test_modelled_times_are_the_dispatchs_routes():
    """Decode, GEMM and the large route each where the dispatch says; more rows take no less."""
    for device in ("a100", "h100", "h200", "rtx4090"):
        before = 0.0
        routes = set()
        for m in (1, 8, 16, 32, 64, 128, 512, 4096):
            time = gpu_model.linear(device, m, 4096, 4096)
            routes.add(time.route.split()[0].rstrip(","))
            assert time.seconds >= 0.999 * before or m > 64, (device, m)
            before = time.seconds
        assert {r.split("_")[0] for r in routes} >= {"decode", "gemm"}, device
    with pytest.raises(gpu_model.NotCounted, match="4000x4096"):
        gpu_model.linear("h100", 1, 4000, 4096)
    assert gpu_model.counted_as(get_device("h200")) == "h100"


def test_counts_are_of_every_named_layer():
    table = gpu_model.counts()["decode"]
    have = {(key[0], *key[4:6]) for key in table}
    for device in ("a100", "h100", "h200", "rtx4090"):
        for layer in shapes.layers(list(shapes.LLAMA)):
            assert (get_device(device).key, layer.n, layer.k) in have, (device, layer)


def test_counts_give_the_rankings_times():
    """A layer's GEMM from its line of counts: what cuda_dispatch.py found by the emulator."""
    results_file = Path(__file__).parents[2] / "benchmarks" / "results" / "cuda_dispatch.json"
    cases = json.loads(results_file.read_text())["cases"]
    found = 0
    for c in cases:
        if c["device"] == "a6000" or c["chosen"]["route"] != "gemm":
            continue  # an A6000's architecture is not among the counts
        backward = c["pass"] == "dX"
        time = gpu_model.linear(c["device"], c["m"], c["n"], c["k"], backward=backward)
        assert 1e6 * time.seconds == pytest.approx(c["chosen"]["us"], rel=0.01), c
        found += 1
    assert found > 100


# --- names and bad input ------------------------------------------------------------------------


def test_shapes_by_name():
    names = [layer.name for layer in shapes.layers(["7b"])]
    assert names == ["7b.qkvo", "7b.gate_up", "7b.down"]
    (kv,) = shapes.layers(["LLaMA-70b.v"])
    assert (kv.name, kv.n, kv.k) == ("70b.kv", 1024, 8192)
    assert shapes.layers(["13b.q", "13b.o", "5120x5120"]) == shapes.layers(["13b.qkvo"])
    (own,) = shapes.layers(["300x70"])
    assert (own.n, own.k, own.size) == (300, 70, "300x70")


def test_a_models_own_layers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128,
    )  # fmt: skip
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json_string())
    found = {layer.name: (layer.n, layer.k) for layer in shapes.model_layers(folder)}
    assert found == {"tiny.q_o": (64, 64), "tiny.k_v": (32, 64), "tiny.gate_up": (96, 64),
                     "tiny.down": (64, 96)}  # fmt: skip
    with pytest.raises(BadInput, match="no config.json is there"):
        shapes.model_layers(tmp_path)
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(BadInput, match="config.json: .*no-such-model"):
        shapes.model_layers(folder)


@pytest.mark.parametrize("words, told", [
    (["--shapes", "7b.gat"], "no shape '7b.gat'; did you mean 7b.gate"),
    (["--shapes", "0x64"], "both numbers must be positive"),
    (["--device", "h101"], "no device 'h101'; did you mean h100"),
    (["--device", "cuda"], "no GPU here .* --device h100"),
    (["--ops", "forwrd"], "no op 'forwrd'; did you mean forward"),
    (["--dtypes", "bf61"], "no dtype 'bf61'; did you mean bf16"),
    (["--peers", "bitsandbyte"], "no peer 'bitsandbyte'; did you mean bitsandbytes"),
    (["--backends", "cuda"], "backend 'cuda' is not for cpu"),
    (["--format", "nf5"], "--format: .*nf5"),
    (["--blocksizes", "48"], "--blocksizes: .*48"),
    (["--rows", "0"], "--rows must be positive, got 0"),
    (["--pairs", "1"], "--pairs must be at least 2"),
    (["--clock", "cpu", "--threads", "2"], "--clock cpu .* needs --threads 1"),
    (["--device", "a100", "--peers", "torch"], "of a machine that is measured"),
    (["compare", "none.json", "none.json"], "cannot read none.json: No such file"),
    (["list", "shapes"], "list takes no arguments"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else "")  # fmt: skip
def test_bad_input_is_said_before_anything_is_measured(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure, "measure", lambda *a, **k: pytest.fail("it was measured"))
    with pytest.raises(BadInput, match=told):
        command.run(words)
    assert not list(tmp_path.iterdir())


GOOD = {"tool": results.TOOL, "schema": 1, "kind": "measured", "machine": {}, "limits": {},
        "lines": []}  # fmt: skip
LINE = {"key": "k", "contenders": {"a": {"rounds": [[1.0]]}}}


@pytest.mark.parametrize("content, told", [
    ("{", "is not JSON"),
    ("[1]", "is not a result of `qlora bench`"),
    ({**GOOD, "tool": "other"}, "is not a result of"),
    ({**GOOD, "schema": 7}, "has schema 7, this version reads 1"),
    ({**GOOD, "lines": {}}, "'lines' is missing or no list"),
    ({**GOOD, "lines": [{}]}, "a line without key"),
    ({**GOOD, "lines": [{**LINE, "contenders": {"a": {}}}]}, "k, a: no samples"),
    ({**GOOD, "lines": [{**LINE, "contenders": {"a": {"rounds": [[0.0]]}}}]}, "not all positive"),
    ({**GOOD, "lines": [{**LINE, "contenders": {"a": {"rounds": [[float("nan")]]}}}]}, "positive"),
    (b"\xff\xfe\x00", "not text"),
], ids=str)  # fmt: skip
def test_results_that_cannot_be_read_are_explained(content, told, tmp_path):
    path = tmp_path / "r.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(BadInput, match=told):
        results.read(path)


def test_a_good_result_is_read(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({**GOOD, "lines": [LINE]}))
    assert results.read(tmp_path / "r.json")["lines"] == [LINE]


def test_list_names_everything(capsys, monkeypatch):
    reasons = {"auto": None, "cpu": None, "cuda": "no GPU is here"}
    monkeypatch.setattr(command.backends_module, "backends", lambda: reasons)  # Triton's import
    monkeypatch.setitem(contenders.PEERS, "bitsandbytes", lambda: "not installed")
    assert command.run(["list"]) == 0
    out = capsys.readouterr().out
    assert "70b.down 8192x28672" in out and "rtx4090" in out and "peer     torch: is here" in out
    assert "backend  cuda: no GPU is here" in out and "bitsandbytes: not installed" in out
