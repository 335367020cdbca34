"""Server-sent events, as the HTML standard says they are read (section 9.2.6), with caps.

However the bytes are cut, the events are the same.  A line or an event over its cap is dropped to its end, and the event is handed out
`spoilt`, so that it can be counted and its id still moves the place to go on from.
"""

import re
from dataclasses import dataclass

MAX_LINE = 2**20
MAX_EVENT = 2**20  # bytes of data
_BOM = b"\xef\xbb\xbf"
_END = re.compile(rb"[\r\n]")


@dataclass(frozen=True)
class Event:
    data: str
    id: str  # of the last event that had one
    name: str = "message"
    spoilt: bool = False


class Events:
    def __init__(self, last_id: str = "", *, max_line: int = MAX_LINE, max_event: int = MAX_EVENT):
        self.id = last_id
        self.retry_ms: int | None = None  # how long the server wants us to wait before we come back
        self._max_line, self._max_event = max_line, max_event
        self._line, self._overlong = bytearray(), False
        self._begun, self._after_cr = False, False
        self._next_id = last_id
        self._data: list[str] = []
        self._name, self._size, self._spoilt = "", 0, False

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that end within `chunk`."""
        events: list[Event] = []
        at = 0
        while at < len(chunk):
            if self._after_cr and chunk[at : at + 1] == b"\n":
                at += 1
            self._after_cr = False
            end = _END.search(chunk, at)
            self._append(chunk[at : end.start() if end else len(chunk)])
            if end is None:
                break
            self._after_cr, at = end[0] == b"\r", end.end()
            events += self._end_of_line()
        return events

    def _append(self, part: bytes) -> None:
        room = self._max_line + len(_BOM) - len(self._line)
        self._line += part[:room]
        self._overlong |= len(part) > room

    def _end_of_line(self) -> list[Event]:
        line = bytes(self._line)
        if not self._begun:
            self._begun, line = True, line.removeprefix(_BOM)
        overlong = self._overlong or len(line) > self._max_line
        self._line, self._overlong = bytearray(), False
        if overlong:
            self._spoilt = True
        elif not line:
            return self._dispatch()
        elif not line.startswith(b":"):
            name, _, value = line.decode("utf-8", "replace").partition(":")
            self._field(name, value.removeprefix(" "))
        return []

    def _field(self, name: str, value: str) -> None:
        if name == "data":
            self._size += len(value) + 1
            if self._size > self._max_event:
                self._spoilt, self._data = True, []
            else:
                self._data.append(value)
        elif name == "event":
            self._name = value
        elif name == "id" and "\0" not in value:
            self._next_id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            self.retry_ms = int(value[:9])

    def _dispatch(self) -> list[Event]:
        self.id = self._next_id
        whole, spoilt = Event("\n".join(self._data), self.id, self._name or "message", False), self._spoilt
        had_data = bool(self._data)
        self._clear()
        if spoilt:
            return [Event("", self.id, whole.name, True)]
        return [whole] if had_data else []

    def _clear(self) -> None:
        self._data = []
        self._name, self._size, self._spoilt = "", 0, False
