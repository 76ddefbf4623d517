"""The fused loss in transformers, PEFT, Trainer and TRL: the same, and the one that runs."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import warnings

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from qlora_kernels.loss import install, uninstall  # noqa: E402

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1}
# What each family does to its logits, and one of each older kind of forward.
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "phi": {},  # a bias in the output layer
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 1.5},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "mixtral": EXPERTS,  # an auxiliary loss of its own
    "granitemoe": {"logits_scaling": 4.0, **EXPERTS},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mamba": {},
}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


def model_of(family: str = "llama", **settings) -> nn.Module:
    settings = {**SMALL, **FAMILIES.get(family, {}), **settings}
    config = transformers.AutoConfig.for_model(family, **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3)  # logits that are not all nearly alike
    return model.eval()


def batch(rows: int = 4, length: int = 9, masked: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :masked] = -100
    labels[-1, -2:] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_grads(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head_trained", (False, True))
def test_every_family_keeps_its_loss(family, head_trained):
    model = model_of(family)
    model.get_output_embeddings().weight.requires_grad_(head_trained)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a notice would mean a fallback
        for extra in ({}, {"num_items_in_batch": torch.tensor(31)}):
            inputs = {**batch(), **extra}
            expected, want = loss_and_grads(model, **inputs)
            handle = install(model)
            output, got = loss_and_grads(model, **inputs)
            assert handle.calls and not handle.fallbacks
            assert output.logits is None and expected.logits is not None
            uninstall(model)
            torch.testing.assert_close(output.loss, expected.loss, rtol=2e-6, atol=2e-6)
            assert got.keys() == want.keys()
            scale = max(g.abs().max() for g in want.values())
            for name in want:
                assert (got[name] - want[name]).abs().max() <= 2e-5 * scale, name
            if getattr(expected, "aux_loss", None) is not None:
                torch.testing.assert_close(output.aux_loss, expected.aux_loss)


def test_the_soft_cap_and_the_factor_matter():
    """Without them the losses above would differ by a thousand times what they may."""
    for family, name, value in (
        ("gemma2", "final_logit_softcapping", None),
        ("granite", "logits_scaling", 1.0),
        ("cohere", "logit_scale", 1.0),
    ):
        model, other = model_of(family), model_of(family, **{name: value})
        assert (model(**batch()).loss - other(**batch()).loss).abs() > 2e-3


def test_shift_labels_and_positions_of_the_last_token():
    model = model_of()
    inputs = batch()
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    install(model)
    loss = model(**inputs).loss
    other = model(input_ids=inputs["input_ids"], labels=None, shift_labels=shifted)
    # Without labels LLaMA computes no loss; with both, shift_labels count.
    assert other.logits is None or other.loss is None
    changed = torch.roll(inputs["labels"], 1, 0)
    both = model(input_ids=inputs["input_ids"], labels=changed, shift_labels=shifted)
    torch.testing.assert_close(both.loss, loss)


def test_what_has_no_labels_is_untouched():
    model = model_of()
    ids = batch()["input_ids"]
    expected = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    handle = install(model)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), tokens)
    assert handle.calls == 0


def test_evaluation_keeps_its_logits_on_request():
    model = model_of()
    handle = install(model, eval_logits=True)
    assert model(**batch()).logits is not None and handle.calls == 0
    assert model.train()(**batch()).logits is None and handle.calls == 1


def test_a_tuple_instead_of_an_output():
    model = model_of()
    expected = model(**batch(), return_dict=False)
    install(model)
    output = model(**batch(), return_dict=False)
    torch.testing.assert_close(output[0], expected[0])
    assert all(isinstance(part, torch.Tensor) for part in output[:1])
    assert len(output) == len(expected) - 1  # no logits


def test_uninstall_leaves_nothing_behind():
    model = model_of()
    before = set(vars(model)), set(vars(model.lm_head))
    install(model)
    uninstall(model)
    assert set(vars(model)) - before[0] <= {"_loss_function"}
    assert set(vars(model.lm_head)) == before[1]
    assert model(**batch()).logits is not None
    uninstall(model)  # nothing to do


def test_twice_installed_counts_once():
    model = model_of()
    handle = install(model)
    assert install(model, chunk_vocab=64) is handle
    model(**batch())
    assert handle.calls == 1 and handle.chunk_vocab == 64


def test_the_signature_that_trainers_read_is_kept():
    model = model_of()
    before = list(inspect.signature(model.forward).parameters)
    install(model)
    assert list(inspect.signature(model.forward).parameters) in (before, ["self", *before])


def test_a_copy_has_its_own_handle():
    model = model_of()
    handle = install(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    loss = twin(**batch()).loss
    torch.testing.assert_close(loss, torch.tensor(97.0).log())  # its own weights
    assert handle.calls == 0 and twin._qlora_loss.calls == 1
    model(**batch())
    assert handle.calls == 1 and twin._qlora_loss.calls == 1


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(TypeError, match="Linear holds none"):
        install(nn.Linear(2, 2))


# --------------------------------------------------------------------------- fallbacks


class AddsToItsLogits(transformers.LlamaForCausalLM):
    """Forbids its words 0 to 9 by a mask on the logits, as nobody expects."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids).last_hidden_state
        logits = self.lm_head(hidden)
        logits[..., :10] = -30.0
        loss = self.loss_function(logits, labels, self.config.vocab_size)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class HasItsOwnLoss(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        loss = nn.functional.cross_entropy(logits.view(-1, 97), labels.view(-1).clamp(0))
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class MultipliesByAMatrix(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids).last_hidden_state
        logits = hidden @ self.lm_head.weight.t()
        loss = self.loss_function(logits, labels, self.config.vocab_size)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("kind", (AddsToItsLogits, HasItsOwnLoss, MultipliesByAMatrix))
def test_a_peculiar_model_keeps_its_own_loss_with_one_notice(kind):
    model = kind(transformers.LlamaConfig(**SMALL)).eval()
    expected, want = loss_and_grads(model, **batch())
    handle = install(model)
    with pytest.warns(UserWarning, match="its own loss is used") as notices:
        output, got = loss_and_grads(model, **batch())
        model(**batch())
    assert len([n for n in notices if "own loss" in str(n.message)]) == 1
    assert handle.calls == 0 and handle.fallbacks == 2 and handle.reason
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(got, want)


def test_a_loss_function_that_somebody_set_is_respected():
    model = model_of()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()
    expected = model(**batch()).loss
    handle = install(model)
    with pytest.warns(UserWarning, match="own loss"):
        torch.testing.assert_close(model(**batch()).loss, expected)
    assert handle.calls == 0


# --------------------------------------------------------------------------- PEFT, quantization


def adapted(model, *targets: str):
    config = peft.LoraConfig(
        r=4, target_modules=list(targets), task_type="CAUSAL_LM", init_lora_weights=False
    )
    torch.manual_seed(3)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("first", ("install", "peft"))
@pytest.mark.parametrize("targets", (("q_proj", "v_proj"), ("q_proj", "lm_head")), ids=str)
def test_adapters_before_or_after_also_on_the_output_layer(first, targets):
    model = model_of()
    if first == "install":
        handle = install(model)
        wrapped = adapted(model, *targets)
    else:
        wrapped = adapted(model, *targets)
        handle = install(wrapped)
    output, got = loss_and_grads(wrapped, **batch())
    assert handle.calls == 1 and not handle.fallbacks and output.logits is None
    uninstall(wrapped)
    expected, want = loss_and_grads(wrapped, **batch())
    torch.testing.assert_close(output.loss, expected.loss)
    assert got.keys() == want.keys() and any("lora_B" in name for name in got)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_a_trained_copy_of_the_output_layer():
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model_of(), config)
    expected, want = loss_and_grads(wrapped, **batch())
    handle = install(wrapped)
    output, got = loss_and_grads(wrapped, **batch())
    torch.testing.assert_close(output.loss, expected.loss)
    assert any("lm_head" in name for name in got) and handle.calls == 1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


