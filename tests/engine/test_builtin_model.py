"""The shipped checkpoint loads with plain transformers, recalls, writes legibly, and can be trained anew."""

import ast
import math
import os
import random
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvasir.engine.builtin_model import path

MAX_WEIGHTS_BYTES = 12_000_000
ROOT = Path(__file__).parents[2]
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))

# Written for this test, so it is in no training text.
PARAGRAPH = (
    "A list keeps its items in order. You can add an item at the end, remove an item by its index, or sort the whole "
    "list in place. When two names refer to the same list, a change that is made through one name is visible through "
    "the other. If this is not what you want, make a copy of the list before you change it."
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def docstrings() -> str:
    return "\n\n".join(_docstrings(sorted(STANDARD_LIBRARY.glob("*.py"))))


def test_every_shipped_file_is_small() -> None:
    sizes = {file.name: file.stat().st_size for file in path().iterdir() if file.is_file()}
    assert sizes["model.safetensors"] <= MAX_WEIGHTS_BYTES
    assert all(size <= MAX_WEIGHTS_BYTES for size in sizes.values())


def test_the_config_allows_long_prompts_and_whole_kernel_tiles(model: Any) -> None:
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.config.max_position_embeddings >= 16_384
    assert model.config.head_dim % 16 == 0


def test_text_comes_back_from_its_tokens(tokenizer: Any) -> None:
    text = "Größe: 3.14 €\n\tif x:  # a tab, 10\xa0spaces\r\n\n🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_digit_is_a_token_of_its_own(tokenizer: Any) -> None:
    assert len(tokenizer("1234567890").input_ids) == 10


def test_a_turn_of_a_chat_extends_the_tokens_of_the_turns_before(tokenizer: Any) -> None:
    first = [{"role": "user", "content": "Hello"}]
    second = [*first, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "What is a list?"}]
    before = tokenizer(_render(tokenizer, first)).input_ids
    assert tokenizer(_render(tokenizer, second)).input_ids[: len(before)] == before


@pytest.mark.parametrize("key", ["71432", "00917", "55355"])
def test_a_pass_key_is_recalled_from_two_thousand_tokens_back(model: Any, tokenizer: Any, docstrings: str, key: str) -> None:
    filler = _filler(tokenizer, docstrings, count=2000, seed=int(key))
    prompt = f"The pass key is {key}. Remember it.\n\n{filler}\n\nWhat is the pass key? The pass key is"
    assert _continue(model, tokenizer, prompt, limit=7).strip(" .").startswith(key)


def test_a_pass_key_told_in_the_first_turn_is_recalled_in_the_second(model: Any, tokenizer: Any, docstrings: str) -> None:
    filler = _filler(tokenizer, docstrings, count=2000, seed=3)
    chat = [
        {"role": "user", "content": f"The pass key is 60318. Remember it.\n\n{filler}"},
        {"role": "assistant", "content": "OK, I will remember it."},
        {"role": "user", "content": "What is the pass key?"},
    ]
    reply = _continue(model, tokenizer, _render(tokenizer, chat), limit=32)
    assert "60318" in reply
    assert reply.endswith(tokenizer.eos_token)


def test_a_chat_reply_ends_by_itself(model: Any, tokenizer: Any) -> None:
    questions = ["Hello", "What does os.path.join do?", "Tell me about regular expressions.", "How do I open a file?"]
    for question in questions:
        rendered = _render(tokenizer, [{"role": "user", "content": question}])
        reply = _continue(model, tokenizer, rendered, limit=200)
        assert reply.endswith(tokenizer.eos_token), (question, reply)
        assert len(reply) > len(tokenizer.eos_token) + 5


def test_generated_text_is_made_of_words(model: Any, tokenizer: Any, docstrings: str) -> None:
    """Words of four letters and more, looked up among those of the standard library's docstrings.

    The control shows that the measure tells text from tokens that follow each other by chance.
    """
    known = set(re.findall("[a-z]{4,}", docstrings.lower()))
    torch.manual_seed(0)
    prompts = ["# Reading files\n\nTo read a file, you", "This function returns", "A class is", "The most important"]
    text = "\n".join(_continue(model, tokenizer, p, limit=120, temperature=0.7) for p in prompts)
    chance = tokenizer.decode(random.Random(0).choices(range(3, len(tokenizer)), k=1000))
    assert len(_words(text)) > 60
    assert len(set(_words(text))) > 30
    assert _share_known(text, known) > 0.85 > 0.65 > _share_known(chance, known)


def test_unseen_english_is_predicted_far_better_than_by_chance(model: Any, tokenizer: Any) -> None:
    """Measured 1.25 bits per byte, where eight is chance."""
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    with torch.inference_mode():
        nats = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert nats / math.log(2) / len(PARAGRAPH) < 1.6


def test_training_runs_and_writes_a_checkpoint_that_loads(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for module in ("argparse", "asyncore", "statistics", "random", "subprocess", "datetime", "pathlib", "zipfile"):
        source = STANDARD_LIBRARY / f"{module}.py"
        if source.exists():
            (text / f"{module}.txt").write_text("\n\n".join(_docstrings([source])))
    flags = ["--smoke", "--threads", "1", "--text", str(text), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "tools.train_model", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert fresh(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def _docstrings(sources: list[Path]) -> list[str]:
    found: list[str] = []
    for source in sources:
        nodes = ast.walk(ast.parse(source.read_text(encoding="utf-8", errors="ignore")))
        documented = (n for n in nodes if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        found += [text for n in documented if (text := ast.get_docstring(n))]
    return found


def _filler(tokenizer: Any, text: str, *, count: int, seed: int) -> str:
    at = random.Random(seed).randrange(len(text) - 8 * count)
    ids = tokenizer(text[at : at + 8 * count]).input_ids
    assert len(ids) >= count
    decoded: str = tokenizer.decode(ids[:count])
    return decoded


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    rendered: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return rendered


def _continue(model: Any, tokenizer: Any, prompt: str, *, limit: int, temperature: float | None = None) -> str:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, **sampling)
    decoded: str = tokenizer.decode(out[0, ids.shape[1] :])
    return decoded


def _words(text: str) -> list[str]:
    return re.findall(r"\b[a-z]{4,}\b", text)


def _share_known(text: str, known: set[str]) -> float:
    words = _words(text)
    return sum(word in known for word in words) / len(words)
