"""A rank that is killed at the n-th thing it does to the cache's folder, for every n, while another one lives.

    python -m tests.stream.dying FOLDER        prints how many deaths there were; a traceback where a survivor found something amiss

Its own process, without threads and torch: each rank that is to die is a fork.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import sys
from pathlib import Path

from streamlearn.stream.copies import Copies

SIZE, BUDGET = 3000, 8000  # two fit
TOUCHES = (
    *((os, "open"), (os, "pwrite"), (os, "posix_fallocate"), (fcntl, "flock"), (shutil, "rmtree")),
    *((Path, name) for name in ("mkdir", "unlink", "hardlink_to", "replace")),
)


def body(name):
    return hashlib.sha256(name.encode()).digest() * SIZE


def shard(name):
    data = body(name)[:SIZE]
    return hashlib.sha256(data).hexdigest(), data


def fetch(copies, name, near=None):
    """As the cache does it; the path."""
    sha256, data = shard(name)
    part = copies.claim(sha256, SIZE, near or {}, heeded=99, force=False)
    assert isinstance(part, Path), (name, part)
    part.write_bytes(data)
    return copies.publish(sha256)


def life(folder):
    """All that a rank does: purge before it is one, fetch, take, drop, evict, purge, find damage, leave."""
    copies = Copies(folder, BUDGET)
    copies.purge([shard("old")[0]], 0)
    assert copies.take(shard("there")[0])
    fetch(copies, "a")
    copies.drop([shard("a")[0]])
    fetch(copies, "b")  # evicts a: `there` is in use
    copies.purge([shard("b")[0]], 7)
    fetch(copies, "c")
    copies.discard(shard("c")[0])
    copies.close()


def dying(folder, at):
    """True if it was killed at that touch; False if it did less."""
    pid = os.fork()
    if not pid:
        left = [at]
        for owner, name in TOUCHES:

            def touch(*args, really=getattr(owner, name), **how):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return really(*args, **how)

            setattr(owner, name, touch)
        life(folder)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or status == 0, status
    return os.WIFSIGNALED(status)


def check(folder, witness):
    """What the survivor finds."""
    mine = shard("there")[0]
    assert (witness._own / f"{mine}.tar").exists()  # in use by a living rank through all of it
    for name in ("a", "b", "c"):  # nothing that the dead had begun stands in the way
        if not witness.take(shard(name)[0]):
            assert fetch(witness, name, {mine: 0})
        witness.drop([shard(name)[0]])
    held = {path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.suffix in (".tar", ".part")}
    assert witness.bytes == sum(held.values()) <= BUDGET
    assert [path.name for path in (folder / ".ranks").iterdir()] == [witness._id]
    for copy in folder.glob("*.tar"):
        assert hashlib.sha256(copy.read_bytes()).hexdigest() == copy.stem


def main(folder):
    deaths = 0
    while True:
        place = folder / str(deaths)
        witness = Copies(place, BUDGET)
        fetch(witness, "there")
        fetch(witness, "old")
        witness.drop([shard("old")[0]])
        killed = dying(place, deaths + 1)
        with contextlib.ExitStack() as stack:
            stack.callback(print, "killed at touch", deaths + 1, file=sys.stderr)
            check(place, witness)
            stack.pop_all()
        witness.close()
        if not killed:
            break
        deaths += 1
    print(deaths)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
