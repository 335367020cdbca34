"""A connector that does what a test says: it announces step after step, and has the trouble that a file names."""

import threading
import time
from pathlib import Path

from ingest.connectors import plugins
from ingest.connectors.base import Found
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.config import Section
from streamlearn.contract.errors import ConfigError, Retryable, Stuck
from streamlearn.contract.status import now

OPEN = []  # instances that are not closed
TROUBLES = {
    "bug": RuntimeError("a bug"),
    "later": Retryable("not now", after_s=0.05),
    "mend": ConfigError("mend it"),
    "stuck": Stuck("hangs"),
}


class StepsOptions(Section):
    steps: int
    trouble: str = ""  # a file; its words are the trouble there is, while it is there
    at: int = 0  # the step before which there is trouble
    pause_s: float = 0.005
    words: tuple[str, ...] = ()


class Steps:
    Options = StepsOptions

    def __init__(self, name, options):
        self.name, self.options = name, options

    def check(self):
        OPEN.append(self)

    def close(self):
        OPEN.remove(self)

    def discover(self, cursor):
        assert threading.current_thread().name == f"connector {self.name}"
        for i in range(cursor["step"] if cursor else 0, self.options.steps):
            self._trouble(i)
            time.sleep(self.options.pause_s)
            candidate = Candidate(url=f"http://{self.name}/{i}.jpg", source=self.name, source_ref=str(i), discovered_at=now())
            yield Found([candidate], [], {"step": i + 1})

    def _trouble(self, step):
        file = Path(self.options.trouble or "/nowhere")
        while step >= self.options.at and file.exists() and file.read_text() == "slow":
            time.sleep(0.02)
        if step >= self.options.at and file.exists() and (trouble := TROUBLES.get(file.read_text())):
            raise trouble


def expected(name, steps):
    return sorted(f"http://{name}/{i}.jpg" for i in range(steps))


def installed(monkeypatch):
    """The class `steps` is one of those that are built in, for a test."""
    monkeypatch.setitem(plugins.BUILT_IN, "steps", "tests.ingest.steps:Steps")
    OPEN.clear()


def config(name, steps=5, **more):
    """Of a connector of that class."""
    return {"name": name, "class": "steps", "steps": steps, "poll_s": 0.05, "errors_retry_delay_max_s": 0.2} | more
