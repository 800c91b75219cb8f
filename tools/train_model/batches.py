"""Batches of the training mix: documentation, chats, and facts to recall, at any length."""

import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tools.train_model import chat
from tools.train_model.recall import REMEMBERED, personal_fact, random_facts
from tools.train_model.text import Document
from tools.train_model.tokenizer import END_OF_TEXT, token_id
from torch import Tensor

ANSWER_WEIGHT = 4.0  # of a recalled token against a token of text: there are few of them
PROMPT_WEIGHT = 0.3  # of what a user says


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens and how much each counts in the loss."""

    tokens: list[int]
    weight: float


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens` and `positions` `(rows, length + 1)` int64, `importance` the same in float32."""

    tokens: Tensor
    positions: Tensor
    importance: Tensor


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares of the sequences; the rest is plain documentation."""

    recall: float
    chat: float
    chat_recall: float
    repeat: float


class Source:
    """Draws sequences from a set of documents; the same seed draws the same ones."""

    def __init__(self, documents: list[Document], tokenizer: Tokenizer, *, seed: int, max_positions: int) -> None:
        self._rng = random.Random(seed)
        self._tokenizer = tokenizer
        self._max_positions = max_positions
        self._end = token_id(tokenizer, END_OF_TEXT)
        shuffled = self._rng.sample(documents, len(documents))
        encoded = tokenizer.encode_batch([d.prose for d in shuffled], add_special_tokens=False)
        self.text = [t for e in encoded for t in [self._end, *e.ids]]
        self._paragraphs = chat.prose_paragraphs(documents)
        self._exchanges = [kind for kind in chat.read_exchanges(documents) if kind] or [list(chat.GREETINGS)]

    def batch(self, rows: int, length: int, mix: Mix) -> Batch:
        """`rows` sequences of `length` predictions each."""
        drawn = [self._sequence(length + 1, mix) for _ in range(rows)]
        tokens, importance, positions = (torch.tensor(column) for column in zip(*drawn, strict=True))
        return Batch(tokens, positions, importance)

    def _sequence(self, length: int, mix: Mix) -> tuple[list[int], list[float], list[int]]:
        draw = self._rng.random()
        jumps = False
        if draw < mix.recall:
            pieces, jumps = self._recall(length), True
        elif draw < mix.recall + mix.chat_recall:
            pieces, jumps = self._chat_recall(length), True
        elif draw < mix.recall + mix.chat_recall + mix.chat:
            pieces = self._chats(length)
        elif draw < mix.recall + mix.chat_recall + mix.chat + mix.repeat:
            pieces = self._repeat(length)
        else:
            pieces = [Piece(self.filler(length), 1.0)]
        tokens = [t for p in pieces for t in p.tokens][-length:]
        importance = [p.weight for p in pieces for _ in p.tokens][-length:]
        short = length - len(tokens)
        tokens += self.filler(short)
        importance += [1.0] * short
        return tokens, importance, self._positions(length, jumps=jumps)

    def filler(self, count: int) -> list[int]:
        """A run of `count` tokens from anywhere in the documentation."""
        at = self._rng.randrange(len(self.text) - count)
        return self.text[at : at + count]

    def _positions(self, length: int, *, jumps: bool) -> list[int]:
        """Consecutive, or (every second time that `jumps`) with gaps, so that short rows teach far distances."""
        room = self._max_positions - length
        if not jumps or self._rng.random() < 0.5:
            return list(range(length))
        gaps = sorted(self._rng.randrange(room) for _ in range(self._rng.randint(1, 3)))
        cuts = sorted(self._rng.randrange(length) for _ in gaps)
        shift, out = 0, []
        for i in range(length):
            while cuts and cuts[0] <= i:
                cuts.pop(0)
                shift = gaps.pop(0)
            out.append(i + shift)
        return out

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _recall(self, length: int) -> list[Piece]:
        """Facts and questions strewn over documentation; half of the questions come at the very end."""
        rng = self._rng
        placed: list[tuple[float, list[Piece]]] = []
        for fact in random_facts(rng, rng.randint(1, max(2, min(12, length // 40)))):
            at = rng.random() * (0.2 if rng.random() < 0.4 else 0.9)
            placed.append((at, [Piece(self._encode(_gap(rng) + fact.statement(rng) + _gap(rng)), 0.0)]))
            for _ in range(rng.randint(1, 2)):
                question, answer = fact.plain_question(rng)
                asked = [Piece(self._encode(_gap(rng) + question), 0.0), Piece(self._encode(answer), ANSWER_WEIGHT)]
                placed.append((1.0 if rng.random() < 0.5 else rng.uniform(at, 1.0), asked))
        placed.sort(key=lambda item: item[0])
        room = max(0, length - sum(len(p.tokens) for _, pieces in placed for p in pieces))
        filler, used, out = self.filler(room), 0, []
        for at, pieces in placed:
            upto = int(at * room)
            out += [Piece(filler[used:upto], 0.5), *pieces]
            used = upto
        return out

    def _chat_recall(self, length: int) -> list[Piece]:
        """One long chat: facts told in the first turns, with long texts, and asked for in the later ones."""
        rng = self._rng
        facts = random_facts(rng, rng.randint(1, 4))
        if rng.random() < 0.3:
            facts[0] = personal_fact(rng)
        told = [self._user(f"{f.statement(rng)}", filler=0) for f in facts]
        tail: list[Piece] = []
        for fact in rng.sample(facts, len(facts)):
            question, answer = fact.chat_question(rng)
            if rng.random() < 0.4:
                tail += self._exchange(rng.choice(rng.choice(self._exchanges)))
            tail += [*self._user(question, filler=0), *self._assistant(answer, ANSWER_WEIGHT)]
        room = length - sum(len(p.tokens) for p in tail) - sum(len(p.tokens) for t in told for p in t) - 24 * len(facts)
        head: list[Piece] = []
        for fact in facts:
            share = max(0, int(room / len(facts)))
            head += self._user(fact.statement(rng), filler=share)
            head += self._assistant(rng.choice(REMEMBERED), 1.0)
        if len(facts) == 1 and rng.random() < 0.4:  # the question in the same message
            question, answer = facts[0].chat_question(rng)
            return [
                *self._user(facts[0].statement(rng), filler=max(0, room), last=question),
                *self._assistant(answer, 4.0),
            ]
        return head + tail

    def _user(self, said: str, *, filler: int, last: str = "") -> list[Piece]:
        """A user's message: `said` before, within or after `filler` tokens of documentation."""
        text = self._tokenizer.decode(self.filler(filler)) if filler > 8 else ""
        text = text.replace(END_OF_TEXT, "").strip()
        cut = text.find(" ", self._rng.randrange(len(text) + 1)) if text else 0
        if self._rng.random() < 0.5 or cut < 0:
            cut = 0
        message = "\n\n".join(part for part in (text[:cut].strip(), said, text[cut:].strip(), last) if part)
        return [Piece(self._encode(f"<|im_start|>user\n{message}<|im_end|>\n"), PROMPT_WEIGHT)]

    def _assistant(self, reply: str, weight: float) -> list[Piece]:
        head, tail = self._encode("<|im_start|>assistant\n"), self._encode("\n")
        return [Piece(head, 0.1), Piece(self._encode(f"{reply}<|im_end|>"), weight), Piece(tail, 0.1)]

    def _exchange(self, exchange: chat.Exchange) -> list[Piece]:
        return [*self._user(exchange.user, filler=0), *self._assistant(exchange.assistant, 1.5)]

    def _chats(self, length: int) -> list[Piece]:
        """Chats of one to three exchanges, one after the other until the row is full."""
        rng, out, count = self._rng, [], 0
        while count < length:
            pieces: list[Piece] = [Piece([self._end], 0.1)]
            if rng.random() < 0.15:
                pieces.append(Piece(self._encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"), 0.1))
            for _ in range(rng.choice((1, 1, 2, 3))):
                pieces += self._exchange(self._any_exchange())
            out += pieces
            count += sum(len(p.tokens) for p in pieces)
        return out

    def _any_exchange(self) -> chat.Exchange:
        draw = self._rng.random()
        if draw < 0.08:
            return self._rng.choice(chat.GREETINGS)
        if draw < 0.65:
            return self._rng.choice(self._rng.choice(self._exchanges))
        if draw < 0.85:
            return chat.continuation(self._rng, self._paragraphs)
        return chat.summary(self._rng, self._paragraphs)

    def _repeat(self, length: int) -> list[Piece]:
        """Runs of text or of random tokens, each two to four times over: the seed of induction."""
        rng, out, count = self._rng, list[Piece](), 0
        while count < length:
            run = self.filler(rng.randint(6, max(8, min(96, length // 4))))
            if rng.random() < 0.6:
                run = [rng.randrange(3, self._tokenizer.get_vocab_size()) for _ in run]
            out.append(Piece(run, 0.0))
            for _ in range(rng.randint(1, 3)):
                out += [Piece(self.filler(rng.randint(0, length // 8)), 0.3), Piece(run[:1], 0.0), Piece(run[1:], 1.0)]
            count = sum(len(p.tokens) for p in out)
        return [Piece(p.tokens[: max(0, length - sum(len(q.tokens) for q in out[:i]))], p.weight) for i, p in enumerate(out)]


def _gap(rng: random.Random) -> str:
    return rng.choice((" ", "\n", "\n\n"))
