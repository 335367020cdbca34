"""Stores that are buckets, logs that are Kafka's: what is copied, what is only named, and the commands themselves."""

import json

from click.testing import CliRunner

from ingest import audit
from streamlearn.__main__ import cli
from streamlearn.contract.event_log import TAKEDOWNS, NewRecord
from streamlearn.contract.object_store import FolderStore
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.operate.backup import Running, back_up
from streamlearn.operate.backup_set import BackupSet
from streamlearn.operate.restore import Outside
from tests.adapters.kafka import MockCluster, open_mocked
from tests.operate.homes import learn, restored, running


def ran(*words):
    done = CliRunner().invoke(cli, [*map(str, words)])
    return done.exit_code, str(done.exception), done.output


def in_bucket(bucket, prefix):
    """As settings of `restore`."""
    found = bucket.config(prefix=prefix).model_dump()
    names = ("kind", "bucket", "prefix", "endpoint_url", "path_style", "attempts")
    return [word for name in names for word in ("--set", f"store.{name}={json.dumps(found[name])}")]


def findings(folder):
    at = running(folder)
    return audit.verify(at.log, at.store, at.catalog, deep=True, sample=0).findings


def keys(bucket):
    return sorted(e["Key"] for e in bucket.client().list_objects_v2(Bucket=bucket.name).get("Contents", ()))


def test_a_home_moves_into_a_bucket_and_is_backed_up_there_by_name_and_whole(home, tmp_path, bucket):
    place, remote = tmp_path / "b", f"s3://{bucket.name}/backups"
    assert ran("backup", "--home", home, "--to", place)[0] == 0
    moved = tmp_path / "moved"
    code, error, _ = ran("restore", "--from", place, "--home", moved, *in_bucket(bucket, "main"))
    assert code == 0, error
    assert findings(moved) == [] and not (moved / "store").exists()

    code, error, said = ran("backup", "--home", moved, "--to", remote, "--json")
    assert code == 0, error
    first = json.loads(said)
    assert first["named"] == 2 * len(running(moved).catalog.rows()) and not [
        k for k in keys(bucket) if k.startswith("backups/blobs") and k.endswith(".tar")
    ]
    learn(moved, step=8)

    where = in_bucket(bucket, "main")
    code, error, _ = ran("restore", "--from", remote, "--home", tmp_path / "x", *where)
    assert code == 1 and "the store holds another state" in error and "store.prefix" in error
    code, error, _ = ran("restore", "--from", remote, "--home", tmp_path / "x", *in_bucket(bucket, "other"))
    assert code == 1 and "objects that the backup only names are not in the store" in error
    assert not [k for k in keys(bucket) if k.startswith("other")] and not (tmp_path / "x" / "config.json").exists()
    code, error, _ = ran("restore", "--from", remote, "--home", tmp_path / "x", "--force", *where)
    assert code == 0, error
    assert Checkpoints(running(tmp_path / "x").store, keep=2).load()["step"] == 4 and findings(tmp_path / "x") == []

    assert ran("backup", "--home", tmp_path / "x", "--to", remote, "--copy-shards", "--keep", "1")[0] == 0
    code, error, _ = ran("restore", "--from", remote, "--home", tmp_path / "y", *in_bucket(bucket, "other"))
    assert code == 0 and findings(tmp_path / "y") == [], error


def test_the_commands_say_what_they_did_and_refuse_what_they_must(home, tmp_path):
    code, _, said = ran("backup", "--home", home, "--to", tmp_path / "b")
    assert code == 0 and "backup 1 in" in said and "step 4" in said and "covered: candidates/0" in said
    assert "lies in the home; a backup belongs on another disk" in ran("backup", "--home", home, "--to", home / "b")[1]
    assert ran("backup", "--home", tmp_path / "nowhere", "--to", tmp_path / "b")[1].startswith(
        f"{tmp_path / 'nowhere'}: no loop has run here"
    )
    code, _, said = ran("restore", "--from", tmp_path / "b", "--list")
    assert code == 0 and said.startswith("1\t") and "step 4" in said
    code, _, said = ran("restore", "--from", tmp_path / "b", "--check")
    assert code == 0 and "backup 1 is whole" in said
    code, error, _ = ran("restore", "--from", tmp_path / "b", "--home", home)
    assert code == 1 and "--force" in error
    code, _, said = ran("restore", "--from", tmp_path / "b", "--home", home, "--force")
    assert code == 0 and "restored" in said and ".replaced-" in said and findings(home) == []


def test_of_kafka_the_compacted_topics_are_kept_and_told_to_a_new_cluster(home, tmp_path):
    cluster = MockCluster()
    try:
        log = open_mocked(cluster)
        for topic in ("candidates", TAKEDOWNS):
            log.ensure_topic(topic, 2)
        log.append([NewRecord(TAKEDOWNS, b"url:a", b"1"), NewRecord(TAKEDOWNS, b"url:b", b"2")])
        for p in range(2):
            end = running(home).catalog.position("candidates", p)
            log.append([NewRecord("candidates", b"x", b"{}", p)] * end)
        at = running(home)
        backup, _ = back_up(
            Running(home, log, at.store, at.catalog, at.registry), BackupSet(FolderStore(tmp_path / "b"), "b"), by_name=False
        )
        assert backup.elsewhere["kafka"]["bounds"]["candidates"] == [(0, log.bounds("candidates", p)[1]) for p in range(2)]
        log.close()
    finally:
        cluster.close()
    other = MockCluster()
    try:
        log = open_mocked(other)
        log.ensure_topic(TAKEDOWNS, 2)
        log.append([NewRecord(TAKEDOWNS, b"url:b", b"newer")])
        restored(tmp_path / "b", tmp_path / "again", outside=Outside(log=log))
        assert log.table(TAKEDOWNS) == {b"url:a": b"1", b"url:b": b"newer"} and not (tmp_path / "again" / "log.sqlite").exists()
        log.close()
    finally:
        other.close()
