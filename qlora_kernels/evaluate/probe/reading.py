"""How a reply is read: its plain words, what it asserts and what it denies.

Rules, not a judge: the same reply always gets the same grade, and every grade can be followed by
hand. They are made for short replies to closed questions, and read more than one form of each
answer: markup, capitals, accents, numbers in words, sentences around the answer, negations.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

__all__ = [
    "asserted",
    "final_number",
    "is_denied",
    "is_empty",
    "mentions",
    "plain",
    "sentences",
    "yes_or_no",
]

_QUOTES = str.maketrans(
    {"‘": "'", "’": "'", "ʼ": "'", "“": '"', "”": '"', "–": "-", "—": "-", "−": "-", "…": "..."}
)
_INVISIBLE = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]")


@lru_cache(maxsize=4096)
def plain(reply: str) -> str:
    """``reply`` without markup, thoughts, accents and capitals; line ends stay."""
    text = re.sub(r"<think>.*?(</think>|\Z)", " ", reply, flags=re.S | re.I)
    text = html.unescape(text)
    text = re.sub(r"</?[a-zA-Z][^<>]*>", " ", text)
    text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).translate(_QUOTES)
    text = re.sub(r"\\(?:boxed|text|mathrm|mathbf)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\[(\[\])]|\$(?=\\)|[*`#~]|(?<!\w)_|_(?!\w)", " ", text)
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return re.sub(r"[ \t]+", " ", text).casefold().strip()


def is_empty(reply: str) -> bool:
    """Whether it says nothing: no letter and no digit."""
    return not re.search(r"[^\W_]", plain(reply))


def sentences(reply: str) -> list[str]:
    """The plain sentences; a line's end ends one too."""
    text = re.sub(r"\b(mr|mrs|ms|dr|st|vs|e\.g|i\.e|u\.s)\.", r"\1", plain(reply))
    parts = re.split(r"(?<=[.!?;])[\"')]*\s+|\n+", text)
    return [part.strip() for part in parts if part.strip()]


def mentions(text: str, phrase: str) -> list[re.Match[str]]:
    """Where ``phrase`` stands in plain text, as whole words."""
    first, pattern = _pattern(phrase)
    return list(pattern.finditer(text)) if first in text else []


@lru_cache(maxsize=4096)
def _pattern(phrase: str) -> tuple[str, re.Pattern[str]]:
    words = re.split(r"[\s\-]+", plain(phrase))
    inside = r"[\s\-]+".join(re.escape(word) for word in words)
    return words[0], re.compile(rf"(?<!\w)(?<!\w-){inside}(?!\w)")


# --- denial -------------------------------------------------------------------------------------

_NOT = (
    r"(?:not|never|no longer|nor|neither|cannot|n't|isnt|wasnt|doesnt|didnt|rather than|"
    r"instead of|as opposed to|unlike|contrary to|except|other than|don't think|doubt)"
)
_WRONG = (
    r"(?:(?:an? )?(?:(?:common|popular|simple) )?(?:mistake|error|myth|misconception)|"
    r"incorrect|inaccurate|wrong|false|untrue|mistaken|"
    r"misinformation|confusion|mixed up|mix-?up|misunderstanding|erroneous)"
)
# Words that turn a denial round.
_DOUBLE = re.compile(
    r"\b(?:not|isn't|wasn't|aren't|never|nothing|no|without)\s+"
    rf"(?:at all\s+|really\s+|any(?:thing)?\s+)?{_WRONG}"
)
_DENIES = re.compile(
    rf"\b{_WRONG}\b|\bnot (?:true|correct|accurate|quite|right|really|the case|actually|so)\b"
    r"|n't (?:true|correct|accurate|right|the case|actually|really)\b"
    r"|\bfalse premise\b|\bno such\b|\bthere (?:is|are|was|were) no\b|\bactually\b|\bin fact\b"
)


def _unturned(text: str) -> str:
    return _DOUBLE.sub(" ", text)


def is_denied(sentence: str, phrase: str) -> bool:
    """Whether every mention of ``phrase`` in a plain sentence is negated.

    A negation belongs to a mention if it stands before it in the same clause, or right behind it
    ("x is not ..."). False where there is no mention.
    """
    found = mentions(sentence, phrase)
    return bool(found) and all(_negated(sentence, m.start(), m.end()) for m in found)


