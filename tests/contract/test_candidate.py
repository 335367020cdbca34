"""Whatever stands in a topic is a candidate, or Corrupt; and what is one can be written everywhere."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamlearn.contract.candidate import MAX_BYTES, ROOM, Candidate, politeness_key
from streamlearn.contract.errors import Corrupt

GOOD = {"schema": 1, "url": "http://a.example/1.jpg", "source": "s", "source_ref": "1", "discovered_at": "2026-11-21T00:00:00Z"}


def test_a_candidate_survives_its_json():
    candidate = Candidate(
        url="http://a.example/ö.jpg",
        source="s",
        source_ref="",
        discovered_at="2026-11-21T00:00:00Z",
        alt="a \u2028 b",
        not_before=1.5,
        attempt=2,
    )
    assert Candidate.from_json(candidate.to_json()) == candidate


@pytest.mark.parametrize(
    "change",
    [
        {"url": 7}, {"url": None}, {"url": "http://a.example/\ud800.jpg"}, {"alt": ["x"]}, {"alt": "\udfff"}, {"attempt": -1}, {"attempt": True},
        {"attempt": 2**40}, {"waits": "1"}, {"not_before": "soon"}, {"not_before": float("nan")}, {"not_before": float("inf")}, {"origin": {}},
        {"unknown": 1}, {"schema": 2}, {"source": None}, {"url": "http://a.example/" + "x" * (MAX_BYTES + ROOM)},
    ],
)  # fmt: skip
def test_what_is_no_candidate_is_corrupt_and_said_so(change):
    with pytest.raises(Corrupt, match="not a candidate"):
        Candidate.from_json(json.dumps(GOOD | change).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"[" * 5000, b'{"schema":1}', b"null", b'"x"', b"1e999"])
def test_garbage_is_corrupt(data):
    with pytest.raises(Corrupt, match="not a candidate"):
        Candidate.from_json(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


@given(
    st.dictionaries(st.sampled_from([*GOOD, "alt", "license", "etag", "attempt", "waits", "not_before", "origin", "purpose", "what"]), JSON)
)
@example({"url": ""})
@example({"alt": ""})
def test_any_json_is_a_candidate_or_corrupt_and_a_candidate_can_be_told_again(fields):
    try:
        candidate = Candidate.from_json(json.dumps(GOOD | fields).encode())
    except Corrupt:
        return
    assert Candidate.from_json(candidate.to_json(MAX_BYTES + 2 * ROOM)) == candidate
    assert isinstance(politeness_key(candidate.url), bytes)
