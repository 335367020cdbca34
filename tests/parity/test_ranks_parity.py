"""One, two and four processes over gloo learn what one process learns from the whole batch."""

import pytest
import torch
import torch.multiprocessing as mp

from streamlearn.contract.config import ObjectiveConfig
from streamlearn.contract.errors import ConfigError
from streamlearn.learn.objectives import build_objective
from streamlearn.learn.ranks import Ranks, joined
from tests.learn.world import flat
from tests.parity.ranks_world import CASES, STEPS, A, B, config, run, worker

GROUPED = [case for case in CASES if config(case).assign_ranks]


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request, tmp_path_factory):
    """What each rank of so many found, all cases in one start."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    mp.spawn(worker, args=(request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


def assert_alike(found, expected):
    for loss, want in zip(found[0], expected[0], strict=True):
        assert loss == pytest.approx(want, rel=1e-6)
    for (name, a), (_, b) in zip(flat(found[1]), flat(expected[1]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", [case for case in CASES if case not in GROUPED])
def test_the_ranks_learn_what_one_process_learns_from_the_whole_batch(ranks, case):
    expected = run(case, Ranks())
    assert len(expected[0]) == STEPS
    for found in ranks:
        assert_alike(found[case], expected)


@pytest.mark.parametrize("case", GROUPED)
def test_ranks_in_groups_learn_what_one_process_learns_that_assigns_each_groups_part_alone(ranks, case):
    if len(ranks) < 2:
        assert case not in ranks[0]  # a group of two asks for two
        return
    groups = len(ranks) // 2
    (losses, state), everybody = run(case, Ranks(), parts=groups), [found[case] for found in ranks]
    for found in everybody:
        assert_alike((found[0], found[1]["net"]), (losses, state["net"]))
        assert_alike((found[0], found[1]["objective"]["prototypes.weight"]), (losses, state["objective"]["prototypes.weight"]))


def test_every_rank_holds_the_whole_state(ranks):
    for case in CASES:
        for found in ranks[1:]:
            for (name, a), (_, b) in zip(flat(ranks[0][case][1]), flat(found[case][1]), strict=True):
                assert torch.equal(a, b), (case, name)


def test_both_views_are_assigned_in_one_reduction_an_iteration(ranks):
    sharp = config("ten iterations, sharp")
    expected = [(A, 1, sharp.prototypes)] * sharp.sinkhorn_iterations if len(ranks) > 1 else []
    assert all(found["reductions"] == expected for found in ranks)


def test_a_queue_that_ranks_cannot_share_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"objective.queue = 40 is no multiple of train.batch = 16, .* set it to 32 or 48"):
        build_objective(ObjectiveConfig(queue=40), 4, batch=B, ranks=Ranks(0, 2, 2))
    build_objective(ObjectiveConfig(queue=40), 4, batch=B, ranks=Ranks())  # alone it shares with nobody


def test_one_process_needs_no_process_group():
    assert joined(4) == Ranks()
