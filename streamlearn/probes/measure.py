"""One snapshot on one bank: what each protocol measures, as the plain values that are recorded.

`each`      every snapshot: weighted k-NN, ridge, label-free numbers, and the two baselines (raw pixels, untrained networks)
`thorough`  candidates for promotion: logistic sweep; 1 % and 10 % of the labels, several draws
Accuracy with Wilson's interval and one bit for each test image (for paired tests); of a multi-label bank VOC's mAP with a bootstrap interval.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamlearn.contract import durable
from streamlearn.contract.config_probe import ProbeConfig
from streamlearn.contract.errors import Corrupt
from streamlearn.contract.registry import Registry
from streamlearn.probes import label_free
from streamlearn.probes.alarms import alarms
from streamlearn.probes.average_precision import eleven_points, mean_ap, mean_ap_interval
from streamlearn.probes.banks import Bank
from streamlearn.probes.feature_cache import FeatureCache, Tensors
from streamlearn.probes.features import RAW_SIDES, Three, features, of_pixels, raw_pixels, untrained, views
from streamlearn.probes.knn import knn_scores
from streamlearn.probes.linear import good, ridge_scores
from streamlearn.probes.logistic import SHARES, low_shot, sweep
from streamlearn.probes.retrieval import add_column
from streamlearn.probes.statistics import packed, wilson
from streamlearn.probes.turns import Turns
from streamlearn.snapshots.lineage import generation_of
from streamlearn.snapshots.pull import read_file
from streamlearn.snapshots.trunk import load_trunk, norm_of, read_settings
from streamlearn.stream.views import normalised

SEEDS = (0, 1, 2)  # of the untrained networks that the curve is compared with
BOOTSTRAP_SEED = 0
EACH, THOROUGH = "each", "thorough"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Snapshot:
    """What is needed to measure one."""

    step: int
    digest: str
    generation: str
    backbone: str
    stem: str
    size: int  # px
    mean: Three
    std: Three
    trunk: nn.Module
    metrics: dict[str, Any]  # the learner's own, of the time of publishing
    norm: str = "bn"  # of the trunk


def open_snapshot(registry: Registry, step: int, digest: str, device: str = "cpu") -> Snapshot:
    """Verified.  Raises Corrupt, NotFound; ValueError, KeyError or RuntimeError where the files are not a snapshot's."""
    settings = read_settings(read_file(registry, digest, "config.json"), digest)
    ours, cfg = settings["streamlearn"], settings["pretrained_cfg"]
    trunk = load_trunk(registry, digest)  # under whatever names: where timm has the model, a snapshot has timm's
    mean, std = (tuple(map(float, cfg[name])) for name in ("mean", "std"))
    return Snapshot(
        step, digest, generation_of(registry, digest), ours["backbone"], ours["stem"], int(cfg["input_size"][-1]),
        (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), trunk.eval().to(device), json.loads(read_file(registry, digest, "metrics.json")),
        norm_of(settings),
    )  # fmt: skip


