"""``compile_generation``: transformers' own generate, its step compiled, over a static cache."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from qlora_kernels.integrations.generation import compile_generation  # noqa: E402
from qlora_kernels.integrations.transformers import load_quantized_model  # noqa: E402

SETTINGS = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


def compiled_tokens(folder, backend, wrapped: bool = False) -> None:
    """The same tokens as without, by a step that was traced once for calls of two lengths."""
    model = load_quantized_model(folder, dtype=torch.float32).eval()
    if wrapped:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear")).eval()
    prompts = [torch.arange(n)[None] + 3 for n in (5, 9)]
    with torch.no_grad():
        want = [model.generate(p, attention_mask=torch.ones_like(p), **SETTINGS) for p in prompts]
        assert compile_generation(model, max_cache_len=32, backend=backend) is model
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for prompt, tokens in zip(prompts, want, strict=True):
            mask = torch.ones_like(prompt)
            assert torch.equal(model.generate(prompt, attention_mask=mask, **SETTINGS), tokens)
    seen = torch._dynamo.utils.counters["stats"]
    assert seen["unique_graphs"] == 1, "one graph, whatever the length"
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "wrapped", [False, pytest.param(True, marks=pytest.mark.full)], ids=["bare", "peft"]
)
def test_generate_runs_one_traced_step(tiny_model, wrapped) -> None:
    compiled_tokens(tiny_model, "eager", wrapped)


@pytest.mark.full
def test_generate_compiled_by_inductor(tiny_model) -> None:
    compiled_tokens(tiny_model, "inductor")


def test_what_does_not_generate_is_named(tiny_model) -> None:
    with pytest.raises(TypeError, match="Linear has no generation_config"):
        compile_generation(torch.nn.Linear(2, 2))
    model = load_quantized_model(tiny_model, dtype=torch.float32)
    with pytest.raises(ValueError, match="max_cache_len is 0"):
        compile_generation(model, max_cache_len=0)
