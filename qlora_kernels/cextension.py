"""bitsandbytes' path to what its callers ask about its build."""

import torch

HIP_ENVIRONMENT = torch.version.hip is not None
"""Whether torch is built for AMD GPUs."""
