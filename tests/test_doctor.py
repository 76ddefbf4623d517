"""`qlora doctor`: what it sees, what it says is missing, and what it never tells."""

from __future__ import annotations

import argparse
import getpass
import importlib.metadata
import json
import platform
from pathlib import Path

import pytest
import torch

from qlora_kernels import cpu, doctor, ops


@pytest.fixture(scope="module")
def health():
    return doctor.examine()


def shown(capsys, *words: str) -> str:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    assert doctor.run(parser.parse_args(words)) == 0
    return capsys.readouterr().out


def test_it_sees_this_machine(health):
    assert list(health.sections) == ["machine", "gpu", "kernels", "packages", "toolchain"]
    assert health.sections["packages"]["torch"] == torch.__version__
    assert health.sections["machine"]["python"] == platform.python_version()
    assert cpu.isa() in health.sections["kernels"]["cpu kernels"]
    assert not any("could not be examined" in section for section in health.sections.values())


def test_json_has_a_schema_and_every_section(capsys, monkeypatch, health):
    monkeypatch.setattr(doctor, "examine", lambda: health)
    found = json.loads(shown(capsys, "--json"))
    assert found["schema"] == doctor.SCHEMA and found["kind"] == "doctor"
    assert found["machine"].keys() == health.sections["machine"].keys()
    assert len(found["findings"]) == len(health.findings)


def test_what_is_missing_comes_with_a_command(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    monkeypatch.setattr(ops, "LIBRARY_ERROR", "it was not built\nmore")
    monkeypatch.setattr(doctor, "_nvidia_is_here", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_said", lambda words: "")
    found = doctor.examine()
    told = {finding.what: finding.command for finding in found.findings}
    assert any("peft" in what and "[finetune]" in told[what] for what in told)
    assert any("plain torch" in what for what in told)
    assert any("NVIDIA" in what for what in told)
    assert any("C++" in what for what in told)
    assert all(told.values())
    assert found.sections["toolchain"]["nvcc"] == "not found"
    assert "more" not in found.sections["kernels"]["cpu kernels"]


def test_a_look_that_fails_does_not_end_the_rest(monkeypatch):
    def broken(health):
        raise OSError("cannot read /home/somebody/secret/file.txt")

    monkeypatch.setitem(doctor._LOOKS, "kernels", broken)
    found = doctor.examine()
    assert "OSError" in found.sections["kernels"]["could not be examined"]
    assert "somebody" not in doctor.report(found)
    assert "torch" in found.sections["packages"]


@pytest.mark.parametrize(
    "text, left",
    [
        ("at /home/alice/work/lib.so: no", "at .../lib.so: no"),
        (r"C:\Users\alice\x\lib.dll", r".../lib.dll"),
        ("~/secret/place/here", ".../here"),
        ("linux, x86_64, 1/2", "linux, x86_64, 1/2"),
        ("'/opt/a b/c'", None),
    ],
)
def test_folders_are_left_out(text, left):
    found = doctor.without_names(text)
    if left is None:
        assert "/opt" not in found
    else:
        assert found == left


def test_the_report_has_no_names(monkeypatch, health):
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    monkeypatch.setattr(platform, "node", lambda: "alices-laptop")
    home = str(Path.home() / "project" / "x.so")
    told = doctor.Health(
        {"machine": {"a": f"alice on alices-laptop, {home}"}},
        [doctor.Finding(f"{home} is broken", "ask alice")],
    )
    text = doctor.report(told)
    assert "alice" not in text and "project" not in text and "x.so" in text
    whole = doctor.report(health)
    assert str(Path.home()) not in whole and str(Path.cwd()) not in whole
