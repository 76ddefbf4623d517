"""A driver for Triton whose GPU is the emulator: ``kernel[grid](...)`` on tensors in host memory.

    with EmulatedTriton("a100") as gpu:
        kernel[grid](x, y, n, BLOCK=1024)
    gpu.launches[-1].result.counts

Triton asks its active driver for four things: which GPU there is, how much shared memory it has,
to load a binary, and to launch it. This one answers the first two from the device table, and runs
the PTX of the same compilation for the last. So everything above the driver is Triton's own, as on
a GPU: which arguments it specializes on, what it compiles, what it passes. The binary itself is
made too (by Triton's ptxas), and its registers are held against the device's.

What is relied on: ``triton.runtime.driver.set_active``, and of a driver ``get_current_device``,
``get_current_stream``, ``get_current_target``, ``utils.get_device_properties``,
``utils.load_binary``, ``utils.unload_module``, ``launcher_cls(src, metadata)`` called with
``(grid x, y, z, stream, function, ...three..., ...arguments)``; and that the PTX lies beside the
metadata in Triton's cache. tests/emulator/test_triton_driver.py holds each of them.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from . import toolchain
from .decode import Kernel
from .devices import DEVICES, Device, get_device
from .errors import EmulatorError
from .launch import Module, Result, emulate, emulate_orders

__all__ = ["EmulatedTriton", "TritonLaunch"]


@dataclass
class TritonLaunch:
    """One launch: the kernel's name, its grid, what Triton says of it, and what came of it."""

    name: str
    grid: tuple[int, int, int]
    metadata: Any
    registers: int  # a thread, by ptxas; 0 where cuobjdump is missing
    spilled: int  # bytes a thread of local memory
    result: Result


@functools.lru_cache(maxsize=256)
def _kernel(ptx: str, name: str) -> Kernel:
    return Module(ptx, f"Triton kernel {name}").kernel()


@functools.lru_cache(maxsize=256)
def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread; zeros where cuobjdump is missing."""
    if toolchain.available("cuobjdump"):
        return 0, 0
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (used,) = toolchain.resource_usage(file.name).values()
    return used.registers, used.local + used.stack


class _Utils:
    def __init__(self, device: Device) -> None:
        self.device = device

    def get_device_properties(self, _index: int) -> dict[str, int]:
        d = self.device
        return {
            "max_shared_mem": d.sm.shared_optin,
            "max_num_regs": d.sm.registers,
            "multiprocessor_count": d.sms,
            "warpSize": 32,
            "sm_clock_rate": int(d.clock / 1e3),
            "mem_clock_rate": d.memory_clock_khz,
            "mem_bus_width": d.bus_bits,
        }

    def load_binary(self, _name: str, binary: bytes, _shared: int, _device: int) -> tuple:
        registers, local = _resources(bytes(binary))
        return object(), (registers, local), registers, local // 4, 1024

    def unload_module(self, _module: Any) -> None:
        pass


class EmulatedTriton:
    """While entered, Triton's GPU. One at a time in a process.

    Args:
        device: of `devices.DEVICES`; its compute capability is what Triton compiles for.
        checks, seed, options: as `emulate`'s.
        orders: above 1, each launch runs in so many orders of warps and blocks first, and raises
            `KernelError` where results differ.

    Raises `EmulatorError` where Triton is not installed, `KernelError` from a launch in which a
    checker found something.
    """

    def __init__(
        self,
        device: str | Device = "h100",
        *,
        checks: Any = True,
        seed: int = 0,
        orders: int = 1,
        **options: Any,
    ) -> None:
        self.device = get_device(device)
        self.checks, self.seed, self.orders, self.options = checks, seed, orders, options
        self.launches: list[TritonLaunch] = []
        self.utils = _Utils(self.device)
        self._before: Any = None

    @property
    def results(self) -> list[Result]:
        return [launch.result for launch in self.launches]

    def __enter__(self) -> EmulatedTriton:
        try:
            from triton.runtime import driver
        except ImportError as e:
            raise EmulatorError("Triton is not installed: pip install triton") from e
        self._before = driver._active
        driver.set_active(self)
        return self

    def __exit__(self, *_: Any) -> None:
        from triton.runtime import driver

        driver._active = self._before

    # --- what Triton asks of a driver ---------------------------------------------------------

    def get_current_device(self) -> int:
        """A number of its own for each entry of the table: Triton keeps compilations by it."""
        return list(DEVICES).index(self.device.key)

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        major, minor = self.device.capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return SimpleNamespace(synchronize=lambda: None, current_device=self.get_current_device)

    def get_benchmarker(self) -> Any:
        """For ``triton.autotune``: candidates are run once, checked, and told apart by the warp
        instructions that they take, in milliseconds' place."""

        def bench(call: Any, quantiles: Any = None, **_: Any) -> Any:
            before = len(self.launches)
            call()
            counts = [launch.result.counts.instructions for launch in self.launches[before:]]
            cost = float(sum(c["warps"].sum() for c in counts))
            return [cost] * len(quantiles) if quantiles else cost

        return bench

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        from triton.runtime.cache import get_cache_manager

        files = get_cache_manager(metadata.hash).get_group(f"{metadata.name}.json") or {}
        texts = [path for name, path in files.items() if name.endswith(".ptx")]
        if not texts:
            raise EmulatorError(
                f"Triton's cache has no PTX of {metadata.name}; what it has: {sorted(files)}"
            )
        kernel = _kernel(Path(texts[0]).read_text(), metadata.name)
        kernel.triton = metadata  # block, shared memory and scratch pointers follow from it
        passed = [k for k, kind in enumerate(src.signature.values()) if kind != "constexpr"]

        def launch(x: int, y: int, z: int, _stream: int, function: Any, *rest: Any) -> None:
            args = [rest[4:][k] for k in passed]
            self._launch(kernel, metadata, (x, y, z), function, args)

        return launch

    def _launch(self, kernel: Kernel, metadata: Any, grid: Any, function: Any, args: list) -> None:
        # The driver that is active now, not the one that compiled it: Triton keeps launchers.
        from triton.runtime import driver

        active = driver.active
        if 0 in grid:
            return
        registers, local = function
        common = {
            "device": active.device,
            "registers": registers or None,
            **active.options,
        }
        if active.orders > 1:
            kept = [a.clone() if hasattr(a, "data_ptr") else a for a in args]
            emulate_orders(kernel, grid, None, kept, orders=active.orders, **common)
        result = emulate(kernel, grid, None, args, checks=active.checks, seed=active.seed, **common)
        active.launches.append(
            TritonLaunch(metadata.name, grid, metadata, registers, local, result)
        )
