"""One self-contained HTML page: no script, no request to anywhere; readable on a phone, in the dark, and read aloud.

Made from heartbeats, histories and the small files of the home alone, in seconds, without torch, while the roles go on.  What is missing is
said, with how to get it.  Its size is bounded: curves are thinned, tables cut, pictures small.
"""

from collections.abc import Mapping
from pathlib import Path

from streamlearn import view
from streamlearn.contract import durable
from streamlearn.contract.config import Config
from streamlearn.contract.object_store import ObjectStore
from streamlearn.report import intake, learning, pictures, probing, transfer
from streamlearn.report.parts import CSS, clock, esc
from streamlearn.report.told import Told

LINKS = {
    "probes": "better?", "retrieval": "alike", "loss": "loss", "collapse": "collapsed?", "transfer": "forgets?", "drift": "drift", "intake": "intake",
    "freshness": "fresh?", "snapshots": "snapshots", "gallery": "prototypes",
}  # fmt: skip
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the browser holds us to it: no script, no request


def build_report(home: Path, config: Config, store: ObjectStore, out: Path, channels: Mapping[str, str] | None = None) -> Path:
    """Write the page from what the roles have told so far.  `channels`: the registry's channel tags -> the digests they point to."""
    told = Told(home, config, store, channels or {})
    sections = [
        _tiles(told),
        _notices(told),
        probing.probing(told),
        pictures.retrieval(told),
        learning.learning(told),
        learning.collapse(told),
        transfer.transfer(told),
        intake.drift(told),
        intake.intake(told),
        intake.freshness(told),
        probing.snapshots(told),
        pictures.gallery(told),
    ]
    name = esc(config.train.name)
    head = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
    head += f'<meta http-equiv=Content-Security-Policy content="{POLICY}"><title>{name}</title>'
    made = f"streamlearn, made {clock(told.now.isoformat())} UTC, last step recorded {clock((told.learnt.lines or [{}])[-1].get('at', 'never'))}"
    links = "<nav aria-label=Sections>" + "".join(f"<a href='#{key}'>{words}</a>" for key, words in LINKS.items()) + "</nav>"
    body = f"<main><h1>{name}</h1><div class=soft>{made}</div>{links}{''.join(sections)}</main>"
    durable.write(out, f"{head}<style>{CSS}</style>{body}</html>".encode())
    return out


def _tiles(told: Told) -> str:
    newest = (told.learnt.lines or [{}])[-1]
    train = {k: newest[k] for k in ("step", "images", "fresh", "lr") if k in newest} | told.status.get("train", {})
    tiles = [
        (_short(train.get("step", 0)), "steps"),
        (_short(train.get("images", 0)), f"images learnt, {_short(train.get('fresh', 0))} of them fresh"),
        (view.number(train.get("lr")), f"learning rate, {train.get('halvings', told.learnt.counts['halved'])} halvings"),
        (esc((train.get("last_snapshot") or {}).get("tag", "–")), "last snapshot"),
        *probing.tiles(told),
    ]
    return (
        "<section class=tiles>"
        + "".join(f"<div class=tile><b>{value}</b><span>{label}</span></div>" for value, label in tiles)
        + "</section>"
    )


def _short(count: int) -> str:
    return f"{count:,}" if count < 10_000_000 else f"{count / 1e6:,.0f} million"


def _notices(told: Told) -> str:
    """What a person should act on, or that there is nothing."""
    red = learning.alarms(told)
    amber = intake.drifting(told)
    for role, _ in view.WAITERS:
        if why := told.told(role, "waiting"):
            amber.append(f"<b>{role} waits</b> since {clock(told.told(role, 'waiting_since'))}: {esc(why)}")
    for name, words in (("failed", "Snapshots that cannot be measured"), ("refused_banks", "Banks that are refused")):
        if held := told.told("evaluate", name):
            amber.append(f"<b>{words}:</b> {esc('; '.join(f'{k[:19]} {v}' for k, v in list(held.items())[:5]))}")
    calm = []
    if told.newest and not red:
        tags = ", ".join(dict.fromkeys(esc(e.get("tag", e["step"])) for e in told.newest))
        calm = [f"No collapse alarm by the newest snapshot measured, {tags}."]
    kinds = (("", red), (" look", amber), (" calm", calm))
    return "".join(f"<div class='notice{kind}'{' role=alert' if not kind else ''}>{text}</div>" for kind, texts in kinds for text in texts)
