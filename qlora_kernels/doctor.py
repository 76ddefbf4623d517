"""``qlora doctor``: what this machine can do, which kernels run here, what is missing and how to
get it; a text for bug reports, without names of users or their folders."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["SCHEMA", "Finding", "examine", "report", "without_names"]

SCHEMA = 1

PACKAGES = (
    "torch", "triton", "transformers", "peft", "trl", "accelerate", "safetensors", "numpy",
    "bitsandbytes", "torchao", "lm-eval", "matplotlib", "rich", "fastapi",
)  # fmt: skip
# What a distribution is wanted for, and how to get it.
_WANTED = {
    "transformers": ("finetune, plan, chat, merge", "pip install 'qlora-kernels[finetune]'"),
    "peft": ("LoRA adapters in their usual format", "pip install 'qlora-kernels[finetune]'"),
    "trl": ("qlora finetune", "pip install 'qlora-kernels[finetune]'"),
    "matplotlib": ("plots", "pip install matplotlib"),
    "bitsandbytes": ("comparisons with it", "pip install bitsandbytes"),
}
_CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd")


@dataclass(frozen=True)
class Finding:
    """Something that is missing or slow here, and the command that changes it."""

    what: str
    command: str


@dataclass
class Health:
    """What was found, by section, each a line of name and value."""

    sections: dict[str, dict[str, str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": "doctor",
            **self.sections,
            "findings": [{"what": f.what, "command": f.command} for f in self.findings],
        }


# --- one look each ------------------------------------------------------------------------------


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "cpu model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                has = line.partition(":")[2].split()
                return [flag for flag in _CPU_FLAGS if flag in has]
    return []


def _gigabytes(n: float) -> str:
    return f"{n / 1e9:.1f} GB"


def _machine(health: Health) -> None:
    import torch

    from .planning.machine import available_memory

    room, who = available_memory()
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    found = {
        "system": system,
        "python": platform.python_version(),
        "processor": f"{_cpu_name()}, {os.cpu_count()} logical, {torch.get_num_threads()} threads",
        "instruction sets": ", ".join(_cpu_flags()) or "not known",
        "memory": f"{_gigabytes(room or 0)} to be had ({who})",
    }
    with contextlib.suppress(ImportError):
        import psutil

        found["memory"] = f"{_gigabytes(psutil.virtual_memory().total)}, {found['memory']}"
    free = shutil.disk_usage(Path.cwd()).free
    found["disk"] = f"{_gigabytes(free)} free here"
    if free < 5e9:
        health.findings.append(
            Finding(
                f"{_gigabytes(free)} free on this disk: models and checkpoints need more",
                "run where there is room (--output_dir), or lower --save_total_limit",
            )
        )
    health.sections["machine"] = found


def _gpus(health: Health) -> None:
    import torch

    found: dict[str, str] = {}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            found[f"gpu {i}"] = (
                f"{p.name}, capability {p.major}.{p.minor}, {_gigabytes(p.total_memory)}"
            )
        driver = _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        if driver:
            found["driver"] = driver.splitlines()[0]
    else:
        found["gpu"] = "none that torch can use"
        if _nvidia_is_here():
            health.findings.append(
                Finding(
                    f"there is an NVIDIA GPU, but torch {torch.__version__} cannot use it",
                    "pip install --force-reinstall torch",
                )
            )
    built = torch.version.cuda or (torch.version.hip and f"HIP {torch.version.hip}")
    found["torch is built for"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else str(
        built or "the CPU alone"
    )  # fmt: skip
    health.sections["gpu"] = found


def _nvidia_is_here() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()


def _kernels(health: Health) -> None:
    import torch

    from . import backend, cpu, cuda, ops

    found = {"backend": backend.get_backend()}
    for name, why in backend.backends().items():
        if name != "auto":
            found[f"backend {name}"] = "can run" if why is None else f"cannot: {_first(why)}"
    if ops.LIBRARY_ERROR:
        found["cpu kernels"] = f"plain torch, correct but slow: {_first(ops.LIBRARY_ERROR)}"
        health.findings.append(
            Finding("the native library is not there: all runs in plain torch", _install())
        )
    else:
        found["cpu kernels"] = f"{cpu.isa()} runs; here there are {', '.join(cpu.available_isas())}"
        best = cpu.available_isas()[-1] if cpu.available_isas() else cpu.isa()
        if best != cpu.isa():
            health.findings.append(
                Finding(f"{cpu.isa()} was chosen, and {best} could run", "unset QLORA_KERNELS_ISA")
            )
        bf16 = cpu.isa() == "avx512_bf16"
        for m in (1, 16, 512):
            with contextlib.suppress(ImportError):
                route = cpu.linear_route(m, 4096, 4096, 64, bf16)
                found[f"linear 4096x4096, {m} rows"] = f"{route} (CPU)"
    if torch.cuda.is_available():
        if ops.CUDA_LIBRARY_ERROR:
            health.findings.append(
                Finding(
                    f"the CUDA kernels are not there: {_first(ops.CUDA_LIBRARY_ERROR)}", _install()
                )
            )
        else:
            for m in (1, 16, 512):
                with contextlib.suppress(ImportError, ValueError):
                    plan, _ = cuda.choose(0, m, 4096, 4096, rank=16)
                    found[f"linear 4096x4096, {m} rows on GPU 0"] = str(plan)
            who = [
                kept for kept in cuda.read_cache("checks.json").values() if isinstance(kept, dict)
            ]
            wrong = sorted({k for kept in who for k, lines in kept.items() if lines})
            if wrong:
                found["switched off by the check"] = ", ".join(wrong)
    for name in ("ISA", "BACKEND", "DISABLE", "OPS", "SELF_CHECK"):
        value = os.environ.get(f"QLORA_KERNELS_{name}")
        if value is not None:
            found[f"QLORA_KERNELS_{name}"] = without_names(value)
    health.sections["kernels"] = found


def _install() -> str:
    return (
        "pip install --force-reinstall --no-deps qlora-kernels (in the source tree: pip install .)"
    )


def _first(text: str) -> str:
    return without_names(text.strip().splitlines()[0]) if text.strip() else ""


def _packages(health: Health) -> None:
    from . import __version__

    found = {"qlora-kernels": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
            if name in _WANTED:
                purpose, command = _WANTED[name]
                health.findings.append(Finding(f"{name} is not installed: {purpose}", command))
    health.sections["packages"] = found


def _toolchain(health: Health) -> None:
    found = {}
    for name, words in {
        "c++": [os.environ.get("CXX", "c++"), "--version"],
        "cmake": ["cmake", "--version"],
        "ninja": ["ninja", "--version"],
        "nvcc": ["nvcc", "--version"],
    }.items():
        said = _said(words)
        lines = [line for line in said.splitlines() if re.search(r"\d+\.\d+", line)]
        found[name] = without_names(lines[0].strip()) if lines else "not found"
    if "not found" in found["c++"]:
        health.findings.append(
            Finding(
                "no C++ compiler: torch.compile and a build from source need one",
                "sudo apt-get install build-essential (or your system's equivalent)",
            )
        )
    health.sections["toolchain"] = found


def _said(words: list[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


_LOOKS: dict[str, Callable[[Health], None]] = {
    "machine": _machine,
    "gpu": _gpus,
    "kernels": _kernels,
    "packages": _packages,
    "toolchain": _toolchain,
}


def examine() -> Health:
    """Looks at everything. A look that fails says so in its section and does not end the rest."""
    health = Health()
    for name, look in _LOOKS.items():
        try:
            look(health)
        except Exception as error:  # a doctor has to see the patient whatever is broken
            told = f"{type(error).__name__}: {_first(str(error))}"
            health.sections[name] = {"could not be examined": told}
            health.findings.append(Finding(f"{name} could not be examined: {told}", "report this"))
    return health


# --- what is told -------------------------------------------------------------------------------


def without_names(text: str) -> str:
    """``text`` without the user's name, the host's, and folders: of a path the last part stays."""
    text = re.sub(
        r"(?:~|[A-Za-z]:)?(?:[\\/][^\s\\/:;,'\"()]+)+[\\/]([^\s\\/:;,'\"()]+)", r".../\1", text
    )
    for name in {_user(), platform.node()}:
        if len(name) > 2 and name not in ("root", "localhost"):
            text = re.sub(rf"\b{re.escape(name)}\b", "...", text)
    return text


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # no name for this user's number
        return ""


def report(health: Health) -> str:
    """The text to paste in a bug report: Markdown."""
    lines = []
    for title, section in health.sections.items():
        lines += [f"**{title}**", ""]
        lines += [f"- {name}: {without_names(value)}" for name, value in section.items()]
        lines.append("")
    lines.append("**missing**")
    lines.append("")
    lines += [
        f"- {without_names(f.what)}: `{without_names(f.command)}`" for f in health.findings
    ] or ["- nothing"]
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="all of it as JSON")
    how.add_argument(
        "--report", action="store_true", help="the text to paste in a bug report alone"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints what was found; 0 also where things are missing."""
    health = examine()
    if arguments.json:
        cleaned = json.loads(json.dumps(health.to_json()), object_hook=_cleaned)
        print(json.dumps(cleaned, indent=2))
        return 0
    if arguments.report:
        sys.stdout.write(report(health))
        return 0
    for title, section in health.sections.items():
        print(title)
        width = max(map(len, section), default=0)
        for name, value in section.items():
            print(f"  {name:<{width}}  {value}")
        print()
    if health.findings:
        print("missing, and how to get it")
        for finding in health.findings:
            print(f"  {finding.what}\n      {finding.command}")
    else:
        print("nothing is missing")
    print("\n`qlora doctor --report` prints this for a bug report, without names and folders.")
    return 0


def _cleaned(found: dict[str, Any]) -> dict[str, Any]:
    return {k: without_names(v) if isinstance(v, str) else v for k, v in found.items()}
