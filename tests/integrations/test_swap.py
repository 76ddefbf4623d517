"""``swap()``: bitsandbytes' layers to ours on the very same bytes, and back to where they were."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from torch import nn

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model  # noqa: E402

import qlora_kernels  # noqa: E402
from qlora_kernels.integrations.peft import FusedLoraLinear  # noqa: E402
from qlora_kernels.nn import Linear4bit  # noqa: E402

IDS = torch.arange(3, 27).view(2, 12)


def load(folder: Path, **config) -> nn.Module:
    """A tiny model in bitsandbytes' layers."""
    config = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **config}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, **config),
    )
    assert type(model.model.layers[0].mlp.up_proj) is bnb.nn.Linear4bit
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def layers(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if type(m) is kind}


def live_bytes() -> int:
    gc.collect()
    storages = {}
    for t in gc.get_objects():
        if type(t) in (torch.Tensor, nn.Parameter) or issubclass(type(t), nn.Parameter):
            if t.device.type == "cpu":
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())


FORMATS = {
    "nf4-nested": {},
    "nf4": {"bnb_4bit_use_double_quant": False},
    "fp4-nested": {"bnb_4bit_quant_type": "fp4"},
    "storage": {"bnb_4bit_quant_storage": torch.bfloat16},
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[] if "-" in k else pytest.mark.full) for k in FORMATS],
)
def test_the_bytes_are_shared_and_mean_the_same(kind, tiny_model) -> None:
    model = load(tiny_model, **FORMATS[kind])
    want = logits(model)
    old = layers(model, bnb.nn.Linear4bit)
    dense = {n: bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state)
             for n, m in old.items()}  # fmt: skip
    parameters, before = model.num_parameters(), live_bytes()
    report = qlora_kernels.swap(model)
    assert report.layers == list(old) and not report.left
    # The tables of 16 values are ours; everything else is held by both.
    assert live_bytes() - before < 2_000
    new = layers(model, Linear4bit)
    for name, layer in new.items():
        theirs = old[name].weight
        assert layer.weight.data_ptr() == theirs.data_ptr(), name
        assert layer.absmax.data_ptr() == theirs.quant_state.absmax.data_ptr(), name
        if theirs.quant_state.state2 is not None:
            nested = theirs.quant_state.state2.absmax
            assert layer.nested_absmax.data_ptr() == nested.data_ptr(), name
        assert torch.equal(layer.dequantize_weight(), dense[name]), name
        assert layer.compute_dtype == old[name].compute_dtype == torch.float32
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    shared = sum(m.weight.numel() * m.weight.element_size() + m.absmax.numel()
                 * m.absmax.element_size() for m in new.values())  # fmt: skip
    assert shared <= report.bytes_shared < 1.1 * shared
    if kind == "nf4-nested":
        assert model.num_parameters() == parameters


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_go_with_them_and_stay_the_objects_that_they_are(dora, tiny_model) -> None:
    model = load(tiny_model)
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=dora, lora_dropout=0.1)
    tuned = get_peft_model(model, config)
    tuned.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"]))
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    tuned.eval()
    before = layers(tuned, peft.tuners.lora.bnb.Linear4bit)
    parameters = {n: id(p) for n, p in tuned.named_parameters() if "lora_" in n}
    want = logits(tuned)
    report = qlora_kernels.swap(tuned)
    assert report.adapters == list(before) and len(before) == 14
    after = layers(tuned, FusedLoraLinear)
    assert {n: id(m) for n, m in after.items()} == {n: id(m) for n, m in before.items()}
    assert {n: id(p) for n, p in tuned.named_parameters() if "lora_" in n} == parameters
    torch.testing.assert_close(logits(tuned), want, rtol=1e-4, atol=1e-5)
    tuned.set_adapter("two")
    two = logits(tuned)
    with tuned.disable_adapter():
        base = logits(tuned)
    back = qlora_kernels.swap(tuned, "bitsandbytes")
    assert list(before) == back.adapters
    torch.testing.assert_close(logits(tuned), two, rtol=1e-4, atol=1e-5)
    tuned.set_adapter("default")
    assert torch.equal(logits(tuned), want)  # the same layers on the same bytes
    with tuned.disable_adapter():
        torch.testing.assert_close(logits(tuned), base, rtol=1e-4, atol=1e-5)


def test_a_training_goes_on_and_gradients_are_theirs(tiny_model) -> None:
    torch.manual_seed(1)
    tuned = get_peft_model(load(tiny_model), LoraConfig(r=4, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)

    def step() -> tuple[float, dict[str, torch.Tensor]]:
        optimizer.zero_grad()
        loss = tuned(IDS, labels=IDS).loss
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in tuned.named_parameters()
                             if p.grad is not None}  # fmt: skip

    step()
    optimizer.step()
    want, grads = step()
    qlora_kernels.swap(tuned)
    got, ours = step()
    assert got == pytest.approx(want, rel=1e-5) and ours.keys() == grads.keys()
    for name, grad in grads.items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-4 * scale, msg=name)
    optimizer.step()
    assert step()[0] < got


