"""What a Batcher wants done. It never leaves the process, so these are classes of machine code and no messages."""

from __future__ import annotations

from mypy_extensions import mypyc_attr


@mypyc_attr(acyclic=True)
class BatcherCommand:
    """Something that an instance's body must carry out; not changed after it was said."""

    __slots__ = ()

    def parts(self) -> tuple[object, ...]:
        """All that it says, in the order in which it is made."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BatcherCommand) and type(other) is type(self) and other.parts() == self.parts()

    def __hash__(self) -> int:
        return hash(self.parts())

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.parts()}"


@mypyc_attr(acyclic=True)
class Chunk(BatcherCommand):
    """Tokens [start, start + length) of a sequence, to be computed in one step; `pages` cover them and all before.

    `samples` is true when the chunk ends at the sequence's newest token, so that a next token is drawn. Only a `share` of the
    model's layers is computed.
    """

    __slots__ = ("length", "pages", "request_id", "samples", "share", "start")

    def __init__(self, request_id: str, start: int, length: int, pages: tuple[int, ...], samples: bool, share: float = 1.0):
        self.request_id = request_id
        self.start = start
        self.length = length
        self.pages = pages
        self.samples = samples
        self.share = share

    def parts(self) -> tuple[object, ...]:
        return self.request_id, self.start, self.length, self.pages, self.samples, self.share


@mypyc_attr(acyclic=True)
class Step(BatcherCommand):
    """One forward pass: prefill `chunks`, and one token for each of `batch` decoding sequences.

    The contexts of the decoding sequences sum to `context_tokens` in the first pass; `Batcher.decode_chunks()` lists them
    until StepDone. A step of decode tokens alone may be made `repeats` times, each pass one token further: until then nobody
    ends by length or needs a page. StepDone says how many passes were made.
    """

    __slots__ = ("batch", "chunks", "context_tokens", "repeats")

    def __init__(self, chunks: tuple[Chunk, ...], batch: int = 0, context_tokens: int = 0, repeats: int = 1):
        self.chunks = chunks
        self.batch = batch
        self.context_tokens = context_tokens
        self.repeats = repeats

    def parts(self) -> tuple[object, ...]:
        return self.chunks, self.batch, self.context_tokens, self.repeats


@mypyc_attr(acyclic=True)
class Publish(BatcherCommand):
    """Blocks `first`, `first` + 1 ... of a sequence are complete in these pages: make them readable under their keys."""

    __slots__ = ("first", "pages", "request_id")

    def __init__(self, request_id: str, first: int, pages: tuple[int, ...]):
        self.request_id = request_id
        self.first = first
        self.pages = pages

    def parts(self) -> tuple[object, ...]:
        return self.request_id, self.first, self.pages


@mypyc_attr(acyclic=True)
class NeedPages(BatcherCommand):
    """Ask the pool for `count` pages; the answer is PagesGranted."""

    __slots__ = ("count",)

    def __init__(self, count: int):
        self.count = count

    def parts(self) -> tuple[object, ...]:
        return (self.count,)


@mypyc_attr(acyclic=True)
class ReturnPages(BatcherCommand):
    """Give unused pages back to the pool."""

    __slots__ = ("pages",)

    def __init__(self, pages: tuple[int, ...]):
        self.pages = pages

    def parts(self) -> tuple[object, ...]:
        return (self.pages,)


@mypyc_attr(acyclic=True)
class Leaves(BatcherCommand):
    """The sequence is with the Batcher no more; `pages` are its private ones that the Batcher does not keep."""

    __slots__ = ("pages", "request_id")

    def __init__(self, request_id: str, pages: tuple[int, ...]):
        self.request_id = request_id
        self.pages = pages

    def parts(self) -> tuple[object, ...]:
        return self.request_id, self.pages


@mypyc_attr(acyclic=True)
class HandOff(Leaves):
    """Its prefill is complete: give its lease, with the `pages` of its tail, to whoever decodes."""

    __slots__ = ()


@mypyc_attr(acyclic=True)
class Release(Leaves):
    """It is over: release its lease; its `pages` go back to the pool."""

    __slots__ = ()


@mypyc_attr(acyclic=True)
class Preempt(Leaves):
    """No page is left: release its lease and `pages` and submit it again, to be recomputed.

    Carry out the rest of the command list before submitting it again: a NeedPages behind it is for the older sequences.
    """

    __slots__ = ()


@mypyc_attr(acyclic=True)
class Starved(Leaves):
    """The pool had no page for it for `waited_s`: release its lease and `pages`, report Failed."""

    __slots__ = ("waited_s",)

    def __init__(self, request_id: str, pages: tuple[int, ...], waited_s: float):
        super().__init__(request_id, pages)
        self.waited_s = waited_s

    def parts(self) -> tuple[object, ...]:
        return self.request_id, self.pages, self.waited_s
