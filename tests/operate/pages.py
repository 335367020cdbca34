"""What the pages tell a reader to type: the commands of their blocks, line by line, and those that stand in the middle of a sentence."""

import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPO

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md")), *sorted((REPO / "docs" / "runbook").glob("*.md"))]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```", flags=re.S | re.M)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
SHELLS = ("", "sh")  # fences that may hold commands
PROGRAMS = ("streamlearn", "python", "make", "torchrun", "docker", "kubectl")  # what is ours in them is held to the code


@dataclass(frozen=True)
class Line:
    """One command, continued lines joined."""

    page: str  # relative to the repository
    number: int  # of the line in the page
    text: str  # with its comment
    kind: str  # of the fence: "sh", "sh runnable", …; "inline" in a sentence

    def __str__(self) -> str:
        return f"{self.page}:{self.number}: {self.text}"

    @property
    def words(self) -> list[str]:
        """As a shell splits it, without comment and redirection; variables before the command, and the environment's folder, left out."""
        words = shlex.split(self.text, comments=True)
        words = list(itertools.takewhile(lambda word: word not in (">", ">>", "<"), words))
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        return [words[0].removeprefix(".venv/bin/"), *words[1:]] if words else []


def blocks(page: Path, kind: str | None = None) -> list[list[Line]]:
    """The blocks of a page that a shell may read, or those of one kind."""
    text, found = page.read_text(), []
    for match in BLOCK.finditer(text):
        if match[1] == kind if kind is not None else match[1].split(" ")[0] in SHELLS:
            found.append(_lines(page, match[1], match[2], text[: match.start()].count("\n") + 2))
    return found


def _lines(page: Path, kind: str, body: str, number: int) -> list[Line]:
    found, begun = [], ""
    for i, line in enumerate(body.splitlines()):
        begun += line
        if begun.endswith("\\"):
            begun = begun[:-1]
        elif begun.strip():
            found.append(Line(str(page.relative_to(REPO)), number + i, begun.strip(), kind))
            begun = ""
    return found


def inline(page: Path) -> list[Line]:
    """What stands between single backticks, on one line."""
    text = BLOCK.sub(lambda m: "\n" * m[0].count("\n"), page.read_text())  # lines keep their numbers
    name = str(page.relative_to(REPO))
    return [Line(name, text[: m.start()].count("\n") + 1, " ".join(m[1].split()), "inline") for m in INLINE.finditer(text)]


def commands() -> list[Line]:
    """Every line of a block, and every inline code, that begins with one of the programs.  `a && b` are two."""
    found = []
    for page in PAGES:
        for line in [*(line for block in blocks(page) for line in block), *inline(page)]:
            found += [Line(line.page, line.number, part, line.kind) for part in line.text.split(" && ")]
    return [line for line in found if _program(line) in PROGRAMS]


def _program(line: Line) -> str:
    try:
        words = line.words
    except ValueError:  # a formula, or half a quotation: no command
        return ""
    return words[0] if len(words) > 1 else ""