class Measurer:
    """Measures; keeps features and baselines in the home, so that nothing is computed twice; and pictures for the report."""

    def __init__(self, config: ProbeConfig, home: Path, turns: Turns, say: Say = lambda _: None):
        self.config, self.turns, self.say = config, turns, say
        self.cache = FeatureCache(home / "features", config.cache_bytes)
        self.home, self.baselines = home, home / "baselines"

    def protocol(self, kind: str, size: int) -> str:
        """Names all that a figure depends on besides snapshot and bank."""
        c = self.config
        if kind == EACH:
            return f"each/2:k{c.k},t{c.temperature:g},{size}px,views{c.view_images}x{c.views}"
        return f"thorough/1:{size}px,seeds{c.low_shot_seeds}"

    def measure(self, kind: str, snapshot: Snapshot, bank: Bank) -> dict[str, Any]:
        """Everything that is recorded."""
        found = self.features(snapshot, bank)
        bank_ND, test_MD = found["train"], found["test"]
        head: dict[str, Any] = {
            "step": snapshot.step, "bank": bank.name, "bank_digest": bank.digest, "protocol": self.protocol(kind, snapshot.size), "size": snapshot.size,
            "generation": snapshot.generation, "metric": "map" if bank.multi else "accuracy", "images": len(bank.test.labels),
        }  # fmt: skip
        if kind == THOROUGH:
            return head | self._thorough(bank, bank_ND, test_MD)
        add_column(self.home, bank, found, step=snapshot.step, digest=snapshot.digest)
        free = self._label_free(snapshot, bank, test_MD)
        return head | self._each(bank, bank_ND, test_MD) | self._baseline(snapshot, bank) | free

    def features(self, snapshot: Snapshot, bank: Bank) -> Tensors:
        """`train` (N,D) and `test` (M,D), from the cache if they are there.  Raises Corrupt where they are not finite."""

        def make() -> Tensors:
            self.say(f"features of {bank.name}")
            return {
                name: features(snapshot.trunk, split, snapshot.mean, snapshot.std, self.config.batch, self.turns)
                for name, split in (("train", bank.train), ("test", bank.test))
            }

        kind = torch.device(self.config.device).type  # a GPU's features differ from a CPU's in the last bits
        found = self.cache.get(snapshot.digest, bank.digest, f"features/1:{snapshot.size}px,{kind}", make)
        if not all(bool(x.isfinite().all()) for x in found.values()):
            raise Corrupt(f"features of {bank.name} are not finite: the weights have diverged; publish an earlier step")
        return found

    def _each(self, bank: Bank, bank_ND: Tensor, test_MD: Tensor) -> dict[str, Any]:
        near, line = self._both(bank, bank_ND, test_MD)
        return graded(bank, {"knn": near, "ridge": line})

    def _both(self, bank: Bank, bank_ND: Tensor, test_MD: Tensor) -> tuple[Tensor, Tensor]:
        near = knn_scores(bank_ND, bank.train.labels, test_MD, k=self.config.k, temperature=self.config.temperature)
        return near, ridge_scores(bank_ND, bank.train.labels, test_MD)

    def _thorough(self, bank: Bank, bank_ND: Tensor, test_MD: Tensor) -> dict[str, Any]:
        self.say(f"logistic sweep on {bank.name}")
        scores_MC, C = sweep(bank_ND, bank.train.labels, test_MD, check=self.turns.check)
        found = graded(bank, {"logistic": scores_MC}) | {"logistic_C": C}
        for name, share in SHARES.items():
            self.say(f"{share:.0%} of the labels of {bank.name}")
            labels, seeds = (bank.train.labels, bank.test.labels), self.config.low_shot_seeds
            drawn = low_shot(bank_ND, labels[0], test_MD, labels[1], share=share, seeds=seeds, check=self.turns.check)
            found[name] = drawn.pop("mean")
            found |= {f"{name}_{k}": v for k, v in drawn.items()}
        return found

    def _label_free(self, snapshot: Snapshot, bank: Bank, test_MD: Tensor) -> dict[str, Any]:
        found = {
            name: getattr(label_free, name)(test_MD)
            for name in ("effective_rank", "rankme", "participation_ratio", "alpha_req", "uniformity")
        }
        count = min(self.config.view_images, len(bank.test.images_NSSC))
        if count > 1:
            shown = views(bank.test.images_NSSC[:: len(bank.test.images_NSSC) // count][:count], self.config.views)
            seen = of_pixels(snapshot.trunk, shown, snapshot.mean, snapshot.std, self.config.batch, self.turns)
            views_NQD = seen.unflatten(0, (count, self.config.views))
            found |= {"alignment": label_free.alignment(views_NQD), "lidar": label_free.lidar(views_NQD)}
        own = {name: float(snapshot.metrics[name]) for name in ("code_entropy", "prototype_perplexity") if name in snapshot.metrics}
        rounded = {name: round(value, 4) for name, value in (found | own).items() if math.isfinite(value)}
        return rounded | {"alarms": alarms(rounded)}

    def _baseline(self, snapshot: Snapshot, bank: Bank) -> dict[str, float]:
        """Raw pixels at their best side, and the mean of untrained networks: measured once for a bank and architecture."""
        key = "\0".join((bank.digest, snapshot.backbone, snapshot.stem, str(snapshot.size), self.protocol(EACH, snapshot.size)))
        key += f"\0{snapshot.norm}" if snapshot.norm != "bn" else ""
        path = self.baselines / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
        if path.exists():
            kept: dict[str, float] = json.loads(path.read_bytes())
            return kept
        raw, random = [], []
        truth = bank.test.labels
        for side in (s for s in RAW_SIDES if s <= snapshot.size):
            self.say("raw pixels")
            raw.append([good(s, truth) for s in self._both(bank, raw_pixels(bank.train, side), raw_pixels(bank.test, side))])
        some = normalised(bank.train.images_NSSC[:: max(1, len(bank.train.labels) // 1024)], snapshot.mean, snapshot.std)
        for seed in SEEDS:
            self.say("untrained networks")
            net = untrained(snapshot.backbone, snapshot.stem, some, seed, norm=snapshot.norm).to(self.config.device)
            parts = [features(net, s, snapshot.mean, snapshot.std, self.config.batch, self.turns) for s in (bank.train, bank.test)]
            random.append([good(s, truth) for s in self._both(bank, *parts)])
        found: dict[str, float] = {}
        for i, name in enumerate(("knn", "ridge")):
            found |= {f"raw_{name}": max((r[i] for r in raw), default=0.0), f"random_{name}": sum(r[i] for r in random) / len(random)}
        durable.create(path, json.dumps(found).encode())
        return found


def graded(bank: Bank, scores: dict[str, Tensor]) -> dict[str, Any]:
    """Figure and interval of each probe; and which test images were right, where that can be said."""
    truth = bank.test.labels
    found: dict[str, Any] = {}
    right: dict[str, str] = {}
    for name, scores_MC in scores.items():
        if bank.multi:
            S, L = scores_MC.double().numpy(), truth.numpy()
            low, high = mean_ap_interval(S, L, seed=BOOTSTRAP_SEED)
            found |= {name: mean_ap(S, L), f"{name}_11": mean_ap(S, L, eleven_points), f"{name}_low": low, f"{name}_high": high}
            continue
        hit_M = (scores_MC.argmax(1) == truth).numpy()
        low, high = wilson(int(hit_M.sum()), len(hit_M))
        found |= {name: float(hit_M.mean()), f"{name}_low": low, f"{name}_high": high}
        right[name] = packed(hit_M)
    return found | ({"right": right} if right else {})