class Halved(nn.Linear):
    """A layer whose product is not ``x @ weight.T``, as a quantized one's."""

    def forward(self, x):
        return super().forward(x) / 2


def test_an_output_layer_that_is_more_than_a_matrix():
    model = model_of()
    layer = Halved(32, 97, bias=False)
    layer.weight = model.lm_head.weight
    model.lm_head = layer
    expected, want = loss_and_grads(model, **batch())
    handle = install(model, chunk_tokens=5)
    output, got = loss_and_grads(model, **batch())
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert handle.calls == 1 and not handle.fallbacks


@pytest.mark.parametrize(
    "family", ("gemma2", *(pytest.param(f, marks=pytest.mark.full) for f in ("llama", "granite")))
)
def test_compiles_whole(family):
    model = model_of(family, num_hidden_layers=1)
    expected, want = loss_and_grads(model, **batch())
    handle = install(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    for _ in range(2):
        output = compiled(**batch())
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert handle.calls == 2 and output.logits is None
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(model.get_parameter(name).grad, want[name], rtol=1e-3, atol=1e-6)


# --------------------------------------------------------------------------- Trainer, TRL

LENGTHS = (5, 9, 12, 7, 3, 11, 8)  # the last accumulated batch is not whole


def rows_of_tokens():
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(3, 97, (n,), generator=generator).tolist()} for n in LENGTHS
    ]


def pad(rows):
    length = max(len(row["input_ids"]) for row in rows)

    def column(name, filler):
        return torch.tensor([row[name] + [filler] * (length - len(row[name])) for row in rows])

    ids = column("input_ids", 0)
    return {"input_ids": ids, "labels": column("labels", -100), "attention_mask": (ids != 0).long()}


def train(model, folder, *, batch_size, accumulate, checkpointing=False):
    data = [{**row, "labels": row["input_ids"]} for row in rows_of_tokens()]
    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=1, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate, learning_rate=1e-2, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, max_grad_norm=0.0,
        gradient_checkpointing=checkpointing, train_sampling_strategy="sequential",
        optim="sgd", lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=pad
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate()["eval_loss"]


