"""The image world: the same everywhere, hard for pixels, broken as the web is broken, and it drifts."""

import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter

import pytest
from prometheus_client import CollectorRegistry

from streamlearn.contract.config import BankConfig
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.metrics import DemoMetrics
from streamlearn.contract.status import Heartbeat
from streamlearn.demo.preset import demo_config
from streamlearn.demo.run import announced, run_demo, write_banks
from streamlearn.demo.world import CONCEPTS, World
from streamlearn.probes.banks import load_bank
from streamlearn.probes.features import raw_pixels
from streamlearn.probes.knn import accuracy, knn
from streamlearn.stream.decode import decode

SMALL = 16  # px; where the pictures do not matter, their banks are soon drawn
WORLD = World(seed=7, size=48, quarter_images=500)


def test_an_image_is_a_function_of_seed_and_index():
    assert WORLD.jpeg(12) == World(7, 48, 500).jpeg(12) != World(8, 48, 500).jpeg(12)
    assert decode(WORLD.jpeg(12)).shape == (48, 48, 3)


def test_each_quarter_brings_new_concepts():
    assert [len(WORLD.concepts(q)) for q in range(5)] == [8, 10, 12, 14, 14] and len(CONCEPTS) >= 10
    seen = Counter(WORLD.label(i) for i in range(500, 1000))
    assert set(seen) == set(WORLD.concepts(1)) and min(seen.values()) > 20


@pytest.mark.slow
def test_raw_pixels_do_badly(tmp_path):
    write_banks(tmp_path, WORLD)
    bank = load_bank(
        BankConfig(name="w", train=str(tmp_path / "demo/bank-train.parquet"), test=str(tmp_path / "demo/bank-test.parquet")), 32
    )
    assert len(bank.classes) == 12
    for side in (8, 16, 32):
        found = accuracy(knn(raw_pixels(bank.train, side), bank.train.labels, raw_pixels(bank.test, side)), bank.test.labels)
        assert found < 0.35


def test_the_server_serves_breaks_and_keeps_its_port(tmp_path):
    config = demo_config(tmp_path)
    config = config.model_copy(update={"demo": config.demo.model_copy(update={"max_images": 120, "size": SMALL})})

    def run():
        stop = threading.Event()
        args = (config, tmp_path, DemoMetrics(CollectorRegistry()), Heartbeat(tmp_path, "demo"), stop)
        thread = threading.Thread(target=run_demo, args=args, daemon=True)
        thread.start()
        return stop, thread

    stop, thread = run()
    urls = tmp_path / "demo" / "urls.txt"
    deadline = time.monotonic() + 240
    while announced(urls) < 120 and time.monotonic() < deadline:
        time.sleep(0.1)
    lines = urls.read_text().split()
    assert len(lines) == len(set(lines)) == 120
    assert urllib.request.urlopen(lines[5]).read() == WORLD_OF(config).jpeg(5)
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(lines[13])
    assert urllib.request.urlopen(lines[71]).read().startswith(b"<html>")
    stop.set()
    thread.join(60)
    with urls.open("a") as f:
        f.write("http://torn")  # killed while writing
    stop, thread = run()
    assert when_up(lines[5]) == WORLD_OF(config).jpeg(5)
    stop.set()
    thread.join(60)
    assert announced(urls) == 120


def when_up(url, limit_s=120):
    """The body, from the moment the server listens."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return urllib.request.urlopen(url).read()
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def WORLD_OF(config):
    return World(config.demo.seed, config.demo.size, config.demo.quarter_images)


def test_a_port_that_is_taken_is_named_with_the_remedy(tmp_path):
    config = demo_config(tmp_path)
    config = config.model_copy(update={"demo": config.demo.model_copy(update={"size": SMALL})})
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        (tmp_path / "demo").mkdir()
        (tmp_path / "demo" / "port").write_text(str(s.getsockname()[1]))
        with pytest.raises(ConfigError, match="is taken by another process; free it, or use a new home"):
            run_demo(config, tmp_path, DemoMetrics(CollectorRegistry()), Heartbeat(tmp_path, "demo"), threading.Event())
