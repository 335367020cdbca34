"""`serve` of a registry elsewhere keeps a copy, and serves that."""

import threading
import time

from prometheus_client import CollectorRegistry

from streamlearn.contract.config import Config, ServeConfig
from streamlearn.contract.errors import Retryable
from streamlearn.contract.metrics import ServeMetrics
from streamlearn.contract.registry import OciLayout
from streamlearn.contract.status import Heartbeat
from streamlearn.serve.mirror import NEWEST, follow, mirror
from streamlearn.serve.run import run_serve
from streamlearn.snapshots.publish import publish, record_result, results
from tests.adapters.oci import remote
from tests.serve.serving import DEADLINE_S, filled, measured
from tests.snapshots.test_publish import export


def same(one, other):
    return {t: d.digest for t, d in one.tags().items()} == {t: d.digest for t, d in other.tags().items()}


def test_every_tag_is_copied_with_its_measurements_and_then_nothing_is(tmp_path):
    source, copy = filled(tmp_path / "there"), OciLayout(tmp_path / "here")
    assert mirror(source, copy) == 5  # three versions, candidate, stable
    assert same(source, copy)
    assert [results(copy, copy.find(f"0.{s}.0").digest) for s in (100, 200, 300)] == [
        results(source, source.find(f"0.{s}.0").digest) for s in (100, 200, 300)
    ]
    assert mirror(source, copy) == 0


def test_what_is_published_measured_and_moved_later_comes_later(tmp_path):
    source, copy = filled(tmp_path / "there"), OciLayout(tmp_path / "here")
    mirror(source, copy)
    _, digest = publish(source, export(400))
    assert mirror(source, copy) == 2 and copy.find("candidate").digest == digest and results(copy, digest) == []
    record_result(source, digest, measured(400))
    mirror(source, copy)
    assert len(results(copy, digest)) == 1
    source.tag(digest, "stable")
    assert mirror(source, copy) == 1 and same(source, copy)


def test_a_registry_behind_a_network_is_copied_too(tmp_path, docker_registry):
    there = filled(tmp_path / "there", steps=(100, 200))
    source = remote(docker_registry.host, tmp_path / "spool")
    mirror(there, source)
    copy = OciLayout(tmp_path / "here")
    assert mirror(source, copy) >= 4 and same(there, copy)
    assert len(results(copy, copy.find("0.100.0").digest)) == 1


class Counting(OciLayout):
    asked = 0

    def find(self, tag):
        self.asked += 1
        return super().find(tag)


def test_versions_that_are_here_are_not_asked_for_again(tmp_path):
    filled(tmp_path / "there", steps=tuple(range(1, NEWEST + 31)))
    source, copy = Counting(tmp_path / "there" / "registry"), OciLayout(tmp_path / "here")
    mirror(source, copy)
    source.asked = 0
    mirror(source, copy)
    assert source.asked <= NEWEST + 2


class Away(OciLayout):
    away = True

    def names(self):
        if self.away:
            raise Retryable("the registry is away")
        return super().names()


def test_it_says_what_it_waits_for_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("streamlearn.serve.mirror.PERIOD_S", 0.05)
    filled(tmp_path / "there")
    source, copy, stop, told = Away(tmp_path / "there" / "registry"), OciLayout(tmp_path / "here"), threading.Event(), []
    thread = threading.Thread(target=follow, args=(source, copy, stop, told.append))
    thread.start()
    wait_for(lambda: "the registry is away" in told)
    source.away = False
    wait_for(lambda: told[-1] == "")
    stop.set()
    thread.join(DEADLINE_S)
    assert same(source, copy)


def test_the_role_serves_the_copy(tmp_path, monkeypatch):
    monkeypatch.setattr("streamlearn.serve.mirror.PERIOD_S", 0.05)
    source, stop, heart = filled(tmp_path / "there"), threading.Event(), Heartbeat(tmp_path / "here", "serve")
    config = Config(serve=ServeConfig(port=0, repository="team/model"))
    numbers = CollectorRegistry()
    args = (config, OciLayout(tmp_path / "here" / "registry"), ServeMetrics(numbers), heart, stop)
    thread = threading.Thread(target=lambda: run_serve(*args, source=source))
    thread.start()
    wait_for(lambda: numbers.get_sample_value("serve_snapshots") == 3)
    stop.set()
    thread.join(DEADLINE_S)
    assert heart.said()[0]["copying"] == ""


def wait_for(condition):
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
