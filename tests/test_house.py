"""The rules of the house that a machine can hold us to."""

import ast
from pathlib import Path

import pytest

from tests.conftest import REPO

SOURCES = sorted(p for top in ("streamlearn", "ingest", "bench") for p in (REPO / top).rglob("*.py"))
LEARNING = {"streamlearn.stream", "streamlearn.learn", "streamlearn.snapshots", "streamlearn.probes"}
# room -> rooms of ours it may import, besides itself (DESIGN.md, section 2)
MAY = {
    "streamlearn.contract": set(),
    "streamlearn.adapters": {"streamlearn.contract"},
    "streamlearn.stream": {"streamlearn.contract"},
    "streamlearn.learn": {"streamlearn.contract"},
    "streamlearn.snapshots": {"streamlearn.contract", "streamlearn.learn.backbones"},
    "streamlearn.probes": {
        "streamlearn.contract",
        "streamlearn.learn.backbones",
        "streamlearn.snapshots",
        "streamlearn.stream.decode",
        "streamlearn.stream.views",
    },
    "streamlearn.serve": {"streamlearn.contract", "streamlearn.snapshots", "streamlearn.report.plots"},
    "streamlearn.demo": {"streamlearn.contract"},
    "streamlearn.operate": {"streamlearn.contract", "streamlearn.stream.rounds", "streamlearn.supervise", "ingest"},
    "ingest": {"streamlearn.contract"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts)


def inside(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def ours(name: str) -> bool:
    return inside(name, "ingest") or name.startswith("streamlearn.")


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_go_one_way(path):
    room = next((r for r in MAY if inside(module_of(path), r)), None)
    if room is None:
        return  # the composition root (cli, supervise, report, bench) may import everything
    allowed = {room} | MAY[room]
    packages = {name for name in imports(path) if ours(name) and name not in {"streamlearn"}}
    wrong = {n for n in packages if not any(inside(n, a) or (inside(a, n) and n.count(".") <= 1 and n == room) for a in allowed)}
    # `from streamlearn.learn import backbones` shows up as both streamlearn.learn and streamlearn.learn.backbones
    wrong = {n for n in wrong if not any(a.startswith(n + ".") and a in packages for a in allowed)}
    assert not wrong, f"{path.relative_to(REPO)} imports {sorted(wrong)}"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_adapters_are_chosen_only_where_roles_are_put_together(path):
    if any(inside(module_of(path), room) for room in ("streamlearn.cli", "streamlearn.adapters", "bench")):
        return
    assert not {n for n in imports(path) if inside(n, "streamlearn.adapters")}, path


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_torch_lives_only_where_tensors_are(path):
    if any(inside(module_of(path), room) for room in LEARNING | {"bench"}) or module_of(path).startswith("streamlearn.cli"):
        return
    assert not {n for n in imports(path) if inside(n, "torch")}, path


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_files_stay_small_enough_to_read(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_nothing_is_swallowed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or (isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"})
            quiet = all(isinstance(s, ast.Pass | ast.Continue) for s in node.body)
            assert not (broad and quiet), f"{path}:{node.lineno}"


def test_neither_torchvision_nor_timm_is_needed():
    for path in SOURCES:
        assert not {n for n in imports(path) if inside(n, "torchvision") or inside(n, "timm")}, path


def test_every_metric_that_is_declared_is_set_by_a_role():
    """The other way round, a name that is not declared, is mypy's to find."""
    tree = ast.parse((REPO / "streamlearn/contract/metrics.py").read_text())
    declared = {
        target.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute) and isinstance(node.value, ast.Call)
    }
    used = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute | ast.Name):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else node.value.id
                if owner in ("metrics", "m"):
                    used.add(node.attr)
    assert len(declared) > 30 and declared - used == set()
