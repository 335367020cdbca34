"""The quickstart's configuration: small enough for two cores, the same loop as everywhere."""

from pathlib import Path

from streamlearn.contract.config import BankConfig, Config, ConnectorConfig, DemoConfig, FetchConfig, ProbeConfig, ShardConfig
from streamlearn.contract.config_file import load


def demo_config(home: Path) -> Config:
    """The preset `demo`, where SwAV learns within minutes (few prototypes, a sharp epsilon, two crops, SGD), on the world made by code."""
    demo = home / "demo"
    world = Config(
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
        probe=ProbeConfig(banks=(BankConfig(name="world", train=str(demo / "bank-train.parquet"), test=str(demo / "bank-test.parquet")),)),
        demo=DemoConfig(enabled=True),
    )
    return load(None, base=world, env={}, overrides={"preset": "demo", "train.name": "demo-swav"})
