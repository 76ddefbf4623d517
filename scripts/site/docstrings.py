"""Docstrings as the site shows them.

The sources' docstrings are read in a terminal first: roles (``:func:`x```), literal blocks after
``::`` and tables drawn with ``====``. Here they become Markdown: code, fenced blocks.
"""

from __future__ import annotations

import re

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")
RULE = re.compile(r"^\s*=+(?: +=+)+\s*$")


def markdown(text: str) -> str:
    """The docstring ``text`` (dedented) as Markdown."""
    lines = ROLE.sub(lambda m: f"`{m[1]}`", text).splitlines()
    out: list[str] = []
    i = 0
    while i < len(lines):
        line = lines[i]
        if RULE.match(line):  # a table, from its first rule to the rule before a blank line
            end = i + 1
            while end < len(lines) and lines[end].strip():
                end += 1
            out += ["```text", *lines[i:end], "```"]
            i = end
        elif line.rstrip().endswith("::"):
            stop = line.rstrip()[:-1]
            indent = len(line) - len(line.lstrip())
            end = i + 1
            while end < len(lines) and (
                not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent
            ):
                end += 1
            body = lines[i + 1 : end]
            while body and not body[-1].strip():
                body.pop()
            while body and not body[0].strip():
                body.pop(0)
            out += [stop, "", " " * indent + "```text", *body, " " * indent + "```", ""]
            i = end
        else:
            out.append(line)
            i += 1
    return re.sub(r"(?<!`)``(?!`)", "`", "\n".join(out))


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
