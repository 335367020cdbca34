"""Candidates that are pushed: acknowledged once they are durable, and told once however often they come."""

import http.client
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.connectors import webhook, webhook_server
from ingest.connectors.webhook import WebhookConnector, WebhookOptions
from streamlearn.contract.errors import ConfigError, Retryable
from tests.ingest.connectors.harness import Killed, candidates, cursor, go, letters, make_log, urls, wait_for


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setenv(webhook.TOKEN, "secret")
    made = []

    def one(**more):
        made.append(WebhookConnector("c", WebhookOptions(**dict(port=0) | more)))
        made[-1].check()
        return made[-1]

    yield one
    for each in made:
        each.close()


class Sender(threading.Thread):
    """Pushes in a thread of its own, as it waits for its answer."""

    def __init__(self, made, body, token="secret", kind="application/json", path="/v1/candidates", method="POST"):
        super().__init__(daemon=True)
        self.port, self.path, self.method = made.port, path, method
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {token}"} if token is not None else {})
        self.status = self.answer = self.retry_after = None
        self.start()

    def run(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(self.method, self.path, self.body, self.headers)
            response = connection.getresponse()
            self.retry_after, self.answer = response.getheader("Retry-After"), json.loads(response.read())
            self.status = response.status
        except (OSError, http.client.HTTPException) as e:
            self.answer = e
        finally:
            connection.close()


def answered(sender):
    sender.join(60)
    assert not sender.is_alive()
    return sender.status


def waiting(made, n):
    wait_for(lambda: sum(len(p.items) for p in list(made._server._waiting)) >= n)


def started(make, tmp_path, **more):
    log, made = make_log(tmp_path), make(**more)
    assert made.port == 0 and go(log, made) == 0
    return log, made


def item(n, **more):
    return {"url": f"http://x/{n}.jpg", "id": f"i{n}"} | more


def test_a_push_is_acknowledged_once_its_candidates_are_durable(make, tmp_path):
    log, made = started(make, tmp_path)
    sender = Sender(made, [item(1, license="CC0", alt="one"), item(2), item(2), {"url": "ftp://x/3"}])
    waiting(made, 4)
    assert sender.status is None and urls(log) == []
    assert go(log, made) == 2 and answered(sender) == 202
    assert sender.answer == {"accepted": 2, "known": 1, "refused": [{"item": 3, "why": "scheme 'ftp' is neither http nor https"}]}
    first = next(c for c in candidates(log) if c.url == "http://x/1.jpg")
    assert (first.license, first.alt, first.source_ref) == ("CC0", "one", "id i1") and len(letters(log)) == 1


def test_no_answer_comes_before_the_cursor_is_recorded(make, tmp_path):
    _, made = started(make, tmp_path)
    sender = Sender(made, item(1))
    waiting(made, 1)
    found = next(made.discover(None))
    assert sender.status is None and found.settled is not None and found.cursor["told"]
    found.settled()
    assert answered(sender) == 202


@pytest.mark.parametrize("when", ["before", "half way", "after"])
@pytest.mark.parametrize("nth", range(2, 8))
def test_killed_at_any_append_every_id_is_announced_exactly_once(make, tmp_path, monkeypatch, when, nth):
    monkeypatch.setattr(webhook, "BATCH", 4)
    log, made = make_log(tmp_path), make()
    list(made.discover(None))
    pushes = [[item(n), item(n + 1), item(n + 2)] for n in (0, 2, 5, 8)]  # 2 stands in two of them
    senders = [Sender(made, p) for p in pushes]
    waiting(made, 12)
    log.countdown, log.when = nth, when
    with pytest.raises(Killed):
        go(log, made)
    made.close()  # the process is gone
    log.countdown = -1
    assert all(answered(s) in (202, 503) for s in senders)
    again, made = [p for s, p in zip(senders, pushes, strict=True) if s.status != 202], make()
    go(log, made)
    repeated = [Sender(made, p) for p in again]
    waiting(made, 3 * len(again))
    go(log, made)
    assert all(answered(s) == 202 for s in repeated)
    assert urls(log) == sorted(f"http://x/{n}.jpg" for n in range(11))


def test_after_an_append_that_failed_the_push_still_waits_and_is_told(make, tmp_path):
    log, made = started(make, tmp_path)
    sender = Sender(made, [{"url": "http://x/1.jpg"}, item(2)])  # also what brings no id
    waiting(made, 2)
    log.countdown, log.when = 2, "before"
    with pytest.raises(Killed):
        go(log, made)
    assert made._begun and sender.status is None
    log.countdown = -1
    assert go(log, made) == 0 and answered(sender) == 202 and urls(log) == ["http://x/1.jpg", "http://x/2.jpg"]


def test_an_id_that_was_told_is_acknowledged_and_not_told_again(make, tmp_path, monkeypatch):
    monkeypatch.setattr(webhook, "TOLD", 3)
    log, made = started(make, tmp_path)
    for n in (1, 1, 2, 3, 4, 1):  # the last 1 lies further back than is remembered
        sender = Sender(made, item(n))
        waiting(made, 1)
        go(log, made)
        assert answered(sender) == 202
    assert urls(log) == sorted(f"http://x/{n}.jpg" for n in (1, 1, 2, 3, 4)) and len(cursor(log)["told"]) == 24


def test_lines_are_taken_as_lists_are(make, tmp_path):
    log, made = started(make, tmp_path)
    sender = Sender(made, b'{"url":"http://x/1.jpg"}\n\n{"url":"http://x/2.jpg"}\r\n', kind="application/x-ndjson")
    waiting(made, 2)
    assert go(log, made) == 2 and answered(sender) == 202


@pytest.mark.parametrize("token", [None, "", "wrong", "secre", "secret2", "é"])
def test_without_the_token_nothing_is_taken(make, tmp_path, token):
    log, made = started(make, tmp_path)
    sender = Sender(made, item(1), token=token.encode().decode("latin-1") if token else token)
    assert answered(sender) == 401 and go(log, made) == 0


def test_whoever_reaches_it_may_push_where_that_is_said(make, tmp_path, monkeypatch):
    monkeypatch.delenv(webhook.TOKEN)
    with pytest.raises(ConfigError, match="no token; name a file"):
        make()
    log, made = started(make, tmp_path, anonymous=True)
    sender = Sender(made, item(1), token=None)
    waiting(made, 1)
    assert go(log, made) == 1 and answered(sender) == 202


def test_the_token_may_lie_in_a_file(make, tmp_path):
    (tmp_path / "token").write_text("from-a-file\n")
    _, made = started(make, tmp_path, token_file=str(tmp_path / "token"))
    assert answered(Sender(made, b"{", token="secret")) == 401 and answered(Sender(made, b"{", token="from-a-file")) == 400
    with pytest.raises(ConfigError, match="token_file = .*cannot be read"):
        make(token_file=str(tmp_path / "none"))


BAD = [
    (b"{", "application/json", "body: not JSON"),
    (b'{"url":"http://x"}\n{"url"', "application/x-ndjson", "line 2: not JSON"),
    (b'[{"url":"http://x"},7]', "application/json", "item 1: expected an object with a url"),
    (b'{"url":5}', "application/json", "body: expected an object with a url"),
    (b'[{"url":"http://x","id":[]}]', "application/json", "item 0: id: expected text"),
    (b'[{"url":"http://x","alt":1}]', "application/json", "item 0: alt: expected text"),
    (b"[" * 10**5, "application/json", "body: not JSON"),
    (b"\xff\xfe\x00", "application/json", "body: not JSON"),
    (json.dumps({"url": "http://x", "id": "i" * 501}).encode(), "application/json", "body: id: over 500"),
]


@pytest.mark.parametrize(("body", "kind", "complaint"), BAD)
def test_what_cannot_be_read_is_refused_with_its_place(make, tmp_path, body, kind, complaint):
    log, made = started(make, tmp_path)
    sender = Sender(made, body, kind=kind)
    assert answered(sender) == 400 and complaint in sender.answer["error"] and go(log, made) == 0


def test_a_url_that_is_no_text_is_refused_by_itself(make, tmp_path):
    log, made = started(make, tmp_path)
    sender = Sender(made, b'[{"url":"http://x/\\ud800"},{"url":"http://x/1.jpg","id":"\\ud800","alt":"\\ud800"}]')
    waiting(made, 2)
    assert go(log, made) == 1 and answered(sender) == 202 and sender.answer["refused"][0]["item"] == 0


def test_too_much_is_refused(make, tmp_path):
    _, made = started(make, tmp_path, max_body_bytes=50_000, queue=500)
    assert answered(Sender(made, b" " * 50_001)) == 413
    assert answered(Sender(made, [{"url": "http://x"}] * 501)) == 413
    first = Sender(made, [{"url": "http://x"}] * 400)
    waiting(made, 400)
    second = Sender(made, [{"url": "http://x"}] * 101)
    assert answered(second) == 429 and second.retry_after == "1" and first.status is None


def test_a_body_that_does_not_come_is_not_waited_for(make, tmp_path):
    _, made = started(make, tmp_path, body_s=0.2)
    connection = http.client.HTTPConnection("127.0.0.1", made.port, timeout=60)
    connection.putrequest("POST", "/v1/candidates")
    connection.putheader("Authorization", "Bearer secret")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b"{")
    assert connection.getresponse().status == 408
    connection.close()


