"""Incremental text: detokenizers, stop strings, the tokenizer and its chat template."""

import asyncio
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from kvasir.core.errors import ModelError, RequestError
from kvasir.gateway.stops import StopStrings
from kvasir.gateway.tokenization import Tokenization
from kvasir.gateway.tokenizer import Tokenizer


def pieces_of(tokenizer: Tokenizer, tokens: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt or [])
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_byte_level_pieces_join_to_the_text_and_never_cut_a_character(tokenizer: Tokenizer, text: str) -> None:
    pieces = pieces_of(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.lists(st.integers(3, 300), max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_tokens_give_what_decoding_them_at_once_gives(tokenizer: Tokenizer, tokens: list[int]) -> None:
    assert "".join(pieces_of(tokenizer, tokens)) == tokenizer.decode(tokens)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Like Llama 2's: spaces as ▁, characters without a token as their bytes."""
    words = ["▁the", "▁fox", "▁", "s", "n", "the", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {"<unk>": 0} | {word: i + 1 for i, word in enumerate(words)}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return Tokenizer(core)


def ids(tokenizer: Tokenizer, *words: str) -> list[int]:
    return [found for word in words if (found := tokenizer._core.token_to_id(word)) is not None]


def test_a_leading_space_survives_when_a_prompt_goes_before(sentencepiece: Tokenizer) -> None:
    the, fox = ids(sentencepiece, "▁the", "▁fox")
    assert "".join(pieces_of(sentencepiece, [fox, the], prompt=[the])) == " fox the"
    assert "".join(pieces_of(sentencepiece, [fox, the])) == "fox the"


def test_byte_tokens_are_held_until_the_character_is_whole(sentencepiece: Tokenizer) -> None:
    snowman = ids(sentencepiece, "▁the", *(f"<0x{byte:02X}>" for byte in "☃".encode()), "s")
    assert pieces_of(sentencepiece, snowman, prompt=[1]) == [" the", "", "", "☃", "s", ""]


def test_bytes_that_never_become_a_character_do_not_stall_the_answer(sentencepiece: Tokenizer) -> None:
    broken = ids(sentencepiece, *["<0xFF>"] * 40, "▁fox")
    pieces = pieces_of(sentencepiece, broken)
    assert pieces[3]
    assert "".join(pieces).endswith(" fox")


@given(
    st.text(alphabet="ab\n", max_size=30),
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=3),
    st.lists(st.integers(0, 30), max_size=8),
)
@settings(deadline=None)
def test_stop_strings_cut_where_a_search_in_the_whole_text_would(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(text)]
    matcher, out = StopStrings(stops), ""
    for start, end in pairwise(edges):
        out += matcher.push(text[start:end])
        if matcher.hit is not None:
            break
    else:
        out += matcher.flush()
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    # a stop string that ends earlier may win over one that begins earlier: what counts is that none is in the output
    assert text.startswith(out)
    assert (matcher.hit is not None) == bool(found)
    assert not any(stop in out for stop in stops)
    assert bool(found) or out == text


def test_text_is_held_only_while_it_may_become_a_stop_string() -> None:
    matcher = StopStrings(["</s>"])
    assert [matcher.push(text) for text in ("a<", "/", "b", "<", "/s>")] == ["a", "", "</b", "", ""]
    assert matcher.hit == "</s>"


def save(core: tokenizers.Tokenizer, folder: Path, config: dict[str, Any]) -> Path:
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_checkpoint_gives_its_tokenizer_and_template(core: tokenizers.Tokenizer, tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content | tojson }}{% endfor %}{{ strftime_now('') }}"
    config = {"bos_token": {"content": "<|endoftext|>"}, "chat_template": [{"name": "default", "template": template}]}
    tokenizer = Tokenizer.load(save(core, tmp_path, config))
    assert tokenizer.render([{"role": "user", "content": "Ü"}]) == '<|endoftext|>user:"Ü"'


def test_a_template_file_wins_and_may_mark_generations(core: tokenizers.Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% generation %}{{ enable_thinking }}{% endgeneration %}")
    tokenizer = Tokenizer.load(save(core, tmp_path, {"chat_template": "old"}))
    assert tokenizer.render([], options={"enable_thinking": "no"}) == "no"


@pytest.mark.parametrize("wants", [True, False])
def test_add_bos_token_is_obeyed(core: tokenizers.Tokenizer, tmp_path: Path, wants: bool) -> None:
    tokenizer = Tokenizer.load(save(core, tmp_path, {"bos_token": "<|endoftext|>", "add_bos_token": wants}))
    assert (tokenizer.encode("hi")[0] == core.token_to_id("<|endoftext|>")) == wants
    assert tokenizer.encode("hi", add_special_tokens=False) == core.encode("hi").ids


BROKEN = {
    "{% for %}": "does not compile",
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{{ raise_exception('cannot read ' + messages[0].content) }}": "refuses these messages",
    "{{ messages[0].content.x.y }}": "refuses these messages",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_template_that_fails_says_so_without_the_text(core: tokenizers.Tokenizer, broken: str) -> None:
    with pytest.raises((ModelError, RequestError), match=f"chat template.*{BROKEN[broken]}") as failed:
        Tokenizer(core, chat_template=broken).render([{"role": "user", "content": "SECRET"}])
    assert "SECRET" not in str(failed.value)


def test_a_model_without_a_template_refuses_messages(core: tokenizers.Tokenizer) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer(core).render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_broken_checkpoint_is_a_model_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_template_cannot_reach_out_of_its_sandbox(core: tokenizers.Tokenizer) -> None:
    with pytest.raises(RequestError):
        Tokenizer(core, chat_template="{{ messages.__class__.__mro__[1].__subclasses__() }}").render([])


async def test_a_long_prompt_does_not_hold_up_the_loop(tokenizer: Tokenizer) -> None:
    text, gaps, last = "the quick brown fox " * 20_000, [], time.monotonic()
    work = asyncio.create_task(Tokenization(threads=2, max_waiting=4).run(lambda: tokenizer.encode(text), num_chars=len(text)))
    while not work.done():
        await asyncio.sleep(0.001)
        now = time.monotonic()
        gaps.append(now - last)
        last = now
    assert await work == tokenizer.encode(text)
    assert len(gaps) > 3, "the loop ran meanwhile"


async def test_prompts_in_line_for_a_thread_are_bounded() -> None:
    tokenization = Tokenization(threads=1, max_waiting=1)

    def work() -> list[int]:
        time.sleep(0.05)
        return [1]

    busy = [asyncio.create_task(tokenization.run(work, num_chars=10**6)) for _ in range(2)]
    await asyncio.sleep(0.01)
    with pytest.raises(RequestError, match="try again") as refused:
        await tokenization.run(lambda: [1], num_chars=10**6)
    assert refused.value.status == 429
    assert await asyncio.gather(*busy) == [[1], [1]]
    assert await tokenization.run(lambda: [2], num_chars=10**6) == [2]


def test_the_gateway_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, kvasir.gateway.app, kvasir.gateway.server; print({'torch', 'transformers'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
