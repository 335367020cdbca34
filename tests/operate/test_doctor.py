"""`streamlearn doctor` finds what is wrong with real things, says what to do, and leaves nothing behind."""

import json
import re
import subprocess
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from click.testing import CliRunner

from streamlearn.cli.doctor import doctor
from streamlearn.contract.config import Config
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.status import Heartbeat
from streamlearn.operate import doctor as look
from streamlearn.supervise import exclusive
from tests.adapters.kafka import MockCluster, mock_config
from tests.adapters.oci import htpasswd_registry
from tests.adapters.oci import settings as registry_settings
from tests.conftest import missing, small_disk
from tests.operate.homes import learn, tree


def examined(home, *words):
    """(exit code, findings that are no ok, all of them)."""
    done = CliRunner().invoke(doctor, ["--home", str(home), "--json", *map(str, words)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    found = json.loads(done.output)["findings"]
    assert all(f["remedy"] for f in found if f["level"] != "ok"), found
    return done.exit_code, [f for f in found if f["level"] != "ok" and f["check"] != "disk"], found


def configured(tmp_path, home=None, **sections):
    """A home that is configured so."""
    home = home or tmp_path / "elsewhere"
    home.mkdir(exist_ok=True)
    (home / "config.json").write_text(Config(home=str(home), **sections).model_dump_json())
    return home


def test_a_sound_home_has_no_errors_and_is_as_it_was(home):
    before = tree(home)
    code, wrong, found = examined(home)
    assert code == 0 and wrong == [], wrong
    assert {f["check"] for f in found} >= {
        "versions",
        "config",
        "folder",
        "home",
        "store",
        "checkpoints",
        "catalog",
        "registry",
        "disk",
        "device",
    }
    assert tree(home) == before and not [p for p in home.rglob("*probe*")]
    table = CliRunner().invoke(doctor, ["--home", str(home)])
    assert table.exit_code == 0 and "0 errors" in table.output and "check" in table.output


def test_a_home_that_is_not_there_yet_is_no_error(tmp_path):
    code, (found,), _ = examined(tmp_path / "new")
    assert code == 0 and found["level"] == "warning" and "no loop has run here" in found["what"] and "--config FILE" in found["remedy"]
    assert not (tmp_path / "new").exists()


def test_each_complaint_about_the_configuration_is_a_finding(tmp_path):
    (tmp_path / "run.toml").write_text('[train]\nbach = 3\n[log]\nkind = "rabbit"\n')
    code, wrong, _ = examined(tmp_path, "--config", tmp_path / "run.toml")
    assert code == 1 and [f["check"] for f in wrong] == ["config", "config"]
    assert "train.bach" in wrong[0]["what"] + wrong[1]["what"] and any("did you mean train.batch?" in f["remedy"] for f in wrong)


def test_sources_banks_and_devices_that_are_not_there(tmp_path):
    (tmp_path / "run.toml").write_text(
        '[[connectors]]\nname = "a"\nclass = "folder"\npath = "/nowhere/images"\n[[probe.banks]]\nname = "b"\ntrain = "/nowhere/bank"\n'
        '[train]\ndevice = "cuda:99"\n'
    )
    code, wrong, _ = examined(tmp_path / "home", "--config", tmp_path / "run.toml")
    told = {f["check"]: f["what"] for f in wrong}
    assert code == 1 and set(told) == {"connectors", "banks", "device"}, wrong
    assert "/nowhere/images" in told["connectors"] and "/nowhere/bank" in told["banks"] and "cuda:99" in told["device"]


def test_a_folder_that_may_only_be_read(tmp_path):
    place = tmp_path / "ro"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place], capture_output=True, text=True, check=False)
    if done.returncode:
        missing(f"cannot mount a read-only tmpfs: {done.stderr.strip()}")
    try:
        code, wrong, _ = examined(place / "home")
    finally:
        subprocess.run(["umount", place], check=True)
    (found,) = (f for f in wrong if f["check"] == "folder")
    assert code == 1 and "Read-only file system" in found["what"] + found["remedy"]


def test_a_full_disk(tmp_path):
    with small_disk(tmp_path / "small", "256k") as place:
        (place / "ballast").write_bytes(b"x" * 2**18)
        code, wrong, found = examined(place)
        assert not list(place.glob(".doctor*"))
    (disk,) = (f for f in found if f["check"] == "disk")
    assert code == 1 and disk["level"] == "error" and "0.0 GB of 0.0 GB are free" in disk["what"] and "free some space" in disk["remedy"]
    assert any(f["check"] == "folder" and "No space left" in f["what"] + f["remedy"] for f in wrong)


