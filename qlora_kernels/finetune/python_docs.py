"""``python-docs``: questions and answers about the installed Python, made on the spot.

What a module, class, function or method of the standard library is for, asked in several ways
and answered by the first words of its documentation. Python sources are parsed and never
imported, so nothing opens a browser or a window; a few built-in modules without a source are
looked at as they are. No network, no files of its own; the same Python gives the same samples in
the same order.

All questions about one object form a group, and so do objects that share their answer: what is
held out of training is never asked about in it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_kernels.finetune.data.formats import Example
from qlora_kernels.finetune.data.types import DataError

# Left out: jokes and programs with windows, Python's own tools and tests, machinery that nobody
# asks about, and what Python 3.13 removed.
_SKIPPED = set(
    """
    antigravity this idlelib turtle turtledemo tkinter curses lib2to3 pydoc_data test
    ensurepip venv encodings distutils msilib nt ntpath nturl2path winreg winsound msvcrt
    sre_compile sre_constants sre_parse pyexpat readline rlcompleter site opcode
    aifc asynchat asyncore audioop cgi cgitb chunk crypt imghdr imp mailcap nis nntplib
    ossaudiodev pipes smtpd sndhdr spwd sunau telnetlib uu xdrlib symtable pickletools
    """.split()
)
# Built-in modules without a Python source: importing them does nothing else. The name under
# which their contents are known stands beside.
_BUILT_IN = {
    "builtins": "",
    "math": "math",
    "cmath": "cmath",
    "itertools": "itertools",
    "time": "time",
    "sys": "sys",
    "posix": "os",
    "gc": "gc",
    "zlib": "zlib",
    "binascii": "binascii",
    "array": "array",
    "unicodedata": "unicodedata",
    "_collections": "collections",
    "_functools": "functools",
    "_struct": "struct",
}
# The Python twins of modules that are written in C hold the documentation.
_TWINS = {"_pydatetime": "datetime", "_pydecimal": "decimal", "_pyio": "io", "posixpath": "os.path"}

_WAYS = {
    "module": (
        "What is Python's module `{name}` for?",
        "What does the module `{name}` offer in Python?",
        "When would I import `{name}` in Python?",
        "Explain the Python module `{name}` in a sentence or two.",
    ),
    "class": (
        "What is Python's class `{name}` for?",
        "What does the class `{name}` represent in Python?",
        "Explain the class `{short}` from {home}.",
        "When would I use `{name}` in Python?",
    ),
    "exception": (
        "What does the exception `{name}` mean in Python?",
        "When is `{name}` raised in Python?",
        "Explain the exception `{short}` from {home}.",
    ),
    "function": (
        "What does `{name}` do in Python?",
        "What is the function `{short}` from {home} for?",
        "Explain Python's `{name}`.",
        "When would I call `{name}` in Python?",
    ),
    "method": (
        "What does the method `{name}` do in Python?",
        "What is `{name}` for in Python?",
        "Explain Python's method `{name}`.",
        "When would I call `{name}` in Python?",
    ),
}
_ASKED = 2  # ways in which each object is asked about
_LONGEST = 400  # characters of an answer's documentation
_SHORTEST = 20
_COMMON = 4  # as many objects with the same words: those say nothing about any of them


@dataclass(frozen=True)
class _Entry:
    kind: str  # a key of _WAYS
    name: str  # as a program would write it: json.dumps
    home: str  # the module; empty for built-ins
    signature: str
    says: str  # the first words of the documentation, cleaned


@functools.cache
def _entries() -> tuple[_Entry, ...]:
    found: dict[str, _Entry] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sources with old escapes
        for entry in (*_from_sources(), *_from_built_ins()):
            found.setdefault(entry.name, entry)
    common = Counter(entry.says for entry in found.values())
    return tuple(e for e in found.values() if common[e.says] < _COMMON)


def examples() -> list[Example]:
    """Conversations of one question and one answer, some thousands, in a fixed order.

    Raises:
        DataError: this Python came without the sources of its standard library.
    """
    made = []
    for entry in _entries():
        ways = sorted(_WAYS[entry.kind], key=lambda way: _hash(way + entry.name))
        for way in ways[:_ASKED]:
            question = way.format(
                name=entry.name,
                short=entry.name.rpartition(".")[2],
                home=f"the module `{entry.home}`" if entry.home else "Python's built-ins",
            )
            made.append(
                Example(
                    where=f"python-docs {entry.name}",
                    messages=[
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": _answer(entry)},
                    ],
                    group=_hash(entry.says),
                )
            )
    if len(made) < 500:
        raise DataError(
            f"python-docs: only {len(made)} questions could be made from "
            f"{sysconfig.get_path('stdlib')}; this Python came without the sources of its "
            "standard library"
        )
    return sorted(made, key=lambda example: _hash(example.messages[0]["content"]))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _answer(entry: _Entry) -> str:
    home = f"in the module `{entry.home}`" if entry.home else "built into Python"
    if entry.kind == "module":
        what = f"`{entry.name}` is a module of Python's standard library."
    else:
        article = "an" if entry.kind[0] in "aeiou" else "a"
        what = f"`{entry.name}{entry.signature}` is {article} {entry.kind} {home}."
    return f"{what} {entry.says}"


# --------------------------------------------------------------------------- words


def _first_words(doc: str | None) -> str:
    """The first paragraph of a docstring, or two if they are short, as plain sentences."""
    if not doc:
        return ""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(doc))
    words = ""
    for paragraph in paragraphs[:3]:
        paragraph = _clean(paragraph)
        if not paragraph:
            if words:
                break
            continue
        if words and len(words) + len(paragraph) > _LONGEST * 0.7:
            break
        words = f"{words} {paragraph}".strip()
        if len(words) > _LONGEST * 0.4:
            break
    if len(words) > _LONGEST:  # whole sentences of it
        end = words.rfind(". ", 0, _LONGEST)
        words = words[: end + 1] if end > 0 else ""
    return words if len(words) >= _SHORTEST else ""


_SIGNATURE = re.compile(r"^[\w.]+\(.*?\)(\s*(->|=>|--)\s*\S.*)?$")


def _clean(paragraph: str) -> str:
    lines = paragraph.split("\n")
    while lines and _SIGNATURE.match(lines[0].strip()):  # C docstrings begin with a signature
        lines = lines[1:]
    text = " ".join(" ".join(lines).split())
    if not text or re.match(r"(>>>|\.\. |[-=*+#|]{2,}|[-*] |\d+[.)] |:\w+|@\w+)", text):
        return ""
    if any(re.fullmatch(r"\s*([-=~*^])\1{2,}\s*", line) for line in lines):  # a headline
        return ""
    text = re.sub(r":[a-zA-Z:]+:`~?([^`]*)`", r"`\1`", text)  # :func:`x` and its like
    text = re.sub(r"``([^`]*)``", r"`\1`", text)
    text = re.sub(r"``([^`']*)''", r'"\1"', text)  # quotation marks of TeX
    text = re.sub(r"(?<![\w*])\*(\w+)\*(?![\w*])", r"`\1`", text)  # *argument*
    text = re.sub(r"^\w[\w.]*\s+--?\s+(?=\S)", "", text)  # "name -- what it is"
    text = text.replace(" -- ", ", ").strip()
    if text.endswith(":") or ">>>" in text or re.match(r"(Internal|Private|XXX|TODO|See\b)", text):
        return ""
    text = text[0].upper() + text[1:] if text[0].isalpha() else text
    return text if text[-1] in ".!?" else text + "."


# --------------------------------------------------------------------------- sources


def _from_sources() -> Iterator[_Entry]:
    library = Path(sysconfig.get_path("stdlib"))
    for name in sorted({*sys.stdlib_module_names, *_TWINS}):
        if name in _SKIPPED or (name.startswith("_") and name not in _TWINS):
            continue
        single, package = library / f"{name}.py", library / name
        if single.is_file():
            yield from _from_file(single, _TWINS.get(name, name))
        elif (package / "__init__.py").is_file():
            yield from _from_package(package, name)


def _from_package(folder: Path, name: str) -> Iterator[_Entry]:
    tree = _parse(folder / "__init__.py")
    if tree is None:
        return
    yield from _from_tree(tree, name)
    lifted: dict[str, set[str]] = {}  # submodule -> what the package offers of it
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            lifted.setdefault(node.module, set()).update(alias.name for alias in node.names)
    # A package that lifts whole submodules into itself (asyncio) hides the others.
    hides = any("*" in names for names in lifted.values())
    for path in sorted(folder.glob("*.py")):
        if path.stem.startswith(("_", "test", "popen_")) or (hides and path.stem not in lifted):
            continue
        yield from _from_file(path, f"{name}.{path.stem}", name, lifted.get(path.stem, set()))
    for path in sorted(folder.glob("*/__init__.py")):
        if path.parent.name not in ("test", "tests", "__pycache__") and path.parent.name[0] != "_":
            yield from _from_package(path.parent, f"{name}.{path.parent.name}")


def _parse(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None  # a file that this Python itself could not import


def _from_file(
    path: Path, module: str, package: str = "", lifted: set[str] | frozenset[str] = frozenset()
) -> Iterator[_Entry]:
    tree = _parse(path)
    if tree is not None:
        yield from _from_tree(tree, module, package, lifted)


def _from_tree(
    tree: ast.Module,
    module: str,
    package: str = "",
    lifted: set[str] | frozenset[str] = frozenset(),
) -> Iterator[_Entry]:
    says = _first_words(ast.get_docstring(tree, clean=False))
    if says:
        yield _Entry("module", module, "", "", says)
    offered = _all_of(tree)
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if node.name.startswith("_") or (offered and node.name not in offered):
            continue
        home = package if node.name in lifted or ("*" in lifted and offered) else module
        yield from _from_node(node, f"{home}.{node.name}", home)


def _all_of(tree: ast.Module) -> set[str]:
    """The names of ``__all__``, where it is written out; else nothing."""
    names: set[str] = set()
    for node in tree.body:
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AugAssign)
            else []
        )
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    names.add(part.value)
    return names


def _from_node(node: ast.AST, name: str, home: str) -> Iterator[_Entry]:
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    says = _first_words(ast.get_docstring(node, clean=False))
    if not isinstance(node, ast.ClassDef):
        if says:
            yield _Entry("function", name, home, _signature(node.args), says)
        return
    bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
    is_error = any(base.endswith(("Error", "Exception", "Warning")) for base in bases)
    init = next(
        (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None
    )
    if says:
        signature = "" if init is None or is_error else _signature(init.args, bound=True)
        yield _Entry("exception" if is_error else "class", name, home, signature, says)
    for part in node.body:
        if not isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        said = _first_words(ast.get_docstring(part, clean=False))
        marks = {ast.unparse(d).rpartition(".")[2] for d in part.decorator_list}
        if part.name.startswith("_") or not said or marks & {"property", "setter", "deleter"}:
            continue
        signature = _signature(part.args, bound="staticmethod" not in marks)
        yield _Entry("method", f"{name}.{part.name}", home, signature, said)


def _signature(args: ast.arguments, bound: bool = False) -> str:
    """``(a, b=1, *, c)``, short ones only: long ones say more about defaults than about use."""
    if bound and (args.posonlyargs or args.args):
        first = args.posonlyargs or args.args
        dropped = first[0]
        text = ast.unparse(args)
        text = re.sub(rf"^{re.escape(ast.unparse(dropped))}(, /)?(, )?", "", text)
    else:
        text = ast.unparse(args)
    return f"({text})" if len(text) <= 60 else "(...)"


# --------------------------------------------------------------------------- built-ins


def _from_built_ins() -> Iterator[_Entry]:
    for module_name, home in _BUILT_IN.items():
        if module_name not in sys.stdlib_module_names:
            continue  # posix elsewhere than on a Unix
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        if home == module_name and _first_words(module.__doc__):
            yield _Entry("module", home, "", "", _first_words(module.__doc__))
        prefix = f"{home}." if home else ""
        for name in sorted(vars(module)):
            value = vars(module)[name]
            # Not what a process may replace (sys.excepthook, with sys.__excepthook__ beside it):
            # the samples are the same in all.
            replaced = f"__{name}__" in vars(module)
            if name.startswith("_") or replaced or not _belongs(value, module_name, home):
                continue
            says = _first_words(getattr(value, "__doc__", None))
            if isinstance(value, type):
                is_error = issubclass(value, BaseException)
                kind = "exception" if is_error else "class"
                if says:
                    signature = "" if is_error else _signature_of(value)
                    yield _Entry(kind, prefix + name, home, signature, says)
                if not is_error:
                    yield from _from_type(value, prefix + name, home)
            elif callable(value) and says:
                yield _Entry("function", prefix + name, home, _signature_of(value), says)


def _belongs(value: object, module_name: str, home: str) -> bool:
    if not (isinstance(value, type) or inspect.isbuiltin(value)):
        return False
    return getattr(value, "__module__", None) in (module_name, home or "builtins", "builtins")


def _from_type(cls: type, name: str, home: str) -> Iterator[_Entry]:
    for attribute in sorted(vars(cls)):
        value = vars(cls)[attribute]
        says = _first_words(getattr(value, "__doc__", None))
        if not attribute.startswith("_") and inspect.isroutine(value) and says:
            signature = _signature_of(getattr(cls, attribute))
            yield _Entry("method", f"{name}.{attribute}", home, signature, says)


def _signature_of(value: object) -> str:
    try:
        text = str(inspect.signature(value))  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return ""
    text = re.sub(r"^\((self|type|cls|\$self|\$type)(, /)?(, )?", "(", text)
    if re.search(r" at 0x|<", text) or len(text) > 62:
        return "(...)"
    return text.replace(", /", "") if text != "(/)" else "()"
