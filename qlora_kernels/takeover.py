"""``enable()``: scripts written for bitsandbytes run on this package's kernels, unchanged.

Three ways, one effect::

    import qlora_kernels; qlora_kernels.enable()
    import qlora_kernels.auto                            # the same, as an import
    python -m qlora_kernels train.py --epochs 1          # ... for a script that is not touched
    python -m qlora_kernels -m axolotl.cli.train c.yml   # ... or a module, or an installed command

What is taken over, with bitsandbytes installed or not:

- transformers: ``BitsAndBytesConfig(load_in_4bit=True)``, and checkpoints that it has saved, give
  this package's layers (PEFT then gives them fused LoRA). What they save is bitsandbytes' again.
- Trainer: ``optim="paged_adamw_32bit"``, ``"paged_adamw_8bit"``, ``"adamw_8bit"`` and
  ``"adamw_bnb_8bit"`` are this package's optimizers.

8-bit models (``load_in_8bit``) stay bitsandbytes'. ``disable()`` gives everything back; models that
were made in between keep their layers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from . import integrations

__all__ = ["disable", "enable", "enabled", "main"]

ENVIRONMENT = "QLORA_KERNELS_ENABLE"
"""Set to 1 for processes that ``python -m qlora_kernels`` starts, and theirs."""

_HOOKS = Path(__file__).parent / "_startup"

TAKEN = {
    "transformers": "BitsAndBytesConfig(load_in_4bit=True) gives qlora_kernels' layers",
    "Trainer": "optim adamw_8bit, adamw_bnb_8bit, paged_adamw_32bit, paged_adamw_8bit are "
    "qlora_kernels' optimizers",
}

_enabled = False


def enabled() -> bool:
    """Whether :func:`enable` holds."""
    return _enabled


def enable(verbose: bool = True) -> dict[str, str]:
    """Takes over what bitsandbytes would serve; see the module. Idempotent.

    Args:
        verbose: print what was taken over, a line each.

    Returns:
        What is taken over, by where. What is not imported yet is when it will be.
    """
    global _enabled
    if not _enabled:
        _enabled = True
        integrations.install()
    if verbose:
        for where, what in TAKEN.items():
            print(f"qlora_kernels: {where}: {what}", file=sys.stderr)
    return dict(TAKEN)


def disable() -> None:
    """Gives back what :func:`enable` took."""
    global _enabled
    _enabled = False


# --- python -m qlora_kernels ----------------------------------------------------------------------

USAGE = """\
usage: python -m qlora_kernels script.py [arguments ...]
       python -m qlora_kernels -m module [arguments ...]
       python -m qlora_kernels command [arguments ...]     an installed one, written in Python

Runs it with qlora_kernels in place of bitsandbytes, in every Python that it starts too. For qlora's
own commands: qlora --help.
"""


def main(argv: list[str]) -> int:
    """``python -m qlora_kernels``: runs what ``argv`` names, taken over. Returns an exit code.

    Processes that it starts (a launcher's workers) are taken over as well: they find
    ``QLORA_KERNELS_ENABLE`` in their environment, and a start-up hook on their path.
    """
    import runpy

    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    os.environ[ENVIRONMENT] = "1"
    paths = [str(_HOOKS), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    enable()
    if argv[0] == "-m":
        if len(argv) < 2:
            print("python -m qlora_kernels -m: which module?", file=sys.stderr)
            return 2
        sys.argv = argv[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        return 0
    path = _find(argv[0])
    if path is None:
        print(
            f"python -m qlora_kernels: {argv[0]} is neither a file nor an installed command that "
            "is written in Python",
            file=sys.stderr,
        )
        return 2
    sys.argv = [str(path), *argv[1:]]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")
    return 0


def _find(name: str) -> Path | None:
    import shutil

    path = Path(name)
    if path.is_file():
        return path
    found = shutil.which(name)
    if found is None:
        return None
    with open(found, "rb") as file:
        first = file.readline()
    return Path(found) if first.startswith(b"#!") and b"python" in first else None
