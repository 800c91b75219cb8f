"""From tokens to text as they come: never half a character, constant work per token."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence, Set
from typing import Protocol

_Utf8 = getincrementaldecoder("utf-8")

_MAX_PENDING = 4
"""A UTF-8 character is at most four bytes, hence at most four tokens: what is still broken then stays broken."""


class Detokenizer(Protocol):
    """The text of one answer, piece by piece. The pieces joined are the decoded whole."""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What is left at the end: a replacement character for an incomplete one."""
        ...


class ByteDetokenizer:
    """For byte-level vocabularies (Llama 3, Qwen, GPT-2): every token is a string of bytes, so UTF-8 decoding is all."""

    def __init__(self, token_bytes: Callable[[int], bytes], skipped: Set[int]):
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._utf8 = _Utf8(errors="replace")

    def push(self, token: int) -> str:
        return "" if token in self._skipped else self._utf8.decode(self._token_bytes(token))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For any other vocabulary: decode a short window twice, with and without the new tokens, and give the difference.

        tokens   … a b c | d e          [a b c] were given out, [d e] are pending
        given    decode(a b c)
        text     decode(a b c d e)      the answer is what `text` has beyond `given`

    The window starts at the previous piece, since a token's text may depend on its predecessor (a leading space); for the
    first piece that is the end of the prompt.
    """

    def __init__(self, decode: Callable[[list[int]], str], skipped: Set[int], prompt: Sequence[int]):
        self._decode = decode
        self._skipped = skipped
        self._window = [token for token in prompt[-_MAX_PENDING:] if token not in skipped]
        self._num_given = len(self._window)

    def push(self, token: int) -> str:
        if token in self._skipped:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith("\ufffd") and not self._is_overdue():
            return ""
        return self._give(text)

    def flush(self) -> str:
        return self._give(self._decode(self._window))

    def _give(self, text: str) -> str:
        piece = text[len(self._decode(self._window[: self._num_given])) :]
        if piece or self._is_overdue():
            self._window = self._window[self._num_given :]
            self._num_given = len(self._window)
        return piece

    def _is_overdue(self) -> bool:
        return len(self._window) - self._num_given >= _MAX_PENDING
