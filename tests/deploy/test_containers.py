"""The compose file in real containers: a quarter of an hour, so only where it is asked for, STREAMLEARN_CONTAINERS=1."""

import json
import os

import pytest

from ops.docker import e2e
from ops.docker.compose import load

DEPENDED_ON_BY = {"train": {"owners", "bucket", "registry", "s3"}, "prometheus": {"owners"}, "hook": {"alertmanager"}}


@pytest.mark.timeout(3600)
def test_the_loop_runs_in_containers_is_watched_stops_and_goes_on(capsys):
    if os.environ.get("STREAMLEARN_CONTAINERS") != "1":
        pytest.skip("not asked for: STREAMLEARN_CONTAINERS=1, podman, podman-compose and the two images of ops/docker")
    if why := e2e.unable():
        pytest.skip(why)
    code = e2e.main([])
    told = capsys.readouterr().out
    assert code == 0, told
    shown = [json.loads(line)["shown"] for line in told.splitlines()]
    assert shown == ["up and healthy", "learning, published, pulled", "watched", "alarmed", "stopped", "again"]


def test_services_are_started_after_those_they_wait_for():
    order = e2e.Project().order()
    assert not e2e.LEFT_OUT & set(order)
    for name, before in DEPENDED_ON_BY.items():
        assert all(order.index(name) > order.index(b) for b in before), order


def test_stand_ins_change_images_and_the_log_but_not_what_the_roles_are_told():
    ours = load([e2e.TOP / "docker-compose.yml"], {})["services"]
    theirs = load([e2e.TOP / f for f in e2e.FILES], {})["services"]
    for role in e2e.ROLES:
        for key in ("command", "user", "read_only", "cap_drop", "healthcheck", "stop_grace_period", "secrets", "networks"):
            assert theirs[role].get(key) == ours[role].get(key), (role, key)
