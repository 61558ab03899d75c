"""Addresses of TCP ports, as people write them: 127.0.0.1:8080, [::1]:8080, localhost:8080."""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from rkcached.errors import SettingsError

_EXAMPLES = "write an address of this machine and a port, as 127.0.0.1:8080 or [::1]:8080"


class Address(NamedTuple):
    host: IPv4Address | IPv6Address
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if self.host.version == 6 else str(self.host)
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The base URL for clients on this machine. One that is bound to all is asked by itself."""
        if not self.host.is_unspecified:
            return f"http://{self}/v1"
        return f"http://localhost:{self.port}/v1"


def parse_address(text: str) -> Address:
    """HOST:PORT. Errors: SettingsError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host:
        raise SettingsError(f"{text!r} is not an address with a port", hint=_EXAMPLES)

    if not port.isascii() or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise SettingsError(
            f"{text!r}: a port is a number from 1 to 65535, not {port!r}", hint=_EXAMPLES
        )
    return Address(_host(host, text), int(port))


def parse_host(text: str) -> IPv4Address | IPv6Address:
    """An address without a port. Errors: SettingsError."""
    return _host(f"[{text}]" if ":" in text else text, text)


def _host(host: str, text: str) -> IPv4Address | IPv6Address:
    if host.lower() == "localhost":
        return IPv4Address("127.0.0.1")

    in_brackets = host.startswith("[") and host.endswith("]")
    try:
        address = ipaddress.ip_address(host[1:-1] if in_brackets else host)
    except ValueError:
        raise SettingsError(
            f"{text!r}: {host!r} is not an IP address; of names, only localhost is accepted",
            hint=_EXAMPLES,
        ) from None

    if (address.version == 6) is not in_brackets:
        raise SettingsError(
            f"{text!r}: write IPv6 addresses in brackets, and no others", hint=_EXAMPLES
        )
    return address
