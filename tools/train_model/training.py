"""The training run: what is learnt when, at which rate, and what is saved on the way."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tools.train_model.batches import Batch, Mix, Source
from tools.train_model.export import export
from tools.train_model.model import Forward, Shape, Weights, initial_weights
from tools.train_model.optimizer import Optimizer
from tools.train_model.text import is_held_out, read_documents
from tools.train_model.tokenizer import train_tokenizer

WARM_UP_STEPS, COOL_DOWN_FROM, LAST_RATE = 60, 0.45, 0.03
EXPORT_EVERY_S, PRINT_EVERY = 240.0, 20


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run needs; `begin` skips a share of the schedule of a run that goes on from `start`."""

    text: Path
    out: Path
    minutes: float
    seed: int = 0
    threads: int = 2
    start: Path | None = None
    begin: float = 0.0
    smoke: bool = False


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the run, up to the share `until` of it: `parts` times `rows` sequences of `length` a step."""

    until: float
    length: int
    rows: int
    parts: int
    mix: Mix


_FIRST = Mix(recall=0.25, chat=0.05, chat_recall=0.05, repeat=0.45)
_EARLY = Mix(recall=0.05, chat=0.15, chat_recall=0.04, repeat=0.03)
_LAST = Mix(recall=0.10, chat=0.40, chat_recall=0.10, repeat=0.0)
_LONG = Mix(recall=0.20, chat=0.20, chat_recall=0.15, repeat=0.0)
PHASES = (
    Phase(0.10, 128, 16, 2, _FIRST),
    Phase(0.40, 512, 4, 2, _EARLY),
    Phase(0.66, 512, 4, 4, _EARLY),
    Phase(0.74, 2048, 1, 4, _LONG),
    Phase(0.82, 4096, 1, 2, _LONG),
    Phase(0.90, 8192, 1, 1, _LONG),
    Phase(1.00, 512, 4, 4, _LAST),
)
_SMOKE_SHAPE = Shape(vocab=512, hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=64)
_SMOKE_PHASES = (Phase(0.5, 64, 2, 1, _EARLY), Phase(1.0, 640, 1, 1, _LONG))


def train(settings: Settings) -> None:
    """Trains, printing progress, and leaves a checkpoint in `settings.out`, renewed every few minutes."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    shape, phases = (_SMOKE_SHAPE, _SMOKE_PHASES) if settings.smoke else (Shape(), PHASES)
    documents = read_documents(settings.text)
    learnt = [d for d in documents if not is_held_out(d)]
    kept = [d for d in documents if is_held_out(d)] or documents[-1:]
    tokenizer, initial = _beginning(settings, shape, [d.prose for d in learnt])
    source = Source(learnt, tokenizer, seed=settings.seed + int(1000 * settings.begin), max_positions=shape.max_positions)
    unseen = Source(kept, tokenizer, seed=1, max_positions=shape.max_positions)
    print(f"{len(source.text):,} tokens to learn from, {len(unseen.text):,} held out", flush=True)
    optimizer = Optimizer(initial, matrix_lr=0.02, other_lr=0.004, decay=0.05)
    forward = Forward(shape, compiled=not settings.smoke)
    exam = draw_exam(unseen, phases[min(1, len(phases) - 2)])
    _Loop(settings, shape, phases, optimizer, forward, source, exam, tokenizer).run()


def _beginning(settings: Settings, shape: Shape, texts: list[str]) -> tuple[Tokenizer, Weights]:
    if settings.start is None:
        return train_tokenizer(texts, shape.vocab), initial_weights(shape, settings.seed)
    stored = load_file(settings.start / "model.safetensors")
    return Tokenizer.from_file(str(settings.start / "tokenizer.json")), {k: w.float() for k, w in stored.items()}


@dataclass(frozen=True, slots=True)
class Exam:
    """Batches never trained on: documentation, and facts in it of which only the answers count."""

    text: list[Batch]
    answers: list[Batch]


@dataclass(frozen=True, slots=True)
class _Loop:
    settings: Settings
    shape: Shape
    phases: tuple[Phase, ...]
    optimizer: Optimizer
    forward: Forward
    source: Source
    exam: Exam
    tokenizer: Tokenizer

    def run(self) -> None:
        started, saved = time.process_time(), time.monotonic()
        step, tokens = 0, 0
        while (progress := self._progress(step, self._worked_s(started))) < 1.0:
            phase = next(p for p in self.phases if progress < p.until)
            loss, norm = self._step(phase, rate_at(progress, step))
            step, tokens = step + 1, tokens + phase.parts * phase.rows * phase.length
            worked = self._worked_s(started)
            if step % PRINT_EVERY == 0 or step < 5:
                print(
                    f"{worked / 60:6.2f} min  step {step:5d}  length {phase.length:5d}  loss {loss:.3f}  "
                    f"gradient {norm:.2f}  {tokens / worked:,.0f} tokens/s",
                    flush=True,
                )
            if time.monotonic() - saved > EXPORT_EVERY_S:
                self._save()
                saved = time.monotonic()
        self._save()

    def _worked_s(self, started: float) -> float:
        """Processor time per thread: wall time on a quiet machine; on a busy one the run takes longer, not worse."""
        return (time.process_time() - started) / self.settings.threads

    def _progress(self, step: int, worked_s: float) -> float:
        if self.settings.smoke:
            return step / 4
        return self.settings.begin + (1 - self.settings.begin) * worked_s / (60 * self.settings.minutes)

    def _step(self, phase: Phase, rate: float) -> tuple[float, float]:
        total, weight = 0.0, 0.0
        for _ in range(phase.parts):
            batch = self.source.batch(phase.rows, phase.length, phase.mix)
            loss = self._loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.collect()
            total += loss.item()
            weight += batch.importance[:, 1:].sum().item()
        norm = self.optimizer.step(scale=1 / weight, rate=rate, clip=1.0)
        return total / weight, norm

    def _loss(self, batch: Batch) -> torch.Tensor:
        return self.forward.loss(self.optimizer.weights, batch.tokens, batch.positions, batch.importance)

    @torch.no_grad()
    def _save(self) -> None:
        """Exports, and prints the mean loss, in nats per token, of unseen text and of answers recalled from it."""
        losses = [self._mean_loss(batches) for batches in (self.exam.text, self.exam.answers)]
        print(f"saved; held-out loss {losses[0]:.3f}, of recalled answers {losses[1]:.3f}", flush=True)
        export(self.settings.out, self.shape, self.optimizer.masters, self.tokenizer)

    def _mean_loss(self, batches: list[Batch]) -> float:
        weight = sum(b.importance[:, 1:].sum().item() for b in batches)
        return sum(self._loss(b).item() for b in batches) / weight


def draw_exam(unseen: Source, phase: Phase) -> Exam:
    """The same sequences for every checkpoint of a run, as long as those of `phase`."""
    text = [unseen.batch(phase.rows, phase.length, Mix(recall=0, chat=0, chat_recall=0, repeat=0)) for _ in range(8)]
    asked = [unseen.batch(phase.rows, phase.length, Mix(recall=1, chat=0, chat_recall=0, repeat=0)) for _ in range(8)]
    return Exam(text, [replace(b, importance=(b.importance > 1).float()) for b in asked])


def rate_at(progress: float, step: int) -> float:
    """The learning rate as a share of its peak: a short rise, a plateau, and a straight way down."""
    rise = min(1.0, (step + 1) / WARM_UP_STEPS)
    fall = (1 - progress) / (1 - COOL_DOWN_FROM)
    return rise * max(LAST_RATE, min(1.0, fall))
