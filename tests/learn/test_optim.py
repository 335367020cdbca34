"""LARS is apex's LARC to the last bit, without host syncs; what is left out, and whose state is taken up again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from streamlearn.contract.config import OptimConfig
from streamlearn.learn.optim import LARS, build_optimizer, load_optimizer, parted

RATES = {"momentum": 0.9, "weight_decay": 1e-5, "trust": 0.001}


class LoopOfLarc:
    """apex's LARC (clip off) around SGD, tensor by tensor and with a look at each norm, as the reference code reads."""

    def __init__(self, params, momentum, weight_decay, trust, eps=1e-8):
        self.params, self.momentum, self.decay, self.trust, self.eps = params, momentum, weight_decay, trust, eps
        self.buffers = {}

    def step(self, grads, lr):
        for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                continue
            p_norm, g_norm = torch.norm(p), torch.norm(g)
            if p_norm != 0 and g_norm != 0:
                adaptive_lr = self.trust * p_norm / (g_norm + p_norm * self.decay + self.eps)
                g = g + self.decay * p
                g = g * adaptive_lr
            if i in self.buffers:
                self.buffers[i].mul_(self.momentum).add_(g)
            else:
                self.buffers[i] = g.clone()
            p.add_(self.buffers[i], alpha=-lr)


SHAPES = [(64, 3, 7, 7), (64,), (128, 64), (1,), (8, 4, 3, 3), (257, 33), (5,), (31, 1, 1, 1), (0,), ()]


def test_fifty_steps_are_bit_identical_to_the_reference_loop():
    g = torch.Generator().manual_seed(0)
    ours = [torch.randn(s, generator=g).mul(10.0 ** (i % 5 - 2)).requires_grad_() for i, s in enumerate(SHAPES)]
    ours[3].data.zero_()  # a parameter of zeros keeps its plain gradient, without decay
    theirs = LoopOfLarc([p.detach().clone() for p in ours], **RATES)
    optimizer = LARS(ours, lr=1.0, **RATES)
    for step in range(50):
        lr = 4.8 * min(1.0, (step + 1) / 20) * 0.5 ** (step // 30)  # warm-up, and a halving
        grads = [torch.randn(s, generator=g) * 10.0 ** float(torch.randint(-6, 3, (), generator=g)) for s in SHAPES]
        grads[1 + step % 3].zero_()  # as does a gradient of zeros
        grads[6][:] = 1e-30  # whose squares are nothing in float32: its norm is 0, it is not
        if step < 7:
            grads[2] = None  # frozen at first
        for p, grad in zip(ours, grads, strict=True):
            p.grad = None if grad is None else grad.clone()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        theirs.step(grads, lr)
    for i, p in enumerate(ours):
        assert torch.equal(p, theirs.params[i]), SHAPES[i]
        assert torch.equal(optimizer.state[p]["momentum_buffer"], theirs.buffers[i])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(-20, 6), min_size=2, max_size=6), st.sampled_from([0.0, 1e-6, 0.1]))
def test_whatever_the_scales_a_few_steps_are_the_loops(seed, scales, decay):
    g = torch.Generator().manual_seed(seed)
    ours = [(torch.randn(3 + i, generator=g) * 10.0**e).requires_grad_() for i, e in enumerate(scales)]
    theirs = LoopOfLarc([p.detach().clone() for p in ours], 0.9, decay, 0.001)
    optimizer = LARS(ours, lr=0.5, momentum=0.9, weight_decay=decay, trust=0.001)
    for _ in range(3):
        grads = [torch.randn(p.shape, generator=g) * 10.0 ** scales[(i + 1) % len(scales)] for i, p in enumerate(ours)]
        for p, grad in zip(ours, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        theirs.step(grads, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs.params, strict=True))


class Looks(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: values that are asked for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


def test_no_step_looks_at_a_value_while_the_loop_does_twice_a_tensor():
    ours = [torch.ones(5, i + 1, requires_grad=True) for i in range(9)]
    optimizer = LARS(ours, lr=0.1, **RATES)
    theirs = LoopOfLarc([p.detach().clone() for p in ours], **RATES)
    for _ in range(2):
        for p in ours:
            p.grad = torch.ones_like(p)
        with Looks() as looks:
            optimizer.step()
        assert looks.count == 0
        with Looks() as looks:
            theirs.step([torch.ones_like(p) for p in ours], 0.1)
        assert looks.count == 2 * len(ours)


def test_a_parameter_without_a_gradient_does_not_move():
    frozen, moving = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = LARS([frozen, moving], lr=1.0, momentum=0.9, weight_decay=0.1, trust=0.1)
    moving.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(frozen, torch.ones(3)) and not torch.equal(moving, torch.ones(3))


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.ReLU(), torch.nn.Linear(5, 3))


