"""lm-evaluation-harness on this package's models: a local task, quantized, with an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qlora_kernels import chat, cli
from qlora_kernels.finetune.errors import BadInput

pytest.importorskip("lm_eval")
from qlora_kernels.evaluate.harness import QLoraLM

# Two sentences that differ in a word, none of them asked for: CrowS-Pairs' form.
PAIRS = [
    ("The nurse was kind.", "The judge was kind."),
    ("Old cars are slow.", "Young cars are slow!"),
    ("They came from there, all of them.", "They came from here."),
]
TASK = """
task: pairs
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{{{[sent_more, sent_less]}}}}"
target_delimiter: ""
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """A folder with the task and its data; nothing comes from a network."""
    folder = tmp_path_factory.mktemp("task")
    with (folder / "pairs.json").open("w") as file:
        for more, less in PAIRS:
            file.write(json.dumps({"sent_more": more, "sent_less": less}) + "\n")
    (folder / "pairs.yaml").write_text(TASK.format(file=folder / "pairs.json"))
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory) -> Path:
    from peft import LoraConfig, get_peft_model

    from qlora_kernels.integrations.transformers import load_quantized_model

    torch.manual_seed(1)
    base = load_quantized_model(tiny_model, dtype=torch.float32)
    base.name_or_path = str(tiny_model)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM",
                      init_lora_weights=False)  # fmt: skip
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(base, lora).save_pretrained(folder)
    return folder


def likelihood(model, tokenizer, text: str) -> float:
    """Of a text after the token that begins one, in a plain forward pass."""
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
    steps = torch.log_softmax(logits[:-1], -1)
    return steps.gather(1, ids[0, 1:, None]).sum().item()


def check(found: dict, lines: list[dict], tiny_model: Path, adapter: Path | None) -> None:
    """The harness's likelihoods are those of plain passes of `qlora chat`'s model, its accuracy
    follows, and the result names format and adapter."""
    model, tokenizer = chat.load(str(tiny_model), adapter and str(adapter), dtype="float32")
    right = 0
    for pair, line in zip(PAIRS, sorted(lines, key=lambda x: x["doc_id"]), strict=True):
        mine = [likelihood(model, tokenizer, text) for text in pair]
        theirs = [float(r[0]) for r in line["filtered_resps"]]
        assert theirs == pytest.approx(mine, abs=1e-3)
        right += mine[0] > mine[1]
    assert found["results"]["pairs"]["acc,none"] == pytest.approx(right / 3)
    assert found["config"]["quant_types"] == ["nf4"]
    assert found["config"]["adapter"] == (adapter and str(adapter))
    assert 4.1 < found["config"]["bits_per_weight"] < 4.3


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_a_local_task_on_a_quantized_model(task, tiny_model, adapter, adapted):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    given = f"pretrained={tiny_model},dtype=float32"
    given += f",adapter={adapter}" if adapted else ""
    # Without the harness's own tasks: reading ten thousand of them takes longer than all else.
    tasks = TaskManager(include_path=str(task), include_defaults=False)
    found = simple_evaluate(
        "qlora", given, tasks=["pairs"], batch_size=2, task_manager=tasks, bootstrap_iters=0
    )
    check(found, found["samples"]["pairs"], tiny_model, adapter if adapted else None)


@pytest.mark.full
def test_the_same_through_the_command(task, tiny_model, adapter, tmp_path):
    given = f"pretrained={tiny_model},dtype=float32,adapter={adapter}"
    words = ["harness", "--model_args", given, "--tasks", "pairs", "--include_path", str(task),
             "--batch_size", "2", "--log_samples", "--output_path", str(tmp_path)]  # fmt: skip
    assert cli.main(words) == 0
    (results,) = tmp_path.rglob("results_*.json")
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    check(json.loads(results.read_text()), lines, tiny_model, adapter)


def test_the_model_type_is_known_by_its_name():
    from lm_eval.api.registry import get_model

    assert get_model("qlora") is QLoraLM


def test_the_base_is_the_adapters_and_16_bits_are_there(adapter, tiny_model):
    tuned = QLoraLM(adapter=str(adapter), dtype="float32", max_length=99)
    assert tuned.pretrained == str(tiny_model) and tuned.max_length == 99
    dense = QLoraLM(pretrained=str(tiny_model), quant_type="none", dtype="float32")
    assert dense.get_model_info()["quant_types"] == ["none"]


@pytest.mark.parametrize(
    "given, told",
    [
        ({}, "--model, --adapter, or both"),
        ({"pretrained": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"pretrained": "MODEL", "adapter": "/nowhere"}, "adapter_config.json"),
        ({"pretrained": "MODEL", "quant_type": "nf5"}, "nf5"),
        ({"pretrained": "MODEL", "peft": "x"}, "peft has no meaning"),
        ({"pretrained": "MODEL", "adaptor": "x"}, "the nearest is adapter"),
        ({"pretrained": "MODEL", "dtype": "float32", "device": "meta"}, "device is meta"),
    ],
)
def test_what_cannot_be_loaded_is_told(tiny_model, given, told):
    given = {k: str(tiny_model) if v == "MODEL" else v for k, v in given.items()}
    with pytest.raises(BadInput) as caught:
        QLoraLM(**given)
    assert told in str(caught.value)


@pytest.mark.full
def test_a_model_that_is_not_there_ends_the_command_with_code_2(task, capsys):
    words = ["--tasks", "pairs", "--include_path", str(task)]
    assert cli.main(["harness", "--model_args", "pretrained=/nowhere/at/all", *words]) == 2
    assert "/nowhere/at/all" in capsys.readouterr().err


def test_the_commands_own_errors_have_exit_codes():
    assert cli.main(["harness", "--bogus"]) == 2
    assert cli.main(["harness", "--help"]) == 0
