"""What a token is in bytes: tokens may end within a character, and only their bytes put together are the text. Pure."""

from __future__ import annotations

import re
from functools import lru_cache

from tokenizers import Tokenizer

__all__ = ["Spelling"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # how SentencePiece writes one


class Spelling:
    """Threads may share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
        self._alphabet = _byte_letters() if "ByteLevel" in repr(tokenizer.decoder) else None

    def spell(self, token: int) -> bytes:
        """Empty for an id that the tokenizer does not know: a model's vocabulary may be padded."""
        if token in self._added:
            return self._added[token].encode()
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if self._alphabet is not None:
            return bytes(self._alphabet[letter] for letter in text if letter in self._alphabet)
        byte = _BYTE.fullmatch(text)
        return bytes([int(byte[1], 16)]) if byte else text.replace(_SPACE, " ").encode()


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """The letter that byte-level BPE writes for each byte: itself if it is printable Latin-1, else one from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
