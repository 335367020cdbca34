"""What each hostile answer costs the fetcher, by the kernel's account: `python -m tests.ingest.hostile_measure` prints it as JSON.

Every answer has a process of its own, forked from this one: a fork's peak memory begins at what is resident, so what it has taken is the
difference to a fork that fetches a plain picture.  A body that kills its process is seen by the way it ended.
"""

import asyncio
import json
import os
import sys
import time

from ingest.fetch.client import Client, Fetched
from ingest.fetch.screen import Refused
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.config import FetchConfig
from tests.ingest.hostile_bodies import CASES, ENDLESS, GOOD_JPEG, RAW

CONFIG = FetchConfig(allow_networks=("127.0.0.0/8",), total_timeout_s=2.0, attempts=1, robots=False)  # else the defaults: 20 MiB, 64 MP
SLICE = 2**16
PLAIN = "a plain picture"


def answers():
    """Name -> the pieces of an answer, of which `ENDLESS` never end."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n"
    bodies = {PLAIN: GOOD_JPEG} | {name: body for name, (body, _) in CASES.items()}
    return {name: [head % len(body), body] for name, body in bodies.items()} | {name: [data] for name, data in RAW.items()} | ENDLESS


async def fetch(pieces):
    """What becomes of a URL that is answered so, and how long it took; the connection must be closed at the end, whoever still writes."""
    cut = asyncio.Event()

    async def answer(reader, writer):
        try:
            await reader.readuntil(b"\r\n\r\n")
            pause_s = 0.0
            for piece in pieces:
                if isinstance(piece, float):
                    pause_s = piece
                elif piece is None:
                    await reader.read()  # until the other side hangs up
                else:
                    for at in range(0, len(piece), SLICE):  # so that what the server itself takes counts for nothing
                        writer.write(piece[at : at + SLICE])
                        await writer.drain()
                    await asyncio.sleep(pause_s)
            writer.write_eof()
            await reader.read()
        except (OSError, asyncio.IncompleteReadError):
            pass  # hung up on, as it should be
        finally:
            cut.set()
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x.jpg"
    began = time.monotonic()
    async with Client(CONFIG) as client:
        found = await client.fetch(Candidate(url=url, source="t", source_ref="", discovered_at="2026-11-21T00:00:00Z"))
        took = time.monotonic() - began
    await asyncio.wait_for(cut.wait(), 60)
    server.close()
    return found, took


async def tell(pieces, writing):
    found, took = await fetch(pieces)
    verdict = "stored" if isinstance(found, Fetched) else "refused" if isinstance(found, Refused) else "unanswered"
    os.write(writing, json.dumps([verdict, getattr(found, "reason", ""), took]).encode())
    os._exit(0)  # here: what it costs to take an event loop down is nobody's body


def measured(pieces):
    """(verdict, reason, peak bytes, seconds of processor, seconds) of a process that fetches one answer."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            asyncio.run(tell(pieces, writing))
        finally:
            os._exit(1)  # its traceback is on stderr
    os.close(writing)
    said = os.read(reading, 10**6)
    os.close(reading)
    _, status, usage = os.wait4(pid, 0)
    verdict, reason, took = json.loads(said) if status == 0 else (f"died, status {status}", "", 0.0)
    return verdict, reason, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime, took


def main():
    all_ = answers()
    _, _, base, base_s, _ = measured(all_[PLAIN])
    found = {}
    for name, pieces in all_.items():
        verdict, reason, peak, cpu_s, took = measured(pieces)
        found[name] = {"verdict": verdict, "reason": reason, "bytes": peak - base, "cpu_s": cpu_s - base_s, "took_s": took}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
