"""RegNetY as others have it, written anew from their papers and sources, module by module: the names come from the structure, not from our key map.

`Timm`: timm/models/regnet.py (ConvNormAct, SEModule with fc1 and fc2, Bottleneck, downsample).  `Vissl`: vissl/models/trunks/regnet.py around
classy_vision/models/anynet.py, and the SwAV head of vissl/models/heads/swav_prototypes_head.py.
"""

import itertools
import math

import torch
from torch import nn

# depth, w0, wa, wm, group width: the papers' (and VISSL's yaml files')
PARAMETERS = {
    "regnety-200mf": (13, 24, 36.44, 2.49, 8),
    "regnety-400mf": (16, 48, 27.89, 2.09, 8),
    "regnety-600mf": (15, 48, 32.54, 2.32, 16),
    "regnety-800mf": (14, 56, 38.84, 2.4, 16),
    "regnety-1.6gf": (27, 48, 20.71, 2.65, 24),
    "regnety-3.2gf": (21, 80, 42.63, 2.66, 24),
    "regnety-4gf": (22, 96, 31.41, 2.24, 64),
    "regnety-6.4gf": (25, 112, 33.22, 2.27, 72),
    "regnety-8gf": (17, 192, 76.82, 2.19, 56),
    "regnety-12gf": (19, 168, 73.36, 2.37, 112),
    "regnety-16gf": (18, 200, 106.23, 2.48, 112),
    "regnety-32gf": (20, 232, 115.89, 2.53, 232),
    "regnety-64gf": (20, 352, 147.48, 2.4, 328),
    "regnety-128gf": (27, 456, 160.83, 2.52, 264),
    "regnety-256gf": (27, 640, 230.83, 2.53, 373),
}


