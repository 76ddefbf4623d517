"""Recognising formats by their fields, and what is wrong with a record, with its place."""

from __future__ import annotations

import pytest

from qlora_kernels.finetune.data import DataError, read_records, to_examples

SAY = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SAID = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
BRIEF = {"role": "system", "content": "Be brief"}


def convert(write, rows, *args, **kwargs):
    return to_examples(read_records(write("d.jsonl", rows)), *args, **kwargs)


@pytest.mark.parametrize(
    "fields, name, messages",
    (
        ({"messages": SAY}, "chat", SAY),
        ({"messages": [BRIEF, *SAY]}, "chat", [BRIEF, *SAY]),
        ({"messages": SAY, "system": "Be brief"}, "chat", [BRIEF, *SAY]),
        ({"messages": SAY, "system": None}, "chat", SAY),
        ({"conversations": SAID}, "sharegpt", SAY),
        ({"conversations": SAY}, "sharegpt", SAY),
        ({"conversations": SAID, "system": "Be brief"}, "sharegpt", [BRIEF, *SAY]),
        ({"instruction": "Hi", "output": "Hello"}, "alpaca", SAY),
        ({"instruction": "Hi", "input": " ", "output": "Hello", "text": "x"}, "alpaca", SAY),
        ({"prompt": SAY[:1], "completion": SAY[1:]}, "prompt-completion", SAY),
        (
            {"prompt": "Hi", "completion": "Hello", "system": "Be brief"},
            "prompt-completion",
            [BRIEF, *SAY],
        ),
    ),
)
def test_conversations(write, fields, name, messages):
    examples, found, _ = convert(write, [fields] * 2)
    assert found.name == name
    assert examples[1].messages == messages and examples[1].where.endswith("d.jsonl:2")


def test_an_input_follows_its_instruction(write):
    (example,), _, _ = convert(write, [{"instruction": "Add", "input": "1 2", "output": "3"}])
    assert example.messages[0]["content"] == "Add\n\n1 2"


def test_texts(write):
    (example,), found, _ = convert(write, [{"text": "Once upon a time", "source": "x"}])
    assert found.name == "text" and example.text == "Once upon a time"
    (example,), found, _ = convert(write, [{"prompt": "1 + 1 =", "completion": " 2"}])
    assert (example.prompt, example.completion) == ("1 + 1 =", " 2") and not example.messages


def test_the_parts_of_a_message_are_joined(write):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    turns = [SAY[0], {"role": "assistant", "content": parts}]
    (example,), _, _ = convert(write, [{"messages": turns}])
    assert example.messages == SAY


def test_several_formats_in_one_record_are_told(write):
    row = {"instruction": "a", "output": "b", "text": "c"}
    _, found, notes = convert(write, [row])
    assert found.name == "alpaca" and "text are there too; alpaca is used" in notes[0]
    examples, found, notes = convert(write, [row], "text")
    assert examples[0].text == "c" and not notes


# --------------------------------------------------------------------------- columns


def test_columns(write):
    rows = [{"q": "Hi", "meta": {"answers": ["no", "Hello"]}, "a.b": "dots"}]
    columns = {"prompt": "q", "completion": "meta.answers.1"}
    (example,), found, _ = convert(write, rows, columns=columns)
    assert (example.prompt, example.completion) == ("Hi", "Hello")
    (example,), found, _ = convert(write, rows, columns={"text": "a.b"})
    assert example.text == "dots" and found.name == "text"
    (example,), found, _ = convert(
        write, rows, columns={"instruction": "q", "output": "a.b", "input": "not there"}
    )
    assert found.name == "alpaca" and example.messages[1]["content"] == "dots"


def test_files_like_self_instruct(shared_data):
    records = read_records(str(shared_data / "self_instruct_seed_tasks.jsonl"))
    columns = {
        "instruction": "instruction", "input": "instances.0.input", "output": "instances.0.output",
    }  # fmt: skip
    examples, found, _ = to_examples(records, columns=columns)
    assert len(examples) == 175 and found.name == "alpaca"
    assert examples[0].messages[1]["content"].startswith("Yes, you can have 1 oatmeal")
    with pytest.raises(DataError, match=r"tasks\.jsonl:1: the format is not recognised"):
        to_examples(records)


def test_a_real_file_of_questions(shared_data):
    records = read_records(str(shared_data / "vicuna_questions.jsonl"))
    examples, _, _ = to_examples(records, columns={"text": "turns.0"})
    assert len(examples) == 80 and examples[0].text.startswith("How can I improve")


@pytest.mark.parametrize(
    "columns, message",
    (
        ({"promt": "q"}, r"'promt' is no role \(did you mean 'prompt'\?\)"),
        ({"prompt": "q"}, r"columns name 'prompt'; a format needs one of these sets: chat"),
        ({"prompt": "q", "completion": "x"}, r"d\.jsonl:1 lacks the column 'x' \(for completion\)"),
        ({"prompt": "q", "completion": "m.a.9"}, r"lacks the column 'm\.a\.9'"),
        ({"text": "m"}, r"'text' is an object; expected a text"),
    ),
)
def test_columns_that_are_not_there(write, columns, message):
    with pytest.raises(DataError, match=message):
        convert(write, [{"q": "Hi", "m": {"a": ["Hello"]}}], columns=columns)


# --------------------------------------------------------------------------- bad records


