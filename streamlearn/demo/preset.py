"""The quickstart's configuration: small enough for two cores, the same loop as everywhere."""

from pathlib import Path

from streamlearn.contract.config import (
    BankConfig,
    Config,
    ConnectorConfig,
    CropConfig,
    DemoConfig,
    FetchConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PlateauConfig,
    ProbeConfig,
    ShardConfig,
    StreamConfig,
    TrainConfig,
)


def demo_config(home: Path) -> Config:
    """SwAV at the scale where it learns within minutes: few prototypes, a sharp epsilon, two crops, SGD."""
    demo = home / "demo"
    return Config(
        home=str(home),
        connectors=(ConnectorConfig.of("demo-world", "urls", path=str(demo / "urls.txt"), poll_s=0.5),),
        fetch=FetchConfig(
            allow_networks=("127.0.0.0/8",),
            concurrency=16,
            total_timeout_s=10.0,
            retry_delays_s=(30.0, 300.0),
            host_rate=0,  # the whole world is one host, and ours
            robots_retry_s=1.0,  # it may start after the fetcher, and comes back within seconds
            breaker_s=2.0,
        ),
        shard=ShardConfig(max_samples=500, max_age_s=5.0),
        stream=StreamConfig(
            crops=(CropConfig(count=2, size=32, scale=(0.4, 1.0)),),
            jitter=0.2,
            blur=0.0,
            fresh_fraction=0.35,
            max_replay_per_fresh=8.0,
            round_samples=2000,
            workers=1,
        ),
        model=ModelConfig(backbone="regnety-tiny", head=(512, 128)),
        objective=ObjectiveConfig(prototypes=64, epsilon=0.015, freeze_prototypes=60),
        train=TrainConfig(
            batch=128,
            optim=OptimConfig(kind="sgd", lr=0.3, warmup_steps=20, weight_decay=5e-4),
            plateau=PlateauConfig(block_steps=25),
            ema_decay=0.99,
            checkpoint_steps=100,
            snapshot_steps=150,
            bn_images=512,
            name="demo-swav",
        ),
        probe=ProbeConfig(banks=(BankConfig(name="world", train=str(demo / "bank-train.parquet"), test=str(demo / "bank-test.parquet")),)),
        demo=DemoConfig(enabled=True),
    )
