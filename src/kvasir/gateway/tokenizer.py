"""A checkpoint's tokenizer and chat template, read with `tokenizers` and jinja2 alone.

transformers' AutoTokenizer imports torch (seconds, hundreds of MiB), which a gateway has no use for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders

from kvasir.core.errors import ModelError
from kvasir.gateway.chat_template import ChatTemplate, Message, load_chat_template
from kvasir.gateway.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer

Json = dict[str, object]


class Tokenizer:
    """Text to tokens and back. Safe to use from several threads at once."""

    def __init__(self, core: tokenizers.Tokenizer, *, config: Json | None = None, chat_template: str | None = None):
        """`config` is the content of tokenizer_config.json; `chat_template` wins over the one in it."""
        config = config or {}
        self._core = core
        self._special = frozenset(i for i, token in core.get_added_tokens_decoder().items() if token.special)
        self._is_byte_level = isinstance(core.decoder, decoders.ByteLevel)
        self._bytes: dict[int, bytes] = {}
        self._template = load_chat_template(config, chat_template)
        self._wants_bos = config.get("add_bos_token")
        self._bos = _token_id(core, config.get("bos_token"))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a checkpoint. Raises ModelError."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelError(f"no tokenizer.json in {folder}; convert the tokenizer with save_pretrained of a fast tokenizer")
        try:
            core = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception for every unreadable file
            raise ModelError(f"cannot read {file}: {error}") from error
        core.no_truncation()
        core.no_padding()
        template = folder / "chat_template.jinja"
        return cls(
            core,
            config=_read_json(folder / "tokenizer_config.json"),
            chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
        )

    @property
    def vocab_size(self) -> int:
        """Tokens with a text, added ones included."""
        return self._core.get_vocab_size(with_added_tokens=True)

    @property
    def chat_template(self) -> ChatTemplate | None:
        return self._template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Takes about 0.3 s per MB, without the interpreter lock (`encode` would hold it)."""
        ids: list[int] = self._core.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        if add_special_tokens and self._bos is not None and isinstance(self._wants_bos, bool):
            has_bos = bool(ids) and ids[0] == self._bos
            if self._wants_bos and not has_bos:
                return [self._bos, *ids]
            if not self._wants_bos and has_bos:
                return ids[1:]
        return ids

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, options: Mapping[str, object] | None = None
    ) -> str:
        """The conversation as the model was trained to read it. Raises RequestError."""
        return ChatTemplate.require(self._template).render(
            messages, add_generation_prompt=add_generation_prompt, options=options
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, special tokens included."""
        return self._core.decode(list(tokens), skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for; part of a character for some. Empty for an id without a token."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = _bytes_of(self._core.id_to_token(token), self._is_byte_level)
        return known

    def detokenizer(self, prompt: Sequence[int] = ()) -> Detokenizer:
        """A new incremental decoder for one answer to `prompt`; special tokens give no text."""
        if self._is_byte_level:
            return ByteDetokenizer(self.token_bytes, self._special)
        return WindowDetokenizer(self.decode, self._special, prompt)


def _bytes_to_unicode() -> dict[int, str]:
    """GPT-2's table: printable Latin-1 stands for itself, the 68 other bytes for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


_BYTE_OF = {char: byte for byte, char in _bytes_to_unicode().items()}


def _bytes_of(piece: str | None, is_byte_level: bool) -> bytes:
    if piece is None:
        return b""
    if is_byte_level:
        is_mapped = all(char in _BYTE_OF for char in piece)
        return bytes(_BYTE_OF[char] for char in piece) if is_mapped else piece.encode()
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def _token_id(core: tokenizers.Tokenizer, token: object) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return core.token_to_id(text) if isinstance(text, str) else None


def _read_json(file: Path) -> Json:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"cannot read {file}: expected a JSON object, got {type(content).__name__}")
    return content
