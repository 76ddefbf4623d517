"""MMLU: the published files, the prompts, likelihoods against a plain forward pass, the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from qlora_kernels import chat, cli
from qlora_kernels.evaluate import mmlu
from qlora_kernels.evaluate.mmlu_data import CATEGORIES, Item, Subject, prompt, read_mmlu
from qlora_kernels.evaluate.mmlu_report import items, summarise, table
from qlora_kernels.evaluate.mmlu_score import Answer, Scorer
from qlora_kernels.finetune.errors import BadInput

SUBJECTS = ("anatomy", "philosophy", "knots_and_ropes")


def write_csv(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def rows(subject: str, split: str, count: int) -> list[list[str]]:
    """Sums, of unequal lengths, with commas, quotes and a line break in them."""
    return [
        [
            f'{subject}, "{split}":\n{i} plus {i % 5}' + " and nought" * (i % 3) + "?",
            *(str(i + i % 5 + k) for k in range(4)),
            "ABCD"[(i * 7 + len(subject)) % 4],
        ]
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three subjects in the published form."""
    root = tmp_path_factory.mktemp("mmlu")
    for subject in SUBJECTS:
        for split, count in (("dev", 5), ("val", 7), ("test", 9)):
            write_csv(root / split / f"{subject}_{split}.csv", rows(subject, split, count))
    return root


@pytest.fixture(scope="module")
def model_folder(make_tiny_model, tmp_path_factory) -> Path:
    """A tiny model with room for prompts of bytes."""
    return make_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)


@pytest.fixture(scope="module")
def loaded(model_folder):
    return chat.load(str(model_folder), dtype="float32")


# --- files --------------------------------------------------------------------------------------


def test_the_published_files(folder):
    data = read_mmlu(folder, "test")
    assert [s.name for s in data.subjects] == sorted(SUBJECTS)
    assert len(data) == 27 and all(len(s.examples) == 5 for s in data.subjects)
    assert data.subjects[0].items[4] == Item(
        'anatomy, "test":\n4 plus 4 and nought?', ("8", "9", "10", "11"), (4 * 7 + 7) % 4
    )
    categories = {s.name: s.category for s in data.subjects}
    assert categories == {
        "anatomy": "STEM", "philosophy": "humanities", "knots_and_ropes": "other"
    }  # fmt: skip
    few = read_mmlu(folder, "val", shots=2, subjects=["philosophy"], limit=3)
    assert len(few) == 3 and len(few.subjects[0].examples) == 2
    assert few.digest != read_mmlu(folder, "val", 2, ["philosophy"]).digest


def test_the_57_subjects_have_one_category_each():
    """19 of STEM, 13 of the humanities, 12 of the social sciences, 13 others: as published."""
    counts = {name: len(subjects) for name, subjects in CATEGORIES.items()}
    assert counts == {"STEM": 19, "humanities": 13, "social sciences": 12, "other": 13}
    assert len({s for subjects in CATEGORIES.values() for s in subjects}) == 57


GOOD = ["1 + 1?", "1", "2", "3", "4", "B"]


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"1 + 1?,1,2,3,4\n", "val.csv:1: 5 columns; expected six"),
        (b"1 + 1?,1,2,3,4,B\n1 + 1?,1,2,3,4,E\n", "val.csv:2: the answer is 'E'"),
        (b"question,A,B,C,D,answer\n1 + 1?,1,2,3,4,B\n", "have no header"),
        (b" ,1,2,3,4,B\n", "the question is empty"),
        (b'"1 + 1?,1,2,3,4,B\n', "not CSV"),
        (b"1 + \xff?,1,2,3,4,B\n", "not UTF-8 (byte 4)"),
        (b'<html><body>"no" such file</body></html>', "1 columns"),
    ],
)
def test_files_that_are_not_as_published(tmp_path, content, told):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "anatomy_val.csv").write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read_mmlu(tmp_path, shots=0)
    assert told in str(caught.value) and "anatomy_val.csv" in str(caught.value)


def test_folders_and_wishes_that_cannot_be_met(folder, tmp_path):
    def told(*args, **kwargs) -> str:
        with pytest.raises(BadInput) as caught:
            read_mmlu(*args, **kwargs)
        return str(caught.value)

    assert "dev/, val/ and test/" in told(tmp_path)
    assert "it may be val, test, dev" in told(folder, "eval")
    assert "did you mean anatomy?" in told(folder, subjects=["anatomi"])
    assert "lower the number of shots" in told(folder, shots=6)
    assert "0 shots" in told(folder, "dev")
    assert "0 or more" in told(folder, shots=-1) and "1 or more" in told(folder, limit=0)
    write_csv(tmp_path / "val" / "new_val.csv", [GOOD])
    assert "new_dev.csv" in told(tmp_path) and len(read_mmlu(tmp_path, shots=0)) == 1
    write_csv(tmp_path / "dev" / "new_dev.csv", [GOOD])
    assert "it has val, dev" in told(tmp_path, "test")


