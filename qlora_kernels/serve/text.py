"""Tokens to text as it comes: whole characters only, and nothing past a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["Detokenizer", "StopAt"]

_BROKEN = "\ufffd"  # what a decoder puts for bytes that are no character (yet)
_LONG = 32  # tokens kept before the window is moved
_KEPT = 8


class Detokenizer:
    """Turns tokens into text, a piece a call; the pieces together are the text of all tokens.

    A character may be spread over several tokens, and a token's text depends on the one before it
    (a blank in front of a word), so a window of the last tokens is decoded again with each.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.window: list[int] = []
        self.sent = 0  # characters of the window's text that were returned

    def _text(self) -> str:
        return self.tokenizer.decode(
            self.window, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def push(self, tokens: Sequence[int], final: bool = False) -> str:
        """The text that ``tokens`` add; ``final`` gives out what was held back as well."""
        self.window.extend(tokens)
        text = self._text()
        # An unfinished character is at most three bytes, each of which shows as one sign.
        broken = 0 if final else min(3, len(text) - len(text.rstrip(_BROKEN)))
        piece = text[self.sent : len(text) - broken]
        self.sent += len(piece)
        if len(self.window) > _LONG and not broken:
            self.window = self.window[-_KEPT:]
            self.sent = len(self._text())
        return piece


class StopAt:
    """Passes text on up to the first of some sequences; what may be the start of one is held back.

    Args:
        stops: the sequences, none empty. None of them is part of what is passed on.

    Attributes:
        hit: whether one was found; nothing is passed on from then on.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""
        self.hit = False

    def push(self, text: str, final: bool = False) -> str:
        """What of the text so far can be passed on now."""
        if self.hit:
            return ""
        text, self.held = self.held + text, ""
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.hit = True
            return text[: min(found)]
        if final:
            return text
        most = max((len(stop) for stop in self.stops), default=1) - 1
        for length in range(min(most, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stops):
                self.held = text[-length:]
                return text[:-length]
        return text
