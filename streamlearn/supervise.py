"""Keep the roles running: start, restart, give up loudly, end cleanly.

A role is a subprocess in its own session, its output in logs/<role>.log.  One that dies is started again after a back-off that doubles; one
that dies `crash_loop` times within `crash_window_s`, or that refuses its configuration (exit code 2), ends the whole run with its last lines.
One that ends because its work is done (`train.max_steps`) is left alone.
SIGTERM or Ctrl-C reaches every role; whoever is still there after `grace_s` is killed, and that is said.  If the supervisor itself
is killed, the kernel ends the roles (PR_SET_PDEATHSIG).
"""

import ctypes
import fcntl
import logging
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from streamlearn.contract.config import SuperviseConfig
from streamlearn.contract.errors import ConfigError, StreamlearnError

PR_SET_PDEATHSIG = 1
TAIL = 15  # lines of a dead role's log
RESTORING = ".restoring"  # in a home: `streamlearn restore` is at work, or was killed (operate/restore.py)
REFUSED = 2  # exit code of a role whose configuration is wrong
logger = logging.getLogger(__name__)


class GivenUp(StreamlearnError):
    """A role cannot be kept running."""


@dataclass(frozen=True)
class RoleSpec:
    name: str
    argv: Sequence[str]


@dataclass
class Role:
    """One role under supervision."""

    spec: RoleSpec
    log: Path
    process: subprocess.Popen[bytes] | None = None
    deaths: deque[float] = field(default_factory=deque)  # monotonic times within the window
    restarts: int = 0
    due: float = 0.0  # monotonic time of the next start
    done: bool = False  # it said that its work is finished

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.spec.argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  one system call; no lock is taken between fork and exec
            )

    def tail(self) -> str:
        if not self.log.exists():
            return ""
        return "\n".join(f"    {line}" for line in self.log.read_text(errors="replace").splitlines()[-TAIL:])


def supervise(
    specs: Sequence[RoleSpec],
    config: SuperviseConfig,
    logs: Path,
    stop: threading.Event,
    tick: Callable[[dict[str, int]], None],
    finished: Callable[[str], bool] = lambda _: False,
) -> dict[str, int]:
    """Run the roles until `stop`; restarts by role.  `tick` is called about every `refresh_s` with the restarts so far.

    `finished` is asked about a role that ended with exit code 0 unbidden: whether its work is done, or it is to be started again.

    Raises GivenUp when a role cannot be kept running; everything has been stopped by then.
    """
    roles = [Role(spec, logs / f"{spec.name}.log") for spec in specs]
    drawn = 0.0
    try:
        for role in roles:
            role.start()
        while not stop.is_set():
            for role in roles:
                if not role.done:
                    _look_after(role, config, finished)
            if time.monotonic() - drawn >= config.refresh_s:
                tick({role.spec.name: role.restarts for role in roles})
                drawn = time.monotonic()
            stop.wait(0.05)
    finally:
        _stop(roles, config.grace_s)
    return {role.spec.name: role.restarts for role in roles}


def _look_after(role: Role, config: SuperviseConfig, finished: Callable[[str], bool]) -> None:
    now = time.monotonic()
    if role.process is None:
        if now >= role.due:
            role.restarts += 1
            role.start()
        return
    code = role.process.poll()
    if code is None:
        return
    role.process = None
    role.done = code == 0 and finished(role.spec.name)
    if role.done:
        logger.info("role %s has finished its work", role.spec.name)
        return
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if code == REFUSED:
        raise GivenUp(f"role {role.spec.name} refuses to start ({how}); it said:\n{role.tail()}")
    role.deaths.append(now)
    while now - role.deaths[0] > config.crash_window_s:
        role.deaths.popleft()
    if len(role.deaths) >= config.crash_loop:
        raise GivenUp(
            f"role {role.spec.name} died {len(role.deaths)} times within {config.crash_window_s:g} s, last {how}; giving up. "
            f"Mend what it says and start again, nothing is lost. The end of {role.log}:\n{role.tail()}"
        )
    wait = min(config.backoff_max_s, config.backoff_s * 2 ** (len(role.deaths) - 1))
    role.due = now + wait
    logger.warning("role %s died (%s); again in %.1f s, see %s", role.spec.name, how, wait, role.log)


def _stop(roles: Sequence[Role], grace_s: float) -> None:
    alive = [role for role in roles if role.process is not None and role.process.poll() is None]
    for role in alive:
        _signal(role, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for role in alive:
        assert role.process is not None
        try:
            role.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.error("role %s did not end within %g s: killed", role.spec.name, grace_s)
            _signal(role, signal.SIGKILL)
            role.process.wait()


def _signal(role: Role, number: signal.Signals) -> None:
    """To the role itself; on SIGKILL to its whole session, workers included."""
    assert role.process is not None
    try:
        if number == signal.SIGKILL:
            os.killpg(role.process.pid, number)
        else:
            role.process.send_signal(number)
    except ProcessLookupError:
        return  # it ended by itself just now


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def exclusive(home: Path, *, restoring: bool = False) -> Iterator[IO[str]]:
    """One supervisor a home.  Raises ConfigError naming the other's pid, and for a home that is half restored unless that is what goes on."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(
                f"{home}: already in use by process {lock.read().strip() or 'unknown'}; stop it first, or use another --home"
            ) from None
        if (home / RESTORING).exists() and not restoring:
            raise ConfigError(f"{home}: half restored; give the same `streamlearn restore` again")
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield lock
