"""The steps that bench.step compares.  Each is made from (backbone, crops, batch, device, home) and takes the crops of a batch."""

import importlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.loading_peers import torchvision_transforms
from streamlearn.contract.config import Config, CropConfig, ModelConfig, ObjectiveConfig, OptimConfig, StreamConfig, TrainConfig
from streamlearn.learn.accumulate import backward
from streamlearn.learn.model import Model
from streamlearn.learn.objectives import build_objective, parameters_of
from streamlearn.learn.state import fresh_state

CROPS = {"small": ((2, 96), (4, 48)), "full": ((2, 224), (4, 96))}
Step = Callable[[Sequence[Tensor]], Tensor]


def crops_of(crops: str, batch: int, device: torch.device) -> list[Tensor]:
    """One (V,B,3,S,S) a resolution, of noise."""
    g = torch.Generator(device).manual_seed(0)
    return [torch.randn(count, batch, 3, size, size, generator=g, device=device) for count, size in CROPS[crops]]


def config_of(backbone: str, crops: str, batch: int, device: torch.device, home: str, **train: object) -> Config:
    """On a GPU as SEER's: 16k prototypes of 256 dimensions behind two hidden layers; on a CPU as SwAV's."""
    seer = device.type == "cuda"
    hidden = (8192, 8192) if backbone.endswith(("128gf", "256gf")) else (4096, 4096)
    return Config(
        home=home or ".streamlearn",
        stream=StreamConfig(crops=tuple(CropConfig(count=c, size=s, scale=(0.3, 1.0)) for c, s in CROPS[crops])),
        model=ModelConfig(backbone=backbone, head=(*hidden, 256) if seer else (2048, 128)),
        objective=ObjectiveConfig(prototypes=16000 if seer else 3000, sinkhorn_iterations=10 if seer else 3, freeze_prototypes=0),
        train=TrainConfig(batch=batch, device=device.type, optim=OptimConfig(kind="lars", lr=0.3, warmup_steps=0), **train),  # type: ignore[arg-type]
    )


def ours(backbone: str, crops: str, batch: int, device: torch.device, home: str, **train: object) -> Step:
    """The learner's own step (learn/trainer.py), moving average included."""
    state = fresh_state(config_of(backbone, crops, batch, device, home, **train))

    def step(crops: Sequence[Tensor]) -> Tensor:
        state.optimizer.zero_grad(set_to_none=True)
        loss, _, _ = backward(state.model, state.objective, crops, state.step)
        state.optimizer.step()
        state.objective.after_step(state.step)
        state.ema.update(state.model, state.step, state.policy.steady_since)
        return loss

    return step


def plain(
    backbone: str,
    crops: str,
    batch: int,
    device: torch.device,
    home: str,
    *,
    layout: torch.memory_format = torch.contiguous_format,
    compile: bool = False,
) -> Step:
    """The step of the tutorials: a forward pass for each crop.  On a GPU in bfloat16."""
    config = config_of(backbone, crops, batch, device, home)
    model = Model(config.model)
    objective = build_objective(config.objective, model.embedding)
    model.to(device, memory_format=layout)  # type: ignore[call-overload]
    trunk, head, prototypes = Trunk(model.trunk, layout), model.head, objective.to(device).prototypes
    params = parameters_of(trunk, head, prototypes)
    update = lars(params)
    forward = torch.compile(trunk, dynamic=False) if compile else trunk

    def step(crops: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            prototypes.weight.copy_(F.normalize(prototypes.weight, dim=1))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            z = [F.normalize(head(forward(view)), dim=1) for crop in crops for view in crop]
            scores = [prototypes(one) for one in z]
        loss = swav_loss([s.float() for s in scores], config.objective.sinkhorn_iterations)
        for p in params:
            p.grad = None
        loss.backward()
        update()
        return loss.detach()

    return step


def lightly(backbone: str, crops: str, batch: int, device: torch.device, home: str) -> Step:
    """lightly's own head, prototypes, loss and LARS as its SwAV example puts them together, around the plain trunk."""
    torchvision_transforms()  # lightly imports torchvision, which must find its operators
    heads = importlib.import_module("lightly.models.modules.heads")
    criterion = importlib.import_module("lightly.loss.swav_loss").SwaVLoss()
    config = config_of(backbone, crops, batch, device, home)
    whole = Model(config.model)
    trunk = Trunk(whole.trunk.to(memory_format=torch.contiguous_format), torch.contiguous_format)  # type: ignore[call-overload]
    head = heads.SwaVProjectionHead(int(whole.trunk.width), *config.model.head)  # type: ignore[arg-type]
    prototypes = heads.SwaVPrototypes(config.model.head[-1], config.objective.prototypes)
    params = parameters_of(trunk, head, prototypes)
    lars_of = importlib.import_module("lightly.utils.lars").LARS
    optimizer = lars_of(params, lr=0.3, momentum=0.9, weight_decay=1e-6)

    def step(crops: Sequence[Tensor]) -> Tensor:
        prototypes.normalize()
        views = [view for crop in crops for view in crop]
        scores = [prototypes(F.normalize(head(trunk(view)), dim=1)) for view in views]
        loss: Tensor = criterion(scores[:2], scores[2:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


class Trunk(nn.Module):
    """pycls's modules one after the other."""

    def __init__(self, trunk: nn.Module, layout: torch.memory_format):
        super().__init__()
        self.children_, self.layout = nn.ModuleList(trunk.children()), layout

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=self.layout)
        for child in self.children_:
            x = child(x)
        return x.mean((2, 3))


def swav_loss(scores: list[Tensor], iterations: int) -> Tensor:
    terms = []
    for a in range(2):
        with torch.no_grad():
            q = torch.exp(scores[a] / 0.05).T
            q /= q.sum()
            for _ in range(iterations):
                q /= q.sum(1, keepdim=True) * q.shape[0]
                q /= q.sum(0, keepdim=True) * q.shape[1]
            q = (q * q.shape[1]).T
        terms += [-(q * F.log_softmax(s / 0.1, 1)).sum(1).mean() for v, s in enumerate(scores) if v != a]
    return torch.stack(terms).mean()


def lars(params: list[Tensor]) -> Callable[[], None]:
    """apex's LARC and SGD, tensor by tensor, with their two looks at a value."""
    buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def update() -> None:
        for p, b in zip(params, buffers, strict=True):
            assert p.grad is not None
            p_norm, g_norm, grad = p.norm(), p.grad.norm(), p.grad
            if p_norm.item() and g_norm.item():
                grad = (grad + 1e-6 * p) * (0.001 * p_norm / (g_norm + 1e-6 * p_norm + 1e-8))
            b.mul_(0.9).add_(grad)
            p.add_(b, alpha=-0.3)

    return update


NHWC = torch.channels_last
VARIANTS: dict[str, Callable[..., Step]] = {
    "ours": ours,
    "plain": plain,
    "lightly": lightly,
    "selective": partial(ours, recompute="selective"),  # what follows shows what each part brings
    "measured": partial(ours, kernels="measured"),
    "full": partial(ours, recompute="full"),
    "compile": partial(ours, compile=True),
    "measured-compile": partial(ours, kernels="measured", compile=True),
    "plain-nhwc": partial(plain, layout=NHWC),
    "plain-compile": partial(plain, layout=NHWC, compile=True),
}
MEASURING = ("measured", "measured-compile")  # the first start of these takes longer
