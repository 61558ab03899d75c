"""`rkcached port`: opens a TCP port of the service, and closes it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rkcached.cli import output
from rkcached.cli.key import described, lines_to_paste
from rkcached.errors import SourceError, UsageError
from rkcached.host import places, unit
from rkcached.host.addresses import Address, parse_address, parse_host
from rkcached.host.port_unit import BRIDGES, PortUnit, bridge_address, not_root
from rkcached.sources.access_keys import AccessKey, add_key, check_name, list_keys

if TYPE_CHECKING:
    from rkcached.cli import forms

_CONTAINER_URLS = {
    "docker": "http://host.docker.internal:{port}/v1",
    "podman": "http://host.containers.internal:{port}/v1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """The options of `port enable`."""

    address: str
    container: bool
    container_address: str | None
    without_key: bool
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Key:
    key: AccessKey
    text: str | None
    """None for one that was there before."""


def enable(wish: Wish, *, want_json: bool) -> int:
    """Open the port, create a key, and say what to paste."""
    address = parse_address(wish.address)
    if wish.without_key and not address.host.is_loopback:
        raise UsageError(
            f"{address} is reached from outside this machine, so it needs keys",
            hint="leave out --without-key, or open 127.0.0.1",
        )

    addresses = [address]
    bridge = _bridge(wish)
    if bridge is not None and not address.host.is_unspecified and bridge != address.host:
        addresses.append(Address(bridge, address.port))

    # What may be wrong with keys is found before a port is opened.
    state_dir = _state_dir()
    check_name(wish.name)
    list_keys(state_dir)

    changed = PortUnit().enable(addresses, open_loopback=wish.without_key)
    key = None
    if bridge is not None or not wish.without_key:
        key = _key(state_dir, wish.name)

    urls = [address.url]
    if bridge is not None:
        urls += [url.format(port=address.port) for url in _CONTAINER_URLS.values()]
    if want_json:
        _print_json(addresses, urls, key, changed=changed)
    else:
        _print(addresses, urls, key, changed=changed, without_key=wish.without_key)
    return os.EX_OK


def disable(*, want_json: bool) -> int:
    """Close the port, and say which keys remain."""
    state_dir = _state_dir()
    changed = PortUnit().disable()
    names = [key.name for key in list_keys(state_dir)]
    if want_json:
        closed: forms.ClosedPort = {"format": 1, "changed": changed, "keys": names}
        output.print_json(closed)
        return os.EX_OK

    click.echo("the port is closed" if changed else "no port was open")
    if names:
        click.echo(f"these keys remain: {', '.join(names)}; `rkcached key revoke NAME` removes one")
    return os.EX_OK


def _state_dir() -> Path:
    """That of the service. Errors: NotPermitted, SourceError."""
    if os.geteuid() != 0:
        raise not_root()

    installed = unit.installed()
    if installed is None:
        raise SourceError(
            "the service rkcached is not installed here",
            hint="without systemd, open a port with `rkcached run --listen ADDRESS`",
        )
    return installed.places.get("state_dir", places.SYSTEM_STATE)


def _bridge(wish: Wish) -> IPv4Address | IPv6Address | None:
    """The address by which containers reach this machine. Errors: SettingsError, SourceError."""
    if wish.container_address is not None:
        return parse_host(wish.container_address)
    if not wish.container:
        return None

    found = bridge_address()
    if found is None:
        raise SourceError(
            f"there is no network of containers here: none of {', '.join(BRIDGES)} has an address",
            hint="start Docker or Podman first, or name the address by which containers reach this "
            "machine: --container-address ADDRESS",
        )
    return found[1]


def _key(state_dir: Path, name: str) -> _Key:
    for key in list_keys(state_dir):
        if key.name == name:
            return _Key(key=key, text=None)
    key, text = add_key(state_dir, name)
    return _Key(key=key, text=text)


def _print_json(
    addresses: list[Address], urls: list[str], key: _Key | None, *, changed: bool
) -> None:
    shown: forms.PortKey | None = None
    if key is not None:
        shown = {**described(key.key), "key": key.text}

    opened: forms.OpenedPort = {
        "format": 1,
        "changed": changed,
        "addresses": [str(address) for address in addresses],
        "base_urls": urls,
        "key": shown,
    }
    output.print_json(opened)


def _print(
    addresses: list[Address],
    urls: list[str],
    key: _Key | None,
    *,
    changed: bool,
    without_key: bool,
) -> None:
    listed = ", ".join(map(str, addresses))
    click.echo(f"open: {listed}" if changed else f"open already: {listed}")
    for url in urls:
        click.echo(f"base URL: {url}")

    if without_key:
        click.echo("every program on this machine can use the models without a key")
    if key is not None:
        _print_key(key, urls[0])

    if not addresses[0].host.is_loopback:
        click.echo(
            "\nwarning: HTTP is not encrypted: anyone who can read the network's traffic can read "
            "the key",
            err=True,
        )


def _print_key(key: _Key, url: str) -> None:
    if key.text is None:
        click.echo(
            f"key: the one named {key.key.name}, created {key.key.created}; `rkcached key add "
            "NAME` creates another one"
        )
        return

    click.echo(f"\nthe key {key.key.name} is shown only now; paste this where a program runs:\n")
    for line in lines_to_paste(key.text, url):
        click.echo(f"  {line}")
