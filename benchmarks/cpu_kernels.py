"""The CPU kernels beside bitsandbytes, dense matmuls and what the machine allows.

    python benchmarks/cpu_kernels.py            # all lines on LLaMA-7B's shapes
    python benchmarks/cpu_kernels.py --shapes 4096x4096 --modes fp32 --lines "M = 1"

A line is one kernel on one weight [out, in] in one mode:

    fp32    x, A, B and sums of products in fp32: what the applications choose where the hardware
            does not multiply bf16
    mixed   x, A and B in fp32, computed in bf16: what PEFT sends by default
    bf16    bf16 throughout

Contenders are checked against fp32 products with the dequantized weight before they are timed:

    ours        linear_4bit and the other ops of this package
    bnb         bitsandbytes' Linear4bit as it is trained (with LoRA: in PEFT)
    repacked    the same after eval(), which repacks the weight where AVX-512 BF16 is there
    bf16, fp32  torch's dense linear of that dtype on the same, dequantized weight
    limit       reading the line's bytes, copying or filling its result, or its products at the
                speed of torch's matmul on square matrices, whichever takes longer

Each bar of the project is then judged: held, missed, or not measurable here with the reason.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import harness
from harness import Contender, Race

SHAPES = ("4096x4096", "11008x4096", "4096x11008")
MODES = ("fp32", "mixed", "bf16")
ROWS = (4, 16, 128, 512, 2048)
HELD = {  # every library that decides at run time, held to AVX2
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "QLORA_KERNELS_ISA": "avx2",
}


@dataclass
class Line:
    """What one race measured."""

    work: str
    shape: str
    mode: str
    race: Race
    flops: float
    bytes: float  # compulsory traffic
    limit: float | None = None  # seconds, where it is not itself a contender
    dense_bytes: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def of_limit(self) -> float | None:
        """The share of the limit that ours attains."""
        if not self.race.has("ours"):
            return None
        if self.race.has("limit"):
            return self.race.ratio("ours", "limit").median
        return None if self.limit is None else self.limit / self.race.time("ours").median

    def as_json(self) -> dict[str, Any]:
        return {
            "work": self.work,
            "shape": self.shape,
            "mode": self.mode,
            "flops": self.flops,
            "bytes": self.bytes,
            "limit_seconds": self.limit,
            **self.extra,
            **self.race.as_json(),
        }


def dtypes(mode: str) -> tuple[Any, Any]:
    """``(of x, A and B; of the products)``."""
    import torch

    f32, bf16 = torch.float32, torch.bfloat16
    return {"fp32": (f32, f32), "mixed": (f32, bf16), "bf16": (bf16, bf16)}[mode]


def same_as(want: Any, tolerance: float) -> Callable[[Any], str | None]:
    """A check: the relative error of a result, by norms, is at most ``tolerance``."""

    def check(got: Any) -> str | None:
        if got.shape != want.shape:
            return f"shape {list(got.shape)}, not {list(want.shape)}"
        error = ((got.float() - want).norm() / want.norm()).item()
        return None if error <= tolerance else f"relative error {error:.2g} > {tolerance:g}"

    return check


TOLERANCE = {"fp32": 1e-4, "mixed": 2**-6, "bf16": 2**-6}


def has_peer(package: str) -> bool:
    return harness.version(package) is not None


def can_repack() -> bool:
    if not has_peer("bitsandbytes"):
        return False
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


class Weight:
    """One weight in every contender's form, made when asked for, in as many copies as wanted."""

    def __init__(self, n: int, k: int) -> None:
        import torch

        from qlora_kernels import functional as F4

        self.n, self.k = n, k
        original = (torch.randn(n, k) * 0.02).to(torch.bfloat16)
        self.original = original
        packed, state = F4.quantize_4bit(original, quant_type="nf4", compress_statistics=True)
        self._ours = [(packed, state)]
        self.values = F4.dequantize_4bit(packed, state, dtype=torch.float32)
        self._dense: dict[Any, list[Any]] = {torch.float32: [self.values]}
        self._peer: dict[Any, list[Any]] = {}
        nested = state.state2
        tensors = (packed, state.absmax, nested.absmax, nested.code, state.code)
        self.packed_bytes = sum(t.numel() * t.element_size() for t in tensors)

    def ours(self, copies: int = 1) -> list[Any]:
        import copy

        while len(self._ours) < copies:
            packed, state = self._ours[0]
            self._ours.append((packed.clone(), copy.deepcopy(state)))
        return self._ours[:copies]

    def dense(self, dtype: Any, copies: int = 1) -> list[Any]:
        found = self._dense.setdefault(dtype, [])
        while len(found) < copies:
            found.append(self.values.to(dtype, copy=True))
        return found[:copies]

    def peer(self, compute: Any, copies: int = 1, repacked: bool = False) -> list[Any]:
        """bitsandbytes' layers."""
        import bitsandbytes as bnb

        found = self._peer.setdefault((compute, repacked), [])
        while len(found) < copies:
            layer = bnb.nn.Linear4bit(
                self.k, self.n, bias=False, compute_dtype=compute, quant_type="nf4"
            )
            layer.weight = bnb.nn.Params4bit(
                self.original.to(compute, copy=True), requires_grad=False, quant_type="nf4"
            )
            layer = layer.to("cpu")  # quantizes
            found.append(layer.train(not repacked))
        return found[:copies]

    def drop(self) -> None:
        """Frees the copies."""
        self._ours, self._peer = self._ours[:1], {}
        self._dense = {d: w[:1] for d, w in self._dense.items()}
        gc.collect()


