"""Forty and more bodies that mean harm: each has its verdict, within a bound of memory and time, and the client goes on."""

import asyncio
import gzip
import json
import os
import subprocess
import sys
import warnings

import pytest
from aiohttp import web
from hypothesis import example, given
from hypothesis import strategies as st

from ingest.fetch.client import Client, Fetched, Unanswered
from ingest.fetch.screen import Reason, Refused, Seen, screen
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.config import FetchConfig
from tests.conftest import REPO
from tests.ingest.hostile_bodies import CASES, ENDLESS, GOOD_GIF, GOOD_JPEG, GOOD_PNG, GOOD_WEBP, PROGRESSIVE, RAW, STORED
from tests.ingest.server import animated

CONFIG = FetchConfig(
    allow_networks=("127.0.0.0/8",),
    total_timeout_s=3.0,
    attempts=1,
    host_rate=0,
    per_host=64,
    robots=False,
    breaker_failures=0,
    max_bytes=4 * 2**20,
)


def serve_and_fetch(handler, paths, config=CONFIG):
    async def go():
        app = web.Application()
        app.router.add_get("/{name:.*}", handler)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        base = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            async with Client(config) as client:
                told = [Candidate(url=f"{base}/{p}", source="t", source_ref="", discovered_at="2026-11-21T00:00:00Z") for p in paths]
                return await asyncio.gather(*(client.fetch(candidate) for candidate in told))
        finally:
            await runner.cleanup()

    return asyncio.run(go())


def expected(name, verdict, reason):
    want = CASES[name][1]
    if want is None:  # what hides in the metadata is no harm to the pixels
        return verdict in ("stored", "refused")
    return verdict == (STORED if want == STORED else "refused") and (not isinstance(want, Reason) or reason == want)


def test_every_body_has_its_verdict_and_the_client_goes_on():
    names = list(CASES)

    async def handler(request):
        return web.Response(body=CASES[names[int(request.match_info["name"])]][0], content_type="text/html")

    caps = {"total_timeout_s": 600.0, "max_bytes": 20 * 2**20, "max_pixels": FetchConfig().max_pixels}
    found = dict(zip(names, serve_and_fetch(handler, range(len(names)), CONFIG.model_copy(update=caps)), strict=True))
    verdicts = {n: ("stored" if isinstance(r, Fetched) else "refused" if isinstance(r, Refused) else "none") for n, r in found.items()}
    assert not {n: r for n, r in found.items() if not expected(n, verdicts[n], getattr(r, "reason", ""))}


@pytest.mark.slow
def test_no_answer_takes_more_memory_or_time_than_its_caps_and_none_kills_its_process():
    """Each in a process of its own, by the kernel's account (hostile_measure.py)."""
    argv = [sys.executable, "-m", "tests.ingest.hostile_measure"]
    done = subprocess.run(argv, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    assert set(CASES) | set(RAW) | set(ENDLESS) < set(found) and len(found) > 120
    assert not {n: r for n, r in found.items() if r["verdict"] not in ("stored", "refused", "unanswered")}
    assert not {n: r for n, r in found.items() if n in CASES and not expected(n, r["verdict"], r["reason"])}
    large = {"an endless body", "an endless body of chunks", "ten gigabytes announced"}  # cut off at their cap, not at the time-out
    assert not {
        n: r for n, r in found.items() if n in ENDLESS and (r["verdict"] == "stored" or (n in large) != (r["reason"] == "too_large"))
    }
    # a body may come as 20 MiB of pieces and be joined; to decode one of 64 million pixels would take 187 to 367
    assert not {n: r for n, r in found.items() if r["bytes"] > 64 * 2**20}
    assert not {n: r for n, r in found.items() if r["cpu_s"] > 10.0}  # the worst takes 1; without the caps on pieces: minutes


async def _raw(request, data):
    """What is no well-formed HTTP, said to the very socket."""
    request.transport.write(data)
    request.transport.close()
    return web.Response()


def test_what_is_no_http_is_left_for_later_or_refused():
    names = list(RAW)

    async def handler(request):
        return await _raw(request, RAW[names[int(request.match_info["name"])]])

    found = dict(zip(names, serve_and_fetch(handler, range(len(names))), strict=True))
    assert not [name for name, r in found.items() if not isinstance(r, Refused | Unanswered) and r.body != GOOD_JPEG], (
        found
    )  # whole, or nothing


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "identity, gzip"])
def test_a_bomb_in_an_encoding_stays_as_small_as_it_came(encoding):
    """10 MB of zeros in 10 kB: nobody asked for an encoding, and nothing is unpacked."""
    bomb = gzip.compress(bytes(10_000_000))

    async def handler(request):
        return web.Response(body=bomb, headers={"Content-Encoding": encoding, "Content-Type": "image/jpeg"})

    (result,) = serve_and_fetch(handler, ["x"])
    assert isinstance(result, Refused) and result.reason == Reason.NOT_AN_IMAGE


MOLDS = [GOOD_JPEG, PROGRESSIVE, GOOD_PNG, GOOD_WEBP, GOOD_GIF, *(animated(kind) for kind in ("GIF", "WEBP", "PNG"))]
EDITS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 9), st.binary(max_size=12)), max_size=8)


@given(st.sampled_from(MOLDS), EDITS)
@example(GOOD_GIF[:13], [])
@example(GOOD_GIF, [(12, 9, b"")])
def test_any_bytes_have_a_verdict(mold, edits):
    """Without a word on stderr either: hostile files are not to fill our log."""
    for at, length, new in edits:
        mold = mold[:at] + new + mold[at + length :]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = screen(mold, max_pixels=10**6, min_side=4)
    assert isinstance(found, Refused) or (isinstance(found, Seen) and min(found.width, found.height) >= 4)