def test_fields_that_are_missing_are_named_with_their_line(write):
    rows = [{"instruction": "a", "output": "b"}] * 3
    rows[2] = {"instruction": "a", "outptu": "b"}
    with pytest.raises(
        DataError,
        match=r"d\.jsonl:3 lacks the field 'output' of the format alpaca; it has 'instruction', "
        r"'outptu'",
    ):
        convert(write, rows)
    with pytest.raises(DataError, match=r"d\.jsonl:1 lacks the fields 'prompt' and 'completion'"):
        convert(write, rows, "prompt-completion")


def test_mixed_formats(write):
    rows = [{"text": "a"}, {"text": "b"}, {"messages": SAY}]
    with pytest.raises(
        DataError, match=r"mixed formats: .*d\.jsonl:1 is text, .*d\.jsonl:3 is chat"
    ):
        convert(write, rows)


def test_an_unknown_format(write):
    with pytest.raises(DataError, match=r"'sharegtp' is not offered \(did you mean 'sharegpt'\?\)"):
        convert(write, [{"text": "a"}], "sharegtp")


def test_fields_that_are_not_recognised(write):
    with pytest.raises(DataError, match=r"d\.jsonl:1: the format is not recognised.*'a', 'b'"):
        convert(write, [{"a": 1, "b": 2}])
    with pytest.raises(
        DataError, match=r"Do you mean columns: \{prompt: question, completion: answer\}\?"
    ):
        convert(write, [{"question": "a", "answer": "b"}])


@pytest.mark.parametrize(
    "good, bad, message",
    (
        ({"text": "a"}, {"text": 3}, r"d\.jsonl:2: 'text' is 3; expected a text"),
        ({"text": "a"}, {"text": None}, r"d\.jsonl:2: 'text' is null"),
        (
            {"instruction": "a", "output": "b"},
            {"instruction": "a", "output": ["b"]},
            r"d\.jsonl:2: 'output' is a list of 1; expected a text",
        ),
        (
            {"instruction": "a", "output": "b"},
            {"instruction": "a", "input": 7, "output": "b"},
            r"d\.jsonl:2: 'input' is 7",
        ),
        ({"messages": SAY}, {"messages": "Hi"}, r"'messages' is 'Hi'; expected a list"),
        ({"messages": SAY}, {"messages": []}, r"'messages' is a list of 0"),
        ({"messages": SAY}, {"messages": ["Hi"]}, r"messages\[0\] is 'Hi'; expected an object"),
        (
            {"messages": SAY},
            {"messages": [SAY[0], {"role": "assistant"}]},
            r"d\.jsonl:2: messages\[1\] lacks 'content' \(it has 'role'\)",
        ),
        (
            {"conversations": SAID},
            {"conversations": [{"from": "human"}]},
            r"conversations\[0\] lacks 'value'",
        ),
        (
            {"messages": SAY},
            {"messages": [{"role": "asistant", "content": "x"}]},
            r"the role is 'asistant' \(did you mean 'assistant'\?\)",
        ),
        (
            {"messages": SAY},
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]},
            r"messages\[0\] calls a tool",
        ),
        (
            {"messages": SAY},
            {"messages": [{"role": "user", "content": None}]},
            r"messages\[0\]: the content is null",
        ),
        (
            {"messages": SAY},
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"a part of its content is image_url; only text is offered",
        ),
    ),
)
def test_values_of_a_wrong_type(write, good, bad, message):
    with pytest.raises(DataError, match=message):
        convert(write, [good, bad])


def test_parquet_is_converted_as_json_lines_are(write):
    source = write("d.parquet", [{"messages": SAY, "id": 1}, {"messages": SAY, "id": 2}])
    examples, found, _ = to_examples(read_records(source))
    assert found.name == "chat" and examples[1].messages == SAY
    assert examples[1].where.endswith("d.parquet row 2")


# --- published forms of others --------------------------------------------------------------------


def test_flan_has_inputs_and_targets(write):
    rows = [{"inputs": "Translate: Hund", "targets": "dog", "task": "wmt", "template_type": "zs"}]
    (example,), found, _ = to_examples(read_records(write("a.jsonl", rows)))
    assert found.name == "flan"
    assert example.messages == [
        {"role": "user", "content": "Translate: Hund"},
        {"role": "assistant", "content": "dog"},
    ]


def test_hh_rlhf_teaches_the_chosen_one(write):
    asked = "\n\nHuman: Hello.\n\nHuman: Are you there?\n\nAssistant: Yes."
    chosen = asked + "\n\nHuman: Good.\n\nAssistant: So it is."
    rows = [{"chosen": chosen, "rejected": "\n\nHuman: Hello.\n\nAssistant: No."}]
    (example,), found, _ = to_examples(read_records(write("a.jsonl", rows)))
    assert found.name == "hh-rlhf"
    assert [m["role"] for m in example.messages] == ["user", "assistant"] * 2
    assert [m["content"] for m in example.messages] == [
        "Hello.\n\nAre you there?", "Yes.", "Good.", "So it is."
    ]  # fmt: skip
    reply = [{"role": "assistant", "content": "c"}]
    rows = [{"prompt": [{"role": "user", "content": "q"}], "chosen": reply, "rejected": reply}]
    (example,), _, _ = to_examples(read_records(write("b.jsonl", rows)))
    assert [m["content"] for m in example.messages] == ["q", "c"]


@pytest.mark.parametrize("chosen", ["no turns", "\n\nAssistant: first", "x\n\nHuman: a", ""])
def test_hh_rlhf_without_turns_is_an_error_with_its_place(write, chosen):
    rows = [{"chosen": chosen, "rejected": "\n\nHuman: a\n\nAssistant: b"}]
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'chosen' does not begin with 'Human:'"):
        to_examples(read_records(write("a.jsonl", rows)))
