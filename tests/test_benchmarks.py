"""The measuring instruments, held to what they claim: order, arithmetic, checks, verdicts.

What they measure is not asserted here: a test must not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks_importable():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture
def harness():
    import harness

    return harness


@pytest.fixture
def args():
    return argparse.Namespace(clock="wall", pairs=3, patience=60.0, quick=True, threads=1, out=None)


# --- races --------------------------------------------------------------------------------------


def test_contenders_take_turns_and_calls_are_counted(harness, args):
    order: list[str] = []
    seen: dict[str, list[int]] = {"a": [], "b": []}

    def contender(name):
        def run(i):
            if not order or order[-1] != name:
                order.append(name)
            seen[name].append(i)

        return harness.Contender(name, run)

    race = harness.race([contender("a"), contender("b")], args, turn=0.0)
    assert order == ["a", "b"] * (1 + args.pairs)  # the check, then the pairs
    assert [len(race.samples[n]) for n in "ab"] == [args.pairs] * 2
    # Each call has its own number, so that rotating copies are used one after another.
    assert all(numbers == list(range(len(numbers))) for numbers in seen.values())


def test_a_wrong_contender_is_not_timed(harness, args):
    calls = []

    def broken(i):
        raise RuntimeError("no such kernel")

    race = harness.race(
        [
            harness.Contender("right", lambda i: 1, lambda result: None),
            harness.Contender("wrong", calls.append, lambda result: "off by one"),
            harness.Contender("broken", broken),
        ],
        args,
    )
    assert race.failed == {"wrong": "off by one", "broken": "RuntimeError: no such kernel"}
    assert list(race.samples) == ["right"] and calls == [0]
    assert race.has("right") and not race.has("right", "wrong")


def test_ratios_are_of_pairs(harness):
    sample = harness.Sample
    race = harness.Race(
        "wall",
        {"ours": [sample(1, 9), sample(2, 9), sample(4, 9)],
         "other": [sample(3, 9), sample(4, 9), sample(4, 9)]},
    )  # fmt: skip
    ratio = race.ratio("ours", "other")  # 3, 2, 1: not the ratio of the medians, which is 2
    assert (ratio.median, ratio.low, ratio.high, ratio.count) == (2, 1, 3, 3)
    assert race.ratio("other", "ours").median == 0.5
    assert race.time("ours").median == 2
    assert ratio.text(1) == "2.0 (1.0-3.0)"
    race.clock = "cpu"
    assert race.ratio("ours", "other").median == 1
    assert json.loads(json.dumps(race.as_json()))["samples"]["ours"]["wall"] == [1, 2, 4]


def test_pairs_go_on_until_they_agree(harness, args, monkeypatch):
    args.quick, args.pairs = False, 4
    clock = [0.0]
    steps = iter([1, 3, 1, 1, 2, 1, 3, 2] + [1, 1] * 100)

    # A clock that only the contenders move: the first pairs disagree, later ones do not.
    fake = types.SimpleNamespace(perf_counter=lambda: clock[0], thread_time=lambda: clock[0])
    monkeypatch.setattr("qlora_kernels.bench.race.time", fake)

    def run(i):
        clock[0] += next(steps) if i else 10.0  # a slow first call: no warm-up call is timed

    both = [harness.Contender("a", run), harness.Contender("b", run)]
    race = harness.race(both, args, cold=True, turn=0.0)
    found = [a.wall / b.wall for a, b in zip(*race.samples.values(), strict=True) if b.wall]
    assert args.pairs < len(race.samples["a"]) < 31
    assert found[-1] == 1.0 and not all(ratio == 1.0 for ratio in found)


def test_patience_ends_a_race(harness, args):
    args.quick, args.pairs, args.patience = False, 7, 0.0
    import time

    race = harness.race([harness.Contender("slow", lambda i: time.sleep(0.01))], args)
    assert len(race.samples["slow"]) == 3  # and the report says how many pairs there were


# --- memory, limits, processes ------------------------------------------------------------------


def test_copies_exceed_the_last_level_cache(harness, args):
    args.quick = False
    for size in (1 << 16, 1 << 20, 1 << 28):
        copies = harness.copies_for_cold(size, args)
        # All copies but the one in use, so that it has left the cache when its turn comes.
        assert copies >= 2 and (copies - 1) * size >= 1.5 * harness.last_level_cache()


def test_reading_memory_reads_all_of_it(harness):
    data = torch.arange(100_003, dtype=torch.int64)
    native = harness.native()
    if native is None:
        pytest.skip("no C compiler")
    want = 0
    for value in data.tolist():
        want ^= value
    for threads in (1, 2, 3):
        assert native.read_words(data.data_ptr(), data.numel(), threads) == want
    harness.read_memory(data, 1)


def test_peak_is_the_process_own(harness, tmp_path):
    script = tmp_path / "child.py"
    script.write_text(
        "import json, sys\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        "import harness\n"
        "before = harness.peak_resident()\n"
        "bytes(range(256)) * (int(sys.argv[1]) << 12)\n"
        "json.dump({'grown': harness.peak_resident() - before}, open(sys.argv[-1], 'w'))\n"
    )
    grown = harness.run_child(script, ["200"])["grown"]  # 200 MiB
    assert 190 << 20 < grown < 260 << 20


def test_a_child_that_fails_says_why(harness, tmp_path):
    script = tmp_path / "child.py"
    script.write_text("raise SystemExit('the peer is not installed')")
    with pytest.raises(RuntimeError, match="the peer is not installed"):
        harness.run_child(script, [])
    script.write_text("")
    with pytest.raises(RuntimeError, match=r"failed \(0\)"):  # wrote nothing
        harness.run_child(script, [])


def test_children_see_what_they_are_held_to(harness, tmp_path):
    import cpu_kernels

    script = tmp_path / "child.py"
    script.write_text(
        "import json, sys, torch\n"
        "from qlora_kernels import cpu\n"
        "isas = [cpu.isa(), torch.backends.cpu.get_cpu_capability()]\n"
        "json.dump(isas, open(sys.argv[-1], 'w'))\n"
    )
    from qlora_kernels import cpu

    if "avx2" not in cpu.available_isas():
        pytest.skip("this machine has no AVX2")
    env = {**cpu_kernels.HELD, "PYTHONPATH": str(FOLDER.parent)}
    assert harness.run_child(script, [], env) == ["avx2", "AVX2"]


def test_the_machine_is_described(harness):
    machine = harness.describe_machine(2)
    assert machine["threads"] == 2 and machine["torch"] == torch.__version__
    assert machine["processor"] in harness.machine_line(machine)
    json.dumps(machine)


def test_table_and_roofline(harness, tmp_path, capsys):
    harness.print_table(["name", "ms"], [["a", "1.0"], ["long", "10.25"]])
    assert capsys.readouterr().out.splitlines() == [
        "name     ms",
        "----  -----",
        "a       1.0",
        "long  10.25",
    ]
    points = [("ours", "M = 1", 4.0, 5e10), ("dense", "M = 1", 0.5, 1e10)]
    harness.roofline(tmp_path / "a" / "roof.png", points, 3e10, {"fp32": 1e11, "bf16": 2e11}, "t")
    assert (tmp_path / "a" / "roof.png").read_bytes()[:4] == b"\x89PNG"


# --- verdicts -----------------------------------------------------------------------------------


def fake_bench(isa="avx2", bf16=False, repack=False, flags=()):
    machine = {"kernels_isa": isa, "flags": list(flags)}
    return types.SimpleNamespace(machine=machine, bf16=bf16, repack=repack)


def fake_line(work, **seconds):
    import cpu_kernels
    import harness

    samples = {n: [harness.Sample(s, s)] * 7 for n, s in seconds.items()}
    return cpu_kernels.Line(work, "8x64", "fp32", harness.Race("wall", samples), 1.0, 1.0)


def test_bars_are_judged_by_their_worst_line():
    from cpu_kernels import Bar

    bar = Bar("quantize", ">= 40 x", ("ours", "bnb"), 40)
    lines = [fake_line("quantize", ours=1, bnb=50), fake_line("quantize", ours=1, bnb=39)]
    assert bar.judge(lines, fake_bench())["verdict"] == "missed"
    assert bar.judge(lines[:1], fake_bench())["verdict"] == "held"
    assert bar.judge([], fake_bench())["verdict"] == "not measured"
    most = Bar("M = 128", "<= 1.1 x", ("bf16", "ours"), 1.1, at_least=False)
    lines = [fake_line("M = 128", ours=1.0, bf16=1.0), fake_line("M = 128", ours=1.2, bf16=1.0)]
    verdict = most.judge(lines, fake_bench())
    assert verdict["verdict"] == "missed" and verdict["worst"] == pytest.approx(1.2)


def test_what_a_machine_cannot_tell_is_not_judged():
    from cpu_kernels import Bar, judge_avx2

    bar = Bar("M = 4", ">= 1.25 x", ("ours", "repacked"), 1.25, needs="repacking")
    verdict = bar.judge([fake_line("M = 4", ours=1, bnb=9)], fake_bench())
    assert verdict["verdict"] == "not measurable" and "AVX-512 BF16" in verdict["why"]
    line = fake_line("M = 4", ours=1, repacked=2)
    assert bar.judge([line], fake_bench("avx512_bf16", True, True))["verdict"] == "held"
    dense = Bar("M = 128", "<= 1.1 x", ("bf16", "ours"), 1.1, False, needs="bf16")
    verdict = dense.judge([fake_line("M = 128", ours=1, bf16=9)], fake_bench())
    assert verdict["verdict"] == "not measurable" and verdict["worst"] == pytest.approx(1 / 9)

    lines = [fake_line("a", ours=1, bnb=2), fake_line("b", ours=1, bnb=0.9)]
    assert judge_avx2(lines, fake_bench())["verdict"] == "missed"
    assert judge_avx2(lines[:1], fake_bench())["verdict"] == "held"
    assert judge_avx2(lines, fake_bench(flags=["avx512f"]))["verdict"] == "not comparable"
    assert judge_avx2([fake_line("a", ours=1)], fake_bench())["verdict"] == "not measured"


def test_every_line_of_the_issue_has_its_bar():
    import cpu_kernels

    works = {bar.work for bar in cpu_kernels.bars()}
    lines = {"quantize", "dequantize, out=", "dequantize", "M = 1, cold", "M = 1, in cache",
             "M = 1, LoRA r = 16", "forward + backward, LoRA r = 64, M = 512",
             *(f"M = {m}" for m in cpu_kernels.ROWS)}  # fmt: skip
    assert works == lines


# --- loops cut out of assembly ------------------------------------------------------------------


def test_the_innermost_loop_is_cut_out():
    from avx512_model import innermost_loop

    lines = """
