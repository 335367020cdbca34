"""The cache against real S3 over a bad network, and against other processes on its folder."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch

from streamlearn.adapters.s3_store import S3Store
from tests.adapters.faultproxy import Fault, FaultProxy
from tests.conftest import REPO
from tests.stream.test_cache import ADDED, drive, filled, same, until
from tests.stream.world import World, take


def on_s3(home, bucket, url):
    world = World(home)
    world.store = S3Store(bucket.config(attempts=1))
    for count, partition in ADDED:
        world.add(count, partition)
    world.store = S3Store(bucket.config(endpoint_url=url, attempts=1))
    return world


def test_s3_that_is_gone_for_seconds_in_the_middle_of_training_changes_no_batch(tmp_path, bucket):
    whole, told = take(filled(tmp_path / "plain").stream(), 100), []
    with FaultProxy(bucket.server) as proxy:
        world = on_s3(tmp_path, bucket, proxy.url)
        stream = world.stream(prefetch=1, prefetch_bytes=1)
        found = drive(stream, 2)
    with contextlib.ExitStack() as back:

        def again(found):
            if stream.waiting()["waiting_s"] > 2.0 and not told:
                told.append(stream.waiting()["waiting"])
                back.enter_context(FaultProxy(bucket.server, port=proxy.port))

        found += drive(stream, len(whole) - 2, again)
    assert same(found, whole) and "failed" in told[0] and stream.counters()["lost"] == 0
    stream.close()


def test_s3_that_throttles_and_breaks_off_answers_changes_no_batch(tmp_path, bucket):
    whole = take(filled(tmp_path / "plain").stream(), 100)
    faults = [Fault("truncate", method="GET", path="shards", keep=5000), Fault("reset_before", method="HEAD", path="shards")]
    faults += [Fault("answer", method="GET", path="shards"), Fault("answer", method="GET", path="rounds")]
    with bucket.behind_faults(*faults) as proxy:
        world = on_s3(tmp_path, bucket, proxy.url)
        stream = world.stream()
        assert same(drive(stream, len(whole)), whole)
        assert stream.counters()["failures"] >= 4 and stream.counters()["lost"] == 0 and not any(fault.times for fault in faults)
        stream.close()


CHILD = """
import json, sys, time
from pathlib import Path
import torch
from tests.stream.stores import Road
from tests.stream.world import World
from tests.stream.test_cache import drive

if __name__ == "__main__":
    home, rank, ranks, count = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    world = World(home)
    world.store = Road(home / "store")
    world.store.stalled = sys.argv[5]
    if rank:
        while not (home / "store" / "rounds" / "00000000.json").exists():
            time.sleep(0.05)  # the leader plans
    stream = world.stream(rank=rank, ranks=ranks, workers=1)
    found = drive(stream, count)
    torch.save([batch.crops for batch in found], home / f"rank{rank}.pt")
    print(json.dumps(dict(world.store.asked)), flush=True)
    stream.close()
"""


def child(home, rank, ranks, count, stalled=""):
    script = home / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, script, home, str(rank), str(ranks), str(count), stalled]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)})


@pytest.mark.slow
def test_two_learners_on_one_folder_download_each_shard_once(tmp_path):
    whole = take(filled(tmp_path / "plain").stream(), 9)
    home = filled(tmp_path / "ranks").home
    ranks = [child(home, rank, 2, 9) for rank in range(2)]
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    asked = [json.loads(text) for text in said]
    assert {key: sum(counts.get(key, 0) for counts in asked) for key in {*asked[0], *asked[1]}} == dict.fromkeys(
        [row.key for row in World(home).catalog.rows()], 1
    )
    got = [torch.load(home / f"rank{rank}.pt") for rank in range(2)]
    both = [tuple(torch.cat(crops, dim=1) for crops in zip(*batch, strict=True)) for batch in zip(*got, strict=True)]
    assert all(torch.equal(x, y) for a, b in zip(whole, both, strict=True) for x, y in zip(a.crops, b, strict=True))


@pytest.mark.slow
def test_a_learner_that_is_killed_while_it_downloads_holds_up_no_other(tmp_path):
    world = filled(tmp_path)
    whole = take(World(tmp_path).stream(cache=tmp_path / "c1"), 9)
    victim = world.catalog.rows()[0].sha256  # of the first round
    killed = child(tmp_path, 0, 1, 9, stalled=victim[:12])
    until(lambda: list((tmp_path / "cache").rglob(f"{victim}.part")))
    killed.kill()
    killed.wait()
    stream = world.stream()
    assert same(drive(stream, 9), whole)
    stream.close()
    assert not list((tmp_path / "cache").rglob("*.part"))
