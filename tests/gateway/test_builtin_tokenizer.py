"""The built-in model's tokenizer, read without transformers, is what transformers reads."""

import json
import subprocess
import sys
from typing import Any

import pytest

from kvasir.engine import builtin_model
from kvasir.gateway.tokenizer import Tokenizer

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi there"}],
    [
        {"role": "system", "content": "You are ü"},
        {"role": "user", "content": " a\n\n"},
        {"role": "assistant", "content": "b ❄️"},
        {"role": "user", "content": "<|im_end|>"},
    ],
]
TEXTS = ["hello world", " lead", "snö ❄️ 🐦‍⬛ \n\n x", "", "<|im_start|>", "  def f(x):\n\treturn x"]

# in a process of its own, where torch cannot be imported: four times faster, and this one stays without it
THEIRS = """
import json, sys
sys.modules["torch"] = None
from transformers import AutoTokenizer
path, chats, texts = json.loads(sys.stdin.read())
core = AutoTokenizer.from_pretrained(path)
rendered = [core.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
json.dump([rendered, [core.encode(text) for text in texts]], sys.stdout)
"""


@pytest.fixture(scope="module")
def theirs() -> tuple[list[str], list[list[int]]]:
    asked = json.dumps([str(builtin_model.path()), CHATS, TEXTS])
    done = subprocess.run([sys.executable, "-c", THEIRS], input=asked, capture_output=True, text=True, check=True)
    rendered, encoded = json.loads(done.stdout)
    return rendered, encoded


def test_chats_and_texts_are_read_alike(theirs: tuple[list[str], list[list[int]]]) -> None:
    ours = Tokenizer.load(builtin_model.path())
    rendered, encoded = theirs
    assert [ours.render(chat) for chat in CHATS] == rendered
    assert [ours.encode(text) for text in TEXTS] == encoded
    assert [ours.decode(tokens) for tokens in encoded] == TEXTS
