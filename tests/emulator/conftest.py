"""The emulator's tests share two helper modules of this folder: ptx_oracle and ptx_kernels."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
