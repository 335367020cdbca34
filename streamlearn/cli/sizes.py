"""A recipe for the user's own images: by their size, for a machine without a GPU."""

import statistics
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from streamlearn.contract.config import (
    Config,
    CropConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ShardConfig,
    StreamConfig,
    TrainConfig,
)

LOOK_AT = 50  # images


def recipe_for(images: Path | None, small_px: int) -> Config:
    """Small images by the recipe for small ones; photographs at 96 and 48 px.  A GPU, or another recipe, by --config."""
    small = images is not None and median_side(images) <= small_px
    crops: tuple[CropConfig, ...] = (CropConfig(count=2, size=32, scale=(0.3, 1.0)),)
    if not small:
        crops = (CropConfig(count=2, size=96, scale=(0.14, 1.0)), CropConfig(count=4, size=48, scale=(0.05, 0.14)))
    return Config(
        shard=ShardConfig(max_samples=500, max_age_s=10.0),
        stream=StreamConfig(crops=crops, jitter=0.5, blur=0.0 if small else 0.5, max_replay_per_fresh=20.0, round_samples=2000, workers=1),
        model=ModelConfig(backbone="regnety-tiny" if small else "regnety-200mf", head=(512, 128)),
        objective=ObjectiveConfig(prototypes=128, epsilon=0.015, freeze_prototypes=100),
        train=TrainConfig(
            batch=128 if small else 64,
            optim=OptimConfig(kind="sgd", lr=0.3 if small else 0.15, warmup_steps=50, weight_decay=5e-4 if small else 1e-4),
            ema_decay=0.99,
            checkpoint_steps=100,
            snapshot_steps=250,
        ),
    )


def median_side(folder: Path) -> float:
    """Median of the shorter sides of the first images found; of an empty folder: infinite (photographs are the likelier)."""
    sides: list[int] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
            continue  # what cannot be stored has no say
        if len(sides) >= LOOK_AT:
            break
    return statistics.median(sides) if sides else float("inf")
