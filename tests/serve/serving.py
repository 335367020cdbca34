"""The role in a thread of this process, over a layout with snapshots; and what a raw client sees of it."""

import http.client
import threading
import time
from contextlib import contextmanager

from prometheus_client import CollectorRegistry

from streamlearn.contract.config import Config
from streamlearn.contract.config_serve import ServeConfig
from streamlearn.contract.metrics import ServeMetrics
from streamlearn.contract.registry import OciLayout
from streamlearn.contract.status import Heartbeat
from streamlearn.serve.run import run_serve
from streamlearn.snapshots.publish import publish, record_result
from tests.snapshots.test_publish import export

DEADLINE_S = 60.0
TOKEN = "a-token-of-the-test-0123456789"


class Served:
    """`layout`, what it serves; `host`; `url`; `counted(name, **labels)`."""

    def __init__(self, layout, host, numbers):
        self.layout, self.host, self.url, self.numbers = layout, host, f"http://{host}", numbers

    def counted(self, name, **labels):
        return self.numbers.get_sample_value(name, labels)

    def ask(self, path, method="GET", **headers):
        """(status, headers, body) of one request, with no client's cleverness; headers in small letters."""
        connection = http.client.HTTPConnection(self.host, timeout=DEADLINE_S)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def blob(self, name, tag="candidate"):
        """(digest, path) of a file of a snapshot."""
        layers = self.layout.manifest(tag)[1]["layers"]
        digest = next(x["digest"] for x in layers if x["annotations"]["org.opencontainers.image.title"] == name)
        return digest, self.layout.path(digest)


@contextmanager
def serving(layout, repository="team/model", **settings):
    config = Config(serve=ServeConfig(port=0, repository=repository, **settings))
    numbers, stop = CollectorRegistry(), threading.Event()
    heart = Heartbeat(layout.root.parent, "serve")
    failed = []

    def run():
        try:
            run_serve(config, OciLayout(layout.root), ServeMetrics(numbers), heart, stop)
        except BaseException as e:  # the test's own thread says so
            failed.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    end = time.monotonic() + DEADLINE_S
    while "port" not in heart.said()[0]:
        assert thread.is_alive() and not failed and time.monotonic() < end, failed
        time.sleep(0.01)
    try:
        yield Served(layout, f"127.0.0.1:{heart.said()[0]['port']}", numbers)
    finally:
        stop.set()
        thread.join(DEADLINE_S)
    assert not failed, failed


def measured(step, bank="world", good=0.5):
    figures = {
        "knn": good,
        "ridge": good + 0.05,
        "logistic": good + 0.08,
        "raw_knn": 0.2,
        "raw_ridge": 0.22,
        "random_knn": 0.25,
        "random_ridge": 0.26,
    }
    return {"bank": bank, "bank_digest": f"sha256:{bank}", "protocol": "each/2:k20", "step": step} | figures


def filled(folder, steps=(100, 200, 300)):
    """A layout with measured snapshots; the first of them is `stable`."""
    layout = OciLayout(folder / "registry")
    for i, step in enumerate(steps):
        _, digest = publish(layout, export(step))
        record_result(layout, digest, measured(step, good=0.3 + 0.5 * i / len(steps)))
    layout.tag(layout.find(f"0.{steps[0]}.0").digest, "stable")
    return layout


def tokens(folder):
    path = folder / "tokens"
    path.write_text(f"# who may pull\nreader {TOKEN}\nother another-token-of-the-test\n")
    return str(path)