def test_trainer_takes_it_and_what_is_saved_is_bitsandbytes(tiny_model, tmp_path) -> None:
    model = load(tiny_model)
    want = logits(model)
    qlora_kernels.swap(model)
    assert model.is_quantized and model.hf_quantizer.is_trainable and model.is_loaded_in_4bit
    model.save_pretrained(tmp_path / "saved")
    told = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == "bitsandbytes" and told["bnb_4bit_quant_type"] == "nf4"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again.model.layers[0].mlp.up_proj) is bnb.nn.Linear4bit
    assert torch.equal(logits(again), want)
    tuned = get_peft_model(
        peft.prepare_model_for_kbit_training(model), LoraConfig(r=4, target_modules="all-linear")
    )
    assert len(layers(tuned, FusedLoraLinear)) == 14
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=3, learning_rate=1e-2, use_cpu=True, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, per_device_train_batch_size=2,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    trainer = transformers.Trainer(tuned, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_a_checkpoint_of_theirs_that_was_loaded_saves_again(tiny_model, tmp_path) -> None:
    """bitsandbytes' own load-then-save leaves a conversion behind that it cannot reverse."""
    load(tiny_model).save_pretrained(tmp_path / "theirs")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    want = logits(model)
    qlora_kernels.swap(model)
    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(logits(again), want)


def plain(bias: bool = True, device: str = "cpu", **kwargs) -> nn.Sequential:
    layer = bnb.nn.Linear4bit(64, 32, bias=bias, quant_type="nf4", **kwargs)
    layer.weight.data.normal_()
    return nn.Sequential(layer, nn.ReLU()).to(device)


def test_a_plain_module_hooks_and_shared_weights() -> None:
    model = plain()
    model.append(nn.Linear(32, 64))
    twin = bnb.nn.Linear4bit(64, 32, quant_type="nf4", device="meta")
    twin.weight, twin.bias = model[0].weight, None
    model.append(twin)
    model.append(model[0])  # one layer under two names
    seen: list[str] = []
    handle = model[0].register_forward_hook(lambda *_: seen.append("hook"))
    bias = model[0].bias
    report = qlora_kernels.swap(model, verbose=True)
    assert sorted(report.layers) == ["0", "3", "4"]
    assert type(model[0]) is type(model[3]) is Linear4bit and model[0] is model[4]
    assert model[0].weight is model[3].weight and model[0].bias is bias
    model[0](torch.randn(2, 64))
    assert seen == ["hook"]
    handle.remove()
    model[0](torch.randn(2, 64))
    assert seen == ["hook"]
    assert report.bytes_shared == _bytes(model[0])
    assert "3 4-bit layers" in str(report)


def _bytes(layer: Linear4bit) -> int:
    tensors = (layer.weight, layer.absmax, layer.nested_absmax)
    return sum(t.numel() * t.element_size() for t in tensors)


def test_there_and_back_without_bitsandbytes_having_made_it() -> None:
    model = nn.Sequential(Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)).cpu()
    x = torch.randn(3, 64)
    want = model(x)
    dense, pointer = model[0].dequantize_weight(), model[0].weight.data_ptr()
    report = qlora_kernels.swap(model, "bitsandbytes")
    assert type(model[0]) is bnb.nn.Linear4bit and model[0].weight.data_ptr() == pointer
    assert "bitsandbytes' now" in str(report)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    packed, state = model[0].weight.data, model[0].weight.quant_state
    assert torch.equal(bnb.functional.dequantize_4bit(packed, state), dense)
    qlora_kernels.swap(model)
    assert torch.equal(model(x), want)


def test_what_cannot_be_swapped_is_named_and_stays() -> None:
    with pytest.raises(ValueError, match="holds no 4-bit layer of bitsandbytes"):
        qlora_kernels.swap(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="holds no 4-bit layer of qlora_kernels"):
        qlora_kernels.swap(nn.Sequential(nn.Linear(4, 4)), "bitsandbytes")
    with pytest.raises(ValueError, match="to is 'peft'; it may be 'qlora_kernels' or"):
        qlora_kernels.swap(plain(), "peft")
    with pytest.raises(ValueError, match="is a layer itself"):
        qlora_kernels.swap(plain()[0])
    dense = plain()
    dense.append(bnb.nn.Linear4bit(32, 32))
    with pytest.raises(ValueError, match="2 is not quantized yet: move the model to its device"):
        qlora_kernels.swap(dense)
    assert type(dense[0]) is bnb.nn.Linear4bit
    ours = nn.Sequential(Linear4bit(64, 32, quant_type="int4")).cpu()
    with pytest.raises(ValueError, match="0 is int4 in blocks of 64, which bitsandbytes lacks"):
        qlora_kernels.swap(ours, "bitsandbytes")
    mixed = plain()
    mixed.append(bnb.nn.Linear8bitLt(32, 8, has_fp16_weights=False))
    report = qlora_kernels.swap(mixed)
    assert report.left == {"2": "Linear8bitLt"} and "stay bitsandbytes'" in str(report)


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
def test_a_merged_adapter_is_refused(tiny_model) -> None:
    tuned = get_peft_model(load(tiny_model), LoraConfig(r=4, target_modules=["q_proj"]))
    tuned.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj has adapters merged into it: unmerge_adapter"):
        qlora_kernels.swap(tuned)
    assert not layers(tuned, Linear4bit)
