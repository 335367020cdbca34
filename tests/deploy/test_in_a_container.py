"""What a role needs where each has a container: a home that other commands understand, and addresses that others reach."""

import threading
import time
import urllib.request

from click.testing import CliRunner
from prometheus_client import CollectorRegistry

from ops.docker.make_secrets import contents, write
from streamlearn.__main__ import cli
from streamlearn.cli.roles import ROLES, _config
from streamlearn.contract.config import Config, DemoConfig
from streamlearn.contract.metrics import DemoMetrics
from streamlearn.contract.status import Heartbeat
from streamlearn.demo.run import run_demo

DEADLINE_S = 120.0


def test_a_role_that_is_given_a_file_keeps_what_it_resolved_for_the_commands_with_a_home(tmp_path):
    file, home = tmp_path / "run.toml", tmp_path / "home"
    file.write_text("metrics_port = 9100\n[serve]\ntokens_file = 'tokens'\n")
    config = _config(home, file)
    assert config.serve.tokens_file == str(tmp_path / "tokens") and _config(home, None) == config
    found = CliRunner().invoke(cli, ["status", "--home", str(home), "--json"])
    assert found.exit_code == 0, found.output


def test_ports_of_roles_never_move():
    """Scrape targets, dashboards and firewalls know them: metrics_port + the place here."""
    assert ROLES == ("demo", "connect", "fetch", "train", "evaluate", "serve", "refresh")


def test_the_image_world_names_itself_as_others_reach_it(tmp_path, monkeypatch):
    monkeypatch.setattr("streamlearn.demo.run.BANK_TRAIN", 12)  # drawing thousands is not what is looked at here
    monkeypatch.setattr("streamlearn.demo.run.BANK_TEST", 12)
    config = Config(demo=DemoConfig(enabled=True, address="0.0.0.0", url="http://demo:8080", max_images=3, quarter_images=50))
    stop, heart = threading.Event(), Heartbeat(tmp_path, "demo")
    thread = threading.Thread(target=run_demo, args=(config, tmp_path, DemoMetrics(CollectorRegistry()), heart, stop))
    thread.start()
    urls, end = tmp_path / "demo" / "urls.txt", time.monotonic() + DEADLINE_S
    while not urls.exists() or len(urls.read_text().splitlines()) < 3:
        assert thread.is_alive() and time.monotonic() < end
        time.sleep(0.05)
    port = int((tmp_path / "demo" / "port").read_text())
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/img/0.jpg") as answer:
        assert answer.status == 200
    stop.set()
    thread.join(DEADLINE_S)
    assert urls.read_text().splitlines()[0] == "http://demo:8080/img/0.jpg"


def test_secrets_are_made_once_and_only_their_owner_comes_at_them(tmp_path):
    folder = tmp_path / "secrets"
    assert write(folder) == list(contents())
    before = {p.name: p.read_text() for p in folder.iterdir()}
    assert write(folder) == [] and {p.name: p.read_text() for p in folder.iterdir()} == before
    (folder / "registry_password").unlink()  # half of a pair: the other half would not fit
    assert write(folder) == ["registry"]
    assert (folder / "registry_htpasswd").read_text() != before["registry_htpasswd"]
    assert (folder / "s3_credentials").read_text() == before["s3_credentials"]
    assert folder.stat().st_mode & 0o777 == 0o700 and all(p.stat().st_mode & 0o777 == 0o644 for p in folder.iterdir())
