"""Texts as tokens of a model: bytes, or what its tokenizer makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_BYTE_TOKENS = 512  # the bytes, and special tokens


class Bytes:
    """Tokens of a byte-level model, which has no tokenizer: bytes, with a byte 0 before a text."""

    start = np.zeros(1, np.int64)

    def encode(self, text: bytes) -> NDArray[np.int64]:
        return np.frombuffer(text, np.uint8).astype(np.int64)

    def decode(self, tokens: NDArray[np.int64]) -> bytes:
        return bytes(int(token) for token in tokens if token < 256)


class Tokenizer:
    """The tokenizer of a checkpoint, without special tokens.

    Attributes
    ----------
    start : int64 [0] or [1]
        What the tokenizer puts before a text: the token of a beginning, or nothing.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        first = tokenizer("a")["input_ids"][:1]
        self.start = np.asarray([token for token in first if token == tokenizer.bos_token_id], np.int64)

    def encode(self, text: bytes) -> NDArray[np.int64]:
        options = {"add_special_tokens": False, "verbose": False}  # a text may be longer than the model takes
        ids = self._tokenizer(text.decode("utf-8", "replace"), **options)["input_ids"]
        return np.asarray(ids, np.int64).reshape(-1)

    def decode(self, tokens: NDArray[np.int64]) -> bytes:
        text: str = self._tokenizer.decode([int(token) for token in tokens])
        return text.encode()
