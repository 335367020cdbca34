"""Retention: what must stay stays, against a model; and whatever is done in whatever order, no tag ever points to nothing."""

import json
import time

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlearn.__main__ import cli
from streamlearn.contract.errors import ConfigError, Corrupt
from streamlearn.contract.oci import parts
from streamlearn.contract.registry import OciLayout
from streamlearn.contract.registry_gc import collect
from streamlearn.snapshots.history import CHANNELS, history
from streamlearn.snapshots.promote import Pinned, pin, promote, rollback, unpin
from streamlearn.snapshots.publish import CANDIDATE, steps
from streamlearn.snapshots.retain import plan, retain
from tests.adapters.oci import remote
from tests.contract.test_registry_gc import killed_at
from tests.snapshots.channels import snapshot

BY = dict(by="ann", why="because")
LATER = time.time() + 10 * 86_400


@pytest.fixture
def registry(tmp_path):
    return OciLayout(tmp_path / "registry")


def publish(registry, step, generation=""):
    digest = snapshot(registry, step, generation=generation)
    registry.tag(digest, CANDIDATE)
    return digest


def whole(registry):
    """Every tag leads to a manifest with all its blobs, and every channel to where its history says."""
    for name, known in registry.tags().items():
        for digest in parts(registry.manifest(known.digest)[1]):
            registry.check_blob(digest)
        if name in CHANNELS:
            assert history(registry, name)[0].after == known.digest
            assert all(registry.manifest(m.record) for m in history(registry, name)[:1])


def test_what_stays_and_why(registry):
    for step in range(1, 11):
        publish(registry, step, "2026Q3" if step <= 5 else "2026Q4")
    for reference in ("0.1.0", "0.2.0", "0.3.0"):
        promote(registry, "stable", reference, **BY)
    registry.tag(registry.find("0.4.0").digest, "ours")
    found = plan(registry, keep=2, keep_moves=1, also=[registry.find("0.7.0").digest])
    assert found.kept == {
        "0.2.0": "in the last moves", "0.3.0": "tag stable, in the last moves", "0.4.0": "tag ours", "0.5.0": "newest of 2026Q3",
        "0.7.0": "needed by this home", "0.9.0": "among the newest", "0.10.0": "tag candidate, among the newest, newest of 2026Q4",
    }  # fmt: skip
    assert list(found.gone) == ["0.1.0", "0.6.0", "0.8.0"] and len(registry.names()) == 13  # a plan changes nothing
    assert retain(registry, keep=2, keep_moves=1, also=[registry.find("0.7.0").digest]) == found and steps(registry) == [
        2,
        3,
        4,
        5,
        7,
        9,
        10,
    ]
    assert collect(registry).manifests == 0  # who is pulling one has a day
    assert collect(registry, now=LATER).manifests >= 3
    whole(registry)
    assert [m.step for m in history(registry)] == [3, 2, 1]  # the audit outlives its snapshots
    assert rollback(registry, "stable", **BY).step == 2


def test_a_tag_that_was_moved_meanwhile_is_not_taken(registry):
    a, b, c = (snapshot(registry, step) for step in (1, 2, 3))
    registry.untag_all({"0.1.0": a, "0.2.0": a, "0.9.0": c})
    assert registry.names() == ["0.2.0", "0.3.0"] and registry.find("0.2.0").digest == b


def test_a_damaged_record_still_keeps_what_it_led_from(registry):
    for step in (1, 2, 3):
        promote(registry, "stable", publish(registry, step), **BY)
    registry.path(registry.manifest(history(registry)[0].record)[1]["layers"][0]["digest"]).write_bytes(b"{}")
    assert list(retain(registry, keep=1, keep_moves=1).gone) == ["0.1.0"]


def test_a_snapshot_that_cannot_be_read_stops_it(registry):
    digest, *_ = (publish(registry, step) for step in (1, 2, 3))
    registry.path(digest).write_bytes(b"{}")
    with pytest.raises(Corrupt, match=digest[7:]):
        retain(registry, keep=1)
    assert steps(registry) == [1, 2, 3]


def test_by_command_and_not_of_a_registry_behind_a_network(registry, tmp_path, docker_registry):
    for step in (1, 2, 3):
        publish(registry, step)
    home, run = ["--home", str(tmp_path)], CliRunner()
    assert isinstance(run.invoke(cli, ["snapshots", "retain", *home]).exception, ConfigError)
    dry = run.invoke(cli, ["snapshots", "retain", "--keep", "1", "--dry-run", *home])
    assert "would go 0.1.0" in dry.output and "keep 0.3.0  tag candidate" in dry.output and steps(registry) == [1, 2, 3]
    done = json.loads(run.invoke(cli, ["snapshots", "retain", "--keep", "1", "--json", *home], catch_exceptions=False).output)
    assert list(done["gone"]) == ["0.1.0", "0.2.0"] and steps(registry) == [3]
    far = remote(docker_registry.host, tmp_path / "spool")
    snapshot(far, 1)
    with pytest.raises(ConfigError, match="use its own retention"):
        retain(far, keep=1)
    with pytest.raises(ConfigError, match="1 or more"):
        plan(registry, keep=0)


# --- against a model ---

ACTS = st.one_of(
    st.tuples(st.just("publish"), st.sampled_from(["", "Q1", "Q2"])),
    st.tuples(st.just("promote"), st.sampled_from(CHANNELS), st.integers(0, 6)),
    st.tuples(st.just("rollback"), st.sampled_from(CHANNELS)),
    st.tuples(st.just("pin"), st.sampled_from(CHANNELS)),
    st.tuples(st.just("unpin"), st.sampled_from(CHANNELS)),
    st.tuples(st.just("mine"), st.integers(0, 6)),
    st.tuples(st.just("retain"), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.just("gc")),
    st.tuples(st.just("crash"), st.integers(0, 12), st.sampled_from(["promote", "rollback", "retain", "gc", "publish"])),
)


