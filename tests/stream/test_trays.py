"""Memory shared with workers: one writer at a time, no leak, the same bytes on both sides."""

import os
import subprocess
import sys
import threading
from concurrent.futures import Future

import numpy as np
import psutil
import pytest

from streamlearn.contract.config import CropConfig
from streamlearn.stream.trays import Trays

CROPS = (CropConfig(count=2, size=16, scale=(0.3, 1.0)), CropConfig(count=1, size=8, scale=(0.05, 0.3)))


@pytest.fixture
def trays(request):
    found = Trays(CROPS, 4, 3, decoded_bytes=getattr(request, "param", 0))
    yield found
    found.close()


def test_a_tray_has_an_array_for_each_resolution(trays):
    assert [a.shape for a in trays.arrays(trays.take())] == [(2, 4, 16, 16, 3), (1, 4, 8, 8, 3)]


def test_a_tray_for_a_pile_has_a_table_and_the_room_that_was_asked_for_or_what_crops_take():
    for asked, got in ((10_000, 10_048), (1, 1728)):  # cache lines
        trays = Trays(CROPS, 4, 3, decoded_bytes=asked)
        assert [a.shape for a in trays.arrays(trays.take())] == [(3, 4, 48), (4 * got,)]
        trays.close()


def test_what_is_not_written_to_takes_no_memory():
    before = psutil.Process().memory_info().shared
    trays = Trays(CROPS, 4, 3, decoded_bytes=2**26)
    trays.arrays(trays.take())[1][: 2**24] = 1
    grown = psutil.Process().memory_info().shared - before
    trays.close()
    assert 2**23 < grown < 2**26


@pytest.mark.parametrize("trays", [0, 5000], indirect=True)
def test_no_two_trays_overlap(trays):
    taken = [trays.take() for _ in range(3)]
    for value, tray in enumerate(taken):
        for array in (*trays.arrays(tray), trays.at(tray)):
            array[...] = value + 1
    for value, tray in enumerate(taken):
        assert all((array == value + 1).all() for array in (*trays.arrays(tray), trays.at(tray)))


def test_another_process_writes_what_this_one_reads(trays):
    tray = trays.take()
    code = "import sys, pickle; from streamlearn.stream.trays import mapped\narrays, at = mapped(pickle.load(sys.stdin.buffer))\nat[0] = 7\nfor a in arrays: a[...] = a.shape[2]"
    import pickle

    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(tray), check=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert [np.unique(a).tolist() for a in trays.arrays(tray)] == [[16], [8]] and trays.at(tray).tolist() == [7]


def test_a_tray_that_is_still_written_to_is_handed_out_last_and_only_when_that_has_ended(trays):
    first, second, third = (trays.take() for _ in range(3))
    work = Future()
    trays.give_back(first, work)
    trays.give_back(second)
    assert trays.take() == second
    found = []
    waiter = threading.Thread(target=lambda: found.append(trays.take()))
    waiter.start()
    waiter.join(0.2)
    assert not found
    work.set_result(None)
    waiter.join(60)
    assert found == [first] and third != first


def test_the_memory_ends_with_its_users():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        trays = Trays(CROPS, 4, 3)
        trays.arrays(trays.take())[0][...] = 1
        trays.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # a mapping holds a descriptor until it is collected
