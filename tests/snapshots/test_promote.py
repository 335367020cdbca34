"""Channels: moved with a record, rolled back, pinned; killed at every step; two movers at once."""

import subprocess
import sys
from contextlib import contextmanager

import pytest

from streamlearn.contract.errors import ConfigError, Conflict, NotFound, StreamlearnError
from streamlearn.contract.registry import OciLayout
from streamlearn.snapshots.history import MOVE, chain, history, marked, unfinished, verdict_of
from streamlearn.snapshots.promote import Pinned, pin, promote, rollback, unpin
from tests.adapters.oci import remote
from tests.conftest import REPO
from tests.contract.test_registry_gc import killed_at
from tests.snapshots.channels import snapshot
from tests.snapshots.test_publish import DyingLayout, Killed

BY = dict(by="ann", why="because")


@pytest.fixture(params=["embedded", "docker-registry"])
def registry(request, tmp_path):
    if request.param == "embedded":
        return OciLayout(tmp_path / "registry")
    return remote(request.getfixturevalue("docker_registry").host, tmp_path / "spool")


@pytest.fixture
def near(tmp_path):
    return OciLayout(tmp_path / "registry")


def moved(registry, channel="stable"):
    return [(m.kind, m.before, m.after) for m in chain(registry, channel)]


def test_every_move_is_told_with_who_why_and_the_figures(registry):
    a, b = snapshot(registry, 1), snapshot(registry, 2)
    promote(registry, "stable", "0.1.0", by="ann", why="the first", verdict={"p": 0.5})
    promote(registry, "stable", b, by="bob", why="better", forced=True)
    two, one = history(registry, "stable")
    assert registry.find("stable").digest == b == two.after and (two.before, one.before, one.after) == (a, "", a)
    assert [(m.number, m.by, m.why, m.forced, m.step) for m in (two, one)] == [
        (2, "bob", "better", True, 2),
        (1, "ann", "the first", False, 1),
    ]
    assert two.at > one.at and two.previous == one.record and verdict_of(registry, one) == {"p": 0.5} and verdict_of(registry, two) == {}
    assert history(registry, "best") == [] and history(registry) == [two, one] and unfinished(registry) == []


def test_rolling_back_goes_to_the_holder_before_and_marks_what_it_left(registry):
    a, b, c, d = (snapshot(registry, step) for step in (1, 2, 3, 4))
    for digest in (a, b, c):
        promote(registry, "stable", digest, **BY)
    assert rollback(registry, "stable", **BY).after == b and set(marked(registry)) == {c}
    promote(registry, "stable", d, **BY)
    assert rollback(registry, "stable", **BY).after == b  # and not to c
    assert rollback(registry, "stable", **BY).after == a and set(marked(registry)) == {b, c, d}
    with pytest.raises(ConfigError, match="no earlier holder"):
        rollback(registry, "stable", **BY)
    promote(registry, "stable", c, forced=True, **BY)
    assert set(marked(registry)) == {b, d}  # a forced hand has taken the mark away
    assert registry.find("stable").digest == c and len(history(registry)) == 8


def test_a_holder_that_retention_has_let_go_is_passed_over(near):
    a, b, c = (snapshot(near, step) for step in (1, 2, 3))
    for digest in (a, b, c):
        promote(near, "stable", digest, **BY)
    near.path(b).unlink()
    assert rollback(near, "stable", **BY).after == a


def test_a_pinned_channel_is_moved_by_a_forced_hand_alone(registry):
    a, b, c = (snapshot(registry, step) for step in (1, 2, 3))
    promote(registry, "stable", a, **BY)
    promote(registry, "stable", b, **BY)
    pin(registry, "stable", by="ann", why="a demo")
    for move in (lambda: promote(registry, "stable", c, **BY), lambda: rollback(registry, "stable", **BY)):
        with pytest.raises(Pinned, match="pinned by ann.*a demo"):
            move()
    assert registry.find("stable").digest == b
    promote(registry, "best", c, **BY)  # another channel
    promote(registry, "stable", c, forced=True, **BY)
    with pytest.raises(Pinned):  # the pin is the channel's, and stays
        rollback(registry, "stable", **BY)
    with pytest.raises(ConfigError, match="pinned already"):
        pin(registry, "stable", **BY)
    unpin(registry, "stable", **BY)
    with pytest.raises(ConfigError, match="not pinned"):
        unpin(registry, "stable", **BY)
    assert rollback(registry, "stable", **BY).after == b
    assert [m.kind for m in history(registry, "stable")] == ["rollback", "unpin", "promote", "pin", "promote", "promote"]


