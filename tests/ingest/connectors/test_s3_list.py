"""A bucket, listed again and again: moto's server, whose clock for objects the tests set."""

import socket
import time
from datetime import UTC, datetime

import pytest
from moto.s3.models import s3_backends

from ingest.connectors import s3_list
from ingest.connectors.s3_list import S3Connector, S3Options
from streamlearn.contract.errors import ConfigError, Retryable
from tests.ingest.connectors.harness import Killed, candidates, cursor, go, go_until, letters, make_log, urls


def put(bucket, key, age_s=1000.0, body=b"x"):
    bucket.client().put_object(Bucket=bucket.name, Key=key, Body=body)
    age(bucket, key, age_s)


def age(bucket, key, age_s):
    stored = s3_backends["123456789012"]["aws"].buckets[bucket.name].keys.getlist(key)[-1]
    stored.last_modified = datetime.fromtimestamp(time.time() - age_s, UTC).replace(tzinfo=None)


def connector(bucket, **more):
    options = dict(bucket=bucket.name, endpoint_url=bucket.url, path_style=True, settle_s=60.0)
    made = S3Connector("c", S3Options(**options | more))
    made.check()
    return made


def next_pass(made):
    """It is time for it."""
    made.discover = lambda c, discover=made.discover: discover(c and c | {"next": 0.0})
    return made


def url(bucket, key):
    return f"{bucket.url}/{bucket.name}/{key}"


def test_images_below_the_prefix_are_told_once(bucket, tmp_path):
    log = make_log(tmp_path)
    for key in ("in/a.jpg", "in/B ä?.PNG", "in/readme.txt", "in/folder.jpg/", "out/c.jpg", "in/x/../d.jpg"):
        put(bucket, key)
    assert go(log, connector(bucket, prefix="in/")) == 2
    assert urls(log) == sorted([url(bucket, "in/B%20%C3%A4%3F.PNG"), url(bucket, "in/a.jpg")]) and len(letters(log)) == 1
    assert go(log, connector(bucket, prefix="in/")) == 0 and go(log, next_pass(connector(bucket, prefix="in/"))) == 0
    assert next(c for c in candidates(log) if c.url.endswith("a.jpg")).source_ref == "in/a.jpg"


def test_what_came_before_the_marker_or_was_changed_is_told_by_the_next_pass_and_only_that(bucket, tmp_path):
    log = make_log(tmp_path)
    put(bucket, "m.jpg")
    put(bucket, "young.jpg", age_s=5)
    assert go(log, connector(bucket)) == 1  # the young one may have neighbours that are not listed yet
    put(bucket, "a.jpg", age_s=30)
    put(bucket, "m.jpg", age_s=30, body=b"new")
    assert go(log, next_pass(connector(bucket, settle_s=2.0))) == 3
    assert go(log, next_pass(connector(bucket, settle_s=2.0))) == 0
    assert urls(log) == sorted(url(bucket, k) for k in ("a.jpg", "m.jpg", "m.jpg", "young.jpg"))
    assert len({c.etag for c in candidates(log) if c.url.endswith("m.jpg")}) == 2


def test_objects_that_come_while_it_lists_are_told_exactly_once(bucket, tmp_path):
    """By the store's own clock, with the shortest settling: 0 to 29 are put while passes go on."""
    log, made, put_ = make_log(tmp_path), connector(bucket, settle_s=1.0, rescan_s=0.05), []

    def more():
        if len(put_) < 30:
            key = f"{(len(put_) * 7) % 30}.jpg"  # now before, now behind the marker
            bucket.client().put_object(Bucket=bucket.name, Key=key, Body=b"x")
            put_.append(key)
        return len(urls(log)) >= 30

    go_until(log, made, more)
    assert urls(log) == sorted(url(bucket, k) for k in put_)


@pytest.mark.parametrize("when", ["before", "half way", "after"])
@pytest.mark.parametrize("nth", range(1, 9))
def test_killed_at_any_append_every_object_is_announced_exactly_once(bucket, tmp_path, monkeypatch, when, nth):
    monkeypatch.setattr(s3_list, "BATCH", 4)
    log, keys = make_log(tmp_path), [f"{n:02}.jpg" for n in range(11)]
    for key in keys:
        put(bucket, key)
    log.countdown, log.when = nth, when
    with pytest.raises(Killed):
        go(log, connector(bucket))
    log.countdown = -1
    go(log, connector(bucket))
    assert urls(log) == sorted(url(bucket, k) for k in keys)
    assert go(log, next_pass(connector(bucket))) == 0


def test_many_pages_go_on_where_the_last_look_ended(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(s3_list, "LOOK_S", 1e-9)
    log, made = make_log(tmp_path), connector(bucket, suffixes=(".jpg",))
    client, listed = made._connected(), []
    list_ = client.list_objects_v2
    client.list_objects_v2 = lambda **more: (listed.append(more.get("StartAfter")), list_(**more | {"MaxKeys": 3}))[1]
    monkeypatch.setattr(s3_list.time, "monotonic", iter(range(10**6)).__next__)  # a second passes at every look at the clock
    monkeypatch.setattr(s3_list, "LOOK_S", 1.5)
    for n in range(8):
        put(bucket, f"{n}.{'jpg' if n in (0, 7) else 'txt'}")
    looks = 0
    while cursor(log) is None or cursor(log)["until"] is not None if looks else True:
        go(log, made)
        looks += 1
        assert looks < 10
    assert listed == [None, "2.txt", "5.txt"] and looks == 3 and len(urls(log)) == 2


def test_one_pass_and_no_more(bucket, tmp_path):
    log = make_log(tmp_path)
    put(bucket, "a.jpg")
    assert go(log, connector(bucket, rescan_s=0.0)) == 1
    assert go(log, connector(bucket, rescan_s=0.0, endpoint_url="http://127.0.0.1:1")) == 0  # nobody is asked again


def test_the_public_address(bucket):
    assert connector(bucket, public_url="https://cdn.example/{key}?w=1")._url("a/b c.jpg") == "https://cdn.example/a/b%20c.jpg?w=1"
    aws = S3Connector("c", S3Options(bucket="b", region="eu-west-1"))
    assert aws._url("k.jpg") == "https://b.s3.eu-west-1.amazonaws.com/k.jpg"


def test_a_store_in_trouble_is_waited_for(bucket, tmp_path):
    log = make_log(tmp_path)
    put(bucket, "a.jpg")
    with pytest.raises(Retryable, match="cannot be listed"):
        go(log, S3Connector("c", S3Options(bucket="no-such-bucket", endpoint_url=bucket.url, path_style=True)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        away = connector(bucket, endpoint_url=f"http://127.0.0.1:{taken.getsockname()[1]}")
    with pytest.raises(Retryable, match="cannot be listed"):
        go(log, away)
    assert go(log, connector(bucket)) == 1


@pytest.mark.parametrize(
    "more", [dict(endpoint_url="ftp://x"), dict(public_url="https://x/"), dict(public_url="{key}"), dict(suffixes=(".JPG",))]
)
def test_bad_options_are_refused_before_anything_starts(more):
    with pytest.raises(ConfigError, match=f"connector c: {next(iter(more))} = "):
        S3Connector("c", S3Options(**dict(bucket="b") | more)).check()
