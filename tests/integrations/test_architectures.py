"""Each architecture by its oddity: quantized as it loads, trained, saved, and the same in a new
process. Then what users do with such a model: static cache, checkpointing, compilation, counting.

One process of its own reloads them all; what it computed is compared model by model.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from qlora_kernels.integrations.peft import FusedLoraLinear, ParamWrapper  # noqa: E402
from qlora_kernels.integrations.transformers import QLoRAKernelsConfig  # noqa: E402
from qlora_kernels.nn import Experts4bit, Linear4bit  # noqa: E402

ROOT = Path(__file__).parents[2]
VOCABULARY, STEPS = 96, 20
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass
class Case:
    """A tiny model with what is odd about its family."""

    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    layers: list[str] = field(default_factory=lambda: [*ATTENTION, *MLP])
    """Last names of the linear layers of a block, all of which are in 4 bits."""
    target_parameters: list[str] = field(default_factory=list)
    odd: dict[str, Any] = field(default_factory=dict)
    """Attributes of the first block that show that the oddity is there; None: there is one."""
    towers: list[str] = field(default_factory=list)
    """Parts of the model that stay dense."""


CASES = {
    "llama": Case(
        "LlamaConfig",  # SmolLM2's shape: 3 key-value heads, blocks that cross rows
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
        odd={"self_attn.k_proj.out_features": 24},
    ),
    "mistral": Case("MistralConfig", {"sliding_window": 4}),
    "qwen2": Case(
        "Qwen2Config", {"tie_word_embeddings": True}, odd={"self_attn.q_proj.bias": None}
    ),
    "qwen3": Case(
        "Qwen3Config",
        {"head_dim": 20},
        odd={"self_attn.q_norm": None, "self_attn.q_proj.out_features": 80},
    ),
    "gemma": Case(  # embeddings times sqrt(hidden_size), tied; one key-value head
        "GemmaConfig",
        {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True},
        odd={"self_attn.k_proj.out_features": 16},
    ),
    "gemma2": Case(
        "Gemma2Config",
        {
            "head_dim": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": 4,
            "tie_word_embeddings": True,
            "attn_implementation": "eager",  # the one that soft-caps
        },
        odd={"self_attn.attn_logit_softcapping": 5.0, "post_feedforward_layernorm": None},
    ),
    "gemma3": Case(
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": 4, "tie_word_embeddings": True},
        odd={"self_attn.k_norm": None},
    ),
    "phi3": Case(
        "Phi3Config",
        {},
        ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        odd={"self_attn.qkv_proj.out_features": 96, "mlp.gate_up_proj.out_features": 160},
    ),
    "phi": Case(
        "PhiConfig",
        {"partial_rotary_factor": 0.5},
        ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
        odd={"self_attn.dense.bias": None, "mlp.fc1.bias": None, "input_layernorm.bias": None},
    ),
    "qwen3_moe": Case(
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "moe_intermediate_size": 24,
            "num_experts": 5,
            "num_experts_per_tok": 2,
        },
        ATTENTION,
        EXPERTS,
        odd={"mlp.experts.num_experts": 5},
    ),
    "mixtral": Case(
        "MixtralConfig",
        {"num_local_experts": 4},
        ATTENTION,
        EXPERTS,
        odd={"mlp.experts.num_experts": 4},
    ),
    "llava": Case("LlavaConfig", towers=["model.vision_tower", "model.multi_modal_projector"]),
}


def dense_model(case: Case) -> nn.Module:
    torch.manual_seed(0)
    changes = {**TEXT, **case.changes}
    implementation = changes.pop("attn_implementation", None)
    if case.config == "LlavaConfig":
        vision = transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
        config = transformers.LlavaConfig(
            vision_config=vision,
            text_config=transformers.LlamaConfig(**changes),
            image_token_index=VOCABULARY - 1,
            tie_word_embeddings=False,
        )
        return transformers.LlavaForConditionalGeneration(config).eval()
    config = getattr(transformers, case.config)(**changes)
    kind = transformers.AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation=implementation)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero as they are drawn
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


RELOADED = """
import sys, torch, transformers, peft, qlora_kernels

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    given = torch.load(f"{folder}/inputs.pt")
    kind = getattr(transformers, given["class"])
    base = kind.from_pretrained(f"{folder}/base", dtype=torch.float32, **given["kwargs"])
    model = peft.PeftModel.from_pretrained(base, f"{folder}/adapter").eval()
    with torch.no_grad():
        told = {"logits": model(**given["batch"]).logits}
        told["tokens"] = model.generate(**given["batch"], **given["generate"])
    torch.save(told, f"{folder}/reloaded.pt")