def _negated(sentence: str, start: int, end: int) -> bool:
    before = re.split(r"[,:;(]| but | it's | it is | and ", sentence[:start])[-1]
    after = re.split(r"[,;]| but | and ", sentence[end:])[0]
    if re.search(rf"(?:\b|(?<=\w)){_NOT}\b(?!\s+only)", before):
        return True
    behind = rf"^[\s\"']*(?:(?:is|was|are|were|does|do|did|would|will|has|have|can|could)\s+(?:{_NOT}|{_WRONG})\b|(?:is|was|are|were|does|do|did|would|will|has|have|can|could)n't\b|(?:cannot|can't|won't)\b)"  # noqa: E501
    return bool(re.search(behind, after))


def denies(text: str) -> bool:
    """Whether a plain text holds a general denial ("that is a misconception")."""
    return bool(_DENIES.search(_unturned(text)))


# --- choices ------------------------------------------------------------------------------------


def asserted(reply: str, choices: Sequence[Sequence[str]]) -> list[int]:
    """Which of the ``choices`` a reply asserts, in the order in which it does.

    Args:
        choices: each with all its names.

    A mention that is negated, or that a later sentence takes back, does not count.
    """
    found: list[int] = []
    for sentence in sentences(reply):
        here = []
        for number, names in enumerate(choices):
            places = [m for name in names for m in mentions(sentence, name)]
            kept = [m.start() for m in places if not _negated(sentence, m.start(), m.end())]
            if kept:
                here.append((min(kept), number))
            elif places and number in found:
                found.remove(number)
        found += [number for _, number in sorted(here) if number not in found]
    return found


_YES = r"(?:yes|yeah|yep|correct|true|certainly|definitely|indeed|of course|absolutely)"
_NO = r"(?:no|nope|false|incorrect|never|not)"


def yes_or_no(reply: str) -> bool | None:
    """True for yes, False for no, None where it says neither, or both.

    The first word decides where it is one of them; else whichever of the two is said at all.
    """
    text = plain(reply)
    text = re.sub(r"^(?:the )?(?:final )?answer(?: is)?[:\s]+", "", text).lstrip(" \"'(-.:")
    if re.match(rf"{_YES}\b", text):
        return True
    if re.match(rf"{_NO}\b", text):
        return False
    said = re.findall(r"\banswer(?: is|:)?\s+[\"']?(yes|no)\b", text)
    if said:
        return said[-1] == "yes"
    yes, no = re.search(r"\byes\b", text), re.search(r"\bno\b(?! (?:idea|doubt|one|matter))", text)
    if bool(yes) != bool(no):
        return bool(yes)
    if re.search(r"n't\b|\bnot\b|\bno idea\b|\bunaware\b|\bcannot\b", text):
        return False
    return None


# --- numbers ------------------------------------------------------------------------------------

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SMALL = {word: i for i, word in enumerate(_ONES)} | {
    word: 10 * (i + 2) for i, word in enumerate(_TENS)
}
_WORD = rf"(?:{'|'.join(sorted([*_SMALL, 'hundred', 'thousand'], key=len, reverse=True))})"
_NUMBER = re.compile(
    rf"(?<![\w.])-?\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?(?![\d])|(?<![\w.])-?\d+(?:\.\d+)?"
    rf"|\b{_WORD}(?:(?:[\s-]+and)?[\s-]+{_WORD})*\b"
)


def _value(text: str) -> float:
    if text[0].isdigit() or text[0] == "-":
        return float(text.replace(",", ""))
    total = part = 0
    for word in re.split(r"[\s-]+", text):
        if word == "and":
            continue
        if word == "hundred":
            part = max(1, part) * 100
        elif word == "thousand":
            total, part = total + max(1, part) * 1000, 0
        else:
            part += _SMALL[word]
    return float(total + part)


def final_number(reply: str) -> float | None:
    """The number that a reply ends with as its answer; None where it has none.

    What follows ``####``, a box or "answer is" comes first; else the last number that is not
    negated ("not 12").
    """
    boxed = re.findall(r"\\boxed\s*\{([^{}]*)\}", reply)
    if boxed:
        return final_number(boxed[-1])
    marked = re.split(r"####|\banswer(?:\s+is)?\s*[:=]?\s*(?=[\s$£€*-]*\d)", reply, flags=re.I)
    if len(marked) > 1:
        for number in _NUMBER.finditer(plain(marked[-1])):
            return _value(number[0])
    text = plain(reply)
    found = []
    for number in _NUMBER.finditer(text):
        before = text[max(0, number.start() - 14) : number.start()]
        if re.search(
            r"\b(?:not|isn't|n't|never)\s+(?:be\s+|equal(?:s)?\s+(?:to\s+)?)?[$£€]?\s*$", before
        ):
            continue
        found.append(_value(number[0]))
    return found[-1] if found else None
