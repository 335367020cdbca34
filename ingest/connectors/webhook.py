"""Candidates that somebody pushes: POST /v1/candidates, with one object, a list of them, or a line for each (NDJSON).

  1. take      the push waits in memory, its sender for an answer
  2. append    the candidates                                           the runner
  3. append    the cursor                                               the runner      <- THE COMMIT POINT
  4. answer    202, with how many were accepted, known and refused

Killed after   what is left                                             who mends it
  1            nothing: the sender saw its connection break             the sender pushes again
  2            candidates without their cursor                          likewise; what brings an id is not told again, as run.py has it
  3            all of it, but the sender does not know                  likewise; what brings an id is in the cursor, and acknowledged

So an item with an `id` is told once however often it is pushed; one without an id is told as often as it is pushed.
The cursor: a mark of each of the last 10,000 ids told, 8 bytes each, 80 KB.  Nothing waits but what has been pushed: `queue` candidates.

The answers: 202; 400 what is wrong and where; 401 no or a wrong token; 408 a body that does not come; 413 too large; 429 full; 503 shutting down.
"""

import hmac
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import Field

from ingest.connectors.base import BATCH, Cursor, Found
from ingest.connectors.offer import Marks, mark, offer
from ingest.connectors.webhook_server import Push, Server
from streamlearn.contract.config import Section
from streamlearn.contract.errors import ConfigError

TOLD = 10_000
TOKEN = "STREAMLEARN_WEBHOOK_TOKEN"


class WebhookOptions(Section):
    host: str = "127.0.0.1"  # to listen on; the token crosses the wire, so put TLS before any other
    port: int = Field(default=8090, ge=0, le=65535)  # 0: a free one, which the log names
    token_file: str = ""  # its first line; empty: the environment variable STREAMLEARN_WEBHOOK_TOKEN
    anonymous: bool = False  # take candidates from whoever reaches the port
    queue: int = Field(default=5000, ge=500, le=10**6)  # candidates that wait to be appended
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024, le=64 * 2**20)  # of one push
    body_s: float = Field(default=10.0, gt=0)  # for a body to come
    settle_s: float = Field(default=30.0, gt=0)  # for a push to be durable; then 503, and the sender tries again


class WebhookConnector:
    Options = WebhookOptions

    def __init__(self, name: str, options: WebhookOptions):
        self.name, self.options = name, options
        self.answered: Callable[[int, float], None] = lambda status, seconds: None
        self._server: Server | None = None
        self._begun: list[Push] = []  # given to the runner, not settled yet

    def check(self) -> None:
        if not self._token() and not self.options.anonymous:
            raise ConfigError(
                f"connector {self.name}: token_file = {self.options.token_file!r}: no token; name a file that holds one, set {TOKEN}, "
                "or set anonymous = true"
            )

    def _token(self) -> str:
        if not self.options.token_file:
            return os.environ.get(TOKEN, "").strip()
        try:
            return (Path(self.options.token_file).read_text(encoding="utf-8").splitlines() or [""])[0].strip()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(
                f"connector {self.name}: token_file = {self.options.token_file!r}: cannot be read: {e}; mend or name another"
            ) from e

    @property
    def port(self) -> int:
        """Where it listens; 0 before the first `discover`."""
        return self._server.port if self._server else 0

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def discover(self, cursor: Cursor | None) -> Iterator[Found]:
        if self._server is None:
            token = self._token().encode()
            allowed = (
                (lambda given: True)
                if self.options.anonymous and not token
                else (lambda given: bool(token) and hmac.compare_digest(given, token))
            )
            self._server = Server(self.options, allowed, self.answered)
        server = self._server
        server.put_back(self._begun)  # whoever comes again before they were settled has not recorded them
        self._begun = []
        state = (cursor or {}).get("told")
        while pushes := server.take(BATCH):
            self._begun = pushes
            told, found = Marks(state, TOLD), Found()
            for push in pushes:
                self._tell(push, told, found)
            state = told.dump()
            found.cursor, found.settled = {"told": state}, self._settle
            yield found

    def _tell(self, push: Push, told: Marks, found: Found) -> None:
        push.accepted, push.known, push.refused = 0, 0, []
        for number, item in enumerate(push.items):
            made = mark(item.id) if item.id else ""
            if made and made in told:
                push.known += 1
                told.add([made])
                continue
            where = f"id {item.id}" if item.id else f"push {push.name} item {number}"
            before = len(found.refused)
            offer(found, self.name, item.url, where, license=item.license, alt=item.alt)
            if len(found.refused) > before:
                push.refused.append({"item": number, "why": found.refused[-1][2]})
            else:
                push.accepted += 1
                told.add([made] if made else [])

    def _settle(self) -> None:
        pushes, self._begun = self._begun, []
        if self._server is not None:
            self._server.settle(pushes)
