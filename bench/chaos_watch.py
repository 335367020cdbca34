"""A real Prometheus with the shipped rules beside the chaos drill (bench/chaos.py), and what raised which alert after how long."""

import contextlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from streamlearn.contract.errors import ConfigError
from tests.conftest import REPO
from tests.ops.prometheus import Prometheus, free_port, running

RULES = REPO / "ops" / "prometheus" / "rules"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SCRAPES = 4  # that a range holds at least: fewer, and a rate is of nothing
LIMITS = {"sample_limit": 5000, "label_limit": 20}  # as ops/prometheus/embedded.yml
READY_S = 60.0


def paced(rules: str, pace: float, scrape_s: float) -> str:
    """A file of rules whose times pass `pace` times as fast: `for`, ranges, offsets, and what seconds are compared with.

    The longer of two ranges stays the longer; what is not a time (shares, counts) stays as it is.
    """
    if pace == 1:
        return rules

    def shorter(found: re.Match[str]) -> str:
        seconds = int(found[2]) * UNITS[found[3]] / pace
        least = SCRAPES * scrape_s if found[1] == "[" else 0.0
        return f"{found[1]}{max(1, round(1000 * max(seconds, least)))}ms"

    blocks = re.split(r"(?m)^(?=      - )", rules)
    for i, block in enumerate(blocks):
        block = re.sub(r"(\[|offset |for: )(\d+)([smhd])", shorter, block)
        if "seconds" in block:
            block = re.sub(r"> (\d{2,})\b(?! \*)(?!\.)", lambda found: f"> {int(found[1]) / pace:.3f}", block)
        blocks[i] = block
    return "".join(blocks)


@contextlib.contextmanager
def watching(folder: Path, ports: dict[str, int], pace: float) -> Iterator[Prometheus]:
    """Prometheus over the roles' /metrics.  Raises ConfigError where it does not start."""
    scrape_s, own = max(1.0, 15 / pace), free_port()
    for file in sorted(RULES.glob("*.yml")):
        (folder / f"rules-{file.name}").write_text(paced(file.read_text(), pace, scrape_s))
    jobs = [
        {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}], **LIMITS}
        for job, port in {**ports, "prometheus": own}.items()
    ]
    times = {"scrape_interval": scrape_s, "scrape_timeout": min(scrape_s, 10), "evaluation_interval": scrape_s}
    every = {key: f"{round(1000 * seconds)}ms" for key, seconds in times.items()}  # Prometheus takes no fractions
    config = folder / "prometheus.yml"  # JSON is YAML
    config.write_text(json.dumps({"global": every, "rule_files": [f"{folder}/rules-*.yml"], "scrape_configs": jobs}))
    argv = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address=127.0.0.1:{own}"]
    with running(argv, folder / "prometheus.log"):
        found, deadline = Prometheus(own), time.monotonic() + READY_S
        while not found.ready():
            if time.monotonic() > deadline:
                raise ConfigError(f"Prometheus does not start; see {folder / 'prometheus.log'}")
            time.sleep(0.2)
        yield found


@dataclass
class Told:
    """Of one class of faults."""

    wanted: str  # the alert
    times: int = 0
    after_s: list[float] = field(default_factory=list)  # from the fault to the alert, where it came
    skipped: str = ""  # why it was not injected here

    def line(self, name: str, pace: float) -> str:
        if self.skipped:
            return f"{name:22} {self.wanted:24} not injected: {self.skipped}"
        if not self.after_s:
            return f"{name:22} {self.wanted:24} injected {self.times} times, NEVER RAISED"
        mean = sum(self.after_s) / len(self.after_s)
        return (
            f"{name:22} {self.wanted:24} raised {len(self.after_s)} of {self.times} times, after {mean:.0f} s "
            f"({min(self.after_s):.0f} to {max(self.after_s):.0f}; {mean * pace / 60:.1f} min at the rules' own pace)"
        )