def test_a_bucket_that_is_well_is_left_as_it_was_and_one_that_is_not_there_is_named(tmp_path, bucket):
    code, wrong, found = examined(configured(tmp_path, store=bucket.config()))
    assert code == 0 and wrong == [], wrong
    assert [f["what"] for f in found if f["check"] == "clock"] == [f"{bucket.url}: agrees with ours"]
    assert "KeyCount" in (left := bucket.client().list_objects_v2(Bucket=bucket.name)) and left["KeyCount"] == 0
    code, wrong, _ = examined(configured(tmp_path, store=bucket.config(bucket="no-such-bucket")))
    assert code == 1 and "no bucket no-such-bucket" in wrong[0]["what"] and "create it" in wrong[0]["remedy"]


class Odd(FolderStore):
    """A store with a fault of its own."""

    fault = ""

    def put_if_absent(self, key, data):
        if self.fault == "heedless":  # as S3 servers that do not know If-None-Match
            self.put(key, data)
        return self.fault == "heedless" or (self.fault != "refuses" and super().put_if_absent(key, data))

    def get(self, key):
        return super().get(key) + (b"?" if self.fault == "alters" else b"")

    def get_range(self, key, start, length):
        return super().get_range(key, 0 if self.fault == "ignores ranges" else start, length)

    def list(self, prefix):
        return [] if self.fault == "hides" else super().list(prefix)

    def delete(self, key):
        if self.fault != "keeps":
            super().delete(key)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("heedless", "although it is there .If-None-Match is not heeded"),
        ("refuses", "although it is there"),
        ("alters", "does not give back"),
        ("ignores ranges", "does not give back"),
        ("hides", "does not give back"),
        ("keeps", "is there after its deletion"),
    ],
)
def test_a_store_whose_promises_are_not_heeded_is_named(tmp_path, fault, told):
    there = Odd(tmp_path)
    there.put("other", b"data")
    there.fault = fault
    (wrong,) = (f for f in look.store(there, "odd") if f.level != "ok")
    assert wrong.level == "error" and re.search(told, wrong.what) and wrong.remedy
    there.fault = ""
    assert fault == "keeps" or there.list("") == ["other"]


def test_a_store_that_cannot_be_reached(tmp_path, bucket):
    code, wrong, _ = examined(configured(tmp_path, store=bucket.config(endpoint_url="http://127.0.0.1:9")))
    assert code == 1 and {f["check"] for f in wrong} == {"store", "clock"} and "127.0.0.1:9" in wrong[0]["what"]


class Yesterday(BaseHTTPRequestHandler):
    """A server with a clock of its own."""

    date = "Sat, 01 Nov 2025 00:00:00 GMT"

    def do_GET(self):
        self.send_response_only(403)
        self.send_header("Date", self.date)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_PUT = do_HEAD = do_DELETE = do_POST = do_GET

    def log_message(self, *_):
        """Quiet."""


@contextmanager
def server(handler):
    served = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize(
    ("date", "told"), [(Yesterday.date, "ahead of"), ("Tue, 01 Jan 2115 00:00:00 GMT", "behind"), ("noon", "says no time")]
)
def test_a_clock_that_is_off_is_told_with_its_direction(tmp_path, bucket, date, told):
    handler = type("Off", (Yesterday,), {"date": date})
    with server(handler) as url:
        code, wrong, _ = examined(configured(tmp_path, store=bucket.config(endpoint_url=url)))
    (clock,) = (f for f in wrong if f["check"] == "clock")
    assert code == 1 and told in clock["what"] and clock["level"] == ("warning" if date == "noon" else "error")


def test_brokers_that_answer_and_brokers_that_do_not(tmp_path):
    cluster = MockCluster()
    try:
        kafka = mock_config(cluster)
        cluster.make_topic("candidates", 3)
        log = {"kind": "kafka", "partitions": 3, "kafka": kafka}
        code, wrong, found = examined(configured(tmp_path, log=log))
        (told,) = (f["what"] for f in found if f["check"] == "event log")
        assert code == 0 and wrong == [] and "answers, 1 topics" in told and "dead-letters" in told
        code, wrong, _ = examined(configured(tmp_path, log=log | {"partitions": 4}))
        assert code == 1 and wrong[0]["what"] == "topic candidates has 3 partitions, log.partitions = 4"
        cluster.down()
        code, wrong, _ = examined(configured(tmp_path, log=log | {"kafka": kafka.model_copy(update={"start_timeout_s": 1.0})}))
        assert code == 1 and [f["check"] for f in wrong] == ["event log"] and "no broker answers" in wrong[0]["what"]
    finally:
        cluster.close()


