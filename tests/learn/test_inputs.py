"""What comes from outside is bound to one step, and taken once in the sequence that the weights go through."""

import threading

import pytest

from streamlearn.contract.errors import ConfigError, Retryable
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.orders import Order, command_key, input_key, orders, read_input, send
from streamlearn.learn.inputs import Inputs, Sources, Window
from streamlearn.learn.state import fresh_state
from streamlearn.learn.trainer import train
from tests.learn.test_trainer import through_disk
from tests.learn.world import batches, same, small_config


class Life:
    """One process of a learner: it begins with a checkpoint, and ends when it is no longer asked."""

    def __init__(self, store, saved=None, sources=None):
        self.store, self.state = store, fresh_state(small_config())
        if saved is not None:
            self.state.load_state_dict(through_disk(saved))
        self.inputs = Inputs(store, self.state, sources or Sources())

    def learn(self, end, sent=()):
        """`sent`: (step, order) that the operator gives before this step."""
        taken = []
        for step in range(self.state.step, end):
            for order in [order for at, order in sent if at == step]:
                send(self.store, order)
            self.inputs.look()
            taken += self.inputs.take(self.state)
            train(self.state, batches(step, step + 1), [])
        return taken


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path)


def rates(state):
    return [rate for _, rate in state.policy.halvings]


@pytest.mark.parametrize("killed_at", [5, 6, 9])
def test_an_order_taken_by_a_run_that_was_killed_is_in_force_from_the_same_step_again(store, tmp_path, killed_at):
    sent = [(5, Order("halve")), (5, Order("set", 0.1)), (8, Order("halve"))]
    whole = Life(store)
    whole.learn(12, sent)

    other = FolderStore(tmp_path / "other")
    first = Life(other)
    first.learn(4)
    checkpoint = first.state.state_dict()
    checkpoint = through_disk(checkpoint)
    first.learn(killed_at, sent)
    second = Life(other, checkpoint)
    second.learn(12, [(at, order) for at, order in sent if at >= killed_at])
    assert same(whole.state.state_dict(), second.state.state_dict()) == set()
    assert len(second.state.policy.halvings) == 2 and second.state.inputs["count"] == 3


def test_an_order_that_a_checkpoint_holds_is_not_taken_again(store):
    first = Life(store)
    first.learn(6, [(3, Order("halve"))])
    second = Life(store, first.state.state_dict())
    assert second.learn(9) == [] and len(second.state.policy.halvings) == 1


def test_an_order_given_while_no_learner_runs_waits_for_one(store):
    send(store, Order("hold", by="ann@desk", reason="a new source"))
    assert [(n, order.by, step) for n, order, step in orders(store)] == [(1, "ann@desk", None)]
    life = Life(store)
    taken = life.learn(2)
    assert life.state.policy.held and [(t["action"], t["step"], t["reason"]) for t in taken] == [("hold", 0, "a new source")]
    assert [(n, step) for n, _, step in orders(store)] == [(1, 0)]


def test_operators_who_order_at_once_get_numbers_of_their_own(store):
    numbers = []
    threads = [threading.Thread(target=lambda: numbers.append(send(store, Order("halve")))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(numbers) == list(range(1, 9))


@pytest.mark.parametrize(
    ("order", "why"),
    [
        (Order("double"), "one of halve, set, hold, release"),
        (Order("set"), "set needs a rate"),
        (Order("halve", 0.1), "halve takes no rate"),
        (Order("set", -1.0), "must be a number above 0"),
        (Order("set", float("nan")), "must be a number above 0"),
        (Order("set", 1e300), r"must be a number above 0, and at most 1e\+38"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused_before_it_is_given(store, order, why):
    with pytest.raises(ConfigError, match=why):
        send(store, order)
    assert store.list("train/") == []


def test_an_order_that_cannot_be_read_is_refused_on_the_record_and_those_after_it_are_taken(store):
    store.put(command_key(1), b'{"action": "ha')
    send(store, Order("halve"))
    life = Life(store)
    taken = life.learn(3)
    assert [t["kind"] for t in taken] == ["refused", "command"] and "no order" in taken[0]["why"]
    assert len(life.state.policy.halvings) == 1 and [(n, o is None, s) for n, o, s in orders(store)] == [(1, True, 0), (2, False, 1)]


class Flaky(FolderStore):
    """Takes no inputs for a while; then it does, and says that it did not."""

    refuses, lies = 0, 0

    def put(self, key, data):
        if key.startswith("train/inputs/") and self.refuses:
            self.refuses -= 1
            raise Retryable("the store is down", after_s=0.0)
        super().put(key, data)
        if key.startswith("train/inputs/") and self.lies:
            self.lies -= 1
            raise Retryable("no reply", after_s=0.0)


def test_an_input_is_in_force_only_once_it_is_on_record(tmp_path):
    store = Flaky(tmp_path)
    send(store, Order("halve"))
    store.refuses, store.lies = 2, 1
    life = Life(store)
    for step in range(3):
        life.learn(step + 1)
        assert life.state.policy.halvings == []
    life.learn(5)
    assert [at for at, _ in life.state.policy.halvings] == [3] == [read_input(store, 1)["step"]]
    assert read_input(store, 2) is None


def test_a_generation_that_is_cut_restarts_the_window_once(store):
    life = Life(store)
    life.learn(6)
    assert life.state.policy.loss.steps > 0
    store.put("generations/2026Q4.json", b"{}")
    taken = life.learn(7)
    assert [(t["kind"], t["generation"]) for t in taken] == [("refresh", "2026Q4")] and life.state.policy.loss.steps <= 1
    assert Life(store, life.state.state_dict()).learn(9) == []


def test_a_source_that_changes_restarts_the_window_once_and_again_when_it_changes_further(store):
    seen = {}
    life = Life(store, sources=Sources(drift=lambda: seen))
    found = []
    for distance in (0.5, 2.0, 2.3, 2.1, 4.0, 0.2):  # without drift at most 1
        seen["web"] = Window(distance, 1.0)
        found += life.learn(life.state.step + 1)
    assert [t["distance"] for t in found] == [2.0, 4.0, 0.2]


def test_results_of_the_probe_reach_the_policy_each_once(store):
    results = [(1000 * i, 0.5) for i in range(1, 4)]
    life = Life(store, sources=Sources(probe=lambda after: [r for r in results if r[0] > after]))
    life.learn(2)
    results.append((4000, 0.4))
    life.learn(4)
    assert life.state.policy.probes == results and life.state.inputs["count"] == 4


def test_a_thread_of_the_learner_looks_by_itself_and_its_fault_is_the_learners(store):
    life = Life(store)
    life.inputs.look_s = 0.01
    send(store, Order("halve"))
    life.inputs.start()
    deadline = threading.Event()
    while not life.inputs.take(life.state) and not deadline.wait(0.01):
        pass
    life.inputs.close()
    assert len(life.state.policy.halvings) == 1

    def broken():
        raise ZeroDivisionError

    other = Inputs(store, life.state, Sources(drift=broken), look_s=0.01)
    other.start()
    with pytest.raises(ZeroDivisionError):
        while not deadline.wait(0.01):
            other.take(life.state)
    other.close()


def test_the_record_is_read_back_whole_or_refused(store):
    from streamlearn.contract.errors import Corrupt

    store.put(input_key(1), b"[]")
    with pytest.raises(Corrupt, match="no input of a learner"):
        Life(store)
