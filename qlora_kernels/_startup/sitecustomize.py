"""On the path of processes that ``python -m qlora_kernels`` starts: takes over there too.

Python runs the first ``sitecustomize`` that it finds, so this one runs the next.
"""

import importlib.machinery
import importlib.util
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))
_next = importlib.machinery.PathFinder.find_spec(
    "sitecustomize", [p for p in sys.path if os.path.abspath(p or os.curdir) != _here]
)
if _next is not None and _next.loader is not None:
    _module = importlib.util.module_from_spec(_next)
    _next.loader.exec_module(_module)


class _WhenTransformersComes:
    """Enables at the first import of transformers or bitsandbytes: a process that imports neither
    pays nothing."""

    def find_spec(self, name, path=None, target=None):
        if name in ("transformers", "bitsandbytes"):
            sys.meta_path.remove(self)
            import qlora_kernels.takeover

            qlora_kernels.takeover.enable(verbose=False)
        return None


if os.environ.get("QLORA_KERNELS_ENABLE") == "1":
    sys.meta_path.insert(0, _WhenTransformersComes())