def test_a_prompt_has_the_layout_of_the_published_figures():
    item = Item("1 + 1?", ("1", "2", "3", "4"), 1)
    subject = Subject("high_school_sums", (item,), (Item("2 + 2?", ("4", "5", "6", "7"), 0),) * 2)
    example = "2 + 2?\nA. 4\nB. 5\nC. 6\nD. 7\nAnswer: A\n\n"
    head = "The following are multiple choice questions (with answers) about high school sums.\n\n"
    asked = "1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    assert prompt(subject, item) == head + 2 * example + asked
    assert prompt(subject, item, 1) == head + example + asked
    assert prompt(subject, item, 0) == head + asked


# --- likelihoods --------------------------------------------------------------------------------


def plain(model, tokenizer, subject: Subject, index: int, shots=None) -> list[float]:
    """Each letter after the prompt, one forward pass of the whole text a letter."""
    found = []
    for letter in "ABCD":
        text = f"{prompt(subject, subject.items[index], shots)} {letter}"
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0].double()
        found.append(torch.log_softmax(logits[-2], -1)[ids[0, -1]].item())
    return found


@pytest.mark.parametrize("batch", [1, 4, 50])
def test_likelihoods_are_those_of_plain_passes(loaded, folder, batch):
    data = read_mmlu(folder, "val")
    answers = mmlu.measure(*loaded, data, batch_size=batch)
    assert [(a.subject, a.index) for a in answers] == [
        (s.name, i) for s in data.subjects for i in range(7)
    ]
    assert all(a.shots == 5 and not a.cut for a in answers)
    for subject in data.subjects:
        for index in (0, 6):
            mine = next(a for a in answers if (a.subject, a.index) == (subject.name, index))
            # float32 through two layers; sums in another order.
            assert mine.log_likelihoods == pytest.approx(plain(*loaded, subject, index), abs=2e-5)
            assert mine.answer == subject.items[index].answer


def test_the_examples_are_read_once_a_subject(loaded, folder, monkeypatch):
    """Seven questions in batches of four: one pass over what they share, and two batches."""
    sizes = []

    def watched(name, size):
        real = getattr(Scorer, name)

        def method(self, rows, *rest):
            sizes.append((name, *size(rows)))
            return real(self, rows, *rest)

        monkeypatch.setattr(Scorer, name, method)

    watched("_read", lambda tokens: (1, len(tokens)))
    watched("_batch", lambda rows: (len(rows), max(map(len, rows))))
    mmlu.measure(*loaded, read_mmlu(folder, "val", subjects=["anatomy"]), batch_size=4)
    (read, one, shared), (_, four, first), (_, three, second) = sizes
    assert (read, one, four, three) == ("_read", 1, 4, 3) and shared > 5 * max(first, second)


def test_prompts_that_are_too_long_lose_examples_then_their_beginning(loaded, folder):
    data = read_mmlu(folder, "val", subjects=["anatomy"])
    whole = len(loaded[1](prompt(data.subjects[0], data.subjects[0].items[0])).input_ids)
    less = mmlu.measure(*loaded, data, max_length=whole - 1)
    assert {a.shots for a in less} <= {3, 4, 5} and less[0].shots == 4
    assert less[0].log_likelihoods == pytest.approx(
        plain(*loaded, data.subjects[0], 0, less[0].shots), abs=2e-5
    )
    cut = mmlu.measure(*loaded, data, max_length=40)
    assert all(a.cut and a.shots == 0 for a in cut)
    said = table(summarise(cut, data))
    assert any("7 questions were longer" in line for line in said)
    assert any("7 questions had fewer than 5" in line for line in said)