def test_a_registry_that_may_be_written_one_that_may_not_and_one_that_is_gone(tmp_path, docker_registry):
    there = registry_settings(docker_registry.host)
    code, wrong, found = examined(configured(tmp_path, snapshots=there))
    assert code == 0 and wrong == [] and any("and it may be written" in f["what"] for f in found)
    with htpasswd_registry(tmp_path / "secured") as secured:
        code, wrong, _ = examined(configured(tmp_path, snapshots=registry_settings(secured.host)))
        assert code == 1 and [f["check"] for f in wrong] == ["registry"] and "401" in wrong[0]["what"] + wrong[0]["remedy"]
    code, wrong, _ = examined(configured(tmp_path, snapshots=there.model_copy(update={"registry": "oci://127.0.0.1:9/x"})))
    assert code == 1 and [f["check"] for f in wrong] == ["registry"] and "127.0.0.1:9" in wrong[0]["what"]


def test_a_home_with_another_number_of_partitions_or_a_checkpoint_that_is_gone(home):
    (home / "config.json").write_text(Config(home=str(home), log={"partitions": 7}).model_dump_json())
    for file in (home / "store" / "checkpoints").glob("0*"):
        file.unlink()
    code, wrong, _ = examined(home)
    assert code == 1 and {f["check"] for f in wrong} == {"event log", "checkpoints"}
    assert any("set log.partitions = 2" in f["remedy"] for f in wrong)


def test_a_part_of_a_checkpoint_that_is_gone_is_named(home):
    learn(home, 8, parted=True, model={"weight": torch.arange(6.0)}, optimizer={})
    assert examined(home)[0] == 0
    (part,) = (home / "store" / "checkpoints").glob("*.part")
    part.unlink()
    code, wrong, _ = examined(home)
    assert code == 1 and [f["what"] for f in wrong] == [f"checkpoints/{part.name}: is not there"]


def test_what_nobody_could_scrape_reach_or_keep_up_with_is_told(tmp_path):
    demo = {"enabled": True, "address": "0.0.0.0"}
    code, wrong, _ = examined(configured(tmp_path, metrics_host="0.0.0.0", demo=demo, dataset={"upkeep_s": 200000.0}))
    assert code == 0 and [f["check"] for f in wrong] == ["metrics", "demo", "upkeep"], wrong
    mended = {"metrics_host": "0.0.0.0", "metrics_port": 29100, "demo": demo | {"url": "http://demo:8080"}, "dataset": {"upkeep_s": 3600.0}}
    assert {f["check"] for f in examined(configured(tmp_path, **mended))[1]} <= {"ports"}  # which somebody may have


def test_the_port_of_a_role_that_runs_here_is_its_own_and_an_address_that_is_not_ours_is_named(tmp_path):
    with server(Yesterday) as url:
        port = int(url.rpartition(":")[2])
        place = configured(tmp_path, metrics_port=port)
        taken = f"metrics_port: 127.0.0.1:{port}: Address already in use"  # those after it may be somebody else's
        assert taken in [f["what"] for f in examined(place)[1]]
        Heartbeat(place, "demo").beat(force=True)  # a container's, which has no supervisor
        assert taken not in [f["what"] for f in examined(place)[1]]
    code, wrong, _ = examined(configured(tmp_path, metrics_port=29100, metrics_host="192.0.2.1"))
    assert code == 1 and {f["remedy"] for f in wrong} == {"set metrics_host to an address of this machine"}


def test_ports_that_are_taken_are_named_where_no_loop_runs(tmp_path):
    with server(Yesterday) as url:
        port = int(url.rpartition(":")[2])
        place = configured(tmp_path, connect={"rest_port": port})
        code, wrong, _ = examined(place)
        assert code == 1 and f"connect.rest_port: 127.0.0.1:{port}" in wrong[0]["what"]
        with exclusive(place):  # the loop itself has them
            assert examined(place)[0] == 0
