"""Trunk and projection head."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamlearn.contract.config import ModelConfig
from streamlearn.learn.backbones import build


class Model(nn.Module):
    """Views -> unit embeddings.

    One trunk forward for each resolution, the head once on all (SwAV's reference code): BatchNorm then sees all views of
    one resolution together, and small crops do not pay for many small kernels.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.trunk = build(config.backbone, config.stem, config.norm)
        width = int(self.trunk.width)  # type: ignore[arg-type]
        layers: list[nn.Module] = []
        *hidden, out = config.head
        for size in hidden:
            layers.append(nn.Linear(width, size, bias=config.head_norm == "none"))
            if config.head_norm == "bn":
                layers.append(nn.BatchNorm1d(size))
            layers.append(nn.ReLU(inplace=True))
            width = size
        self.head = nn.Sequential(*layers, nn.Linear(width, out))
        self.embedding = out
        self.precision = torch.float32  # of what trunk and head compute, not of their weights (learn/fit.py)
        # whether a view's embedding is the same without the views of other resolutions: the head sees all of them together
        self.views_apart = config.head_norm == "none" or len(config.head) == 1

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """crops: one (V_r,B,3,S_r,S_r) a resolution -> (V,B,D), unit length, V over all resolutions in order."""
        batch = crops[0].shape[1]
        whole = self.precision == torch.float32
        with nullcontext() if whole else torch.autocast(crops[0].device.type, self.precision):
            features = torch.cat([self.trunk(crop.flatten(0, 1)) for crop in crops])
            z = self.head(features)
        # FSDP wants no view for a result
        return F.normalize(z.float().unflatten(0, (-1, batch)), dim=-1)