def stages(depth, w0, wa, wm, group):
    """[(depth, width, groups)]: each block's width w0 + wa j to the nearest w0 wm^k, that to a multiple of 8, then of the group width."""
    widths = [round(w0 * wm ** round(math.log((w0 + wa * j) / w0) / math.log(wm)) / 8) * 8 for j in range(depth)]
    found = []
    for width in sorted(set(widths)):
        fits = min(group, width)
        whole = round(width / fits) * fits
        found.append((widths.count(width), whole, whole // fits))
    return found


class ConvNormAct(nn.Module):
    def __init__(self, w_in, w_out, kernel, stride=1, groups=1, act=True):
        super().__init__()
        self.conv = nn.Conv2d(w_in, w_out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(w_out)
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class SEModule(nn.Module):
    def __init__(self, width, squeezed):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x):
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class TimmBlock(nn.Module):
    def __init__(self, w_in, w_out, stride, groups):
        super().__init__()
        self.conv1 = ConvNormAct(w_in, w_out, 1)
        self.conv2 = ConvNormAct(w_out, w_out, 3, stride, groups)
        self.se = SEModule(w_out, round(w_in * 0.25))
        self.conv3 = ConvNormAct(w_out, w_out, 1, act=False)
        self.downsample = ConvNormAct(w_in, w_out, 1, stride, act=False) if stride != 1 or w_in != w_out else nn.Identity()

    def forward(self, x):
        return (self.conv3(self.se(self.conv2(self.conv1(x)))) + self.downsample(x)).relu()


class Timm(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.stem, w_in = ConvNormAct(3, 32, 3, 2), 32
        for i, (depth, width, groups) in enumerate(stages(*PARAMETERS[backbone]), start=1):
            stage = nn.Module()
            for j in range(depth):
                stage.add_module(f"b{j + 1}", TimmBlock(w_in, width, 2 if j == 0 else 1, groups))
                w_in = width
            self.add_module(f"s{i}", stage)

    def forward(self, x):
        x = self.stem(x)
        for stage in (self.s1, self.s2, self.s3, self.s4):
            for block in stage.children():
                x = block(x)
        return x.mean((2, 3))


class VisslBlock(nn.Module):
    def __init__(self, w_in, w_out, stride, groups):
        super().__init__()
        if stride != 1 or w_in != w_out:
            self.proj, self.bn = nn.Conv2d(w_in, w_out, 1, stride, bias=False), nn.BatchNorm2d(w_out)
        self.f = nn.Sequential()
        self.f.add_module("a", nn.Sequential(nn.Conv2d(w_in, w_out, 1, bias=False), nn.BatchNorm2d(w_out), nn.ReLU()))
        b = nn.Conv2d(w_out, w_out, 3, stride, 1, groups=groups, bias=False)
        self.f.add_module("b", nn.Sequential(b, nn.BatchNorm2d(w_out), nn.ReLU()))
        self.f.add_module("se", VisslSE(w_out, round(w_in * 0.25)))
        self.f.add_module("c", nn.Conv2d(w_out, w_out, 1, bias=False))
        self.f.add_module("final_bn", nn.BatchNorm2d(w_out))

    def forward(self, x):
        return (self.f(x) + (self.bn(self.proj(x)) if hasattr(self, "proj") else x)).relu()


class VisslSE(nn.Module):
    def __init__(self, width, squeezed):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.excitation = nn.Sequential(nn.Conv2d(width, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, width, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.excitation(self.avg_pool(x))


class Vissl(nn.Module):
    """`parts`: as FSDP trunks group their blocks, so many in each part; 0 is the plain trunk."""

    def __init__(self, backbone, parts=0):
        super().__init__()
        stem = nn.Module()
        stem.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        blocks, w_in = {"conv1": stem}, 32
        for i, (depth, width, groups) in enumerate(stages(*PARAMETERS[backbone]), start=1):
            stage = nn.Sequential()
            for j in range(depth):
                at = stage
                if parts:
                    name = f"block{i}-part{j // parts}"
                    if not hasattr(stage, name):
                        stage.add_module(name, nn.Sequential())
                    at = getattr(stage, name)
                at.add_module(f"block{i}-{j}", VisslBlock(w_in, width, 2 if j == 0 else 1, groups))
                w_in = width
            blocks[f"res{i + 1}"] = stage
        self._feature_blocks, self.width = nn.ModuleDict(blocks), w_in

    def forward(self, x):
        x = self._feature_blocks["conv1"].stem(x)
        for i in (2, 3, 4, 5):
            x = self._feature_blocks[f"res{i}"](x)
        return x.mean((2, 3))


class VisslHead(nn.Module):
    """Linear with bias, BatchNorm or not, ReLU, …; prototypes."""

    def __init__(self, dims, prototypes, use_bn):
        super().__init__()
        layers = []
        for w_in, w_out in itertools.pairwise(dims[:-1]):
            layers += [nn.Linear(w_in, w_out), *([nn.BatchNorm1d(w_out)] if use_bn else []), nn.ReLU()]
        self.projection_head = nn.Sequential(*layers, nn.Linear(dims[-2], dims[-1]))
        self.prototypes0 = nn.Linear(dims[-1], prototypes, bias=False)

    def forward(self, features):
        return nn.functional.normalize(self.projection_head(features), dim=1)


def seeded(module, seed=0):
    """With weights and statistics that nothing else would have by chance, in eval mode, channels last as ours."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(
                    torch.rand(tensor.shape, generator=generator) * (0.2 if tensor.dim() == 4 else 1.0)
                    + (0.5 if tensor.dim() < 2 else -0.1)
                )
            else:
                tensor.fill_(100 + len(name))
    return module.eval().to(memory_format=torch.channels_last)


def vissl_checkpoint(trunk, head=None):
    """As VISSL writes one at the end of a phase: the optimizer, meters and counters of its task beside the model."""
    heads = {} if head is None else {f"0.{name}": tensor for name, tensor in head.state_dict().items()}
    model = {"trunk": dict(trunk.state_dict()), "heads": heads}
    task = {
        "train": True,
        "base_model": {"model": model, "meta": {}},
        "meters": [],
        "optimizer": {"state": {}, "param_groups": []},
        "num_updates": 7,
        "phase_idx": 1,
    }
    return {
        "phase_idx": 1,
        "iteration": 244_000,
        "loss": {},
        "iteration_num": 7,
        "train_phase_idx": 1,
        "classy_state_dict": task,
        "type": "consolidated",
    }