# --- lines --------------------------------------------------------------------------------------


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        self.args, self.torch = args, torch
        self.machine = harness.describe_machine(args.threads)
        self.bf16 = harness.has_bf16_products(self.machine)
        self.peer = has_peer("bitsandbytes") and not args.no_peer
        self.repack = self.peer and can_repack()
        self.lines: list[Line] = []
        f32, bf16 = torch.float32, torch.bfloat16
        self.bandwidth = harness.read_bandwidth(args)
        self.peaks = {
            "fp32": harness.matmul_peak(f32, args),
            "bf16": harness.matmul_peak(bf16, args),
        }

    def usual_modes(self, shape: str) -> tuple[str, ...]:
        """Where bf16 is multiplied in software it takes minutes a line: on one weight only."""
        if self.bf16:
            return ("mixed", "bf16")
        return MODES if shape == self.args.shapes[0] else ("fp32",)

    def wanted(self, work: str) -> bool:
        return re.search(self.args.lines, work) is not None

    def add(self, line: Line) -> None:
        self.lines.append(line)
        race = line.race
        text = ", ".join(f"{n} {1e3 * race.time(n).median:.3f}" for n in race.samples)
        wrong = "".join(f"; {n} FAILED" for n in race.failed)
        pairs = race.time(next(iter(race.samples))).count if race.samples else 0
        print(f"  {line.work} {line.shape} {line.mode}: {text} ms, {pairs} pairs{wrong}",
              file=sys.stderr, flush=True)  # fmt: skip

    def all_lines(self) -> None:
        for shape in self.args.shapes:
            n, k = map(int, shape.split("x"))
            weight = Weight(n, k)
            with self.torch.no_grad():
                self.conversions(weight, shape)
            for mode in self.args.modes or self.usual_modes(shape):
                with self.torch.no_grad():
                    self.linears(weight, shape, mode)
                self.training(weight, shape, mode)
                weight.drop()
            del weight
            gc.collect()

    def conversions(self, w: Weight, shape: str) -> None:
        """quantize and dequantize: of and to bf16."""
        torch, args = self.torch, self.args
        from qlora_kernels import functional as F4

        packed, state = w.ours()[0]
        want, original = w.dense(torch.bfloat16)[0].float(), w.original
        out, source = torch.empty_like(original), w.dense(torch.bfloat16)[0]
        ours, peer = {"quant_type": "nf4", "compress_statistics": True}, None
        if self.peer:
            import bitsandbytes.functional as peer

            peer_packed, peer_state = peer.quantize_4bit(original, **ours)

        def same_bytes(result: Any) -> str | None:
            same = torch.equal(result[0].view(-1), packed.view(-1))
            return None if same else "other bytes than ours"

        if self.wanted("quantize"):
            contenders = [
                Contender("ours", lambda _: F4.quantize_4bit(original, **ours), same_bytes),
                Contender("limit", lambda _: harness.read_memory(original, args.threads)),
            ]
            if peer:
                run = lambda _: peer.quantize_4bit(original, **ours)  # noqa: E731
                contenders.append(Contender("bnb", run, same_bytes))
            self.add(Line("quantize", shape, "of bf16", harness.race(contenders, args), 0,
                          2 * w.n * w.k + w.packed_bytes))  # fmt: skip
        # The peer's nested offset is a mean whose last bits depend on its threads; ours does not.
        check, peer_check = same_as(want, 0), same_as(want, 1e-4)
        traffic = 2 * w.n * w.k + w.packed_bytes
        if self.wanted("dequantize, out="):
            contenders = [
                Contender("ours", lambda _: F4.dequantize_4bit(packed, state, out=out), check),
                Contender("limit", lambda _: out.copy_(source)),
            ]
            if peer:  # cannot write into a given tensor on a CPU
                run = lambda _: peer.dequantize_4bit(peer_packed, peer_state)  # noqa: E731
                contenders.append(Contender("bnb", run, peer_check))
            self.add(Line("dequantize, out=", shape, "to bf16", harness.race(contenders, args), 0,
                          traffic))  # fmt: skip
        if self.wanted("dequantize"):
            contenders = [
                Contender("ours", lambda _: F4.dequantize_4bit(packed, state), check),
                Contender("limit", lambda _: torch.full((w.n, w.k), 1.0, dtype=torch.bfloat16)),
            ]
            if peer:
                run = lambda _: peer.dequantize_4bit(peer_packed, peer_state)  # noqa: E731
                contenders.append(Contender("bnb", run, peer_check))
            self.add(Line("dequantize", shape, "to bf16", harness.race(contenders, args), 0,
                          traffic))  # fmt: skip

    def linears(self, w: Weight, shape: str, mode: str) -> None:
        torch = self.torch
        x_dtype, compute = dtypes(mode)
        for work, m, cold in [
            ("M = 1, cold", 1, True),
            ("M = 1, in cache", 1, False),
            *((f"M = {m}", m, False) for m in self.args.rows),
        ]:
            if not self.wanted(work):
                continue
            x = torch.randn(m, w.k).to(x_dtype)
            contenders = self.linear_contenders(w, x, compute, mode, cold)
            if m == 1:
                contenders.insert(1, self.read_limit(w, cold))
            line = Line(work, shape, mode, harness.race(contenders, self.args, cold=cold),
                        2.0 * m * w.n * w.k, self.traffic(w, m, x_dtype))  # fmt: skip
            if m > 1:
                peak = max(self.peaks.values()) if compute == torch.bfloat16 else self.peaks["fp32"]
                line.limit = max(line.bytes / self.bandwidth, line.flops / peak)
            self.add(line)
            weight_bytes = w.n * w.k * (2 if compute == torch.bfloat16 else 4)
            line.dense_bytes = line.bytes - w.packed_bytes + weight_bytes
        if self.wanted("M = 1, LoRA r = 16"):
            self.lora_line(w, shape, mode)

    def traffic(self, w: Weight, m: int, x_dtype: Any) -> float:
        return w.packed_bytes + m * (w.n + w.k) * self.torch.empty(0, dtype=x_dtype).element_size()

    def read_limit(self, w: Weight, cold: bool) -> Contender:
        """Reads as many bytes as the packed weight has, from as many places as it stands in."""
        copies = harness.copies_for_cold(w.packed_bytes, self.args) if cold else 1
        buffers = [
            self.torch.ones(w.packed_bytes // 8, dtype=self.torch.int64) for _ in range(copies)
        ]
        threads = self.args.threads
        return Contender("limit", lambda i: harness.read_memory(buffers[i % copies], threads))

    def linear_contenders(
        self, w: Weight, x: Any, compute: Any, mode: str, cold: bool
    ) -> list[Contender]:
        torch = self.torch
        from qlora_kernels import functional as F4

        check = same_as(x.float() @ w.values.T, TOLERANCE[mode])

        def places(size: int) -> int:
            return harness.copies_for_cold(size, self.args) if cold else 1

        def ours() -> Callable[[int], Any]:
            copies = w.ours(places(w.packed_bytes))
            return lambda i: F4.linear_4bit(x, *copies[i % len(copies)], compute_dtype=compute)

        def peer(repacked: bool = False) -> Callable[[int], Any]:
            layers = w.peer(compute, places(w.packed_bytes), repacked)
            return lambda i: layers[i % len(layers)](x)

        def dense(dtype: Any) -> Callable[[int], Any]:
            size = torch.empty(0, dtype=dtype).element_size()
            copies, y = w.dense(dtype, places(w.n * w.k * size)), x.to(dtype)
            return lambda i: torch.nn.functional.linear(y, copies[i % len(copies)])

        found = [Contender("ours", ours(), check)]
        if self.peer:
            found.append(Contender("bnb", peer(), check))
        if self.repack:
            found.append(Contender("repacked", peer(True), same_as(x.float() @ w.values.T, 2**-5)))
        found.append(Contender("fp32", dense(torch.float32), check))
        if compute == torch.bfloat16:
            loose = same_as(x.float() @ w.values.T, 2**-6)
            found.append(Contender("bf16", dense(torch.bfloat16), loose))
        return found

    def lora_line(self, w: Weight, shape: str, mode: str) -> None:
        torch = self.torch
        from qlora_kernels import functional as F4

        x_dtype, compute = dtypes(mode)
        packed, state = w.ours()[0]
        x, r = torch.randn(1, w.k).to(x_dtype), 16
        a = (torch.randn(r, w.k) / w.k**0.5).to(x_dtype)
        b = torch.randn(w.n, r).to(x_dtype)
        plain = x.float() @ w.values.T
        want = plain + 0.5 * (x.float() @ a.float().T) @ b.float().T
        options = {"compute_dtype": compute}
        contenders = [
            Contender("ours", lambda _: F4.linear_4bit(x, packed, state, None, a, b, scaling=0.5,
                                                       **options), same_as(want, TOLERANCE[mode])),
            Contender("without", lambda _: F4.linear_4bit(x, packed, state, **options),
                      same_as(plain, TOLERANCE[mode])),
        ]  # fmt: skip
        extra = (a.numel() + b.numel()) * a.element_size()
        self.add(Line("M = 1, LoRA r = 16", shape, mode, harness.race(contenders, self.args),
                      2.0 * (w.n * w.k + r * (w.n + w.k)),
                      self.traffic(w, 1, x_dtype) + extra))  # fmt: skip

    def training(self, w: Weight, shape: str, mode: str) -> None:
        """Forward and backward of a layer with LoRA, as PEFT builds it around each base layer."""
        torch = self.torch
        m = 512 if 512 in self.args.rows else max(self.args.rows)
        work, r = f"forward + backward, LoRA r = 64, M = {m}", 64
        if not self.wanted(work) or not has_peer("peft"):
            return
        x_dtype, compute = dtypes(mode)
        x = torch.randn(m, w.k).to(x_dtype).requires_grad_()
        dy = torch.randn(m, w.n).to(x_dtype)
        a = (torch.randn(r, w.k) / w.k**0.5).to(x_dtype)
        b = (torch.randn(w.n, r) * 0.1).to(x_dtype)
        plain = dy.float() @ w.values
        want = plain + 0.5 * (dy.float() @ b.float()) @ a.float()

        def step(layer: Callable[[Any], Any], x: Any, dy: Any) -> Callable[[int], Any]:
            def run(_: int) -> Any:
                x.grad = None
                layer(x).backward(dy)
                return x.grad

            return run

        check = same_as(want, TOLERANCE[mode])
        contenders = [Contender("ours", step(self.ours_with_lora(w, compute, a, b), x, dy), check)]
        if self.peer:
            layer = with_peft(w.peer(compute)[0], a, b, four_bit=True)
            contenders.append(Contender("bnb", step(layer, x, dy), check))
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            if dtype == torch.bfloat16 and compute != dtype:
                continue
            dense = torch.nn.Linear(w.k, w.n, bias=False, device="meta")
            dense.weight = torch.nn.Parameter(w.dense(dtype)[0], requires_grad=False)
            y, g = x.detach().to(dtype).requires_grad_(), dy.to(dtype)
            loose = same_as(plain, 2**-6)
            contenders.append(Contender(name, step(dense, y, g), loose))
            lora = with_peft(dense, a.to(dtype), b.to(dtype))
            check_lora = same_as(want, 2**-6)
            contenders.append(Contender(f"{name} + LoRA", step(lora, y, g), check_lora))
        products = 4.0 * m * w.n * w.k + 10.0 * m * r * (w.n + w.k)
        line = Line(work, shape, mode, harness.race(contenders, self.args), products,
                    2 * self.traffic(w, m, x_dtype))  # fmt: skip
        peak = max(self.peaks.values()) if compute == torch.bfloat16 else self.peaks["fp32"]
        line.limit = max(line.bytes / self.bandwidth, line.flops / peak)
        self.add(line)

    def ours_with_lora(self, w: Weight, compute: Any, a: Any, b: Any) -> Any:
        from qlora_kernels import integrations, nn

        integrations.install()
        layer = nn.Linear4bit.from_linear(
            dense_linear(w.original), quant_type="nf4", compute_dtype=compute
        )
        return with_peft(layer, a, b)


def dense_linear(weight: Any) -> Any:
    import torch

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def with_peft(base: Any, a: Any, b: Any, four_bit: bool = False) -> Any:
    """The layer that PEFT puts around ``base``, with given A and B and ``scaling`` 0.5."""
    import peft
    import torch

    class Holder(torch.nn.Module):
        is_loaded_in_4bit = four_bit  # PEFT asks the model, not the layer

        def __init__(self) -> None:
            super().__init__()
            self.layer = base

        def forward(self, x: Any) -> Any:
            return self.layer(x)

    config = peft.LoraConfig(r=a.shape[0], lora_alpha=a.shape[0] // 2, target_modules=["layer"])
    with torch.random.fork_rng():
        layer = peft.get_peft_model(Holder(), config).base_model.model.layer
    layer.lora_A["default"].weight = torch.nn.Parameter(a.clone())
    layer.lora_B["default"].weight = torch.nn.Parameter(b.clone())
    return layer.train()


# --- bars ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """What a line must reach: ``ratio`` of a race, at least or at most."""

    work: str
    text: str
    of: tuple[str, str]  # Race.ratio's arguments
    bound: float
    at_least: bool = True
    needs: str = ""  # "repacking", "bf16": what the machine must have for it to mean anything

    def judge(self, lines: list[Line], bench: Bench) -> dict[str, Any]:
        found = [line for line in lines if line.work == self.work]
        values = [(line.race.ratio(*self.of), line) for line in found if line.race.has(*self.of)]
        verdict: dict[str, Any] = {"work": self.work, "bar": self.text}
        if values:
            worst, at = (min if self.at_least else max)(values, key=lambda v: v[0].median)
            held = worst.median >= self.bound if self.at_least else worst.median <= self.bound
            verdict |= {"worst": worst.median, "low": worst.low, "high": worst.high,
                        "pairs": worst.count, "where": f"{at.shape} {at.mode}"}  # fmt: skip
        reason = self.missing(bench)
        if reason:
            verdict |= {"verdict": "not measurable", "why": reason}
        elif not values:
            verdict |= {"verdict": "not measured", "why": "no line of this run has it"}
        else:
            verdict["verdict"] = "held" if held else "missed"
            if worst.count < 7:
                verdict["why"] = f"{worst.count} pairs only"
        return verdict

    def missing(self, bench: Bench) -> str:
        """Why this machine cannot tell, or nothing."""
        here = bench.machine["kernels_isa"]
        if self.needs == "repacking" and not bench.repack:
            return f"bitsandbytes repacks with AVX-512 BF16 only; this machine has {here}"
        if self.needs == "bf16" and not bench.bf16:
            return f"stated for a machine that multiplies bf16; this one has {here}"
        return ""


def bars(rows: tuple[int, ...] = ROWS) -> list[Bar]:
    found = [
        Bar("quantize", ">= 40 x bitsandbytes", ("ours", "bnb"), 40),
        Bar("dequantize, out=", ">= 60% of a copy", ("ours", "limit"), 0.6),
        Bar("dequantize", ">= 0.9 x a fill", ("ours", "limit"), 0.9),
        Bar("dequantize", ">= bitsandbytes", ("ours", "bnb"), 1.0),
        Bar("M = 1, cold", ">= 75% of reading", ("ours", "limit"), 0.75, needs="bf16"),
        Bar("M = 1, cold", ">= 1.1 x repacked", ("ours", "repacked"), 1.1, needs="repacking"),
        Bar("M = 1, in cache", ">= 1.0 x repacked", ("ours", "repacked"), 1.0, needs="repacking"),
        Bar("M = 1, LoRA r = 16", "<= 1.15 x without", ("without", "ours"), 1.15, False),
        Bar("M = 4", ">= 1.25 x repacked", ("ours", "repacked"), 1.25, needs="repacking"),
        Bar("M = 16", ">= 1.2 x repacked", ("ours", "repacked"), 1.2, needs="repacking"),
    ]
    for m, bound in ((128, 1.10), (512, 1.05), (2048, 1.03)):
        text = f"<= {bound:.2f} x dense bf16"
        found.append(Bar(f"M = {m}", text, ("bf16", "ours"), bound, False, "bf16"))
    found.append(Bar("forward + backward, LoRA r = 64, M = 512", "<= 1.08 x dense bf16, no LoRA",
                     ("bf16", "ours"), 1.08, False, "bf16"))  # fmt: skip
    return found


def judge_avx2(lines: list[Line], bench: Bench) -> dict[str, Any]:
    """On AVX2 ours is at least as fast as bitsandbytes, not repacked, on every line."""
    verdict: dict[str, Any] = {"work": "every line, AVX2", "bar": ">= bitsandbytes, not repacked"}
    values = [
        (line.race.ratio("ours", "bnb"), line) for line in lines if line.race.has("ours", "bnb")
    ]
    if not values:
        return verdict | {"verdict": "not measured", "why": "bitsandbytes is not here"}
    worst, at = min(values, key=lambda v: v[0].median)
    where = f"{at.work} {at.shape} {at.mode}"
    verdict |= {"worst": worst.median, "low": worst.low, "high": worst.high,
                "pairs": worst.count, "where": where, "lines": len(values)}  # fmt: skip
    if {"avx512f"} & set(bench.machine["flags"]):
        why = "bitsandbytes' library takes AVX-512 at run time and cannot be held below it"
        return verdict | {"verdict": "not comparable", "why": why}
    return verdict | {"verdict": "held" if worst.median >= 1 else "missed"}


# --- report -------------------------------------------------------------------------------------


def report(bench: Bench, verdicts: list[dict[str, Any]]) -> None:
    rows = []
    for line in bench.lines:
        race = line.race
        if not race.has("ours"):
            rows.append([line.work, line.shape, line.mode, "FAILED", *[""] * 5])
            continue

        def against(name: str, race: Race = race) -> str:
            return race.ratio("ours", name).text() if race.has(name) else ""

        share = line.of_limit()
        rows.append([line.work, line.shape, line.mode, f"{1e3 * race.time('ours').median:.3f}",
                     against("bnb"), against("repacked"), against("bf16"), against("fp32"),
                     "" if share is None else f"{100 * share:.0f}%"])  # fmt: skip
    print(f"\n{harness.machine_line(bench.machine)}")
    print(f"clock: {bench.args.clock}; cold reads {bench.bandwidth / 1e9:.1f} GB/s; torch's matmul "
          f"{bench.peaks['fp32'] / 1e9:.0f} GFLOP/s in fp32, {bench.peaks['bf16'] / 1e9:.0f} in "
          "bf16")  # fmt: skip
    print("how many times as fast as each: median of pairs (smallest-largest)\n")
    head = ["work", "weight", "mode", "ours, ms", "bitsandbytes", "repacked", "dense bf16",
            "dense fp32", "of limit"]  # fmt: skip
    harness.print_table(head, rows)
    for line in bench.lines:
        for name, why in line.race.failed.items():
            first = why.splitlines()[0][:200]
            print(f"FAILED: {line.work} {line.shape} {line.mode}: {name}: {first}")
    print()
    harness.print_table(
        ["bar", "", "worst line", "", "verdict"],
        [[v["work"], v["bar"],
          "" if "worst" not in v else f"{v['worst']:.2f} ({v['low']:.2f}-{v['high']:.2f})",
          v.get("where", ""),
          v["verdict"] + (f" ({v['why']})" if v.get("why") else "")] for v in verdicts],
    )  # fmt: skip


def draw(bench: Bench) -> None:
    names = {"ours": "ours", "bnb": "bitsandbytes", "repacked": "bitsandbytes, repacked",
             "fp32": "dense fp32", "bf16": "dense bf16"}  # fmt: skip
    shape = bench.args.shapes[0]
    mode = (bench.args.modes or bench.usual_modes(shape))[0]
    points = []
    for name, title in names.items():
        for line in bench.lines:
            if (line.shape, line.mode) != (shape, mode) or not line.race.has(name):
                continue
            if not line.work.startswith("M = ") or "LoRA" in line.work or "cache" in line.work:
                continue
            traffic = line.dense_bytes if name in ("fp32", "bf16") else line.bytes
            points.append((title, line.work, line.flops / traffic,
                           line.flops / line.race.time(name).median))  # fmt: skip
    if points:
        peaks = {f"torch's matmul, {k}": v for k, v in bench.peaks.items()}
        path = harness.result_path(bench.args).with_suffix(".png")
        title = f"y = x W^T, W {shape} NF4, {mode}, {bench.args.threads} thread(s)"
        harness.roofline(path, points, bench.bandwidth, peaks, title)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="weights, out x in")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        help="usual: those that the hardware is for; without bf16 all on the first weight",
    )
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="M > 1")
    parser.add_argument("--lines", default="", help="regular expression: lines to run")
    parser.add_argument("--no-peer", action="store_true", help="leave bitsandbytes out")
    parser.add_argument("--held", action="store_true", help=argparse.SUPPRESS)
    harness.add_arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.shapes = ["256x512"] if args.shapes == list(SHAPES) else args.shapes
        args.rows = [m for m in args.rows if m <= 128]
    harness.begin(args)
    bench = Bench(args)
    bench.all_lines()
    verdicts = [bar.judge(bench.lines, bench) for bar in bars() if bench.wanted(bar.work)]
    figures: dict[str, Any] = {
        "limits": {"read_bytes_per_second": bench.bandwidth,
                   "matmul_flops": bench.peaks},
        "lines": [line.as_json() for line in bench.lines],
    }  # fmt: skip
    if bench.machine["kernels_isa"] in ("avx512", "avx512_bf16") and not args.held:
        held = harness.run_child(__file__, [*sys.argv[1:], "--held"], HELD)
        figures["held_to_avx2"] = {k: held[k] for k in ("limits", "lines")}
        verdicts += [v for v in held["verdicts"] if v["work"] == "every line, AVX2"]
    elif bench.machine["kernels_isa"] == "avx2":
        verdicts.append(judge_avx2(bench.lines, bench))
    report(bench, verdicts)
    harness.write_json(args, figures | {"verdicts": verdicts})
    draw(bench)
    return 1 if any(line.race.failed for line in bench.lines) else 0


if __name__ == "__main__":
    sys.exit(main())
