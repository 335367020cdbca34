"""Who yields to whom: by the learner's heartbeat, on its device, and no longer than asked."""

import threading

import pytest

from streamlearn.contract.status import Heartbeat
from streamlearn.probes.turns import Stopped, Turns, learning, same_device, turns_of


class Machine:
    """A clock on which work takes time, and the waits that were asked for."""

    def __init__(self):
        self.now, self.waits, self.finished = 0.0, [], 0

    def wait(self, seconds):
        if seconds:
            self.waits.append(seconds)
        return False

    def finish(self):
        self.finished += 1
        self.now += 1.0  # the queued work


def turns(machine, share, busy):
    return Turns(share, busy=lambda: busy, wait=machine.wait, clock=lambda: machine.now, finish=machine.finish)


@pytest.mark.parametrize(("share", "pause"), [(0.25, 9.0), (0.5, 3.0), (1.0, 0.0)])
def test_a_busy_device_is_left_alone_for_as_long_as_the_share_says(share, pause):
    machine = Machine()
    found = turns(machine, share, True)
    with found.turn():
        machine.now += 2.0
    assert found.yielded_s == pytest.approx(pause) and sum(machine.waits) == pytest.approx(pause)


def test_a_device_that_nobody_wants_is_used_without_a_pause():
    machine = Machine()
    found = turns(machine, 0.25, False)
    with found.turn():
        machine.now += 2.0
    assert found.yielded_s == 0 == machine.finished and machine.waits == []


def test_who_is_asked_to_stop_begins_nothing_more():
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped), Turns(1.0, busy=lambda: False, wait=stop.wait).turn():
        raise AssertionError("begun")


def test_only_a_learner_that_learns_on_the_same_gpu_is_yielded_to(tmp_path):
    assert same_device("cuda", "cuda:0") and not same_device("cuda:1", "cuda:0")
    assert not same_device("cpu", "cpu") and not same_device("cuda", "cpu")
    assert turns_of(tmp_path, "cpu", "cuda", 0.25, threading.Event()).share == 1.0
    assert turns_of(tmp_path, "cuda:0", "cuda", 0.25, threading.Event()).share == 0.25


def test_a_learner_that_waits_or_is_silent_is_not_learning(tmp_path):
    assert not learning(tmp_path)
    heart = Heartbeat(tmp_path, "train", period_s=0)
    heart.beat(state="waiting")
    assert not learning(tmp_path)
    heart.beat(state="learning")
    assert learning(tmp_path)
    path = tmp_path / "status" / "train.json"
    path.write_text(path.read_text().replace('"at": "20', '"at": "19'))
    assert not learning(tmp_path)