"""
GENERATE = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@dataclass
class Trained:
    """What became of one architecture; see ``trained``."""

    folder: Path
    dense: nn.Module
    base: Any = None
    model: Any = None
    batch: dict[str, torch.Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    logits: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


def inputs(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY - 1, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if CASES[name].towers:
        ids[:, 1:5] = VOCABULARY - 1  # four patches
        batch["pixel_values"] = torch.randn(2, 3, 8, 8)
    return batch


def train(name: str, folder: Path) -> Trained:
    case = CASES[name]
    dense = dense_model(case)
    one = Trained(folder, dense, batch=inputs(name))
    dense.save_pretrained(folder / "dense")
    config = QLoRAKernelsConfig(
        llm_int8_skip_modules=[*case.towers, "lm_head"] if case.towers else None
    )
    implementation = case.changes.get("attn_implementation")
    kwargs = {"attn_implementation": implementation} if implementation else {}
    one.base = type(dense).from_pretrained(
        folder / "dense", quantization_config=config, dtype=torch.float32, **kwargs
    )
    one.base.save_pretrained(folder / "base")
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        target_parameters=case.target_parameters or None,
        exclude_modules=rf".*({'|'.join(case.towers)}).*" if case.towers else None,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    one.model = peft.get_peft_model(one.base, lora).train()
    optimizer = torch.optim.AdamW([p for p in one.model.parameters() if p.requires_grad], lr=1e-2)
    labels = one.batch["input_ids"]
    for _ in range(STEPS):
        loss = one.model(**one.batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        one.losses.append(loss.item())
    one.model.eval().save_pretrained(folder / "adapter")
    with torch.no_grad():
        one.logits = one.model(**one.batch).logits
        one.tokens = one.model.generate(**one.batch, **GENERATE)
    torch.save(
        {
            "class": type(dense).__name__,
            "kwargs": kwargs,
            "batch": one.batch,
            "generate": GENERATE,
        },
        folder / "inputs.pt",
    )
    return one


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained | str]:
    """All of them, trained; what failed by its traceback, so that it fails its own tests alone."""
    torch.set_num_threads(1)
    result: dict[str, Trained | str] = {}
    for name in CASES:
        try:
            result[name] = train(name, tmp_path_factory.mktemp(name))
        except Exception:
            result[name] = traceback.format_exc()
    folders = [str(t.folder) for t in result.values() if isinstance(t, Trained)]
    done = subprocess.run(
        [sys.executable, "-c", RELOADED, *folders],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    result["the new process"] = done.stderr
    return result


@pytest.fixture(params=CASES)
def trained(request: pytest.FixtureRequest, everything: dict[str, Trained | str]) -> Trained:
    one = everything[request.param]
    if isinstance(one, str):
        pytest.fail(one)
    return one


def case_of(one: Trained, request: pytest.FixtureRequest) -> Case:
    return CASES[request.node.callspec.params["trained"]]


def blocks(model: nn.Module) -> list[Any]:
    return next(m for n, m in model.named_modules() if n.endswith("layers") and "vision" not in n)


def test_the_oddity_is_there_and_all_of_a_block_is_in_4_bits(trained: Trained, request) -> None:  # type: ignore[no-untyped-def]
    case = case_of(trained, request)
    fresh = type(trained.dense).from_pretrained(trained.folder / "base")
    for path, want in case.odd.items():
        got: Any = blocks(fresh)[0]
        for part in path.split("."):
            got = getattr(got, part)
        assert got is not None
        if want is not None:
            assert got == want, path
    for name, module in fresh.named_modules():
        if isinstance(module, nn.Linear):
            tower = name.startswith(tuple(case.towers))
            assert isinstance(module, Linear4bit) != (tower or name == "lm_head"), name
    linear = {n for n, m in blocks(fresh)[0].named_modules() if isinstance(m, Linear4bit)}
    assert {n.split(".")[-1] for n in linear} == set(case.layers)
    experts = [m for m in fresh.modules() if isinstance(m, Experts4bit)]
    assert bool(experts) == bool(case.target_parameters)


def test_every_4_bit_layer_trains_in_one_op(trained: Trained) -> None:
    adapted = [m for m in trained.model.modules() if isinstance(m, FusedLoraLinear)]
    packed = [m for m in trained.model.modules() if isinstance(m, Linear4bit)]
    assert len(adapted) == len(packed) > 0
    wrapped = [m for m in trained.model.modules() if isinstance(m, ParamWrapper)]
    stacks = [m for m in trained.model.modules() if isinstance(m, Experts4bit)]
    assert len(wrapped) == 2 * len(stacks)
    assert all(torch.isfinite(torch.tensor(trained.losses)))
    assert trained.losses[-1] < 0.9 * trained.losses[0]
    with torch.no_grad(), trained.model.disable_adapter():
        assert not torch.equal(trained.model(**trained.batch).logits, trained.logits)
    for module in (*adapted, *wrapped):
        assert all(b.weight.abs().max() > 0 for b in module.lora_B.values())
    assert not [n for n, _ in trained.model.named_parameters() if "vision" in n and "lora" in n]


def test_a_new_process_gives_the_same(trained: Trained, everything) -> None:  # type: ignore[no-untyped-def]
    path = trained.folder / "reloaded.pt"
    assert path.exists(), everything["the new process"][-4000:]
    told = torch.load(path)
    assert torch.equal(told["logits"], trained.logits)
    assert torch.equal(told["tokens"], trained.tokens)
    assert trained.tokens.shape[1] == trained.batch["input_ids"].shape[1] + 8


def test_it_is_the_model_of_its_dequantized_weights(trained: Trained) -> None:
    """Value of the whole model against transformers' own code on the same weights, dense."""
    packed = type(trained.dense).from_pretrained(trained.folder / "base")
    dense = copy.deepcopy(packed).dequantize()
    assert not any(isinstance(m, (Linear4bit, Experts4bit)) for m in dense.modules())
    with torch.no_grad():
        want, got = dense(**trained.batch).logits, packed(**trained.batch).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    # ... and what was trained is far enough from it for the comparison to mean something.
    assert (trained.logits - want).abs().max() > 0.1