def test_a_push_that_is_not_settled_in_time_may_be_pushed_again(make, tmp_path):
    log, made = started(make, tmp_path, settle_s=0.2)
    sender = Sender(made, item(1))
    assert answered(sender) == 503 and go(log, made) == 0 and urls(log) == []


def test_shutting_down_turns_the_waiting_away(make, tmp_path):
    _, made = started(make, tmp_path)
    sender = Sender(made, item(1))
    waiting(made, 1)
    made.close()
    assert answered(sender) == 503 and sender.answer == {"error": "shutting down"}


def test_health_and_a_port_that_is_taken(make, tmp_path):
    log, made = started(make, tmp_path)
    sender = Sender(made, b"", path="/healthz", method="GET", token=None)
    assert answered(sender) == 200 and sender.answer == {"status": "ok", "waiting": 0}
    with pytest.raises(Retryable, match="free the port"):
        go(log, make(port=made.port))


@given(
    st.binary(max_size=100) | st.text(alphabet='[]{}":,url0a\\ud8').map(str.encode),
    st.sampled_from(["application/json", "application/jsonl"]),
)
def test_parsing_raises_nothing_but_what_is_wrong(body, kind):
    try:
        assert all(isinstance(i.url, str) for i in webhook_server.parse(body, kind))
    except ValueError as e:
        assert str(e).startswith(("body: ", "line ", "item "))
