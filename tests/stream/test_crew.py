"""Worker processes: what they die of is found out, and what they take of memory does not grow."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch

from streamlearn.contract.errors import Stuck
from streamlearn.contract.shards import ShardSample
from streamlearn.stream import crew as crews
from streamlearn.stream.crew import Crew
from streamlearn.stream.keys import draws, key
from streamlearn.stream.worker import BatchSpec, Place
from tests.ingest.server import picture
from tests.stream.world import CONFIG

B = 4


def spec(path, number, bodies):
    """A batch of these images."""
    file, places = path / f"{number}.bin", []
    with file.open("wb") as f:
        for n, body in enumerate(bodies):
            places.append(Place(str(file), ShardSample(n, n, "jpg", f.tell(), len(body))))
            f.write(body)
    return BatchSpec(tuple(places), draws(key(0, number), len(bodies)))


def plain(path, number):
    return spec(path, number, [picture(10 * number + i) for i in range(B)])


def crew_of(workers, **more):
    return Crew(CONFIG.model_copy(update={"workers": workers, "prefetch": 3} | more), batch=B, device=torch.device("cpu"))


def taken(crew, work):
    sound = crew.collect(work)
    crops = crew.crops(work)
    crew.end(work)
    return sound.tolist(), crops


def workers_of(crew):
    return list(crew._pool._processes) if crew._pool is not None else []


@contextlib.contextmanager
def death_to(crew, condemned):
    """Whoever does what `condemned()` says is killed at once."""
    over = threading.Event()

    def reap():
        while not over.wait(0.001):
            if condemned():
                for pid in workers_of(crew):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)

    reaper = threading.Thread(target=reap, daemon=True)
    reaper.start()
    try:
        yield
    finally:
        over.set()
        reaper.join(60)


@pytest.mark.parametrize(("place", "augment"), [(0, "workers"), (1, "device")])  # the oldest work, and one behind it
def test_a_picture_that_kills_whoever_decodes_it_is_replaced_and_the_others_are_made(tmp_path, place, augment):
    deadly = 2
    specs = [plain(tmp_path, n) for n in range(3)]
    bodies = [picture(10 * place + i) for i in range(B)]
    bodies[deadly] = picture(7, size=(5000, 5000))  # long enough to be caught in the act
    specs[place] = spec(tmp_path, place, bodies)
    sound = crew_of(0, augment=augment)
    wanted = [taken(sound, sound.begin(s)) for s in specs]
    crew = crew_of(2, augment=augment)
    works = [crew.begin(s) for s in specs]

    def at_it():
        return not works[place].spec.deadly and int(crew._trays.at(works[place].tray)[0]) == deadly

    with death_to(crew, at_it):
        found = [taken(crew, work) for work in works]
    crew.close()
    assert crew.deaths >= 2 and works[place].spec.deadly == {deadly}
    for n, ((is_sound, crops), (was_sound, reference)) in enumerate(zip(found, wanted, strict=True)):
        assert was_sound == [True] * B
        assert is_sound == [n != place or slot != deadly for slot in range(B)]
        kept = [slot for slot in range(B) if is_sound[slot]]
        assert all(torch.equal(a[:, kept], b[:, kept]) for a, b in zip(crops, reference, strict=True))


def test_a_worker_that_was_killed_over_a_picture_by_chance_costs_no_picture(tmp_path):
    """As by the kernel for want of memory: three deaths, the last of them at work alone, are no proof."""
    bodies = [picture(i) for i in range(B)]
    bodies[2] = picture(7, size=(5000, 5000))
    crew = crew_of(1)
    work = crew.begin(spec(tmp_path, 0, bodies))
    with death_to(crew, lambda: crew.deaths < 3 and int(crew._trays.at(work.tray)[0]) == 2):
        sound, _ = taken(crew, work)
    crew.close()
    assert crew.deaths == 3 and sound == [True] * B and not work.spec.deadly


def test_workers_that_are_killed_whatever_they_do_end_the_role_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(crews, "DEATHS_IN_A_ROW", 3)
    crew = crew_of(1)
    work = crew.begin(plain(tmp_path, 0))
    with death_to(crew, lambda: True), pytest.raises(Stuck, match=r"4 worker processes were killed one after another .* out-of-memory"):
        for _ in range(1000):  # some are quicker than the reaper
            taken(crew, work)
            work = crew.begin(plain(tmp_path, 0))
    crew.close()


def memory_over_batches(path):
    """RSS of the learner's process and its workers, in bytes, after each quarter of 2,000 batches."""
    crew = crew_of(1, crops=(CONFIG.crops[0].model_copy(update={"size": 96}),))
    one, seen = spec(path, 0, [picture(i, size=(200, 150)) for i in range(B)]), []
    for n in range(2000):
        taken(crew, crew.begin(one))
        if n % 500 == 499:
            seen.append(sum(psutil.Process(pid).memory_info().rss for pid in (os.getpid(), *workers_of(crew))))
    crew.close()
    return seen


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_batches(tmp_path):
    """A leak of one batch's crops in fifty would show.  In a process of its own: this one's memory is moved by all tests before."""
    code = "import sys, pathlib; from tests.stream.test_crew import *\nif __name__ == '__main__':\n    print(memory_over_batches(pathlib.Path(sys.argv[1])))"
    script = tmp_path / "measure.py"
    script.write_text(code)
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    said = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, env=env, check=False)
    assert said.returncode == 0, said.stderr
    seen = json.loads(said.stdout)
    assert seen[-1] - seen[0] < 15 * (2 * B * 96 * 96 * 3) + 2**21, [s >> 10 for s in seen]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("augment", ["workers", "device"])
def test_what_is_copied_ahead_to_a_gpu_is_what_the_processor_has(tmp_path, augment):
    specs = [plain(tmp_path, n) for n in range(6)]
    here = crew_of(0, augment=augment)
    wanted = [taken(here, here.begin(s))[1] for s in specs]
    there = Crew(CONFIG.model_copy(update={"workers": 2, "prefetch": 3, "augment": augment}), batch=B, device=torch.device("cuda"))
    assert there._trays._pinned
    works, found = [there.begin(s) for s in specs[:3]], []
    for n in range(6):
        found.append(taken(there, works[0])[1])
        works.pop(0)
        if works:
            works[0].future.result()
            there.copy_ahead(works[0])
            assert works[0].copied is not None
        if n + 3 < 6:
            works.append(there.begin(specs[n + 3]))
    there.close()
    for ours, theirs in zip(wanted, found, strict=True):
        assert all(np.allclose(a.numpy(), b.cpu().numpy(), atol=1e-5) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("augment, rest", [("auto", "the learner's process"), ("workers", "or set stream.augment to 'device'")])
def test_without_the_libraries_that_opencv_loads_the_remedy_is_said(tmp_path, augment, rest):
    """In a process of its own, which finds an OpenCV like that of a bare container."""
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')\n")
    code = (
        "import logging, torch; from streamlearn.stream.crew import Crew; from tests.stream.world import CONFIG\n"
        "logging.basicConfig()\n"
        f"crew = Crew(CONFIG.model_copy(update={{'augment': {augment!r}}}), batch=2, device=torch.device('cpu'))\n"
        "assert not crew.paint and crew._trays.take().shapes[0] == (2, 2, 16, 16, 3)  # crops are still left to the workers\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), os.getcwd()))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert (done.returncode == 0) == (augment == "auto"), done.stderr
    assert "libGL.so.1" in done.stderr and "libgl1 and libglib2.0-0" in done.stderr and rest in done.stderr
    assert ("ConfigError" in done.stderr) == (augment == "workers")
