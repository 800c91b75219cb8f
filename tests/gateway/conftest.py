"""A scripted Service, a byte-level tokenizer trained on the spot, and clients for both the bare app and a real server."""

import asyncio
import io
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import httpx
import pytest
import structlog
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from kvasir.cluster.service import ClusterStatus, Output, Rejected, Submission
from kvasir.core.commands import Candidate, Decision, Reject
from kvasir.core.request import FinishReason
from kvasir.costs.shape import ModelShape
from kvasir.engine.interface import ModelSpec, SampledToken
from kvasir.gateway.app import make_app
from kvasir.gateway.config import GatewayConfig
from kvasir.gateway.server import serve_http
from kvasir.gateway.tokenizer import Tokenizer
from kvasir.telemetry.logs import setup

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = ["the quick brown fox jumps over the lazy dog and the snow falls on the fjord", "a raven called Huginn flies far"]

Step = Output | BaseException | float
Script = Callable[[Submission], Sequence[Step]]


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    setup("info", json=True, stream=io.StringIO())
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def core() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False)
    core.train_from_iterator(TEXT, trainer)
    core.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return core


@pytest.fixture(scope="session")
def tokenizer(core: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(core, config={"eos_token": "<|im_end|>"}, chat_template=CHAT_TEMPLATE)


def sampled(tokens: Sequence[int], top: int | None) -> list[SampledToken]:
    if top is None:
        return [SampledToken(token) for token in tokens]
    return [SampledToken(t, -0.5, tuple((t + i, -0.5 - i) for i in range(top))) for t in tokens]


@dataclass
class FakeService:
    """Answers by script, one step after another: outputs are given, numbers slept, exceptions raised."""

    spec: ModelSpec
    script: Script
    ready: bool = True
    submitted: list[Submission] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    async def submit(self, submission: Submission) -> AsyncGenerator[Output, None]:
        self.submitted.append(submission)
        try:
            for step in self.script(submission):
                match step:
                    case Output():
                        yield step
                    case BaseException():
                        raise step
                    case _:
                        await asyncio.sleep(step)
            self.finished.append(submission.request_id)
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted.append(submission.request_id)
            raise

    def status(self) -> ClusterStatus:
        return ClusterStatus(ready=self.ready, reason="" if self.ready else "no decode instance is up", instances=(), pools={})


@pytest.fixture
def says(tokenizer: Tokenizer) -> Callable[..., Script]:
    """A script that answers with a text, one token at a time."""

    def script_of(text: str, *, gap_s: float = 0.0, cached: int = 0, finish: FinishReason = FinishReason.STOP) -> Script:
        def script(submission: Submission) -> Sequence[Step]:
            tokens = sampled(tokenizer.encode(text), submission.sampling.logprobs)
            outputs = [Output([token]) for token in tokens]
            outputs[0].cached_tokens = cached
            outputs[-1].finish_reason = finish
            return [step for output in outputs for step in (gap_s, output)]

        return script

    return script_of


@pytest.fixture
def service(tokenizer: Tokenizer, says: Callable[..., Script]) -> FakeService:
    shape = ModelShape(2, 64, 4, 2, 16, 128, tokenizer.vocab_size, 10**6, 4)
    eos = tokenizer.encode("<|im_end|>")[0]
    spec = ModelSpec(
        name="tiny", path="/nowhere", identity="0", architecture="llama", shape=shape, dtype="float32", layout="paged",
        block_tokens=16, max_model_len=512, eos_token_ids=(eos,),
    )  # fmt: skip
    return FakeService(spec, says("the quick brown fox", cached=3))


@pytest.fixture
def config() -> GatewayConfig:
    return GatewayConfig()


@pytest.fixture
async def client(service: FakeService, tokenizer: Tokenizer, config: GatewayConfig) -> AsyncIterator[httpx.AsyncClient]:
    """Talks to the application without a network."""
    transport = httpx.ASGITransport(make_app(service, tokenizer, config))
    async with httpx.AsyncClient(transport=transport, base_url="http://kvasir") as client:
        yield client


@pytest.fixture
async def url(service: FakeService, tokenizer: Tokenizer, config: GatewayConfig) -> AsyncIterator[str]:
    """A real server on a free port."""
    async with serve_http(make_app(service, tokenizer, config), "127.0.0.1", 0, stop_timeout_s=1) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def rejection() -> Rejected:
    decision = Decision(
        request_id="r",
        policy="mooncake",
        at_s=1.0,
        why="least TTFT among 1",
        candidates=(Candidate("p0", wait_s=41.0, transfer_s=0.0, prefill_s=1.0, prefix_tokens=0),),
        decode="d0",
        tbt_s=0.14,
        batch=9,
        refusal="decode is full",
    )
    reject = Reject(
        request_id="r",
        code="slo_tbt",
        message="predicted TBT 140 ms exceeds the SLO of 100 ms",
        retry_after_s=2.3,
        decision=decision,
    )
    return Rejected(reject)
