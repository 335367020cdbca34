"""One question tells what became of an image, and the log's lines can be followed by machine."""

import io
import json
import logging

import pytest
from click.testing import CliRunner

from streamlearn.__main__ import cli
from streamlearn.cli.logs import JsonLines
from streamlearn.contract.candidate import Candidate, politeness_key
from streamlearn.contract.errors import NotFound
from streamlearn.contract.event_log import CANDIDATES, NewRecord
from streamlearn.contract.shards import read_sidecar, sidecar_key
from streamlearn.operate.trace import trace
from tests.operate.homes import learn, running


def outcomes(at):
    return [{**o, "row": row} for row in at.catalog.rows() for o in read_sidecar(at.store.get(sidecar_key(row.key))).to_pylist()]


def of(at, name):
    return [(e.what, e.where) for e in trace(at.log, at.store, at.catalog, name)]


def test_a_stored_image_is_found_by_url_digest_and_offset_up_to_the_batches_that_learnt_it(home):
    for step in range(8, 40, 4):
        learn(home, step)
    at = running(home)
    stored = next(o for o in outcomes(at) if o["outcome"] == "stored" and not o["origin"])
    row = stored["row"]
    wanted = [("stored", f"{row.topic}/{row.partition}/{stored['offset']}"), ("learnt", row.key)]
    assert of(at, stored["url"]) == of(at, stored["sha256"]) == of(at, wanted[0][1]) == wanted
    learnt = trace(at.log, at.store, at.catalog, stored["url"])[1].more
    rounds = [json.loads(at.store.get(key)) for key in at.store.list("rounds/")]
    (number,) = [r["round"] for r in rounds if row.key in [s[1] for s in r["shards"]]]
    before = sum(r["slots"] // 8 for r in rounds[:number])
    assert learnt == {"round": number, "first_batch": before + 1, "last_batch": before + rounds[number]["slots"] // 8}


def test_a_retry_is_joined_to_the_candidate_it_came_from_by_either_name(home):
    at = running(home)
    second = next(o for o in outcomes(at) if o["origin"] and o["outcome"] == "stored")
    row = second["row"]
    place = f"{row.topic}/{row.partition}/{second['offset']}"
    told = of(at, second["origin"])
    assert told[0] == ("deferred", second["origin"]) and ("stored", place) in told and of(at, place) == told == of(at, second["url"])


def test_a_refusal_is_told_with_the_detail_of_its_dead_letter(home):
    at = running(home)
    refused = next(o for o in outcomes(at) if o["outcome"] == "rejected")
    (event,) = trace(at.log, at.store, at.catalog, refused["url"])
    assert event.what == "rejected" and event.more["reason"] == refused["reason"] and event.more["detail"]


def test_what_waits_and_what_nobody_knows(home):
    at, url = running(home), "http://late.example/1.jpg"
    with pytest.raises(NotFound, match="neither a live shard nor the log knows of it"):
        trace(at.log, at.store, at.catalog, url)
    c = Candidate(url=url, source="t", source_ref="1", discovered_at="2026-11-21T00:00:00Z")
    ((partition, offset),) = at.log.append([NewRecord(CANDIDATES, politeness_key(url), c.to_json())])
    assert of(at, url) == [("waits", f"candidates/{partition}/{offset}")] == of(at, f"candidates/{partition}/{offset}")
    done = CliRunner().invoke(cli, ["trace", url, "--home", str(home), "--json"])
    assert done.exit_code == 0 and json.loads(done.output)["what"] == "waits"


def test_a_line_of_the_log_names_what_it_is_about():
    out, logger = io.StringIO(), logging.getLogger("tests.lines")
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonLines("fetch"))
    logger.addHandler(handler)
    try:
        logger.error("sealed %s", "a", extra={"ids": {"shard": "a"}})
        try:
            raise ValueError("bad\nline")
        except ValueError:
            logger.exception("ended")
    finally:
        logger.removeHandler(handler)
    first, second = map(json.loads, out.getvalue().splitlines())
    assert (first["role"], first["level"], first["message"], first["shard"]) == ("fetch", "error", "sealed a", "a")
    assert "ValueError: bad" in second["trace"] and second["at"].endswith("Z")


def test_the_line_of_a_round_names_the_round_and_its_shards(home, caplog):
    with caplog.at_level("INFO"):
        learn(home, step=8)
    store = running(home).store
    (ids,) = [r.ids for r in caplog.records if "round" in getattr(r, "ids", {})]
    recorded = json.loads(store.get(store.list("rounds/")[-1]))
    assert ids == {"round": recorded["round"], "shards": [shard[1] for shard in recorded["shards"]]} and ids["shards"]
