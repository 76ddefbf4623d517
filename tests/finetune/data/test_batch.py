"""Batches, and the promise that packed samples get exactly the losses that they get alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_kernels.finetune.data import (
    IGNORE,
    Collator,
    EpochSampler,
    Sample,
    Samples,
    pack,
    packing_is_exact,
)
from qlora_kernels.loss import install

LENGTHS = (5, 9, 1, 12, 7, 2, 3, 11, 8, 1)


def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    made = []
    for n in LENGTHS:
        ids = rng.integers(3, 97, n).astype(np.int32)
        labels = np.where(rng.random(n) < 0.6, ids, IGNORE).astype(np.int32)
        labels[0] = IGNORE
        made.append(Sample(ids, labels))
    return made


def model_of(family: str, attention: str = "sdpa", **settings):
    config = AutoConfig.for_model(
        family, vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)  # so that a token that is seen wrongly is felt
    return model.eval()


def losses_of(model, batch) -> torch.Tensor:
    """The loss of each token, ``[rows, length - 1]``, in fp64."""
    labels = batch.pop("labels")
    logits = model(**batch).logits.double()
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
    )


def test_padded_rows(tokenizer):
    rows = Samples([[s] for s in samples()])
    batch = Collator(tokenizer, pad_to_multiple_of=8)([rows[0], rows[3]])
    assert {k: tuple(v.shape) for k, v in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), (2, 16)
    )
    assert all(v.dtype == torch.int64 for v in batch.values())
    assert batch["attention_mask"].sum(1).tolist() == [5, 12]
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORE).all()
    assert batch["input_ids"][0, :5].tolist() == rows[0]["input_ids"].tolist()
    assert batch["labels"][1, :12].tolist() == rows[3]["labels"].tolist()


@pytest.mark.parametrize(
    "settings, expected", (({"pad": "<pad>"}, "<pad>"), ({}, "</s>"), ({"eos": None}, None))
)
def test_what_pads(make_tokenizer, settings, expected):
    tokenizer = make_tokenizer("chatml", **settings)
    collator = Collator(tokenizer)
    assert collator.pad == (0 if expected is None else tokenizer.convert_tokens_to_ids(expected))


def test_eos_keeps_its_label_where_it_pads(tokenizer):
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos
    ids = np.array([5, 6, eos], np.int32)
    rows = Samples([[Sample(ids, np.array([IGNORE, 6, eos], np.int32))], [samples()[3]]])
    batch = Collator(tokenizer)([rows[0], rows[1]])
    assert batch["labels"][0].tolist() == [IGNORE, 6, eos] + [IGNORE] * 9
    assert batch["attention_mask"][0].tolist() == [1] * 3 + [0] * 9


@pytest.mark.parametrize(
    "family, attention",
    (
        *((family, kind) for family in ("llama", "qwen3", "gpt2") for kind in ("sdpa", "eager")),
        ("gemma2", "eager"),  # has no other
    ),
)
def test_packed_samples_get_the_losses_that_they_get_alone(family, attention, tokenizer):
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 4} if family == "gpt2" else {}
    model = model_of(family, attention, **settings).double()
    made = samples()
    rows = pack(LENGTHS, 24, seed=0)
    packed = Samples([[made[i] for i in row] for row in rows], packed=True)
    assert len(packed) < len(made) and any(len(row) > 2 for row in rows)
    batch = Collator(tokenizer)([packed[i] for i in range(len(packed))])
    assert "attention_mask" not in batch
    together = losses_of(model, batch)
    alone_total = 0.0
    for number, row in enumerate(rows):
        start = 0
        for i in row:
            n = LENGTHS[i]
            single = Collator(tokenizer)([Samples([[made[i]]])[0]])
            alone = losses_of(model, single)[0]
            inside = together[number, start : start + n - 1]
            torch.testing.assert_close(inside, alone, rtol=1e-5, atol=1e-6)
            alone_total += alone.sum()
            # The first token of the next sample is not predicted from the last of this one.
            if start + n - 1 < together.shape[1]:
                assert together[number, start + n - 1] == 0
            start += n
    torch.testing.assert_close(together.sum(), alone_total, rtol=1e-6, atol=0)


def test_gradients_of_packed_rows_are_those_of_the_samples(tokenizer):
    """Through the fused loss: one batch of packed rows, or each sample by itself."""
    model = model_of("llama")
    handle = install(model)
    made = samples()
    packed = Samples([[made[i] for i in row] for row in pack(LENGTHS, 24, 0)], packed=True)
    count = torch.tensor(packed.trained_tokens)
    batches = [
        [Collator(tokenizer)([packed[i] for i in range(len(packed))])],
        [Collator(tokenizer)([Samples([[sample]])[0]]) for sample in made],
    ]
    results = []
    for parts in batches:
        model.zero_grad()
        total = 0.0
        for part in parts:
            loss = model(**part, num_items_in_batch=count).loss
            loss.backward()
            total += loss.item()
        results.append((total, [p.grad.clone() for p in model.parameters()]))
    assert abs(results[0][0] - results[1][0]) < 1e-5 * results[0][0]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max() + 1))
    assert handle.calls == 1 + len(made)


def test_a_mask_or_a_cache_would_mix_packed_samples(tokenizer):
    """What the collator leaves out, and why: the losses above would change in silence."""
    model = model_of("llama")
    made = samples()
    row = Samples([[made[0], made[1]]], packed=True)[0]
    right = losses_of(model, Collator(tokenizer)([row]))
    for change in ({"use_cache": True}, {"attention_mask": torch.ones(1, 14)}):
        wrong = losses_of(model, {**Collator(tokenizer)([row]), **change})
        assert (wrong - right).abs().max() > 1e-2


def test_models_that_mix_packed_samples_are_told_from_those_that_do_not():
    assert packing_is_exact(model_of("llama"))
    assert packing_is_exact(model_of("gemma2", "eager").bfloat16())
    assert not packing_is_exact(model_of("bloom", "eager", n_layer=2, n_head=4))
    assert not packing_is_exact(model_of("mamba", "eager"))
    model = model_of("llama").train()
    assert packing_is_exact(model) and model.training


def test_a_loader_with_workers_gives_each_sample_once(tokenizer):
    rows = Samples([[s] for s in samples()])
    loader = DataLoader(
        rows, batch_size=3, sampler=EpochSampler(rows, seed=1), collate_fn=Collator(tokenizer),
        num_workers=1,
    )  # fmt: skip
    counts = [int(n) for batch in loader for n in batch["attention_mask"].sum(1)]
    assert counts == [LENGTHS[i] for i in EpochSampler(rows, seed=1)]
