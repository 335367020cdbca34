"""What a response's headers say about learning from it.  Pure; any text is survived.

  X-Robots-Tag: noai | noimageai | noml              refused, always: said about learning itself
  X-Robots-Tag: noindex | none | noimageindex        refused unless `fetch.respect_noindex` is off: said about search
  TDM-Reservation: 1                                 refused, always (TDM Reservation Protocol, W3C community report 2024)

`name: directive` is meant for that crawler alone, and for whatever follows in the same header up to the next name.
"""

import re
from collections.abc import Iterable

_LEARNING = {"noai", "noimageai", "noml"}
_SEARCH = {"noindex", "none", "noimageindex"}
_VALUED = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}  # `directive: value`: no crawler's name


def refusal(headers: Iterable[tuple[str, str]], *, token: str, respect_noindex: bool) -> str:
    """Why an image with these headers is left alone; empty if it need not be.  `token`: our product token."""
    for name, value in headers:
        match name.strip().lower():
            case "x-robots-tag":
                if word := _forbidden(value, token.lower(), _LEARNING | _SEARCH if respect_noindex else _LEARNING):
                    return f"X-Robots-Tag: {word}"
            case "tdm-reservation":
                if "1" in re.split(r"[,;\s]+", value):
                    return "TDM-Reservation: 1"
    return ""


def _forbidden(value: str, token: str, words: set[str]) -> str:
    """The first directive for us that forbids."""
    for_us = True
    for part in re.split(r"[,;]", value.lower()):
        name, colon, rest = part.partition(":")
        if colon and name.strip() in _VALUED:
            continue
        if colon:
            for_us = name.strip().partition("/")[0] in (token, "*")
        said = [word.strip("\"'") for word in (rest if colon else part).split()]
        if for_us and (found := [word for word in said if word in words]):
            return found[0]
    return ""
