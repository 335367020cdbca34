"""Gradients in parts are those of the whole batch: codes over all of it, BatchNorm over the part."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from streamlearn.contract.config import ModelConfig, ObjectiveConfig
from streamlearn.learn.accumulate import backward
from streamlearn.learn.model import Model
from streamlearn.learn.objectives import SwAV, parameters_of
from streamlearn.learn.state import fresh_state
from streamlearn.learn.trainer import train
from tests.learn.world import batches, same, small_config

B = 12


def crops(seed=0, resolutions=((2, 16), (3, 8))):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(views, B, 3, size, size, generator=g) for views, size in resolutions]


class Tiny(nn.Module):
    """A trunk without BatchNorm: its features of an image depend on nothing else."""

    width = 6

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2)

    def forward(self, x):
        return F.gelu(self.conv(x)).mean((2, 3))


def learner(head_norm="none", trunk=None, queue=0):
    torch.manual_seed(1)
    model = Model(ModelConfig(backbone="regnety-tiny", head=(8, 5), head_norm=head_norm))
    if trunk is not None:
        model.trunk = trunk
        model.head[0] = nn.Linear(trunk.width, 8, bias=head_norm == "none")
    return model, SwAV(ObjectiveConfig(prototypes=7, epsilon=0.03, queue=queue, freeze_prototypes=0), 5)


def grads(model, objective):
    return [p.grad.clone() for p in parameters_of(model, objective)]


@pytest.mark.parametrize("part", [1, 3, 5, 6])
def test_without_batchnorm_loss_codes_and_gradients_are_the_whole_batchs(part):
    whole, parts = learner(trunk=Tiny(), queue=B), learner(trunk=Tiny(), queue=B)
    parts[0].load_state_dict(whole[0].state_dict())
    for step in range(3):  # from the second on with a queue
        found = [backward(*one, crops(step), step, part=size) for one, size in ((whole, 0), (parts, part))]
        for a, b in zip(*found, strict=True):  # loss, each image's, embeddings
            torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(parts[1]._pending[1], whole[1]._pending[1], atol=1e-6, rtol=1e-6)
        for a, b in zip(grads(*whole), grads(*parts), strict=True):
            torch.testing.assert_close(b, a, atol=1e-7, rtol=1e-5)
        for _, objective in (whole, parts):
            objective.after_step(step)
        for p in parameters_of(*whole, *parts):
            p.grad = None


def test_the_sum_of_small_losses_would_be_another():
    whole, naive = learner(trunk=Tiny()), learner(trunk=Tiny())
    naive[0].load_state_dict(whole[0].state_dict())
    views = crops()
    loss, _, _ = backward(*whole, views, 0)
    small = [backward(*naive, [c[:, at : at + 3] for c in views], 0)[0] for at in range(0, B, 3)]
    assert abs(float(torch.stack(small).mean() - loss)) > 1e-3


class InParts(nn.Module):
    """Applies a module to groups of `part` images, as if BatchNorm's statistics were shared by so many only."""

    def __init__(self, module, part, views):
        super().__init__()
        self.module, self.part, self.views = module, part, views
        self.width = getattr(module, "width", 0)

    def forward(self, x):
        per_view = x.unflatten(0, (-1, B))
        done = [
            self.module(per_view[:, at : at + self.part].flatten(0, 1)).unflatten(0, (len(per_view), -1)) for at in range(0, B, self.part)
        ]
        return torch.cat(done, dim=1).flatten(0, 1)


@pytest.mark.parametrize("head_norm", ["bn", "none"])
def test_with_batchnorm_they_are_the_whole_batchs_normalised_in_groups_of_a_part(head_norm):
    model, objective = learner(head_norm=head_norm)
    reference = copy.deepcopy((model, objective))
    reference[0].trunk, reference[0].head = InParts(reference[0].trunk, 4, 5), InParts(reference[0].head, 4, 5)
    views = crops(resolutions=((2, 32), (2, 16)))
    loss, _, z = backward(model, objective, views, 0, part=4)
    expected, _, expected_z = backward(*reference, views, 0)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(z, expected_z, atol=1e-5, rtol=1e-5)
    for a, b in zip(grads(*reference), grads(model, objective), strict=True):
        torch.testing.assert_close(b, a, atol=1e-5 * float(a.abs().max()) + 1e-7, rtol=1e-4)


def test_the_first_pass_leaves_running_statistics_alone():
    model, objective = learner(head_norm="bn")
    twin = copy.deepcopy(model)
    views = crops(resolutions=((2, 32), (2, 16)))
    backward(model, objective, views, 0, part=6)
    for at in (0, 6):
        twin([c[:, at : at + 6] for c in views])
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_in_parts_goes_on_like_any_other():
    states = [fresh_state(small_config()) for _ in range(3)]
    train(states[0], batches(0, 6), [], micro_batch=4)
    train(states[1], batches(0, 3), [], micro_batch=4)
    states[2].load_state_dict(states[1].state_dict())
    train(states[2], batches(3, 6), [], micro_batch=4)
    assert same(states[0].state_dict(), states[2].state_dict()) == set()
    assert states[0].step == 6 and states[0].bad_steps == 0


def test_a_bad_part_spoils_the_step_and_nothing_else():
    state = fresh_state(small_config())
    train(state, batches(0, 5), [], micro_batch=4)
    before = copy.deepcopy(state.state_dict())
    train(state, batches(5, 6, spoilt={5}), [], micro_batch=4)
    after = state.state_dict()
    assert state.bad_steps == 1
    for part in ("model", "ema", "objective", "optimizer", "policy"):
        assert same(before[part], after[part]) == set(), part
