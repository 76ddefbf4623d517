"""From a file to rows: what is counted, what is left out, what is an error, and that it repeats."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from qlora_kernels.finetune.data import IGNORE, DataError, DataOptions, prepare, preview


def ask(i: int, reply: str | None = None) -> dict:
    reply = f"It is {i} times " + "very " * (i % 4) + "true." if reply is None else reply
    return {"instruction": f"What about {i}?", "output": reply}


def texts(rows, tokenizer) -> list[str]:
    return [tokenizer.decode(row["input_ids"]) for row in rows]


@pytest.fixture
def source(write) -> str:
    return write("d.jsonl", [ask(i) for i in range(40)])


def options(source: str, **changes) -> DataOptions:
    return DataOptions(source, **{"max_length": 200, "eval_split": 4, **changes})


# --------------------------------------------------------------------------- the whole way


def test_the_report_counts_what_is_there(source, tokenizer):
    prepared = prepare(options(source), tokenizer)
    report = prepared.report
    assert (report.read, report.train, report.eval) == (40, 36, 4)
    assert len(prepared.train) == 36 and len(prepared.eval) == 4 and report.format == "alpaca"
    rows = list(prepared.train)
    assert report.tokens == sum(row["length"] for row in rows)
    assert report.trained_tokens == sum((row["labels"] != IGNORE).sum() for row in rows)
    everything = [*rows, *prepared.eval]
    assert report.longest == max(row["length"] for row in everything)
    lines = "\n".join(report.lines())
    assert "40 samples, format alpaca" in lines and "train 36, held out 4" in lines
    assert "left out" not in lines and prepared.chat_template == tokenizer.chat_template


def test_every_sample_is_on_one_side_in_the_order_of_the_file(source, tokenizer):
    prepared = prepare(options(source), tokenizer)
    numbers = [
        [int(text.split("What about ")[1].split("?")[0]) for text in texts(part, tokenizer)]
        for part in (prepared.train, prepared.eval)
    ]
    assert sorted(numbers[0] + numbers[1]) == list(range(40))
    assert all(part == sorted(part) for part in numbers)


@pytest.mark.parametrize("packing", (False, True))
def test_the_same_again_and_another_for_every_change(source, write, tokenizer, packing):
    base = options(source, packing=packing)
    first = prepare(base, tokenizer)
    assert prepare(base, tokenizer).fingerprint == first.fingerprint
    rows = [ask(i) for i in range(40)]
    rows[7]["output"] += "!"
    changed = write("other.jsonl", rows)
    prints = {first.fingerprint}
    for change in (
        {"seed": 1}, {"train_on": "all"}, {"max_length": 40}, {"eval_split": 5},
        {"packing": not packing}, {"limit": 39}, {"source": changed},
    ):  # fmt: skip
        prints.add(prepare(dataclasses.replace(base, **change), tokenizer).fingerprint)
    assert len(prints) == 8


def test_packed_rows_hold_the_same_samples(source, tokenizer):
    plain = prepare(options(source), tokenizer)
    packed = prepare(options(source, packing=True), tokenizer)
    assert packed.report.rows == len(packed.train) < len(plain.train)
    assert packed.report.tokens == plain.report.tokens
    assert packed.report.trained_tokens == plain.report.trained_tokens
    assert packed.train.lengths.max() <= 200 and not packed.eval.packed
    pieces = []
    for row in packed.train:
        cuts = np.cumsum(row["segments"])[:-1]
        labels = np.split(row["labels"], cuts)
        assert all(part[0] == IGNORE for part in labels)
        pieces += [tuple(ids) for ids in np.split(row["input_ids"], cuts)]
    assert sorted(pieces) == sorted(tuple(row["input_ids"]) for row in plain.train)


@pytest.mark.parametrize("name", ("d.jsonl", "d.json", "d.parquet"))
def test_every_kind_of_file_gives_the_same_rows(write, source, tokenizer, name):
    expected = prepare(options(source), tokenizer).fingerprint
    other = write(name, [ask(i) for i in range(40)])
    assert prepare(options(other), tokenizer).fingerprint == expected


# --------------------------------------------------------------------------- too long, masked


def test_samples_that_are_too_long(write, tokenizer):
    rows = [ask(i) for i in range(10)] + [ask(10, "long " * 100)]
    source = write("d.jsonl", rows)
    cut = prepare(options(source, eval_split=0), tokenizer)
    assert cut.report.truncated == 1 and cut.report.train == 11
    assert cut.train.lengths.max() == 200 < cut.report.longest
    assert cut.train[10]["labels"][-1] != tokenizer.eos_token_id  # cut off: it does not end here
    assert "1 longer than max_length, cut" in "\n".join(cut.report.lines())
    dropped = prepare(options(source, eval_split=0, too_long="drop"), tokenizer)
    assert dropped.report.dropped_too_long == 1 and dropped.report.train == 10
    assert dropped.report.truncated == 0


def test_a_sample_of_just_the_length_is_whole(write, tokenizer):
    source = write("d.jsonl", [ask(1)])
    length = prepare(options(source, eval_split=0), tokenizer).report.longest
    exact = prepare(options(source, eval_split=0, max_length=length), tokenizer).report
    assert exact.truncated == 0
    assert prepare(options(source, eval_split=0, max_length=length - 1), tokenizer).report.truncated


def test_masked_samples_are_counted_and_all_masked_is_an_error(write, tokenizer):
    far = {"instruction": "why " * 200, "output": "So."}
    source = write("d.jsonl", [ask(1), far, ask(2), far])
    report = prepare(options(source, eval_split=0), tokenizer).report
    assert report.fully_masked == 2 and report.train == 2
    assert "2 without a trained token, left out" in "\n".join(report.lines())
    hopeless = write("e.jsonl", [far, far])
    with pytest.raises(
        DataError, match=r"no sample is left.*2 have no trained token.*e\.jsonl:1.*train_on: all"
    ):
        prepare(options(hopeless), tokenizer)
    assert prepare(options(hopeless, train_on="all", eval_split=0), tokenizer).report.train == 2
    with pytest.raises(DataError, match="2 are longer than max_length 200"):
        prepare(options(hopeless, too_long="drop"), tokenizer)


def test_conversations_without_a_reply(write, tokenizer):
    alone = {"messages": [{"role": "user", "content": "Hi"}]}
    source = write("d.jsonl", [alone, alone])
    with pytest.raises(DataError, match=r"d\.jsonl:1: the reply is empty, and so is each of the 2"):
        prepare(options(source, eval_split=0), tokenizer)
    assert prepare(options(source, eval_split=0, train_on="all"), tokenizer).report.train == 2


def test_empty_replies_are_counted_and_all_empty_is_an_error(write, tokenizer):
    rows = [ask(1), ask(2, ""), ask(3, " \n")]
    report = prepare(options(write("d.jsonl", rows), eval_split=0), tokenizer).report
    assert report.empty_replies == 2 and report.train == 1 and report.read == 3
    assert "2 with an empty reply, left out" in "\n".join(report.lines())
    with pytest.raises(DataError, match=r"e\.jsonl:1: the reply is empty"):
        prepare(options(write("e.jsonl", rows[1:])), tokenizer)
    for row in ({"text": " "}, {"prompt": "a", "completion": ""}):
        with pytest.raises(DataError, match="the reply is empty"):
            prepare(options(write("f.jsonl", [row])), tokenizer)


# --------------------------------------------------------------------------- the split


def test_duplicates_do_not_leak(write, tokenizer):
    """But for case and white space: what is held out is nowhere in training."""
    rows = [ask(i) for i in range(30)]
    again = [
        {"instruction": f"what  ABOUT {i}?", "output": ask(i)["output"] + "\n"} for i in range(30)
    ]
    prepared = prepare(options(write("d.jsonl", rows + again), eval_split=0.3), tokenizer)
    assert prepared.report.duplicates == 30 and prepared.report.eval == 18

    def numbers(part):
        return {
            int(text.lower().split("about ")[1].split("?")[0]) for text in texts(part, tokenizer)
        }

    assert not numbers(prepared.train) & numbers(prepared.eval)


def test_an_evaluation_file_of_its_own(write, source, tokenizer):
    other = write("eval.jsonl", [ask(3), ask(5), ask(100)])
    prepared = prepare(options(source, eval_source=other), tokenizer)
    assert prepared.report.eval == 3 and prepared.report.train == 38
    assert prepared.report.eval_overlap == 2
    assert not any("What about 3?" in text for text in texts(prepared.train, tokenizer))
    with pytest.raises(DataError, match=r"every sample of .*d\.jsonl is in"):
        prepare(options(source, eval_source=source), tokenizer)
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        prepare(options(source, eval_source="/nowhere.jsonl"), tokenizer)


def test_limit_and_no_evaluation(source, tokenizer):
    prepared = prepare(options(source, limit=5, eval_split=0), tokenizer)
    assert prepared.report.read == 5 and len(prepared.eval) == 0
    with pytest.raises(DataError, match="asks for 5 samples, and there are 5"):
        prepare(options(source, limit=5, eval_split=5), tokenizer)


# --------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "change, message",
    (
        ({"train_on": "some"}, "train_on is 'some'; it may be 'replies' or 'all'"),
        ({"too_long": "cut"}, "too_long is 'cut'"),
        ({"max_length": 1}, "max_length is 1; .* at least 2"),
        ({"eval_split": -1}, "eval_split is -1"),
        ({"eval_split": 1.5}, "a share is below 1.0"),
        ({"eval_split": True}, "eval_split is True"),
        ({"limit": 0}, "limit is 0"),
    ),
)
def test_options_that_are_not_offered(change, message):
    with pytest.raises(DataError, match=message):
        DataOptions("d.jsonl", **change)


def test_errors_are_value_errors():
    assert issubclass(DataError, ValueError)


def test_texts_need_no_template(write, make_tokenizer):
    source = write("d.jsonl", [{"text": f"Word number {i}"} for i in range(9)])
    prepared = prepare(options(source, eval_split=2), make_tokenizer(None))
    assert prepared.chat_template is None and prepared.report.template == ""


def test_a_second_bos_is_counted(write, make_tokenizer):
    tokenizer = make_tokenizer(None, bos="<s>", adds_bos=True)
    source = write("d.jsonl", [{"text": "<s><s>a b"}, {"text": "<s>a c"}, {"text": "a d"}])
    prepared = prepare(options(source, eval_split=0), tokenizer)
    assert prepared.report.bos_fixed == 1
    assert [(row["input_ids"] == tokenizer.bos_token_id).sum() for row in prepared.train] == [1] * 3


# --------------------------------------------------------------------------- preview


def styled(text) -> list[tuple[str, str]]:
    return [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]


def test_the_preview_colours_exactly_what_is_trained(write, tokenizer):
    source = write("d.jsonl", [ask(1, "Yes."), ask(2, "No.")])
    row = prepare(options(source, eval_split=0), tokenizer).train[0]
    text = preview(row, tokenizer)
    assert "".join(part for part, style in styled(text) if "green" in style) == "Yes.<|im_end|>"
    assert text.plain == tokenizer.decode(row["input_ids"])
    assert ("<|im_start|>", "dim on grey23") in styled(text)
    screen = io.StringIO()
    Console(file=screen, force_terminal=True, color_system="standard").print(text)
    assert "\x1b[1;32mYes." in screen.getvalue()


def test_the_preview_of_a_packed_row_sets_samples_apart(write, tokenizer):
    source = write("d.jsonl", [ask(1, "Yes."), ask(2, "No.")])
    row = prepare(options(source, eval_split=0, packing=True), tokenizer).train[0]
    assert preview(row, tokenizer).plain.count("next sample in this row") == 1
    assert "tokens more" in preview(row, tokenizer, max_tokens=10).plain
