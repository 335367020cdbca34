"""Which addresses may be connected to.  Checked on the socket, where literals, redirects and rebinding all must pass.

The web is hostile: a list of URLs can point to the machine itself, to its neighbours, or to a cloud's metadata service, by a name,
by any spelling of a number, by a redirect, or by a name that changes its answer.  What is connected to in the end is one address, and that
is what is looked at.
"""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

MARK = "address refused"  # aiohttp folds several failed addresses into one message; this survives it
_CARRIES_IPV4 = tuple(  # mapped, translated (SIIT), NAT64: judged by the address inside
    ip_network(block) for block in ("::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96")
)
_NEVER = tuple(
    ip_network(block)
    for block in (
        "100.64.0.0/10",  # carriers' NAT
        "168.63.129.16/32",  # Azure's host agent: public by its number, and yet the machine's own metadata service
        "192.0.0.0/24",  # protocol assignments
        "::/96",  # IPv4-compatible, long deprecated
        "64:ff9b:1::/48",  # local NAT64: leads anywhere
        "2001::/32",  # Teredo
        "2002::/16",  # 6to4
        "fec0::/10",  # site-local
    )
)


class AddressRefused(OSError):
    """Not a public address."""


def is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address) and any(address in network for network in _CARRIES_IPV4):
        return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
    if any(address in network for network in _NEVER if network.version == address.version):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class Guard:
    """Public addresses, and the networks that the user exempts (`fetch.allow_networks`)."""

    def __init__(self, allow: Sequence[str] = ()):
        self.allow = [ip_network(block) for block in allow]

    def allows(self, host: str) -> bool:
        address = ip_address(host.partition("%")[0])  # a scoped address is judged without its scope
        return is_public(address) or any(address in network for network in self.allow if network.version == address.version)


def complaint(url: str) -> str:
    """Why a URL may not be asked for at all; empty if it may."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as e:
        return f"not a URL: {e}"
    if parts.scheme not in ("http", "https"):
        return f"scheme {parts.scheme!r} is neither http nor https"
    if not parts.hostname:
        return "no host"
    if parts.username is not None or parts.password is not None:
        return "credentials in the URL"
    if port == 0:
        return "port 0"
    return ""
