"""What a figure depends on: processor or GPU, caches, threads, versions, and how busy it was."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .limits import cache_sizes

__all__ = ["describe_machine", "differences", "has_bf16_products", "machine_line", "version"]

_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
          "amx_tile", "amx_bf16", "asimd", "bf16", "sve")  # fmt: skip
_PACKAGES = ("bitsandbytes", "torchao", "triton", "transformers", "peft", "trl", "accelerate",
             "numpy")  # fmt: skip


def version(package: str) -> str | None:
    """Of an installed package; None of one that is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_machine(threads: int, gpu: int | None = None) -> dict[str, Any]:
    """What a figure depends on; ``gpu`` is the index of one that is measured."""
    from qlora_kernels import __version__, cpu

    info: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    flags = set((info.get("flags") or info.get("Features") or "").split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "processor": info.get("model name") or platform.processor() or platform.machine(),
        "family_model": f"{info.get('cpu family', '?')}/{info.get('model', '?')}",
        "virtual": "hypervisor" in flags,
        "flags": [f for f in _FLAGS if f in flags],
        "caches": cache_sizes(),
        "cores": os.cpu_count(),
        "memory": memory,
        "threads": threads,
        "load": list(os.getloadavg()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "kernels_isa": cpu.isa(),
        "qlora_kernels": __version__,
        "packages": {p: version(p) for p in _PACKAGES},
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    if gpu is not None:
        p = torch.cuda.get_device_properties(gpu)
        found["gpu"] = {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "memory": p.total_memory,
            "multiprocessors": p.multi_processor_count,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return found


def machine_line(machine: dict[str, Any]) -> str:
    caches = ", ".join(f"{k} {v >> 10} KiB" for k, v in machine["caches"].items())
    gpu = machine.get("gpu")
    return (
        (f"{gpu['name']} (sm {gpu['capability']}, CUDA {gpu['cuda']}) in " if gpu else "")
        + f"{machine['processor']} (family/model {machine['family_model']}"
        f"{', virtual' if machine['virtual'] else ''}), {machine['cores']} cores, "
        f"{machine['threads']} thread(s), {caches}; kernels {machine['kernels_isa']}, "
        f"torch {machine['torch']} {machine['torch_isa']}; "
        f"load {machine['load'][0]:.1f}"
    )


def has_bf16_products(machine: dict[str, Any]) -> bool:
    """Whether the processor multiplies bf16 in hardware."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(machine["flags"]))


# What makes a machine another one, and what is only another version of the software on it.
_SAME = ("processor", "family_model", "cores", "threads", "kernels_isa", "torch_isa")
_VERSIONS = ("qlora_kernels", "torch", "python")


def differences(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between two machines: ``(of the machines, of the software on them)``."""

    def text(what: str, x: Any, y: Any) -> str:
        return f"{what}: {x} and {y}"

    machine = [text(k, a.get(k), b.get(k)) for k in _SAME if a.get(k) != b.get(k)]
    one, other = (m.get("gpu") or {} for m in (a, b))
    if one.get("name") != other.get("name"):
        machine.append(text("GPU", one.get("name"), other.get("name")))
    software = [text(k, a.get(k), b.get(k)) for k in _VERSIONS if a.get(k) != b.get(k)]
    if one.get("cuda") != other.get("cuda"):
        software.append(text("CUDA", one.get("cuda"), other.get("cuda")))
    packages, others = a.get("packages") or {}, b.get("packages") or {}
    for name in sorted(set(packages) | set(others)):
        if packages.get(name) != others.get(name):
            software.append(text(name, packages.get(name), others.get(name)))
    return machine, software
