"""A real web server over real images: the sources of tests and benchmarks.

    python -m bench.serve cifar10-train.parquet --port 0        one image a row of a parquet, at /<row>.jpg
    python -m bench.serve imagenet-sample-1000.tar              one image a member of a tar, at /<number>.jpg

Prints `serving <n> images at http://127.0.0.1:<port>/` once it listens.
"""

import argparse
import asyncio
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from aiohttp import web


def load(path: Path, count: int | None = None) -> Sequence[bytes]:
    """The images of a parquet (column `jpeg`) or a tar, in order."""
    if path.suffix == ".parquet":
        images: list[bytes] = pq.read_table(path, columns=["jpeg"]).column(0).to_pylist()
        return images[:count]
    with tarfile.open(path) as tar:
        bodies = [f.read() for member in tar if member.isfile() and (f := tar.extractfile(member))]
    return bodies[:count]


def application(images: Sequence[bytes]) -> web.Application:
    async def image(request: web.Request) -> web.Response:
        index = int(request.match_info["index"])
        if index >= len(images):
            raise web.HTTPNotFound
        return web.Response(body=images[index], content_type="image/jpeg")

    app = web.Application()
    app.router.add_get(r"/{index:\d+}.jpg", image)
    return app


async def serve(images: Sequence[bytes], port: int) -> None:
    runner = web.AppRunner(application(images), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    port = runner.addresses[0][1]
    print(f"serving {len(images)} images at http://127.0.0.1:{port}/", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--count", type=int)
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    asyncio.run(serve(load(args.path, args.count), args.port))
