"""The role `serve`: one event loop that answers and beats, so a loop that hangs is not called healthy.

It writes nothing but its heartbeat, and may be killed at any moment: who was pulling asks for the rest.
"""

import asyncio
import threading
from functools import partial
from pathlib import Path

from aiohttp import web

from streamlearn.contract.config import Config
from streamlearn.contract.config_serve import ServeConfig, check_repository
from streamlearn.contract.errors import ConfigError, Corrupt
from streamlearn.contract.metrics import ServeMetrics
from streamlearn.contract.registry import OciLayout, Registry
from streamlearn.contract.status import Heartbeat
from streamlearn.serve.app import application
from streamlearn.serve.mirror import follow
from streamlearn.serve.tokens import Tokens

PERIOD_S = 0.25  # between heartbeats
CLOSING_S = 2.0  # for pulls under way when the role is told to stop


def check(config: Config) -> Tokens | None:
    """What can be found wrong before anything is started.  Raises ConfigError."""
    try:
        check_repository(repository(config))
    except ValueError as e:
        raise ConfigError(f"serve.repository: {e}") from e
    return Tokens(Path(config.serve.tokens_file)) if config.serve.tokens_file else None


def repository(config: Config) -> str:
    return config.serve.repository or config.train.name


def run_serve(
    config: Config,
    layout: OciLayout,
    metrics: ServeMetrics,
    heartbeat: Heartbeat,
    stop: threading.Event,
    *,
    source: Registry | None = None,
) -> None:
    """Until `stop`; with `source`, a registry elsewhere, `layout` is a copy that follows it.  Raises ConfigError: port taken, tokens unread."""
    app = application(config.serve, layout, repository(config), metrics, check(config))
    if source is not None:
        follower = partial(follow, source, layout, stop, lambda waiting: heartbeat.beat(copying=waiting))
        threading.Thread(target=follower, name="mirror", daemon=True).start()
    asyncio.run(_serve(app, config.serve, layout, metrics, heartbeat, stop))


async def _serve(
    app: web.Application, config: ServeConfig, layout: OciLayout, metrics: ServeMetrics, heartbeat: Heartbeat, stop: threading.Event
) -> None:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=CLOSING_S)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, config.address, config.port).start()
        except OSError as e:
            raise ConfigError(f"serve.port = {config.port}: cannot listen on {config.address} ({e}); choose another, or 0 for any") from e
        heartbeat.beat(state="serving", address=config.address, port=runner.addresses[0][1], force=True)
        while not stop.is_set():
            metrics.heartbeat.set_to_current_time()
            try:
                names = (await asyncio.to_thread(layout.index)).names()
            except Corrupt as e:
                heartbeat.beat(state="failed", why=str(e))
            else:
                metrics.snapshots.set(sum(name.startswith("0.") for name in names))
                heartbeat.beat(state="serving", why="")
            await asyncio.sleep(PERIOD_S)
    finally:
        await runner.cleanup()
