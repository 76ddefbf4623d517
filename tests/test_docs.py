"""The pages of docs/ and the README: their code runs, their commands parse, their links lead on.

A page's ``python`` blocks run in one namespace, top to bottom, in an empty folder. Where they need
more (a GPU's stand-in, both sides of a diff), a test of their own runs them: `ELSEWHERE`.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_kernels import cli
from qlora_kernels.finetune.config import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
ELSEWHERE = {
    "migrate.md": "tests/test_migrate.py",
    "new-format.md": "tests/test_new_format.py",
    "optimizer.md": "tests/test_optim.py",
    "emulator.md": "tests/emulator/test_docs.py",
    "emulator_model.md": "tests/emulator/test_docs.py",
    "emulator_runtime.md": "tests/emulator/test_docs.py",
    "triton.md": "tests/triton/test_backend.py",
    "experts.md": "tests/integrations/test_experts.py",
}
LANGUAGES = {"python", "sh", "text", "json", "jsonl", "yaml", "diff", "cpp", "html", "js"}
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.M | re.S)
LINK = re.compile(r"(?<!`)!?\[[^\]\n]*\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    return page.relative_to(DOCS if page.is_relative_to(DOCS) else ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return [text for _, kind, text in FENCE.findall(page.read_text("utf-8")) if kind == language]


def commands(page: Path) -> list[list[str]]:
    """The page's shell lines, continued ones joined, as words; comments and redirections off."""
    found = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append(words)
    return found


every_page = pytest.mark.parametrize("page", PAGES, ids=name)


@every_page
def test_a_block_says_its_language(page):
    told = {kind for _, kind, _ in FENCE.findall(page.read_text("utf-8"))}
    assert told <= LANGUAGES, f"of {sorted(LANGUAGES)}: pictures and output are `text`"


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python") and p.name not in ELSEWHERE], ids=name
)
def test_the_code_runs(page, tiny_model, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {"path/to/model": tiny_model, "train.jsonl": tiny_data}
    names: dict = {"__name__": page.stem}
    for block in blocks(page, "python"):
        for told, real in paths.items():
            block = block.replace(f'"{told}"', repr(str(real)))
        exec(compile(block, str(page), "exec"), names)


def test_pages_that_are_run_elsewhere_are():
    for page, test in ELSEWHERE.items():
        assert blocks(DOCS / page, "python") and page in (ROOT / test).read_text("utf-8")


# --- commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "sh")], ids=name)
def test_a_command_is_one_that_there_is(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for words in commands(page):
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # VARIABLE=value in front
            words = words[1:]
        match words:
            case ["qlora", command, *rest]:
                check_qlora(command, rest)
            case ["make", target, *_]:
                assert target in targets, words
            case ["python", "-m", module, *rest] if module.startswith("qlora_kernels."):
                importlib.import_module(module)
            case ["python", script, *rest] if script.startswith("benchmarks/"):
                check_script(ROOT / script, rest)
            case ["python" | "pip" | "lm_eval" | "git" | "cd" | "curl" | "export" | "pytest", *_]:
                pass
            case _:
                pytest.fail(f"what is {shlex.join(words)}?")


def check_qlora(command: str, rest: list[str]) -> None:
    assert command in cli.COMMANDS, command
    if any(word in ("--help", "--help-all") or word.startswith("[") for word in rest):
        return
    module = importlib.import_module(cli.COMMANDS[command].module)
    if command == "finetune":
        parse_arguments(rest if rest[0].startswith("-") else rest[1:])
    elif hasattr(module, "add_arguments"):
        cli._command_parser(command, module).parse_args(rest)


def check_script(script: Path, rest: list[str]) -> None:
    """Options are looked for in the script and in what it shares: starting each would take long."""
    shared = [*script.parent.glob("*.py"), *(ROOT / "qlora_kernels" / "bench").glob("*.py")]
    text = script.read_text() + "".join(p.read_text() for p in shared if p != script)
    for word in rest:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in text, f"{script.name} has no {word}"


# --- links --------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    from markdown.extensions.toc import slugify

    text = FENCE.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ +(.*?)(?: *#+)?$", text, re.M)
    return {slugify(re.sub(r"[`*]|\]\([^)]*\)|\[", "", t), "-") for t in titles}


@every_page
def test_links_lead_on(page):
    for link in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file) if file else page
        assert target.exists(), f"{name(page)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{name(page)}: {link}"


def test_every_page_is_in_the_site():
    import yaml

    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/-]+\.md", yaml.dump(yaml.safe_load(text)["nav"])))
    assert listed == {name(p) for p in PAGES if p.is_relative_to(DOCS)}


@pytest.mark.full
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    page = (tmp_path / "api" / "functional.html").read_text("utf-8")
    assert "quantize_4bit" in page and ":func:" not in page
