"""Whatever a server answers, the fetcher has a reason for it within its caps."""

import asyncio

import pytest

from ingest.fetch.client import Client, Fetched, Unanswered
from ingest.fetch.screen import Reason, Refused, Seen, screen, sniff
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.config import FetchConfig
from tests.ingest.server import BODIES, FETCH, Site, picture, serving

EXPECTED = {
    "empty": Reason.EMPTY,
    "page": Reason.NOT_AN_IMAGE,
    "svg": Reason.NOT_AN_IMAGE,
    "noise": Reason.NOT_AN_IMAGE,
    "truncated-jpg": Reason.TRUNCATED,
    "truncated-png": Reason.TRUNCATED,
    "truncated-webp": Reason.TRUNCATED,
    "header-only": Reason.TRUNCATED,
    "gif": Reason.ANIMATED,
    "webp": Reason.ANIMATED,
    "apng": Reason.ANIMATED,
    "huge": Reason.TOO_MANY_PIXELS,
    "tiny": Reason.TOO_SMALL,
    "nowhere": Reason.GONE,
    "loop": Reason.REDIRECTS,
    "endless": Reason.TOO_LARGE,
    "lying": Reason.TOO_LARGE,
}


@pytest.fixture(scope="module")
def site():
    site = Site()
    with serving(site) as base:
        site.base = base
        yield site


def fetch(url, config=FETCH, folders=()):
    async def go():
        async with Client(config, lambda: folders) as client:
            return await client.fetch(Candidate(url=url, source="t", source_ref="", discovered_at="2026-11-21T00:00:00Z"))

    return asyncio.run(go())


def test_an_image_comes_as_it_was_served_whatever_it_is_called(site):
    got = fetch(f"{site.base}/7.jpg")
    assert isinstance(got, Fetched) and got.body == picture(7)
    assert (got.seen, got.etag, got.http_status) == (Seen("jpg", 24, 20), '"7"', 200)


@pytest.mark.parametrize("name", EXPECTED)
def test_trouble_is_refused_with_its_reason(site, name):
    got = fetch(f"{site.base}/trouble/{name}")
    assert isinstance(got, Refused) and got.reason == EXPECTED[name], got


def test_an_endless_body_is_cut_off_at_the_server_too(site):
    fetch(f"{site.base}/trouble/endless")
    assert site.hits.get("endless cut") == 1


@pytest.mark.parametrize("name", ["stalled", "drip"])
def test_a_server_that_takes_too_long_is_left_for_later(site, name):
    got = fetch(f"{site.base}/trouble/{name}", FETCH.model_copy(update={"attempts": 1}))
    assert isinstance(got, Unanswered) and "no whole answer within 1 s" in got.detail


def test_a_server_that_names_a_time_is_not_asked_before_it(site):
    before = site.hits.get("busy", 0)
    got = fetch(f"{site.base}/trouble/busy")
    assert isinstance(got, Unanswered) and got.after_s == 77 and site.hits["busy"] == before + 1


def test_a_fault_that_passes_is_tried_again_at_once(site):
    site.fail_first[55] = 2
    assert isinstance(fetch(f"{site.base}/55.jpg"), Fetched) and site.hits[55] == 3


def test_nobody_listening_is_left_for_later():
    got = fetch("http://127.0.0.1:9/1.jpg")
    assert isinstance(got, Unanswered) and "connect" in got.detail


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a..b", ".", "%zz", "a b", "*", "a.example.."])
@pytest.mark.parametrize("robots", [True, False])
def test_what_is_no_name_of_a_host_is_refused_and_ends_no_process(host, robots):
    got = fetch(f"http://{host}/1.jpg", FETCH.model_copy(update={"robots": robots}))
    assert isinstance(got, Refused) and got.reason == Reason.BAD_URL


def test_a_file_is_read_only_from_a_watched_folder(tmp_path):
    watched, other = tmp_path / "watched", tmp_path / "other"
    for folder in (watched, other):
        folder.mkdir()
        (folder / "a b.jpg").write_bytes(picture(2))
    (watched / "link.jpg").symlink_to(other / "a b.jpg")
    assert fetch((watched / "a b.jpg").as_uri(), folders=(watched,)).body == picture(2)
    for url in (
        (other / "a b.jpg").as_uri(),
        f"file://{watched}/../other/a%20b.jpg",
        (watched / "link.jpg").as_uri(),
        "file:///etc/passwd",
    ):
        assert fetch(url, folders=(watched,)).reason == Reason.OUTSIDE, url
    assert fetch((watched / "gone.jpg").as_uri(), folders=(watched,)).reason == Reason.GONE


def test_a_folder_that_is_watched_since_later_is_asked_for(tmp_path):
    """A connector may be made while the fetcher runs; one that is there is not asked about again."""
    asked = []
    for name in ("early", "late"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(picture(1))

    def folders():
        asked.append(1)
        return (tmp_path / "early",) if len(asked) == 1 else (tmp_path / "early", tmp_path / "late")

    async def go():
        async with Client(FETCH, folders) as client:
            found = []
            for name in ("early", "early", "late", "late"):
                url = (tmp_path / name / "a.jpg").as_uri()
                found.append(await client.fetch(Candidate(url=url, source="t", source_ref="", discovered_at="2026-11-21T00:00:00Z")))
            return found

    assert [got.body for got in asyncio.run(go())] == [picture(1)] * 4 and len(asked) == 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_each_format_is_known_by_its_bytes(kind):
    body = picture(4, size=(300, 280), kind=kind)
    seen = screen(body, max_pixels=10**6, min_side=16)
    assert isinstance(seen, Seen) and (seen.width, seen.height) == (300, 280) and seen.ext == sniff(body)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(24, 20), (600, 500)])
def test_a_file_cut_short_anywhere_is_never_stored(kind, size):
    body = picture(4, size=size, kind=kind)
    whole = 40 if kind == "PNG" else 0  # behind the last pixels of a PNG come checksums and an empty chunk
    for cut in (1, 2, 10, len(body) // 3, len(body) // 2, len(body) - 40, len(body) - 1 - whole):
        assert isinstance(screen(body[:cut], max_pixels=10**6, min_side=16), Refused), cut


def test_no_body_of_the_table_takes_the_default_caps_as_an_image():
    caps = FetchConfig()
    assert [n for n, b in BODIES.items() if isinstance(screen(b, max_pixels=caps.max_pixels, min_side=caps.min_side), Seen)] == []


def test_headers_that_are_no_text_are_made_text(site, tmp_path):
    """They go into JSON and parquet, which hold nothing else."""
    got = fetch(f"{site.base}/trouble/bytes")
    assert isinstance(got, Fetched) and '"' in got.etag
    for text in (got.etag, got.last_modified):
        text.encode()


def test_a_file_name_that_is_none_is_refused(tmp_path):
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    for url in ("file:///a%00b.jpg", f"file://{tmp_path}/loop.jpg"):
        got = fetch(url, folders=(tmp_path,))
        assert isinstance(got, Refused) and got.reason in (Reason.BAD_URL, Reason.OUTSIDE), got
