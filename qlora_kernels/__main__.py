"""``python -m qlora_kernels script.py``: see :func:`qlora_kernels.takeover.main`."""

import sys

from .takeover import main

sys.exit(main(sys.argv[1:]))
