"""What is particular to the embedded log: one file, several processes, kill -9."""

import subprocess
import sys
import threading

import pytest

from streamlearn.contract.errors import Corrupt
from streamlearn.contract.event_log import CANDIDATES, SOURCE_STATE, SqliteLog


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.sqlite"


@pytest.fixture
def log(path):
    log = SqliteLog(path)
    log.ensure_topic(CANDIDATES, 3)
    log.ensure_topic(SOURCE_STATE, 1)
    return log


def test_a_file_that_is_no_database_is_named(tmp_path):
    path = tmp_path / "log.sqlite"
    path.write_bytes(b"not a database, but long enough to be looked at by sqlite" * 20)
    with pytest.raises(Corrupt, match=r"log\.sqlite.*not a database.*backup"):
        SqliteLog(path)


def test_processes_that_append_at_once_lose_and_double_nothing(log, path):
    code = (
        "import sys; from pathlib import Path; from streamlearn.contract.event_log import *\n"
        "log = SqliteLog(Path(sys.argv[1]))\n"
        "for i in range(50): log.append([NewRecord('candidates', b'k', b'%s-%d' % (sys.argv[2].encode(), i), 0) for _ in range(2)])"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(path), str(n)]) for n in range(3)]
    assert [c.wait() for c in children] == [0, 0, 0]
    records = log.read(CANDIDATES, 0, 0, 1000)
    assert [r.offset for r in records] == list(range(300))
    assert len({r.value for r in records}) == 150


def test_killed_while_appending_the_log_holds_whole_batches_only(log, path):
    code = (
        "import sys; from pathlib import Path; from streamlearn.contract.event_log import *\n"
        "log = SqliteLog(Path(sys.argv[1]))\n"
        "i = 0\nwhile True:\n"
        "    batch = [NewRecord('candidates', b'k', b'%d' % i, 0) for _ in range(20)]\n"
        "    log.append([*batch, NewRecord('source-state', b'c', b'%d' % i)])\n"
        "    i += 1"
    )
    for pause in (0.3, 0.45, 0.6):
        child = subprocess.Popen([sys.executable, "-c", code, str(path)])
        before = log.bounds(CANDIDATES, 0)[1]
        while log.bounds(CANDIDATES, 0)[1] == before:
            pass
        threading.Event().wait(pause / 3)
        child.kill()
        child.wait()
        records = log.read(CANDIDATES, 0, 0, 10**6)
        assert len(records) % 20 == 0 and log.latest(SOURCE_STATE, b"c") == records[-1].value


def test_a_recreated_log_has_another_name(tmp_path):
    assert SqliteLog(tmp_path / "a").log_id != SqliteLog(tmp_path / "b").log_id
    assert SqliteLog(tmp_path / "a").log_id == SqliteLog(tmp_path / "a").log_id
