"""Everything that can go wrong, and who acts.

* A refusal is a value, not an exception (ingest.fetch.Refused): counted, dead-lettered, the offset moves on.
* StreamlearnError
  - ConfigError     the user's: printed without a traceback, exit code 2, nothing on disk has changed
    - Unreachable   or the network's: no server answers at the start.  A command ends; a role waits
  - Retryable       may pass: back off `after_s` and try again; nothing is given up
    - StoreFull     no space left: back-pressure until there is
  - NotFound        no object, record or tag of this name
  - Corrupt         bytes that do not match their digest or cannot be parsed; names the file and the remedy
  - Fenced          another writer has taken this place in the catalog: drop the unit, read the position anew
  - Conflict        a compare-and-set was lost: someone else moved the tag
  - OffsetGap       the log or catalog lacks offsets that must be there: an incident, never skipped silently
  - Stuck           a library that has stopped working, workers that are killed whatever they do: the process ends, and starts anew
* Anything else is a bug: the process ends with its traceback and the supervisor starts it again.
"""


class StreamlearnError(Exception):
    """What, where, which value, and what to do about it."""


class ConfigError(StreamlearnError): ...


class Unreachable(ConfigError): ...


class Retryable(StreamlearnError):
    """A fault that may pass.  `on`: what is out, one of metrics.WAITS_ON."""

    on = "other"

    def __init__(self, message: str, *, after_s: float = 1.0, on: str = ""):
        super().__init__(message)
        self.after_s = after_s
        self.on = on or self.on


class StoreFull(Retryable):
    on = "disk"  # unless its raiser knows better


class NotFound(StreamlearnError): ...


class Corrupt(StreamlearnError): ...


class Fenced(StreamlearnError): ...


class Conflict(StreamlearnError): ...


class OffsetGap(StreamlearnError): ...


class Stuck(StreamlearnError): ...
