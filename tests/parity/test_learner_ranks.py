"""One, two and four processes, each with a part of every batch, learn what one process learns from the whole, with DDP and with FSDP2."""

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from streamlearn.contract.errors import ConfigError
from streamlearn.learn.ranks import Ranks, meeting
from tests.learn.world import flat
from tests.parity.learner_world import CASES, STEPS, B, furthest, worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # up to four processes begin before the first of them
NEAR = 1e-6


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    mp.spawn(worker, args=(0, str(folder)), nprocs=1)
    return torch.load(folder / "0.pt", weights_only=False)


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request, tmp_path_factory):
    """What each rank of so many found, all cases in one start."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    mp.spawn(worker, args=(request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_the_ranks_learn_what_one_process_learns_from_the_whole_batch(alone, ranks, case):
    steps, state = alone[case]
    assert len(steps) == STEPS and all(rows == B for *_, rows in steps)
    for found in ranks:
        for seen, want in zip(found[case][0], steps, strict=True):
            assert seen == pytest.approx(want, rel=NEAR, nan_ok=True)
        assert set(dict(flat(found[case][1]))) == set(dict(flat(state)))
        far, where = furthest(found[case][1], state)
        assert far < NEAR, where


@pytest.mark.parametrize("case", CASES)
def test_every_rank_holds_the_same_to_the_last_bit(ranks, case):
    for found in ranks[1:]:
        assert furthest(found[case][1], ranks[0][case][1])[0] == 0.0
        assert str(found[case][0]) == str(ranks[0][case][0])


def test_a_batch_that_is_not_finite_on_one_rank_is_learnt_by_none(ranks):
    for found in ranks:
        state = found["fsdp, not finite"][1]
        assert (state["bad_steps"], state["step"]) == (1, STEPS)


@pytest.mark.parametrize("size", [0, 2])
def test_a_group_normalises_as_one_process_with_all_of_its_images(ranks, size):
    if len(ranks) == 1:
        assert "norms" not in ranks[0]
        return
    size = size or len(ranks)
    for first in range(0, len(ranks), size):
        group = [found["norms"][0 if size == len(ranks) else size] for found in ranks[first : first + size]]
        for parts in zip(*group, strict=True):
            x = torch.cat([part["x"] for part in parts]).requires_grad_()
            norm = (nn.BatchNorm2d(3) if x.dim() == 4 else nn.BatchNorm1d(3)).double()
            with torch.no_grad():
                norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
            y = norm(x)
            weights = torch.cat([torch.arange(part["y"].numel()).view(part["y"].shape).double().sin() for part in parts])
            (y * weights).sum().backward()
            together = {"y": y, "dx": x.grad, **norm.state_dict(), "dw": norm.weight.grad, "db": norm.bias.grad}
            for name in ("y", "dx"):
                torch.testing.assert_close(torch.cat([part[name] for part in parts]), together[name], atol=1e-12, rtol=1e-9)
            for name in ("dw", "db"):
                torch.testing.assert_close(torch.stack([part[name] for part in parts]).sum(0), together[name], atol=1e-12, rtol=1e-9)
            for part in parts:
                for name in ("running_mean", "running_var", "num_batches_tracked"):
                    torch.testing.assert_close(part[name], together[name], atol=1e-12, rtol=1e-9)


def test_without_torchrun_there_is_nobody_to_meet(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with meeting("cuda:1"):
        assert Ranks().agreed(3, 4) == (3, 4) and Ranks().told("news") == "news" and Ranks().said(1) == [1]


@pytest.mark.parametrize(
    ("device", "told"), [("cuda:1", "each takes its own device; set it to 'cuda' or 'cpu'"), ("cuda", "lower --nproc-per-node")]
)
def test_a_device_that_processes_cannot_share_is_refused_with_the_remedy(monkeypatch, device, told):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "4096")
    with pytest.raises(ConfigError, match=rf"train.device = '{device}': .*{told}"), meeting(device):
        pass