def adapter_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", (False, True))
def test_under_trainer(tmp_path, checkpointing):
    settings = {"batch_size": 2, "accumulate": 2, "checkpointing": checkpointing}
    expected = train(adapted(model_of(), "q_proj", "v_proj"), tmp_path, **settings)
    model = adapted(model_of(), "q_proj", "v_proj")
    handle = install(model)
    losses = train(model, tmp_path, **settings)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert handle.calls >= 5 and not handle.fallbacks


def test_accumulated_batches_train_as_one_under_trainer(tmp_path):
    """k batches of b and one of k b give the same steps, the last partial one included."""
    results = []
    for batch_size, accumulate in ((4, 1), (2, 2), (1, 4)):
        model = adapted(model_of(), "q_proj", "v_proj")
        install(model)
        losses = train(model, tmp_path, batch_size=batch_size, accumulate=accumulate)
        results.append((losses[0], adapter_of(model)))
    for losses, adapter in results[1:]:
        torch.testing.assert_close(losses, results[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(adapter, results[0][1], rtol=1e-4, atol=1e-6)


def sft(folder, when: str, family: str):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    words = tokenizers_model()
    model = model_of(family)
    handle = install(model) if when == "before" else None
    config = trl.SFTConfig(
        str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], logging_steps=1, use_cpu=True, bf16=False, save_strategy="no",
        gradient_checkpointing=False, disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    rows = datasets.Dataset.from_list(rows_of_tokens())
    with contextlib.redirect_stderr(io.StringIO()):
        trainer = trl.SFTTrainer(
            model=model, args=config, train_dataset=rows, eval_dataset=rows,
            processing_class=words,
            peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        )  # fmt: skip
    if when == "after":
        handle = install(trainer)
    trainer.train()
    wanted = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm")
    logs = [
        [entry[name] for name in wanted] for entry in trainer.state.log_history if "loss" in entry
    ]
    return logs, trainer.evaluate()["eval_loss"], handle


def tokenizers_model():
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w3"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


@pytest.mark.parametrize("family", ("llama", pytest.param("gemma2", marks=pytest.mark.full)))
def test_under_trl_it_is_the_loss_that_runs(tmp_path, family, monkeypatch):
    logs, evaluated, _ = sft(tmp_path, "never", family)
    import trl.trainer.utils as utils

    class Never:
        @staticmethod
        def apply(*args):
            raise AssertionError("TRL's own loss ran")

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Never)
    for when in ("before", "after"):
        ours, our_evaluated, handle = sft(tmp_path, when, family)
        torch.testing.assert_close(ours, logs, rtol=1e-4, atol=1e-5)
        assert abs(our_evaluated - evaluated) < 1e-5
        assert handle.calls >= 7 and not handle.fallbacks
    with pytest.raises(AssertionError, match="TRL's own loss ran"):
        sft(tmp_path, "never", family)


def test_trl_gets_its_own_loss_back(tmp_path):
    pytest.importorskip("trl")
    from trl.trainer.utils import add_fused_lm_head

    expected = model_of()
    add_fused_lm_head(expected)
    want = expected(**batch(), fused_lm_head=True).log_probs
    for order in ("trl first", "ours first"):
        model = model_of()
        model.lm_head.weight.requires_grad_(False)
        if order == "ours first":
            install(model)
        add_fused_lm_head(model)
        handle = install(model)
        torch.testing.assert_close(model(**batch(), fused_lm_head=True).log_probs, want)
        assert handle.calls == 1
        uninstall(model)
        torch.testing.assert_close(model(**batch(), fused_lm_head=True).log_probs, want)
        assert handle.calls == 1 and model(**batch()).logits is not None


def test_what_trl_asks_beyond_losses_is_left_to_it():
    pytest.importorskip("trl")
    from trl.trainer.utils import add_fused_lm_head

    model = model_of()
    add_fused_lm_head(model, temperature=0.5)
    want = model(**batch(), fused_lm_head=True).log_probs
    handle = install(model)
    with pytest.warns(UserWarning, match="TRL asks for more"):
        torch.testing.assert_close(model(**batch(), fused_lm_head=True).log_probs, want)
    assert handle.calls == 0 and handle.fallbacks == 1


@pytest.mark.parametrize("family", ("llama", "phi", "granite", "gemma2"))
def test_the_mean_of_the_logits_that_dpo_reports(family):
    """Without logits, but where they are capped: then it is TRL that computes them."""
    pytest.importorskip("trl")
    from trl.trainer.utils import add_fused_lm_head

    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    model = model_of(family)
    model.requires_grad_(False)
    add_fused_lm_head(model, outputs=outputs)
    want = model(**batch(), fused_lm_head=True)
    handle = install(model)
    capped = family == "gemma2"
    notice = pytest.warns(UserWarning, match="capped") if capped else contextlib.nullcontext()
    with notice:
        got = model(**batch(), fused_lm_head=True)
    assert (handle.calls, handle.fallbacks) == ((0, 1) if capped else (1, 0))
    for name in ("loss", *outputs):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), msg=name)
