"""LARS is apex's LARC to the last bit, without host syncs."""

import torch

from streamlearn.learn.optim import LARS


def reference_step(params, grads, buffers, lr, momentum, decay, trust, eps=1e-8):
    """apex LARC (clip off) around SGD, tensor by tensor, as the reference code reads."""
    for p, g, b in zip(params, grads, buffers, strict=True):
        p_norm, g_norm = torch.norm(p), torch.norm(g)
        if p_norm != 0 and g_norm != 0:
            rate = trust * p_norm / (g_norm + p_norm * decay + eps)
            g = (g + decay * p) * rate
        b.mul_(momentum).add_(g)
        p.add_(b, alpha=-lr)


def test_three_steps_are_bit_identical_to_the_reference_formula():
    g = torch.Generator().manual_seed(0)
    shapes = [(8, 3, 3, 3), (8,), (5, 8), (1,)]
    ours = [torch.randn(s, generator=g).requires_grad_() for s in shapes]
    ours[3].data.zero_()  # a zero parameter keeps its plain gradient, without decay
    theirs = [p.detach().clone() for p in ours]
    buffers = [torch.zeros_like(p) for p in theirs]
    optimizer = LARS(ours, lr=0.3, momentum=0.9, weight_decay=1e-6, trust=0.001)
    for _ in range(3):
        grads = [torch.randn(s, generator=g) for s in shapes]
        grads[1].zero_()  # as does a zero gradient
        for p, grad in zip(ours, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        reference_step(theirs, grads, buffers, 0.3, 0.9, 1e-6, 0.001)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_a_parameter_without_a_gradient_does_not_move():
    frozen, moving = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = LARS([frozen, moving], lr=1.0, momentum=0.9, weight_decay=0.1, trust=0.1)
    moving.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(frozen, torch.ones(3)) and not torch.equal(moving, torch.ones(3))
