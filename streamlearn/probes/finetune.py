"""Fine-tuning for releases: all weights are trained on a bank, by a rule that leaves nothing to choose.

`bit`   BiT-HyperRule (Kolesnikov et al., arXiv:1912.11370, section 3.3; google-research/big_transfer, bit_hyperrule.py): SGD 0.9 at 0.003 per 512
        images, no weight decay, a head of zeros; length, MixUp and resolution follow from the bank.
`seer`  SEER's (arXiv:2103.01988, section 4): 35 epochs of SGD 0.9 at 0.0125 per 256 images, a tenth of it from epoch 30 on; random resized crops.

Images are held in memory at the rule's larger side: SEER's crops are drawn from squares of that side, not from the whole photograph.
`steps` shortens a rule and moves its marks in proportion; the figure is then another protocol's, and is recorded as such.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from streamlearn.contract.errors import ConfigError
from streamlearn.probes.banks import Bank, Split
from streamlearn.probes.features import of_pixels
from streamlearn.probes.measure import Snapshot, graded
from streamlearn.stream.decode import Pixels
from streamlearn.stream.views import boxes, cut, normalised

RULES = ("bit", "seer")


@dataclass(frozen=True)
class Rule:
    name: str
    load: int  # px of the images in memory
    crop: int  # px
    batch: int
    lr: float  # after warm-up
    warmup: int  # steps, linear
    drops: tuple[int, ...]  # steps after which the rate is a tenth
    steps: int
    mixup: float  # alpha of the Beta distribution; 0: none
    zoom: bool  # random resized crops instead of plain ones

    def rate(self, step: int) -> float:
        """Of the step with this number, from 0."""
        if step < self.warmup:
            return self.lr * step / self.warmup
        return self.lr * 0.1 ** sum(step > drop for drop in self.drops)

    def shortened(self, steps: int) -> "Rule":
        def at(x: int) -> int:
            return round(x * steps / self.steps)

        return replace(self, steps=steps, warmup=at(self.warmup), drops=tuple(map(at, self.drops)))

    def sized(self, px: int) -> "Rule":
        """For a machine that cannot bear the rule's resolution."""
        return replace(self, load=px * self.load // self.crop, crop=px)

    @property
    def protocol(self) -> str:
        return f"finetune-{self.name}/1:{self.steps}steps,b{self.batch},{self.load}-{self.crop}px"


def bit_hyperrule(images: int, height: int, width: int, *, batch: int = 512) -> Rule:
    """By the number of training images and their typical size.  The rate follows the batch, linearly."""
    load, crop = (160, 128) if height * width < 96 * 96 else (512, 480)
    if images < 20_000:
        warmup, drops, steps = 100, (200, 300, 400), 500
    elif images < 500_000:
        warmup, drops, steps = 500, (3000, 6000, 9000), 10_000
    else:
        warmup, drops, steps = 500, (6000, 12_000, 18_000), 20_000
    return Rule("bit", load, crop, batch, 0.003 * batch / 512, warmup, drops, steps, 0.0 if images < 20_000 else 0.1, False)


def seer_rule(images: int, *, batch: int = 256) -> Rule:
    """35 epochs."""
    epoch = max(1, images // batch)
    return Rule("seer", 256, 224, batch, 0.0125 * batch / 256, 0, (30 * epoch,), 35 * epoch, 0.0, True)


def rule_for(
    name: str, images: int, height: int, width: int, *, batch: int | None = None, px: int | None = None, steps: int | None = None
) -> Rule:
    """The named rule for a bank of so many images of this size, as altered.  Raises ConfigError."""
    for what, value, least in (("--batch", batch, 2), ("--px", px, 8), ("--steps", steps, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{what} {value}: at least {least}")
    if name == "bit":
        rule = bit_hyperrule(images, height, width, batch=batch or 512)
    else:
        rule = seer_rule(images, batch=batch or 256)
    rule = rule.sized(px) if px else rule
    return rule.shortened(steps) if steps else rule


def squashed(image: Pixels, size: int) -> Pixels:
    """(size,size,3) the whole image, its shape given up, as BiT has it."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def middle(image: Pixels, size: int) -> Pixels:
    """(size,size,3) the square in the middle."""
    height, width = image.shape[:2]
    half = min(height, width) / 2
    box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box))


SHAPES = {"bit": squashed, "seer": middle}  # of the bank's images in memory


class Tuned(nn.Module):
    def __init__(self, trunk: nn.Module, width: int, classes: int):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.head(self.trunk(images_BCHW))
        return logits_BK


def finetune(
    snapshot: Snapshot, bank: Bank, rule: Rule, *, seed: int = 0, say: Callable[[int, float], None] = lambda *_: None
) -> dict[str, Any]:
    """What is recorded.  `bank` was loaded at `rule.load` px.  `say` is told step and loss.  Raises ConfigError where the loss is not finite."""
    device = next(snapshot.trunk.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Tuned(snapshot.trunk, int(snapshot.trunk.width), len(bank.classes)).to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=rule.lr, momentum=0.9)
    draw = np.random.default_rng(seed)
    model.train()
    for step in range(rule.steps):
        images, targets_BC = _batch(bank, rule, draw, step)
        x = normalised(torch.from_numpy(images).to(device), snapshot.mean, snapshot.std)
        y = targets_BC.to(device)
        if rule.mixup > 0:
            share = float(draw.beta(rule.mixup, rule.mixup))
            other = torch.from_numpy(draw.permutation(len(x))).to(device)
            x, y = share * x + (1 - share) * x[other], share * y + (1 - share) * y[other]
        for group in optimizer.param_groups:
            group["lr"] = rule.rate(step)
        loss = _loss(model(x), y, bank.multi)
        if not torch.isfinite(loss):
            raise ConfigError(
                f"fine-tuning of step {snapshot.step} on {bank.name}: loss {loss.item()} at step {step}; lower --batch, and with it the rate"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        say(step, float(loss.detach()))
    scores_MC = _scores(model, bank.test, rule, snapshot)
    head = {
        "step": snapshot.step, "bank": bank.name, "bank_digest": bank.digest, "generation": snapshot.generation, "protocol": f"{rule.protocol},seed{seed}",
        "metric": "map" if bank.multi else "accuracy", "images": len(bank.test.labels), "size": rule.crop,
    }  # fmt: skip
    return head | graded(bank, {f"finetune_{rule.name}": scores_MC})


def _loss(logits_BC: Tensor, y_BC: Tensor, multi: bool) -> Tensor:
    if not multi:
        return F.cross_entropy(logits_BC, y_BC)
    judged = y_BC >= 0
    losses = F.binary_cross_entropy_with_logits(logits_BC, y_BC.clamp_min(0), reduction="none")
    return (losses * judged).sum() / judged.sum().clamp_min(1)


def _batch(bank: Bank, rule: Rule, draw: np.random.Generator, step: int) -> tuple[Pixels, Tensor]:
    """(B,S,S,3) and (B,C) targets; images with replacement, mirrored half of the time."""
    at = draw.integers(0, len(bank.train.labels), rule.batch)
    source, S = bank.train.images_NSSC, rule.crop
    out: Pixels = np.empty((rule.batch, S, S, 3), np.uint8)
    if rule.zoom:
        keys = draw.integers(0, 2**63, rule.batch).astype(np.uint64)
        box_B4 = boxes(keys, np.full((rule.batch, 2), source.shape[1]), range(1), np.array([[0.08, 1.0]]))[0]
        for n, i in enumerate(at.tolist()):
            cut(source[i], box_B4[n], out[n])
    else:
        places = draw.integers(0, source.shape[1] - S + 1, (rule.batch, 2))
        for n, i in enumerate(at.tolist()):
            top, left = places[n]
            out[n] = source[i, top : top + S, left : left + S]
    mirrored = draw.random(rule.batch) < 0.5
    out[mirrored] = out[mirrored][:, :, ::-1]
    labels = bank.train.labels[torch.from_numpy(at)]
    targets = labels.float() if bank.multi else F.one_hot(labels, len(bank.classes)).float()
    return out, targets


@torch.inference_mode()
def _scores(model: nn.Module, test: Split, rule: Rule, snapshot: Snapshot) -> Tensor:
    """(M,C) on the CPU, at the crop's side: BiT squashes the whole image to it, SEER takes the middle."""
    model.eval()
    S, load = rule.crop, test.images_NSSC.shape[1]
    images = test.images_NSSC
    if rule.zoom:
        edge = (load - S) // 2
        images = images[:, edge : edge + S, edge : edge + S]
    else:
        images = np.stack([squashed(image, S) for image in images])
    return of_pixels(model, images, snapshot.mean, snapshot.std, 64)