def test_an_adapter_counts_and_the_model_is_left_as_it_was(loaded, folder, model_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    base, tokenizer = chat.load(str(model_folder), dtype="float32")
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    tuned = get_peft_model(base, lora)
    tuned.train()
    data = read_mmlu(folder, "val", subjects=["anatomy"], limit=2)
    found = mmlu.measure(tuned, tokenizer, data)
    assert tuned.training
    tuned.eval()
    assert found[1].log_likelihoods == pytest.approx(
        plain(tuned, tokenizer, data.subjects[0], 1), abs=2e-5
    )
    without = mmlu.measure(*loaded, data)
    assert found[1].log_likelihoods != pytest.approx(without[1].log_likelihoods, abs=1e-3)


def test_letters_that_one_token_does_not_tell_apart_are_an_error(loaded):
    model, tokenizer = loaded

    class Words:
        bos_token_id = None

        def __call__(self, text, **kwargs):
            ids = [9] if text.endswith("A") else [ord(c) for c in text]
            return type("Encoding", (), {"input_ids": ids})

    with pytest.raises(BadInput, match="one token each"):
        Scorer(model, Words())
    with pytest.raises(BadInput, match="1 question or more"):
        Scorer(model, tokenizer, batch_size=0)


# --- figures ------------------------------------------------------------------------------------


def test_shares_and_intervals(folder):
    data = read_mmlu(folder, "val")
    likely = {0: (0.0, -1.0, -2.0, -3.0), 1: (-1.0, 0.0, -2.0, -3.0)}
    answers = [
        Answer(s.name, i, likely[i % 2], 0, 5) for s in data.subjects for i in range(len(s.items))
    ]
    result = summarise(answers, data)
    assert result["split"] == "val" and result["shots"] == 5
    assert (result["correct"], result["questions"]) == (12, 21)
    assert result["accuracy"] == pytest.approx(12 / 21)
    # Wilson's interval by its formula.
    p, n, z = 12 / 21, 21, 1.959964
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    assert (result["low"], result["high"]) == pytest.approx(
        (middle - half, middle + half), abs=1e-6
    )
    assert set(result["categories"]) == {"STEM", "humanities", "other"}
    assert result["subjects"]["anatomy"]["correct"] == 4
    assert result["mean_of_subjects"] == pytest.approx(4 / 7)
    assert "split val" in table(result)[0]
    assert [i["chosen"] for i in items(answers)[:2]] == ["A", "B"]


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def command(folder, model_folder, tmp_path, capsys):
    """``command(*words)``: its exit code, and what it said."""

    def call(*words: str) -> tuple[int, str]:
        code = cli.main(
            ["mmlu", "--data", str(folder), "--model", str(model_folder), "--dtype", "float32",
             "--batch", "3", "--output", str(tmp_path / "out.json"), *words]
        )  # fmt: skip
        out = capsys.readouterr()
        return code, out.out + out.err

    return call


def test_the_command_writes_a_result_that_names_its_split(command, tmp_path):
    code, said = command("--split", "test", "--limit", "2")
    assert code == 0 and "MMLU, split test, 5-shot" in said and "philosophy" in said
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["schema"] == 1 and result["split"] == "test" and len(result["items"]) == 6
    assert not (tmp_path / "out.json.partial.jsonl").exists()
    again, said = command("--split", "test", "--limit", "2")
    assert again == 0 and "finished" in said and "split test" in said
    code, said = command("--split", "val")
    assert code == 2 and "another run" in said


def test_a_run_that_was_killed_goes_on(command, tmp_path, monkeypatch):
    words = ("--subjects", "anatomy,philosophy")
    assert command(*words)[0] == 0
    whole = json.loads((tmp_path / "out.json").read_text())
    (tmp_path / "out.json").unlink()

    real, passes = Scorer._batch, []

    def killed(self, *args):
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Scorer, "_batch", killed)
    assert command(*words)[0] == 130
    partial = tmp_path / "out.json.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 1 + 6
    with partial.open("a") as file:
        file.write('{"subject": "anat')  # what a kill in the middle of a line leaves
    passes[:] = [0] * 10
    code, said = command(*words)
    assert code == 0 and "going on after 6 questions" in said
    assert len(passes) - 10 == 1 + 3, "questions that were answered are asked again"
    after = json.loads((tmp_path / "out.json").read_text())
    for before, now in zip(whole["items"], after["items"], strict=True):
        assert now.pop("log_likelihoods") == pytest.approx(before.pop("log_likelihoods"), abs=2e-5)
        assert now == before
    for result in (whole, after):
        del result["items"]
    assert after == whole


def test_answers_of_another_run_are_not_gone_on_with(command, tmp_path):
    partial = tmp_path / "out.json.partial.jsonl"
    partial.write_text(json.dumps({"schema": 1, "run": {"model": "another"}}) + "\n")
    code, said = command("--limit", "1")
    assert code == 2 and str(partial) in said and "another run" in said
    partial.write_text('{"schema": 1\n{}\n')
    code, said = command("--limit", "1")
    assert code == 2 and "damaged" in said
    assert command("--limit", "1", "--overwrite")[0] == 0


def test_what_cannot_be_asked(command, tmp_path, folder, capsys):
    code, said = command("--subjects", "philosofy")
    assert code == 2 and "did you mean philosophy?" in said
    assert cli.main(["mmlu", "--data", str(folder)]) == 2
    assert "--model, --adapter, or both" in capsys.readouterr().err
    for content in ("not JSON", '{"kind": "other"}', '{"kind": "mmlu", "schema": 9}'):
        (tmp_path / "out.json").write_text(content)
        code, said = command()
        assert code == 2 and "out.json" in said