def test_what_cannot_be_moved_is_refused_and_nothing_changes(registry):
    a = snapshot(registry, 1)
    probe = registry.attach(registry.find("0.1.0"), "application/probe", b"1", {})
    for channel, reference, match in (
        ("candidate", a, "moved by publishing"),
        ("v1", a, "one of stable, best"),
        ("stable", probe.digest, "not a snapshot's"),
    ):
        with pytest.raises(ConfigError, match=match):
            promote(registry, channel, reference, **BY)
    with pytest.raises(NotFound):
        promote(registry, "stable", "0.7.0", **BY)
    for act in (rollback, pin):
        with pytest.raises(ConfigError, match="points to nothing yet"):
            act(registry, "stable", **BY)
    promote(registry, "stable", a, **BY)
    with pytest.raises(ConfigError, match="already"):
        promote(registry, "stable", a, forced=True, **BY)
    with pytest.raises(Conflict, match="not nothing: someone else moved it"):
        promote(registry, "stable", snapshot(registry, 2), expect="", **BY)
    assert len(history(registry)) == 1 and unfinished(registry) == []


# --- killed ---


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("step", "left"), [("blob", 1), ("blob", 2), ("manifest", 1), ("tag", 1)])
@pytest.mark.parametrize("act", ["promote", "rollback"])
def test_killed_at_any_step_the_tag_is_where_history_says_and_the_next_try_completes_it(act, step, left, when, tmp_path):
    root = tmp_path / "registry"
    registry = OciLayout(root)
    a, b, c = (snapshot(registry, step) for step in (1, 2, 3))
    for digest in (a, b):
        promote(registry, "stable", digest, **BY)
    before = history(registry)

    def go(registry):
        return promote(registry, "stable", c, **BY) if act == "promote" else rollback(registry, "stable", **BY)

    dying = DyingLayout(root)
    dying.step, dying.when, dying.left = step, when, left
    with pytest.raises(Killed):
        go(dying)
    told = (step, when) in (("manifest", "after"), ("tag", "before"))
    done = (step, when) == ("tag", "after")
    after = OciLayout(root)
    assert history(after)[-2:] == before and len(history(after)) == 2 + done
    assert history(after)[0].after == after.find("stable").digest == ((c if act == "promote" else a) if done else b)
    assert [m.kind for m in unfinished(after)] == ([act] if told else []) and set(marked(after)) == (
        {b} if done and act == "rollback" else set()
    )
    if not done:
        move = go(after)
        assert move.number == (4 if told else 3)  # greater than the unfinished one's
    assert history(after)[0].after == after.find("stable").digest == (c if act == "promote" else a)
    assert [m.kind for m in history(after)] == [act, "promote", "promote"] and len(unfinished(after)) == told


def test_killed_before_any_change_of_the_disk_history_and_tag_agree(tmp_path):
    """SIGKILL before the nth system call that changes anything."""
    for nth in range(200):
        registry = OciLayout(tmp_path / str(nth))
        a, b = snapshot(registry, 1), snapshot(registry, 2)
        promote(registry, "stable", a, **BY)
        died = killed_at(lambda r, b=b: promote(r, "stable", b, **BY), registry.root, nth)
        left = OciLayout(registry.root)
        held = left.find("stable").digest
        assert held in (a, b) and history(left)[0].after == held and len(history(left)) == (2 if held == b else 1)
        if held == a:
            promote(left, "stable", b, **BY)
        assert moved(left) == [("promote", a, b), ("promote", "", a)] and len(unfinished(left)) <= 1
        if not died:
            break
    assert not died and nth > 8


@pytest.mark.parametrize("record", ["damaged", "lost"])
def test_a_record_that_is_damaged_or_lost_is_told_apart_and_history_goes_on(record, near):
    a, b, c = (snapshot(near, step) for step in (1, 2, 3))
    promote(near, "stable", a, **BY)
    promote(near, "stable", b, by="bob", why="better")
    pin(near, "stable", **BY)
    unpin(near, "stable", **BY)
    if record == "damaged":
        for move in history(near)[:3]:
            path = near.path(near.manifest(move.record)[1]["layers"][0]["digest"])
            path.write_bytes(b"~" + path.read_bytes()[1:])
        assert [(m.kind, m.by) for m in history(near)] == [("unpin", "ann"), ("pin", "ann"), ("promote", "bob"), ("promote", "ann")]
        assert "damaged" in history(near)[2].why and history(near)[3].why == "because"
    else:
        near.replace_index(near.index().without([("", m.record) for m in history(near)[:3]]))
        assert [(m.kind, m.after) for m in history(near)] == [("untold", b), ("promote", a)]
    promote(near, "stable", c, **BY)
    assert history(near)[0].before == b and rollback(near, "stable", **BY).after == b and rollback(near, "stable", **BY).after == a


def test_a_tag_that_another_tool_moved_is_untold_and_keeps_its_pin(registry):
    a, b, c = (snapshot(registry, step) for step in (1, 2, 3))
    promote(registry, "stable", a, **BY)
    pin(registry, "stable", **BY)
    registry.tag(b, "stable")
    assert next((m.kind, m.before, m.after, m.pinned) for m in history(registry)) == ("untold", a, b, True)
    with pytest.raises(Pinned):
        promote(registry, "stable", c, **BY)
    promote(registry, "stable", c, forced=True, **BY)
    assert [m.kind for m in history(registry)] == ["promote", "untold", "pin", "promote"]
    assert [(m.before, m.after) for m in history(registry)][:2] == [(b, c), (a, b)]