def stepped(optimizer, model, steps=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
    return optimizer


def test_what_is_left_out_is_named_by_what_it_is():
    model = net()
    names = {id(p): n for n, p in model.named_parameters()}

    def left_out(*exclude):
        return {names[id(p)] for p in parted([model], exclude)[1]}

    assert left_out() == set()
    assert left_out("bias") == {"0.bias", "3.bias"}
    assert left_out("norm") == {"1.weight", "1.bias"}
    assert left_out("norm", "bias") == {"0.bias", "1.weight", "1.bias", "3.bias"}


def test_what_is_left_out_of_lars_takes_a_plain_step_of_momentum_without_decay():
    model = net()
    bias = model[0].bias
    expected, buffer = bias.detach().clone(), torch.zeros_like(bias)
    optimizer = build_optimizer(OptimConfig(kind="lars", lr=0.1, weight_decay=0.5, exclude=("bias", "norm")), model)
    g = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        buffer.mul_(0.9).add_(bias.grad)
        expected.add_(buffer, alpha=-0.1)
        optimizer.step()
    assert torch.equal(bias, expected)


@pytest.mark.parametrize("kind", ["lars", "sgd", "adamw"])
def test_decay_spares_what_is_left_out(kind):
    model = net()
    optimizer = build_optimizer(OptimConfig(kind=kind, lr=0.1, weight_decay=0.5, exclude=("norm",)), model)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 2]


def test_adamw_has_the_configured_betas():
    group = build_optimizer(OptimConfig(kind="adamw", lr=0.1, momentum=0.8, second_beta=0.95), net()).param_groups[0]
    assert group["betas"] == (0.8, 0.95) and group["foreach"]


@pytest.mark.parametrize("kind", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("exclude", [(), ("norm",)])
def test_a_state_that_was_saved_goes_on_alike(kind, exclude):
    config = OptimConfig(kind=kind, lr=0.1, exclude=exclude)
    whole, cut = net(), net()
    stepped(stepped(build_optimizer(config, whole), whole), whole, seed=2)
    saved = stepped(build_optimizer(config, cut), cut).state_dict()
    again = build_optimizer(config, cut)
    load_optimizer(again, saved)
    stepped(again, cut, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_a_state_from_before_exclusions_is_still_taken_up():
    model = net()
    saved = stepped(build_optimizer(OptimConfig(), model), model).state_dict()
    for group in saved["param_groups"]:
        del group["adapt"]
    optimizer = build_optimizer(OptimConfig(), model)
    load_optimizer(optimizer, saved)
    stepped(optimizer, model)


def test_the_configuration_says_what_decay_is_not_the_state():
    model = net()
    saved = stepped(build_optimizer(OptimConfig(weight_decay=1e-6), model), model).state_dict()
    optimizer = build_optimizer(OptimConfig(weight_decay=1e-4, momentum=0.8), model)
    load_optimizer(optimizer, saved)
    assert (optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[0]["momentum"]) == (1e-4, 0.8)


def test_a_state_of_another_optimizer_or_of_other_groups_is_refused():
    model = net()
    saved = stepped(build_optimizer(OptimConfig(kind="sgd"), model), model).state_dict()
    with pytest.raises(ValueError, match=r"its optimizer is train.optim.kind = 'sgd', here it is 'lars'"):
        load_optimizer(build_optimizer(OptimConfig(), model), saved)
    with pytest.raises(ValueError, match=r"groups of \[6\] parameters, here \[4, 2\]: train.optim.exclude"):
        load_optimizer(build_optimizer(OptimConfig(kind="sgd", exclude=("norm",)), model), saved)
    saved = stepped(build_optimizer(OptimConfig(kind="sgd", exclude=("bias",)), model), model).state_dict()  # as many, but others
    with pytest.raises(ValueError, match=r"train.optim.exclude, or the model, differs"):
        load_optimizer(build_optimizer(OptimConfig(kind="sgd", exclude=("norm",)), model), saved)
