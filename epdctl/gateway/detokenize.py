"""Tokens to text, piece by piece: never half a character, never a part of a stop string. Pure.

The pieces put together are what decoding all tokens at once gives, cut before the first stop string. One exception
lies in the decoders with byte fallback: a stray byte behind whole characters takes them back there, after they are out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["Decode", "Detokenizer", "StopFinder", "TextStream"]

Decode = Callable[[Sequence[int]], str]  # special tokens skipped

UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are not (yet) a character
CUT_AFTER = 32  # tokens without a whole character at their end; then a harmless cut is looked for
CUT_TAIL = range(8, 24)
LONGEST_PARTIAL = 4  # a character's bytes; nothing further back can still change


class Detokenizer:
    """Decodes a window that begins with text already given out, because some decoders treat a first token apart."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._given: list[int] = []  # tokens whose text is out, at the window's start
        self._given_text = ""
        self._open: list[int] = []  # tokens whose text may still change at its end
        self._out = 0  # characters of the open tokens' text that are out

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens made certain."""
        self._open += tokens
        text = self._open_text()
        certain = len(text.rstrip(UNFINISHED))
        fresh = text[self._out : certain]
        self._out = max(self._out, certain)
        if certain == len(text):
            self._settle(self._open)
        elif len(self._open) > CUT_AFTER:
            fresh += self._cut(text)
        return fresh

    def flush(self) -> str:
        """The rest, as it stands."""
        text = self._open_text()
        fresh, self._out = text[self._out :], len(text)
        return fresh

    def _open_text(self) -> str:
        return self._decode([*self._given, *self._open])[len(self._given_text) :]

    def _settle(self, tokens: list[int]) -> None:
        text = self._decode(tokens)
        if not text and len(tokens) <= CUT_AFTER:
            return  # a window that begins with nothing would make what follows the first token
        if text:
            self._given, self._given_text = tokens, text
        self._open, self._out = [], 0

    def _cut(self, text: str) -> str:
        """Keep the window short when characters never end, and give out its beginning: bytes that far back cannot
        change any more."""
        for size in CUT_TAIL:
            head, tail = self._open[:-size], self._open[-size:]
            head_text, tail_text = self._decode(head), self._decode(tail)
            if head_text and len(tail_text) > LONGEST_PARTIAL and head_text + tail_text == text:
                fresh = text[self._out : len(head_text)]
                self._given, self._given_text = head, head_text
                self._open, self._out = tail, max(0, self._out - len(head_text))
                return fresh
        return ""


class StopFinder:
    """Holds text back while it could be the beginning of a stop string. The stop string that ends first wins."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._exempt = 0  # characters at the start of what is held in which no stop string ends
        self.found = False

    def push(self, text: str, *, exempt: bool = False) -> str:
        """The text that is certain to come before any stop string. ``exempt``: none ends in ``text``, though one that
        ends later may begin there."""
        if self.found:
            return ""
        self._held += text
        if exempt:
            self._exempt = len(self._held)
        ends = [(start + len(stop), start) for stop in self._stops if (start := self._find(stop)) >= 0]
        if ends:
            self.found = True
            return self._release(min(ends)[1])
        return self._release(len(self._held) - self._doubtful())

    def flush(self) -> str:
        return "" if self.found else self._release(len(self._held))

    def _find(self, stop: str) -> int:
        return self._held.find(stop, max(0, self._exempt - len(stop) + 1))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self._exempt = max(0, self._exempt - count)
        return text

    def _doubtful(self) -> int:
        """Characters at the end that begin some stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0


class TextStream:
    """Both together: tokens in, text out, until ``stopped``. Within the first ``min_tokens`` no stop string ends.

    ``offsets``: of each token that went into the text, where in it the token begins, in characters; a token that goes
    on with a character begins where the character does. ``released``: characters that are out.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._detokenizer = Detokenizer(decode)
        self._min_tokens = min_tokens
        self._finder = StopFinder(stops)
        self._certain = 0  # characters that the detokenizer gave out
        self.offsets: list[int] = []
        self.released = 0

    @property
    def used(self) -> int:
        """Tokens that went into the text."""
        return len(self.offsets)

    @property
    def stopped(self) -> bool:
        return self._finder.found

    def push(self, tokens: Sequence[int]) -> str:
        """One token at a time, so that ``used`` is exact; nothing is taken after a stop string."""
        pieces = []
        for token in tokens:
            if self.stopped:
                break
            self.offsets.append(self._certain)
            fresh = self._detokenizer.push([token])
            self._certain += len(fresh)
            pieces.append(self._finder.push(fresh, exempt=self._exempt))
        return self._out("".join(pieces))

    def flush(self) -> str:
        """The end of the answer."""
        rest = self._finder.push(self._detokenizer.flush(), exempt=self._exempt)
        return self._out(rest + self._finder.flush())

    @property
    def _exempt(self) -> bool:
        return self.used <= self._min_tokens

    def _out(self, text: str) -> str:
        self.released += len(text)
        return text
