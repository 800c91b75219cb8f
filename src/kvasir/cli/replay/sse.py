"""Server-sent events: bytes in, data payloads out (WHATWG HTML, section 9.2, what OpenAI-compatible servers use of it)."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class SseParser:
    """Keeps what is incomplete; fields other than `data` and comments (keep-alives) are dropped."""

    _buffer: bytearray = field(default_factory=bytearray)
    _data: list[bytes] = field(default_factory=list)

    def feed(self, piece: bytes) -> list[bytes]:
        """The payloads of the events that `piece` completes."""
        self._buffer += piece
        *lines, rest = bytes(self._buffer).split(b"\n")
        self._buffer[:] = rest
        events: list[bytes] = []
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events
