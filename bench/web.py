"""nginx on loopback, under several addresses, over a folder of images: the server of the ingest benchmarks, so that it is not what is measured."""

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from streamlearn.contract.event_log import partition_of

CONFIG = """
daemon off;
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3; uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  types {{ image/jpeg jpg; text/plain txt; }}
  sendfile on; tcp_nopush on; keepalive_requests 1000000;
  server {{ {http_at} root {folder}/files; }}
  server {{ {https_at} ssl_certificate {folder}/cert.pem; ssl_certificate_key {folder}/key.pem; root {folder}/files; }}
}}
"""
HOSTS = tuple(f"127.0.0.{i}" for i in range(1, 17))
SUBJECT = ["-subj", "/CN=localhost", "-addext", f"subjectAltName=DNS:localhost,{','.join(f'IP:{host}' for host in HOSTS)}"]
SUBJECT += ["-addext", "basicConstraints=critical,CA:TRUE"]


def hosts_of(partitions: int) -> tuple[str, ...]:
    """For each partition number a host of this machine whose number it is: a host is asked by its owner only."""
    return tuple(next(h for h in HOSTS if partition_of(h.encode(), partitions) == number) for number in range(partitions))


@contextlib.contextmanager
def nginx(images: Sequence[bytes], folder: Path) -> Iterator[tuple[str, str, Path]]:
    """(http base, https base, the authorities to trust) while it runs.  Images are at /<number>.jpg; robots.txt allows everything."""
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if binary is None:
        raise SystemExit("nginx is not installed: it serves the images of this benchmark (Debian: apt-get install nginx-light)")
    files = folder / "files"
    files.mkdir(parents=True)
    for i, image in enumerate(images):
        (files / f"{i}.jpg").write_bytes(image)
    (files / "robots.txt").write_text("User-agent: *\nDisallow: /private/\n")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(folder / "key.pem")]
    subprocess.run([*make, "-out", str(folder / "cert.pem"), *SUBJECT], check=True, capture_output=True)
    http, https = _free_port(), _free_port()
    at = {"http_at": _listen(http, ""), "https_at": _listen(https, " ssl")}
    (folder / "nginx.conf").write_text(CONFIG.format(user="user root;" if os.geteuid() == 0 else "", folder=folder, **at))
    server = subprocess.Popen([binary, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")])
    try:
        _wait_for(https)
        yield f"http://127.0.0.1:{http}/", f"https://127.0.0.1:{https}/", _trust(folder)
    finally:
        server.terminate()
        server.wait()


def _listen(port: int, how: str) -> str:
    return " ".join(f"listen {host}:{port}{how};" for host in HOSTS)


def _trust(folder: Path) -> Path:
    """The system's authorities and our certificate: what a TLS client has to read on a real machine."""
    system = ssl.get_default_verify_paths().cafile
    bundle = folder / "bundle.pem"
    bundle.write_text((Path(system).read_text() if system else "") + (folder / "cert.pem").read_text())
    return bundle


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wait_for(port: int, limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