# --- two at once, as processes ---


@contextmanager
def movers(where, spool):
    """Two processes; calling it with (reference, expected holder) for each lets both go at once, and says what they said."""
    argv = [sys.executable, "-m", "tests.snapshots.channels"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPO)
    both = [subprocess.Popen([*argv, who, where, str(spool)], **pipes) for who in ("one", "other")]

    def race(*calls):
        for mover, call in zip(both, calls, strict=True):
            mover.stdin.write(" ".join(call) + "\n")
        for mover in both:
            mover.stdin.flush()
        return [mover.stdout.readline().split()[0] for mover in both]

    try:
        assert [mover.stdout.readline() for mover in both] == ["ready\n"] * 2
        yield race
    finally:
        for mover in both:
            mover.communicate(timeout=240)


def test_of_two_promoters_one_wins_and_the_other_says_so(near):
    a, *rest = (snapshot(near, step) for step in range(1, 42))
    promote(near, "stable", a, **BY)
    with movers(str(near.root), near.root) as race:
        for one, other in zip(rest[::2], rest[1::2], strict=True):
            held = near.find("stable").digest
            said = race((one, held), (other, held))
            assert sorted(said) == ["conflict", "moved"]
            winner = one if said[0] == "moved" else other
            assert near.find("stable").digest == winner == history(near)[0].after and history(near)[0].before == held
    assert len(history(near)) == 21 and unfinished(near) == []  # the lock: who comes second has not even begun


def test_of_two_promoters_on_a_registry_without_compare_and_set_the_tag_is_one_s_and_history_names_it(docker_registry, tmp_path):
    far = remote(docker_registry.host, tmp_path / "spool")
    held, *rest = (snapshot(far, step) for step in range(1, 12))
    promote(far, "stable", held, **BY)
    with movers(far.config.registry, tmp_path / "spool") as race:
        for one, other in zip(rest[::2], rest[1::2], strict=True):
            assert "moved" in race((one, held), (other, held))
            before, held = held, far.find("stable").digest
            (last, *_), past = history(far, "stable"), history(far, "stable")[1:]
            assert held in (one, other) and (last.before, last.after) == (before, held) and past[0].after == before
            assert last.by == ("one" if held == one else "other")
    assert len(history(far, "stable")) == 6 and {m.after for m in unfinished(far)} <= set(rest)


def test_cut_off_at_any_request_history_and_tag_agree_and_the_next_try_completes_it(docker_registry, tmp_path, monkeypatch):
    """The remote adapter against a real registry: the process dies before or after its nth request."""
    from streamlearn.adapters.oci_wire import Wire

    ask, deaths = Wire.ask, 0
    for nth, when in ((n, w) for n in range(1, 100) for w in ("before", "after")):
        far = remote(docker_registry.host, tmp_path / "spool")
        a, b = snapshot(far, 1), snapshot(far, 2)
        promote(far, "stable", a, **BY)
        left = [nth]

        def dying(wire, *args, left=left, when=when, **kwargs):
            left[0] -= 1
            if left[0] == 0 and when == "before":
                raise Killed
            reply = ask(wire, *args, **kwargs)
            if left[0] == 0:
                raise Killed
            return reply

        with monkeypatch.context() as m:
            m.setattr(Wire, "ask", dying)
            try:
                promote(far, "stable", b, **BY)
            except Killed:
                deaths += 1
            except StreamlearnError:
                assert left[0] <= 0
        far = remote(docker_registry.host, tmp_path / "spool", registry=far.config.registry)
        held, told = far.find("stable").digest, history(far, "stable")
        assert told[0].after == held in (a, b) and told[-1].after == a and "untold" not in {m.kind for m in told}
        if held == a:
            promote(far, "stable", b, **BY)
        assert moved(far) == [("promote", a, b), ("promote", "", a)] and len(unfinished(far)) <= 1
        if left[0] > 0:
            break
    assert deaths > 10


def test_the_record_is_listed_again_where_another_writer_lost_it(docker_registry, tmp_path):
    """The fallback index of referrers has no compare-and-set: an entry may go while the tag moves."""

    class Losing(type(remote(docker_registry.host, tmp_path))):
        def tag(self, digest, tag, *, expect="*"):
            super().tag(digest, tag, expect=expect)
            self._put_manifest(digest.replace(":", "-"), *empty_index())

    far = remote(docker_registry.host, tmp_path / "spool")
    a = snapshot(far, 1)
    far.__class__ = Losing
    promote(far, "stable", a, **BY)
    assert [r.artifact_type for r in far.referrers(a)] == [MOVE] and [m.kind for m in history(far)] == ["promote"]


def empty_index():
    from streamlearn.contract.oci import INDEX, Descriptor, canonical, digest_of

    data = canonical({"schemaVersion": 2, "mediaType": INDEX, "manifests": []})
    return Descriptor(INDEX, digest_of(data), len(data)), data
