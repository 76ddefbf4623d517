"""The memory plan of a finetune: :mod:`qlora_kernels.planning`, under the name that runs use."""

from ..planning.machine import (
    available_memory,
    peak_memory,
    peak_resident_memory,
    resident_memory,
)
from ..planning.memory import MemoryPlan, plan_memory
from ..planning.trace import StepShape

__all__ = [
    "MemoryPlan",
    "StepShape",
    "available_memory",
    "peak_memory",
    "peak_resident_memory",
    "plan_memory",
    "resident_memory",
]