class Model:
    """What the tags must be, told without records: a list of holders for each channel."""

    def __init__(self, registry):
        self.registry, self.step, self.tags, self.generations = registry, 0, {}, {}
        self.moves = {c: [] for c in CHANNELS}  # (before, after), the newest last
        self.pinned, self.bad = set(), {c: set() for c in CHANNELS}

    def nth(self, n):
        tags = sorted((t for t in self.tags if t[0] == "0"), key=lambda t: int(t.split(".")[1]))
        return self.tags[tags[n % len(tags)]] if tags else None

    def publish(self, generation):
        self.step += 1
        digest = publish(self.registry, self.step, generation)
        self.tags |= {f"0.{self.step}.0": digest, CANDIDATE: digest}
        self.generations[digest] = generation

    def promote(self, channel, n):
        digest = self.nth(n)
        if digest is None or self.tags.get(channel) == digest:
            return
        try:
            promote(self.registry, channel, digest, **BY)
        except Pinned:
            assert channel in self.pinned
            return
        assert channel not in self.pinned
        self._moved(channel, digest)
        self.bad[channel].discard(digest)

    def rollback(self, channel):
        held = self.tags.get(channel)
        left = self.bad[channel] | {held}
        known = [after for _, after in reversed(self.moves[channel]) if after not in left and self.there(after)]
        try:
            digest = rollback(self.registry, channel, **BY).after
        except (Pinned, ConfigError) as e:
            assert channel in self.pinned if isinstance(e, Pinned) else not known
            return
        assert digest == known[0]
        self.bad[channel].add(held)
        self._moved(channel, digest)

    def _moved(self, channel, digest):
        self.moves[channel].append((self.tags.get(channel, ""), digest))
        self.tags[channel] = digest

    def pin(self, channel):
        if channel in self.tags and channel not in self.pinned:
            pin(self.registry, channel, **BY)
            self.pinned.add(channel)
            self.moves[channel].append((self.tags[channel],) * 2)

    def unpin(self, channel):
        if channel in self.pinned:
            unpin(self.registry, channel, **BY)
            self.pinned.discard(channel)
            self.moves[channel].append((self.tags[channel],) * 2)

    def mine(self, n):
        digest = self.nth(n)
        if digest:
            self.registry.tag(digest, "mine")
            self.tags["mine"] = digest

    def retain(self, keep, keep_moves):
        versions = sorted((int(t.split(".")[1]), d) for t, d in self.tags.items() if t[0] == "0")
        kept = {d for _, d in versions[-keep:]} | {d for t, d in self.tags.items() if t[0] != "0"}
        kept |= {d for c in CHANNELS for move in self.moves[c][-keep_moves:] for d in move}
        kept |= {d for g, d in {self.generations[d]: d for _, d in versions}.items() if g}
        retain(self.registry, keep=keep, keep_moves=keep_moves)
        self.tags = {t: d for t, d in self.tags.items() if t[0] != "0" or d in kept}

    def gc(self):
        collect(self.registry, now=LATER)
        listed = {row.digest for row in self.registry.index().rows.values()}
        assert {d for d in self.generations if d in listed} == set(self.tags.values())

    def there(self, digest):
        return self.registry.path(digest).exists()

    def crash(self, nth, act):
        """A process dies by SIGKILL before its nth change of the disk: what it wanted is done or not, and the model learns which."""
        channel, digest = "stable", self.nth(nth)
        wanted = {
            "promote": lambda r: promote(r, channel, digest, **BY), "rollback": lambda r: rollback(r, channel, **BY),
            "retain": lambda r: retain(r, keep=1, keep_moves=1), "gc": lambda r: collect(r, now=LATER), "publish": lambda r: publish(r, 1000 + nth),
        }  # fmt: skip
        if act == "promote" and digest is None:
            return
        before = self.registry.find(channel)
        killed_at(lambda r: quietly(wanted[act], r), self.registry.root, nth)
        whole(self.registry)
        after = self.registry.find(channel)
        if after != before:
            self._moved(channel, after.digest)
            if act == "rollback":
                self.bad[channel].add(before.digest)
            self.bad[channel] -= {after.digest} if act == "promote" else set()
        found = {name: known.digest for name, known in self.registry.tags().items()}
        assert {t: d for t, d in found.items() if t[0] != "0" and t != CANDIDATE} == {
            t: d for t, d in self.tags.items() if t[0] != "0" and t != CANDIDATE
        }
        self.tags = found
        self.generations |= {d: "" for t, d in found.items() if d not in self.generations}
        self.step = max([self.step, *(int(t.split(".")[1]) for t in found if t[0] == "0")])


def quietly(act, registry):
    try:
        act(registry)
    except (Pinned, ConfigError):
        return


@settings(max_examples=60)
@given(acts=st.lists(ACTS, max_size=22))
def test_whatever_was_done_and_killed_the_tags_are_the_model_s_and_lead_to_whole_snapshots(acts, tmp_path_factory):
    model = Model(OciLayout(tmp_path_factory.mktemp("registry")))
    for name, *args in [("publish", "Q1"), ("publish", ""), *acts, ("retain", 1, 1), ("gc",)]:
        getattr(model, name)(*args)
        whole(model.registry)
        assert {t: known.digest for t, known in model.registry.tags().items()} == model.tags
    for channel in CHANNELS:
        told = [(m.before, m.after) for m in history(model.registry, channel)]
        assert told == model.moves[channel][::-1]
