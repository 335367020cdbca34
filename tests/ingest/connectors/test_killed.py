"""The role with a connector of every class, each at a real server that speaks its protocol: killed again and again, nothing missed, nothing twice."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prometheus_client import CollectorRegistry

from ingest.connectors.configure import build
from ingest.connectors.run import Source
from streamlearn.contract.config import ConnectorConfig
from streamlearn.contract.metrics import ConnectMetrics
from tests.conftest import REPO
from tests.ingest.connecting import free_port, make_log, records, until, urls
from tests.ingest.connectors import test_commoncrawl as crawl
from tests.ingest.connectors import test_feed as feeds
from tests.ingest.connectors import test_s3_list as s3
from tests.ingest.connectors import test_wikimedia as wiki
from tests.ingest.server import serving
from tests.ingest.test_connectors import put

N = 40  # of each
PROGRAM = """
import json, sys, threading, time
from pathlib import Path
from ingest.connectors import commoncrawl, feed, folder, s3_list, urls, webhook, wikimedia
for module in (commoncrawl, feed, folder, s3_list, urls, webhook, wikimedia):
    module.BATCH = 3
from streamlearn.contract.event_log import SqliteLog
from tests.ingest.connecting import Role, make_log

class SlowLog(SqliteLog):  # so that there is time to be killed in
    def append(self, records):
        time.sleep(0.02)
        done = super().append(records)
        time.sleep(0.02)
        return done

here = Path(sys.argv[1])
with Role(here, log=make_log(here, SlowLog), connectors=json.loads(sys.argv[2])):
    threading.Event().wait()
"""


class Pusher(threading.Thread):
    """Pushes until each push is acknowledged, as a sender must."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.port, self.over = port, threading.Event()
        self.start()

    def run(self):
        for n in range(0, N, 2):
            body = json.dumps([{"url": f"http://push/{i}.jpg", "id": f"i{i}"} for i in (n, n + 1)])
            while not self.over.is_set() and self._push(body) != 202:
                self.over.wait(0.05)

    def _push(self, body):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("POST", "/v1/candidates", body, {"Content-Type": "application/json"})
            return connection.getresponse().status


@pytest.fixture
def sources(tmp_path, bucket):
    """name -> (its configuration, what it must announce)."""
    numbered = {kind: [f"http://{kind}/{n:02}.jpg" for n in range(N)] for kind in ("txt", "csv", "one", "parts")}
    (tmp_path / "u.txt").write_text("".join(f"{url}\n" for url in numbered["txt"]))
    (tmp_path / "u.csv").write_text("url,alt\n" + "".join(f"{url},a\n" for url in numbered["csv"]))
    pq.write_table(pa.table({"url": numbered["one"]}), tmp_path / "u.parquet", row_group_size=7)
    (tmp_path / "parts").mkdir()
    for part in range(4):
        pq.write_table(pa.table({"url": numbered["parts"][part * 10 : part * 10 + 10]}), tmp_path / "parts" / f"{part}.parquet")
    for n in range(N):
        put(tmp_path / "images" / f"{n:02}.jpg", n)
        os.utime(tmp_path / "images" / f"{n:02}.jpg", ns=(0, (1_700_000_000 + n // 4) * 10**9))  # several share a time of change
        s3.put(bucket, f"{n:02}.jpg")
    (tmp_path / "a.wat.gz").write_bytes(crawl.INFO + b"".join(crawl.wat(n, n + 1) for n in range(0, N - 20, 2)))
    (tmp_path / "b.wat.gz").write_bytes(crawl.wat(*range(N - 20, N)))
    site, stream, archives = feeds.Feeds(), wiki.Stream([wiki.upload(n) for n in range(N)]), crawl.Archives(tmp_path)
    site.bodies = {"f": feeds.rss(*range(20)), "g": feeds.rss(*range(20, N))}
    stream.overlap = 3  # what comes after Last-Event-ID comes again in part
    with serving(site) as at_feeds, serving(stream) as at_stream, serving(archives) as at_archives:
        yield {
            **{kind: (dict(path=str(tmp_path / f"u.{kind}")), numbered[kind]) for kind in ("txt", "csv")},
            "one": (dict(path=str(tmp_path / "u.parquet")), numbered["one"]),
            "parts": (dict(path=str(tmp_path / "parts")), numbered["parts"]),
            "folder": (dict(path=str(tmp_path / "images")), [p.as_uri() for p in (tmp_path / "images").iterdir()]),
            "feed": (dict(feeds=[f"{at_feeds}/f", f"{at_feeds}/g"], interval_s=1.0), [feeds.image(n) for n in range(N)]),
            "wikimedia": (dict(stream=f"{at_stream}/stream", files=wiki.FILES, read_s=0.2), [wiki.url(n) for n in range(N)]),
            "commoncrawl": (
                dict(files=[f"{at_archives}/a.wat.gz", str(tmp_path / "b.wat.gz")], total_s=60.0, timeout_s=30.0),
                [crawl.image(n) for n in range(N)],
            ),
            "s3": (
                dict(bucket=bucket.name, endpoint_url=bucket.url, path_style=True, rescan_s=1.0),
                [s3.url(bucket, f"{n:02}.jpg") for n in range(N)],
            ),
            "webhook": (dict(port=free_port(), anonymous=True), [f"http://push/{n}.jpg" for n in range(N)]),
        }


@pytest.mark.slow
def test_killed_with_minus_nine_every_source_is_announced_exactly_once(tmp_path, sources):
    home, kinds = tmp_path / "home", {"txt": "urls", "csv": "urls", "one": "urls", "parts": "urls"}
    home.mkdir()
    configs = [{"name": name, "class": kinds.get(name, name), "poll_s": 0.05} | options for name, (options, _) in sources.items()]
    log, pusher = make_log(home), Pusher(sources["webhook"][0]["port"])
    wanted, kills = len(sources) * N, 0
    for target in (1, *range(40, wanted + 40, 40)):
        argv = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(home), json.dumps(configs)]
        process = subprocess.Popen(argv, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)})
        try:
            until(lambda target=target, process=process: len(records(log)) >= min(target, wanted) or process.poll() is not None)
            assert process.poll() is None
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    pusher.over.set()
    assert kills > 10
    for config in configs:  # whoever comes now finds nothing left to do, or what the last kill left
        connector = build(ConnectorConfig.model_validate(config))
        connector.check()
        source = Source(config["name"], connector, log, ConnectMetrics(CollectorRegistry()))
        try:
            until(lambda source=source: not source.poll(threading.Event()) and not source.poll(threading.Event()))
        finally:
            source.close()
    assert {name: Counter(urls(log, name)) for name in sources} == {name: Counter(told) for name, (_, told) in sources.items()}
