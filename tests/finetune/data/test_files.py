"""Reading records: every kind of file, and every way in which one can be broken."""

from __future__ import annotations

import json
import sys
import types

import pytest

from qlora_kernels.finetune.data import DataError, read_records

ROWS = [{"text": f"sample {i}", "n": i, "odd": "a\u2028b\x85c"} for i in range(5)]


@pytest.mark.parametrize("name", ("a.jsonl", "a.ndjson", "a.json", "a.parquet", "A.JSONL"))
def test_every_kind_gives_the_same_records(write, name):
    source = write(name, ROWS)
    records = read_records(source)
    assert [r.fields for r in records] == ROWS
    assert read_records(source, limit=2) == records[:2]


def test_places(write):
    lines = write("a.jsonl", '\n{"text": "a"}\n\n   \n{"text": "b"}\n')
    assert [r.where for r in read_records(lines)] == [f"{lines}:2", f"{lines}:5"]
    whole = write("a.json", '[\n {"text": "a"},\n\n {"text":\n  "b"},\n {"text": "c"}\n]\n')
    assert [r.where for r in read_records(whole)] == [f"{whole}:{n}" for n in (2, 4, 6)]
    nested = write("b.json", {"version": 1, "data": ROWS})
    assert read_records(nested)[1].where == f"{nested} data[1]"
    table = write("a.parquet", ROWS)
    assert read_records(table)[4].where == f"{table} row 5"


def test_json_lines_that_are_called_json(write):
    source = write("a.json", '{"text": "a"}\n{"text": "b"}\n')
    assert [r.where for r in read_records(source)] == [f"{source}:1", f"{source}:2"]


def test_a_byte_order_mark_and_windows_line_ends(write):
    source = write("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [r.fields["text"] for r in read_records(source)] == ["a", "b"]


def test_a_folder_in_the_order_of_its_names(write, tmp_path):
    write("b.jsonl", ROWS[:1])
    write("a.parquet", ROWS[1:3])
    write("notes.txt", "not data")
    assert [r.fields["n"] for r in read_records(str(tmp_path))] == [1, 2, 0]


def test_a_folder_without_data(tmp_path):
    with pytest.raises(DataError, match=r"folder without \.jsonl, .*\.parquet files"):
        read_records(str(tmp_path))


@pytest.mark.parametrize("name", ("a.jsonl", "a.json", "a.parquet"))
@pytest.mark.parametrize("content", (b"", b" \n\n"), ids=("nothing", "blank"))
def test_empty(write, name, content):
    if name == "a.parquet" and content:
        pytest.skip("a blank Parquet file is a broken one")
    with pytest.raises(DataError, match=rf"{name} is empty"):
        read_records(write(name, content))


@pytest.mark.parametrize("name, content", (("a.json", "[]"), ("b.json", " [ ] ")))
def test_a_list_of_nothing(write, name, content):
    with pytest.raises(DataError, match="holds no records"):
        read_records(write(name, content))


def test_absent(write, tmp_path):
    write("train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"does not exist; did you mean .*/train\.jsonl\?"):
        read_records(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=r"does not exist \(nor does the folder"):
        read_records(str(tmp_path / "nowhere" / "x.jsonl"))
    with pytest.raises(DataError, match="does not exist; give a"):
        read_records("python-dosc")


@pytest.mark.parametrize(
    "name, nearest", (("a.json1", r"\.jsonl?"), ("a.parqet", r"\.parquet"), ("a.xlsx", None))
)
def test_an_extension_that_is_not_offered(write, name, nearest):
    hint = rf"did you mean {nearest}\?" if nearest else "Offered"
    with pytest.raises(DataError, match=rf"cannot be read.*{hint}"):
        read_records(write(name, "x"))


def test_half_written_lines(write):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    for cut in (1, 2, 10, 30):  # the line end alone is no loss; then always the last line
        source = write("a.jsonl", text[: len(text) - cut])
        if cut == 1:
            assert len(read_records(source)) == 5
            continue
        with pytest.raises(DataError, match=r"a\.jsonl:5: the last line ends in the middle.*half"):
            read_records(source)


def test_a_broken_line_in_the_middle(write):
    source = write("a.jsonl", '{"text": "a"}\n{"text": "b"\n{"text": "c"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON \(character 12"):
        read_records(source)


def test_half_written_json(write):
    text = json.dumps(ROWS, indent=1)
    for cut in range(1, len(text), 7):
        with pytest.raises(DataError, match=r"a\.json:\d+: not JSON .*half-written"):
            read_records(write("a.json", text[: len(text) - cut]))


def test_json_that_goes_on_after_its_end(write):
    with pytest.raises(DataError, match="Extra data"):
        read_records(write("a.json", '[{"text": "a"}] x'))
    with pytest.raises(DataError, match="',' delimiter"):
        read_records(write("a.json", '[{"text": "a"} {"text": "b"}]'))


def test_not_utf8(write):
    source = write("a.jsonl", '{"text": "a"}\n{"text": "é"}\n'.encode("latin1"))
    with pytest.raises(DataError, match=r"a\.jsonl:2: not UTF-8 \(byte 0xe9 at offset 24\).*iconv"):
        read_records(source)


@pytest.mark.parametrize(
    "value, kind", (("3", "number"), ('"x"', "string"), ("null", "null"), ("[1]", "list"))
)
def test_lines_that_are_no_objects(write, value, kind):
    with pytest.raises(DataError, match=rf"a\.jsonl:2: a {kind}; expected an object"):
        read_records(write("a.jsonl", f'{{"text": "a"}}\n{value}\n'))
    with pytest.raises(DataError, match=rf"a\.json:1: a {kind}; expected an object"):
        read_records(write("a.json", f'[{{"text": "a"}}, {value}]'))


@pytest.mark.parametrize(
    "value",
    ({"a": 1}, {"a": [{"text": "x"}], "b": [{"text": "y"}]}, {"a": [1, 2]}, 3),
    ids=("no list", "two lists", "a list of numbers", "a number"),
)
def test_json_that_holds_no_one_list(write, value):
    with pytest.raises(DataError, match="exactly one such list"):
        read_records(write("a.json", value))


def test_nested_beyond_reason(write):
    deep = '{"a": ' * 100_000 + "1" + "}" * 100_000
    with pytest.raises(DataError, match=r"a\.jsonl:1: JSON nested too deeply"):
        read_records(write("a.jsonl", deep + "\n"))


def test_a_truncated_parquet(write, tmp_path):
    path = tmp_path / "a.parquet"
    write("a.parquet", ROWS)
    data = path.read_bytes()
    for keep in (3, 20, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(DataError, match=r"a\.parquet: not a whole Parquet file"):
            read_records(str(path))
    path.write_text("text,n\n1,2\n")
    with pytest.raises(DataError, match="not a whole Parquet file"):
        read_records(str(path))


def test_the_hub(monkeypatch):
    """Without a network: the library is replaced, its errors too."""
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "who/private":
            raise PermissionError("gated\nmore")
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    records = read_records("who/what", limit=3)
    assert [r.fields for r in records] == ROWS[:3] and records[2].where == "who/what row 3"
    read_records("who/what:train[:5%]")
    assert asked == [("who/what", "train"), ("who/what", "train[:5%]")]
    with pytest.raises(DataError, match=r"reading it from the hub failed: gated \("):
        read_records("who/private")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        read_records("who/what")
