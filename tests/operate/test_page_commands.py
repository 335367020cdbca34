"""No page names a command, an option, a module or a target that is not there.  Nothing is run here: words are held to the code."""

import ast
import re

import click
import pytest

from streamlearn.__main__ import cli
from tests.conftest import REPO
from tests.operate.pages import PAGES, Line, commands, inline

OTHERS = {"--delete-untagged", "--local-addr", "--max-restarts", "--nnodes"}  # distribution's and torchrun's

WRONG = [  # what each rule is for: a page that rots is found
    ("sh", "streamlearn statsu --home runs/mine", "no command `statsu`"),
    ("sh", "streamlearn status --hoem runs/mine", "--hoem"),
    ("inline", "streamlearn status --hoem", "--hoem"),
    ("sh", "streamlearn snapshots show", "REFERENCE is missing"),
    ("inline", "streamlearn snapshots export stable", "--to is missing"),
    ("sh", "streamlearn snapshots export stable --to tensorflow", "'tensorflow' is not one of"),
    ("sh", "streamlearn up --for soon", "'soon' is not a valid"),
    ("sh", "streamlearn status runs/mine", "nothing takes `runs/mine`"),
    ("sh", "streamlearn up --home", "requires an argument"),
    ("sh", "docker compose run --rm connect config chekc /etc/x.toml", "no command `chekc`"),
    ("sh", "docker compose exec train streamlearn status --hoem x", "--hoem"),
    ("sh", "kubectl exec train-0 --container train -- streamlearn docter --home x", "no command `docter`"),
    ("sh", "torchrun --nnodes 2 -m streamlearn role trian --home x", "'trian' is not one of"),
    ("sh", "python -m bench.planing", "no module bench.planing"),
    ("inline", "python -m bench.faults --arm none", "no option --arm"),
    ("inline", "make tests", "no target tests"),
]


def complaint(line: Line) -> str:
    """What is wrong with a command; empty: nothing."""
    words = line.words
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), flags=re.M))
        return "".join(f"no target {word}" for word in words[1:] if word not in targets and "=" not in word)
    if words[0] == "python" and words[1] == "-m":
        return _of_module(words[2], words[3:])
    return _of_group(cli, _ours(words), whole=line.kind != "inline")


def _ours(words: list[str]) -> list[str]:
    """The part of a command line that our own command reads; [] where it reads none."""
    if words[0] == "kubectl":
        words = words[words.index("--") :] if "--" in words else []
    if "streamlearn" in words:
        return words[words.index("streamlearn") + 1 :]
    if words[:3] == ["docker", "compose", "run"]:  # the image's command is ours: what follows the service
        services = re.findall(r"^  ([a-z0-9]+):$", (REPO / "docker-compose.yml").read_text(), flags=re.M)
        return words[next(i for i, word in enumerate(words) if word in services) + 1 :]
    return []


def _of_group(command: click.Command, words: list[str], *, whole: bool) -> str:
    """Follows the words to a command, and holds the rest to its parameters.  In a sentence a bare name is no command line."""
    info = "streamlearn"
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        under = command.get_command(click.Context(command), words[0])
        if under is None:
            return f"no command `{words[0]}` of {info}"
        command, info, words = under, f"{info} {words[0]}", words[1:]
    if isinstance(command, click.Group) or not (words or whole):
        return "" if set(words) <= {"--version", "--help"} else f"{info}: {words}"
    return _of_command(command, words)


def _of_command(command: click.Command, words: list[str]) -> str:
    context = click.Context(command)
    try:
        given, rest, _ = command.make_parser(context).parse_args(list(words))
        if rest:
            return f"nothing takes `{' '.join(rest)}`"
        for parameter in command.get_params(context):
            value = given.get(parameter.name)
            missing = parameter.name not in given or parameter.value_is_missing(value)
            if missing and parameter.required:
                return f"{parameter.make_metavar(context) if isinstance(parameter, click.Argument) else parameter.opts[0]} is missing"
            if not missing and not _placeholder(value) and not isinstance(parameter.type, click.Path):  # files are the reader's
                parameter.type_cast_value(context, value)
    except click.UsageError as e:
        return e.format_message()[:1].lower() + e.format_message()[1:]
    return ""


def _placeholder(value: object) -> bool:
    """REPOSITORY, RATE, <name>, $TOKEN: the reader's to fill in."""
    return isinstance(value, str) and re.fullmatch(r"[A-Z]+|<[a-z ]+>|\$[A-Z_]+", value) is not None


def _of_module(module: str, words: list[str]) -> str:
    file = REPO / (module.replace(".", "/") + ".py")
    if not file.exists():
        return f"no module {module}"
    known = {"--help"} | _options(ast.parse(file.read_text()))
    return "".join(f"no option {word} of {module}" for word in words if word.startswith("--") and word not in known)


def _options(tree: ast.AST) -> set[str]:
    """What a module tells its argparse, and what a module of ours that it hands its parser to does."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bench."):
            file = REPO / (node.module.replace(".", "/") + ".py")
            found |= _options(ast.parse(file.read_text()))
    return found


def test_every_command_of_every_page_is_there_with_its_options_and_arguments():
    lines = commands()
    assert len(lines) > 150  # the pages were read
    assert [f"{line}  <- {wrong}" for line in lines if (wrong := complaint(line))] == []


def test_every_option_that_a_page_names_alone_is_somewhere():
    modules = [*(REPO / "bench").glob("*.py"), *(REPO / "ops").rglob("*.py")]
    known = OTHERS.union(_every_option(cli), *(_options(ast.parse(file.read_text())) for file in modules))
    named = [line for page in PAGES for line in inline(page) if line.text.startswith("--")]
    assert len(named) > 50
    assert [str(line) for line in named if line.text.split()[0].split("=")[0] not in known] == []


def _every_option(command: click.Command) -> set[str]:
    context = click.Context(command)
    if not isinstance(command, click.Group):
        return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    under = [command.get_command(context, name) for name in command.list_commands(context)]
    return set[str]().union(*(_every_option(one) for one in under if one is not None))


@pytest.mark.parametrize(("kind", "text", "why"), WRONG, ids=[text for _, text, _ in WRONG])
def test_a_page_that_rots_is_found(kind, text, why):
    assert why.lower() in complaint(Line("page.md", 1, text, kind)).lower()
