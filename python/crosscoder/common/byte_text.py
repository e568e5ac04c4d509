"""Token pieces of a byte-level BPE tokenizer as the text that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the others for code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    for byte in range(256):
        if byte not in printable:
            table[chr(256 + len(table) - len(printable))] = byte
    return table


def byte_level_text(piece: str) -> str:
    """The text of one byte-level BPE piece: "ĠPresident" -> " President", "Ċ" -> newline.

    Bytes that are no UTF-8 on their own (a part of a character) are written as \\xNN, so that different tokens stay
    different. A piece with characters outside the byte alphabet (an added token) is returned as it is.
    """
    table = _byte_of_character()
    try:
        data = bytes(table[character] for character in piece)
    except KeyError:
        return piece
    return data.decode("utf-8", errors="backslashreplace")


@dataclass(frozen=True)
class Vocabulary:
    """The text of every token, as it stands in a document."""

    texts: Sequence[str]

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """Of a `transformers` tokenizer with a byte-level alphabet."""
        return cls([byte_level_text(piece) for piece in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])