.L0:
	ret
	.p2align 4
.L1:
	movq	%rax, %rcx
.L2:
	vpermps	(%rdi), %zmm0, %zmm1
	addq	$64, %rdi
	cmpq	%rsi, %rdi
	jne	.L2
	subq	$1, %rcx
	jne	.L1
	testq	%rcx, %rcx
	je	.L0
""".splitlines()
    loop = innermost_loop(lines, "f")
    assert [text.split()[0] for text in loop] == ["vpermps", "addq", "cmpq", "jne"]
    with pytest.raises(RuntimeError, match="f should hold one innermost loop, found 0"):
        innermost_loop(lines[1:4], "f")


def test_loops_are_compiled_with_the_kernels_flags():
    from avx512_model import cmake_flags

    assert cmake_flags("avx2") == ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
    assert cmake_flags("avx512_bf16")[:4] == cmake_flags("avx2")
    assert {"-mavx512f", "-mavx512bf16"} <= set(cmake_flags("avx512_bf16"))


# --- whole scripts ------------------------------------------------------------------------------


def run_script(name: str, tmp_path: Path, *arguments: str) -> tuple[dict, str]:
    out = tmp_path / f"{name}.json"
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--threads", "1"]
    run = subprocess.run(
        [*command, *arguments, "--out", str(out)], capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return (json.loads(out.read_text()) if out.exists() else {}), run.stdout


def test_cpu_kernels_checks_and_times_every_line(tmp_path):
    arguments = ["--shapes", "64x128", "--rows", "4", "16", "--modes", "fp32", "--no-peer"]
    result, text = run_script("cpu_kernels", tmp_path, *arguments)
    assert not any(line["failed"] for line in result["lines"])
    works = [line["work"] for line in result["lines"]]
    assert works[:4] == ["quantize", "dequantize, out=", "dequantize", "M = 1, cold"]
    assert all(s["wall"] for line in result["lines"] for s in line["samples"].values())
    assert "not measurable" in text or "held" in text
    assert (tmp_path / "cpu_kernels.png").exists()


@pytest.mark.full
def test_cpu_kernels_against_every_peer(tmp_path):
    pytest.importorskip("bitsandbytes")
    result, _ = run_script("cpu_kernels", tmp_path, "--shapes", "256x512")
    assert not any(line["failed"] for line in result["lines"])
    assert all("bnb" in line["samples"] for line in result["lines"] if "r = 16" not in line["work"])


@pytest.mark.full
def test_avx512_model_says_that_it_is_a_model(tmp_path):
    _, text = run_script("avx512_model", tmp_path, "--no-check")
    assert "skipped: " in text or "MODELLED" in text


@pytest.mark.full
def test_generate_accounts_for_a_step(tmp_path):
    pytest.importorskip("transformers")
    result, _ = run_script("generate", tmp_path, "--no-peer")
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert not result["forward"]["failed"]


@pytest.mark.full
def test_finetune_starts_from_equal_losses(tmp_path):
    for package in ("bitsandbytes", "peft", "trl", "datasets"):
        pytest.importorskip(package)
    result, _ = run_script("finetune", tmp_path)
    for found in result["results"].values():
        assert not found["failed"]
        assert all(end["peak"] > 100e6 for end in found["ends"].values())


@pytest.mark.full
def test_drop_in_judges_every_bar(tmp_path):
    for package in ("bitsandbytes", "peft", "trl", "datasets"):
        pytest.importorskip(package)
    result, text = run_script("drop_in", tmp_path)
    assert "FAILED" not in text
    assert len(result["bars"]) == 3 + 3 + 2 + 2
    assert {bar[3] for bar in result["bars"]} <= {"met", "missed"}
    ours, theirs = (result["losses_float32"][run] for run in ("ours", "peer"))
    assert ours == pytest.approx(theirs, rel=1e-4)


# --- the CUDA benchmarks' common part -----------------------------------------------------------


@pytest.fixture
def common(monkeypatch, tmp_path):
    monkeypatch.setenv("PTX_EMULATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["cuda_some.py"])
    import cuda_common

    if missing := cuda_common.toolchain.available():
        pytest.skip(missing)
    return cuda_common


def test_bars_say_whether_they_are_met(common, capsys):
    low, high = common.Bar("sass", 31, 30, "loads"), common.Bar("ratio", 1.2, 1.15, "", True)
    assert not low.met and high.met and common.Bar("sass", 30, 30).met
    common.print_bars([low, high], met=False)
    out = capsys.readouterr().out
    assert "1 of 2 bars met; the others:" in out
    assert "MISSED sass" in out and "31.00 <= 30.00  loads" in out and "ratio" not in out
    common.print_bars([low, high])
    assert "met    ratio" in capsys.readouterr().out


def test_cuda_arguments(common, capsys):
    args = common.parse(common.parser("What it costs.\n", ("a100", "h100")), [])
    assert args.devices == ["a100", "h100"] and args.shapes == list(common.SHAPES)
    assert args.out == FOLDER / "results" / "cuda_some.json"
    quick = common.parse(common.parser("What it costs.", ("a100", "h100")), ["--quick"])
    assert quick.devices == ["a100"] and len(quick.shapes) == 1
    assert quick.out.name == "cuda_some-quick.json", "what is committed is of whole runs"
    with pytest.raises(SystemExit):
        common.parse(common.parser("What it costs."), ["--devices", "h101"])
    assert "did you mean" in capsys.readouterr().err


def test_cuda_results_are_labelled_and_short(common, tmp_path):
    args = common.parse(common.parser("x", shapes=()), ["--out", str(tmp_path / "a" / "r.json")])
    bars = [common.Bar("sass", 31.23456789, 30, "loads")]
    common.write(args, bars, figures=[{"us": 1 / 3, "m": 4}, {"us": torch.tensor(2.5).numpy()}])
    text = (tmp_path / "a" / "r.json").read_text()
    result = json.loads(text)
    assert "modelled" in result["what"] and "no GPU" in result["what"]
    assert result["bars"] == [{"what": "sass", "value": 31.235, "limit": 30, "why": "loads",
                               "at_least": False, "met": False}]  # fmt: skip
    assert result["figures"] == [{"us": 0.33333, "m": 4}, {"us": 2.5}]
    assert str(tmp_path) not in text, "where things lay says nothing on another machine"


def test_counts_are_remembered_by_kernels_and_question(common, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(common, "_kernels", lambda library: library.name)

    def ask(library, *question):
        def make():
            asked.append((library, *question))
            return {"answer": len(asked)}

        return common.remembered(tmp_path / library, make, *question)

    assert ask("one", "a100", 16) == ask("one", "a100", 16) == {"answer": 1}
    assert ask("one", "a100", 17) == {"answer": 2} and ask("two", "a100", 16) == {"answer": 3}
    for broken in (common.toolchain.cache_dir() / "counts").iterdir():
        broken.write_bytes(b"half a fi")
    assert ask("one", "a100", 16) == {"answer": 4}


def test_what_a_dense_product_takes(common):
    a100 = common.get_device("a100")
    many = common.dense_seconds(a100, 8192, 8192, 8192, 0.5, launch=0)
    assert many == pytest.approx(2 * 8192**3 / (0.5 * a100.tensor["bf16"]))
    one = common.dense_seconds(a100, 1, 8192, 8192, launch=0)
    assert one == pytest.approx(2 * (8192**2 + 2 * 8192) / a100.dram_read)
    more = common.dequantized_seconds(a100, 1, 8192, 8192) - common.dense_seconds(
        a100, 1, 8192, 8192
    )
    moved = 8192**2 * (4.127 / 8 + 2) / a100.dram_read
    assert more == pytest.approx(moved + 0.45 * a100.launch)