def test_counts_and_bytes(trained: Trained) -> None:
    model = type(trained.dense).from_pretrained(trained.folder / "base")
    assert model.num_parameters() == trained.dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == trained.dense.num_parameters(
        exclude_embeddings=True
    )
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    # Tables that layers share count in each of them there, as transformers counts.
    assert size <= model.get_memory_footprint() < trained.dense.get_memory_footprint()


def test_a_static_cache_gives_the_same_tokens(trained: Trained) -> None:
    with torch.no_grad():
        tokens = trained.model.generate(**trained.batch, **GENERATE, cache_implementation="static")
    assert torch.equal(tokens, trained.tokens)


def test_checkpointing_gives_the_same_gradients(trained: Trained) -> None:
    model = trained.model
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients() -> list[torch.Tensor]:
        loss = model(**trained.batch, labels=trained.batch["input_ids"], use_cache=False).loss
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))

    model.train()
    try:
        want = gradients()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        calls = []
        hooks = [
            m.register_forward_hook(lambda *_: calls.append(1))
            for m in model.modules()
            if isinstance(m, FusedLoraLinear)
        ]
        got = gradients()
        # Each once, and once more but for the last of a block, whose output nothing needs again.
        assert len(calls) >= 2 * len(hooks) - 2 * len(blocks(model)) > len(hooks)
    finally:
        for hook in hooks:
            hook.remove()
        model.gradient_checkpointing_disable()
        model.eval()
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)


def test_a_tower_that_is_skipped_in_vain_is_warned_of(everything) -> None:  # type: ignore[no-untyped-def]
    one = everything["llava"]
    config = QLoRAKernelsConfig(llm_int8_skip_modules=["vision_tower", "q_proj", "lm_head"])
    with pytest.warns(UserWarning, match="'vision_tower'.* so say 'model.vision_tower'") as caught:
        type(one.dense).from_pretrained(one.folder / "dense", quantization_config=config)
    said = [str(w.message) for w in caught if "llm_int8_skip_modules" in str(w.message)]
    assert len(said) == 1


COMPILED = ["llama", "gemma2", "phi3", "mixtral"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "llama" else pytest.mark.full) for n in COMPILED],
)
def test_a_loaded_model_compiles_in_one_graph(name: str, everything) -> None:  # type: ignore[no-untyped-def]
    one = everything[name]
    model = type(one.dense).from_pretrained(one.folder / "base").eval()
    ids = one.batch["input_ids"]
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
