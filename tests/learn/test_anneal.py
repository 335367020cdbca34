"""A branch falls to zero and is published; the trunk is only read."""

import hashlib
import threading

import pytest
from prometheus_client import CollectorRegistry

from streamlearn.contract.errors import ConfigError
from streamlearn.contract.metrics import LearnerMetrics
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.overlay_store import OverlayStore
from streamlearn.contract.status import Heartbeat
from streamlearn.learn.anneal import Plan, annealing, branch
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.learn.run import run_train
from tests.learn.test_run import Killed, Shelf, learn
from tests.learn.world import PlainStream, same, small_config


def contents(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def grow(home, trunk, shelf, **more):
    """What `streamlearn train anneal` does, without a shell."""
    own = FolderStore(home / "store")
    config = small_config(checkpoint_steps=2, bn_images=8)
    plan = branch(FolderStore(trunk / "store"), own, config, **{"share": 0.5} | more)
    config = annealing(config, plan, home=str(home), name="calm")
    stop = threading.Event()
    heart = Heartbeat(home, "train", period_s=0)
    return plan, run_train(config, lambda s: PlainStream(s, 100, stop), own, shelf, LearnerMetrics(CollectorRegistry()), heart, stop=stop)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    home = tmp_path_factory.mktemp("trunk")
    learn(home, 8, Shelf())
    return home


def test_its_last_step_is_published_under_its_own_name_and_the_trunk_is_only_read(trunk, tmp_path):
    before, shelf = contents(trunk), Shelf()
    plan, state = grow(tmp_path, trunk, shelf)
    assert plan == Plan(8, 4) and state.step == 12 and sorted(shelf.exports) == [12]
    assert shelf.exports[12][1].name == "calm"
    assert [round(state.policy.rate(s), 6) for s in range(8, 13)] == [0.5, 0.375, 0.25, 0.125, 0.0]
    assert contents(trunk) == before


def test_it_learns_otherwise_than_the_trunk_from_the_same_images(trunk, tmp_path):
    _, calm = grow(tmp_path / "a", trunk, Shelf())
    on = learn(tmp_path / "b", 12, Shelf())
    assert calm.stream == on.stream and calm.images == on.images
    different = same(calm.state_dict(), on.state_dict())
    assert any(path.startswith(".model") for path in different)


def test_killed_it_goes_on_to_the_same_weights_whatever_the_trunk_has_done_since(trunk, tmp_path):
    whole, late = Shelf(), Shelf(die_at=12)
    _, expected = grow(tmp_path / "a", trunk, whole)
    with pytest.raises(Killed):
        grow(tmp_path / "b", trunk, late)
    late.die_at = None
    learn(tmp_path / "other", 14, Shelf())
    plan, state = grow(tmp_path / "b", tmp_path / "other", late)
    # the rate that a loaded optimizer has before a step is the configuration's; every step sets it
    assert plan == Plan(8, 4) and same(expected.state_dict(), state.state_dict()) <= {".optimizer.param_groups.0.lr"}
    assert late.exports[12][0] == whole.exports[12][0]


def test_a_branch_that_was_begun_otherwise_and_a_home_that_is_none_are_refused(trunk, tmp_path):
    own, config = FolderStore(tmp_path / "own"), small_config()
    trunk_store = FolderStore(trunk / "store")
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        branch(FolderStore(tmp_path / "nothing"), own, config, share=0.1)
    with pytest.raises(ConfigError, match="is no branch"):
        branch(trunk_store, trunk_store, config, share=0.1)
    branch(trunk_store, own, config, share=0.1, steps=7)
    assert branch(trunk_store, own, config, share=0.1) == Plan(8, 7)
    with pytest.raises(ConfigError, match="begun with 7 steps, not 9"):
        branch(trunk_store, own, config, share=0.1, steps=9)
    with pytest.raises(ConfigError, match="itself a branch"):
        branch(own, FolderStore(tmp_path / "second"), config, share=0.1)


def test_a_trunk_in_its_warm_up_has_nothing_to_release(tmp_path):
    learn(tmp_path / "t", 2, Shelf())
    with pytest.raises(ConfigError, match=r"step 2, in the warm-up \(3 steps\)"):
        branch(FolderStore(tmp_path / "t" / "store"), FolderStore(tmp_path / "own"), small_config(), share=0.1)
    assert Checkpoints(FolderStore(tmp_path / "own"), keep=3).load() is None


def test_an_overlay_shows_both_stores_and_writes_to_one(tmp_path):
    beneath, top = FolderStore(tmp_path / "beneath"), FolderStore(tmp_path / "top")
    beneath.put("a/1", b"one")
    beneath.put("a/2", b"two")
    before = contents(tmp_path / "beneath")
    seen = OverlayStore(top, beneath)
    seen.put("a/2", b"second")
    assert seen.put_if_absent("a/3", b"three") and not seen.put_if_absent("a/1", b"other")
    (tmp_path / "file").write_bytes(b"four")
    seen.put_file("a/4", tmp_path / "file")
    assert seen.list("a/") == ["a/1", "a/2", "a/3", "a/4"]
    assert [seen.get(k) for k in seen.list("")] == [b"one", b"second", b"three", b"four"]
    assert (seen.size("a/1"), seen.size("a/2"), seen.get_range("a/1", 1, 2)) == (3, 6, b"ne")
    seen.get_file("a/1", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == b"one" and seen.modified("a/1") == beneath.modified("a/1")
    seen.delete("a/2")
    seen.delete("a/1")
    assert seen.get("a/2") == b"two" and contents(tmp_path / "beneath") == before
