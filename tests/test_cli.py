"""The command `qlora`: which words it takes, with which code it ends, what it says then."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import qlora_kernels
from qlora_kernels import cli
from qlora_kernels.finetune.errors import BadInput, Interrupted, RunError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def command(monkeypatch):
    """``command(run, add_arguments=None)``: makes `qlora test` call it."""

    def make(run, add_arguments=None):
        module = types.ModuleType("qlora_test_command")
        module.run = run
        if add_arguments is not None:
            module.add_arguments = add_arguments
        monkeypatch.setitem(sys.modules, module.__name__, module)
        commands = {
            **cli.COMMANDS,
            "test": cli.Command(module.__name__, "does as told", "qlora test"),
        }
        monkeypatch.setattr(cli, "COMMANDS", commands)

    return make


def raising(error):
    def run(arguments):
        raise error

    return run


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, code", [([], 0), (["--help"], 0), (["-h"], 0)])
def test_help_lists_every_command_with_an_example(capsys, argv, code):
    try:
        assert cli.main(argv) == code
    except SystemExit as end:
        assert end.code == code
    text = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert name in text and command.what in text and command.example in text
    for title, group in cli.GROUPS.items():
        assert (f"\n{title}:\n" in text) == bool(group)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{qlora_kernels.__version__}\n"


@pytest.mark.parametrize(
    "word, told", [("fintune", "did you mean finetune?"), ("xyz", "no command xyz\n")]
)
def test_an_unknown_command_is_an_error_with_the_nearest_one(capsys, word, told):
    assert cli.main([word, "--learning_rate", "1"]) == 2
    assert told in capsys.readouterr().err


def test_an_unknown_option_is_an_error(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--verison"])
    assert end.value.code == 2 and "--verison" in capsys.readouterr().err


def test_what_follows_a_command_is_the_command_s(command, capsys):
    seen = []
    command(lambda words: seen.append(words))
    assert cli.main(["test", "--version", "x", "--help"]) == 0
    assert seen == [["--version", "x", "--help"]]

    def add_arguments(parser):
        parser.add_argument("--number", type=int)

    command(lambda arguments: arguments.number, add_arguments)
    assert cli.main(["test", "--number", "7"]) == 7
    for wrong in (["--number", "seven"], ["--num", "7"], ["stray"]):
        with pytest.raises(SystemExit) as end:
            cli.main(["test", *wrong])
        assert end.value.code == 2
    assert "qlora test" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(capsys, name):
    try:
        assert cli.main([name, "--help"]) == 0
    except SystemExit as end:
        assert end.code == 0
    text = capsys.readouterr().out
    assert f"qlora {name}" in text and "example: qlora" in text


# --- codes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, code",
    [
        (BadInput("no such file"), 2),
        (RunError("the disk is full"), 1),
        (Interrupted("stopped after step 3", 15), 143),
        (Interrupted("stopped after step 3", 2), 130),
    ],
)
def test_a_users_error_is_one_line_and_a_code(command, capsys, error, code):
    command(raising(error))
    assert cli.main(["test"]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"qlora test: {error}\n")


def test_ctrl_c_and_a_closed_pipe_end_quietly(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert cli.main(["test"]) == 130
    command(raising(BrokenPipeError()))
    assert cli.main(["test"]) == 141
    assert capsys.readouterr() == ("", "")


def test_a_defect_keeps_its_traceback(command):
    for error in (ValueError("a shape that was not foreseen"), KeyError("x"), OSError("y")):
        command(raising(error))
        with pytest.raises(type(error)):
            cli.main(["test"])


def test_a_package_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "qlora_kernels.chat", None)
    commands = {"chat": cli.Command("package_that_is_not_there", "talks", "qlora chat", "serve")}
    monkeypatch.setattr(cli, "COMMANDS", commands)
    assert cli.main(["chat"]) == 2
    err = capsys.readouterr().err
    assert "package_that_is_not_there is not installed" in err
    assert "pip install 'qlora-kernels[serve]'" in err
    commands["chat"] = cli.Command("qlora_kernels.not_there", "talks", "qlora chat")
    with pytest.raises(ModuleNotFoundError):  # a part of ours that is missing is a defect
        cli.main(["chat"])


# --- as it is typed -----------------------------------------------------------------------------


def qlora(*words, **kwargs) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "qlora_kernels.cli", *words],
        capture_output=True, text=True, env=environment, **kwargs,
    )  # fmt: skip


def test_the_command_is_installed_under_its_name():
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"qlora": "qlora_kernels.cli:main"}


def test_help_needs_none_of_the_large_packages():
    """They answer at once."""
    code = (
        "import sys; from qlora_kernels import cli; cli.main(['--help'])\n"
        "assert 'transformers' not in sys.modules and 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


def test_bad_words_end_in_one_line_without_a_traceback(tmp_path):
    done = qlora(
        "finetune", "--model_name_or_path", str(tmp_path), "--dataset_name", "x.jsonl",
        "--learnig_rate", "1", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert "learnig_rate" in line and "the nearest name is learning_rate " in line
    assert list(tmp_path.iterdir()) == []


def test_a_finetune_from_a_file_and_words(tmp_path):
    """Absent data under a name of the file; the word on the command line wins."""
    (tmp_path / "run.yaml").write_text("model_name_or_path: m\ndataset_name: d.jsonl\n")
    done = qlora("finetune", "run.yaml", "--model_name_or_path", "other", cwd=tmp_path)
    assert done.returncode == 2 and "other" in done.stderr and "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.yaml"]
