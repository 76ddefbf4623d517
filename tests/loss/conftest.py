"""Small tensors: one thread is faster than two that wait for each other."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_seeded):
    torch.set_num_threads(1)  # _seeded puts it back
