"""Why the channels point where they do: the newest of their moves, as people read them."""

import html

from streamlearn.contract.errors import Corrupt
from streamlearn.serve.asked import VERSION
from streamlearn.serve.look import badges, link, section, short, table
from streamlearn.serve.shelf import Contents, Shelf
from streamlearn.snapshots.history import Move, history

SHOWN = 12
REASON = 400  # characters
WORDS = {"promote": "promoted", "rollback": "rolled back", "pin": "pinned", "unpin": "unpinned", "untold": "moved by another tool"}


def moves(shelf: Shelf, contents: Contents) -> str:
    """Empty where no channel was ever moved.  What it says comes from records in the registry, so it is data, and escaped."""
    try:
        found = history(shelf.layout)
    except Corrupt as e:
        return section("Moves", f"<p>{html.escape(str(e))}</p>")
    if not found:
        return ""
    more = f"<p class=soft>and {len(found) - SHOWN:,} earlier: <code>streamlearn snapshots history</code></p>" if len(found) > SHOWN else ""
    rows = [_row(move, contents) for move in found[:SHOWN]]
    note = "Who moved a channel, and why: the gate compares snapshots on the same labelled images."
    made = table(["when", "channel", "what", "to", "from", "by", "why"], rows)
    return section("Moves", f"<div class=moves>{made}</div>{more}", note)


def _row(move: Move, contents: Contents) -> list[str]:
    what = WORDS.get(move.kind, move.kind) + (", by force" if move.forced else "")
    why = move.why if len(move.why) <= REASON else move.why[: REASON - 1] + "…"
    return [
        html.escape(move.at[:16].replace("T", " ") or "–"),
        badges([move.channel]),
        html.escape(what),
        _snapshot(move.after, contents),
        _snapshot(move.before, contents) if move.before else "–",
        html.escape(move.by[:60] or "–"),
        f"<span class=why>{html.escape(why or '–')}</span>",
    ]


def _snapshot(digest: str, contents: Contents) -> str:
    """A link while it has a tag: retention may have let it go."""
    version = next((tag for tag in contents.tags.get(digest, ()) if VERSION.fullmatch(tag)), "")
    return link(digest, version) if version else short(digest)
