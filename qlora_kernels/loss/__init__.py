"""Cross entropy of a language model without its logits, and its way into transformers and TRL.

handle = install(model)              # or install(trainer)
model(input_ids, labels=labels).loss # loss and gradient from the hidden states
handle.calls                         # rises: this is the loss that runs
"""

from qlora_kernels.loss.cross_entropy import head_cross_entropy, linear_cross_entropy
from qlora_kernels.loss.install import LossHandle, install, uninstall

__all__ = ["LossHandle", "head_cross_entropy", "install", "linear_cross_entropy", "uninstall"]
