"""The operator's pages: what they compute is right, and the commands marked as runnable run."""

import math
import shutil

import pytest

from tests.conftest import REPO
from tests.operate.pages import PAGES, blocks
from tests.operate.reader import learnt

DOCS = REPO / "docs"


def rows(text, columns):
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| "))
    return [row for row in cells if len(row) == columns]


def test_the_worked_example_is_what_its_formulas_say():
    text = (DOCS / "capacity.md").read_text()
    known = {row[0].strip("`"): float(row[1]) for row in rows(text, 4) if row[0].startswith("`")}
    known["yields"] = known.pop("yield")  # a word of Python
    computed = [row for row in rows(text, 4) if row[1].startswith("`") and row[0] != "what"]
    assert len(known) >= 18 and len(computed) >= 13
    for what, formula, result, _ in computed:
        value = eval(formula.strip("`").replace("yield", "yields"), {"min": min}, known)
        assert math.isclose(value, float(result), rel_tol=0.02, abs_tol=0.005), (what, value, result)


def test_what_the_example_calls_measured_stands_in_the_log():
    log = (REPO / "LOG.md").read_text()
    told = [row[3].removeprefix("LOG.md: ") for row in rows((DOCS / "capacity.md").read_text(), 4) if row[3].startswith("LOG.md: ")]
    assert len(told) == 4 and [figure for figure in told if figure not in log] == []


# Not marked, and why: what needs the internet (git clone, pip), containers, brokers, a bucket or another registry, many GPUs, root, or ten minutes.

RUNNABLE = {page: found for page in PAGES if (found := blocks(page, "sh runnable"))}
ENDLESS = {page: found for page in PAGES if (found := blocks(page, "sh runnable until Ctrl-C"))}


@pytest.fixture(scope="module")
def settled(tmp_path_factory):
    """A reader who has typed the first line of the README."""
    return learnt(tmp_path_factory.mktemp("reader") / "folder", ENDLESS[REPO / "README.md"][0][0])


def named(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


@pytest.mark.slow
@pytest.mark.timeout(900)
@named(RUNNABLE)
def test_the_commands_marked_as_runnable_run(page, settled, tmp_path):
    reader = settled.copy(tmp_path / "folder")
    for line in (line for block in RUNNABLE[page] for line in block):
        ran = reader.run(line)
        refusing = ran.returncode == 1 and "exit code 1" in line.text  # as the page says
        assert (ran.returncode == 0 or refusing) and "Traceback" not in ran.stderr, f"{line}\n{ran.stdout}\n{ran.stderr}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@named(ENDLESS)
def test_what_runs_until_ctrl_c_works_and_ends_in_good_order(page, settled, tmp_path):
    reader = settled.copy(tmp_path / "folder")
    (reader.folder / "runs" / "web").unlink()  # `up` makes its home
    for line in (line for block in ENDLESS[page] for line in block):
        home = line.words[line.words.index("--home") + 1]
        roles = {"up": {"connect", "fetch", "train", "evaluate"}, "serve": {"serve"}}[line.words[1]]
        shutil.rmtree(reader.folder / home / "status", ignore_errors=True)
        code, said = reader.run_until(line, lambda home=home, roles=roles: at_work(reader.status(home)) >= roles)
        assert code == 0 and "Traceback" not in said, f"{line}\n{said}"


def at_work(said):
    return {role for role, beat in said.items() if beat.get("state") not in (None, "starting")}


def test_the_pages_that_a_newcomer_reads_have_commands_that_are_run():
    marked = {page.name for page in RUNNABLE | ENDLESS}
    assert marked >= {
        f"{name}.md" for name in ("README", "install", "operate", "backup", "dataset", "snapshots", "probes", "promotion", "serve")
    }
