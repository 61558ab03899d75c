"""Declares the commands about the daemon: running it, its board, its keys and ports."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rkcached.cli import completion
from rkcached.cli.options import FLAGS, Whole, as_json, places

if TYPE_CHECKING:
    from rkcached.host.settings import Settings


@click.command()
@places("manifest", "cache_dir", "state_dir", "socket", "admin_socket", listens=True)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="The least severe lines to log; default: info. [RKCACHED_LOG_LEVEL]",
)
@click.option(
    "--listen",
    multiple=True,
    metavar="HOST:PORT",
    help="Also listen on a TCP port, such as 127.0.0.1:8080 or [::1]:8080, where each request "
    "needs a key; may be given several times. [RKCACHED_LISTEN, separated by spaces]",
)
@click.option(
    "--open-loopback",
    is_flag=True,
    help="Let every program on this machine send requests over the loopback without a key. "
    "[RKCACHED_OPEN_LOOPBACK]",
)
def run(
    *, settings: Settings, log_level: str | None, listen: Sequence[str], open_loopback: bool
) -> int:
    """Run the daemon in the foreground.

    It ends on SIGTERM or Ctrl-C, and looks for changes at once on SIGHUP. Under systemd it reports
    its state to it.
    """
    from rkcached.host.systemd import asking_for_time

    with asking_for_time():
        from rkcached import daemon

    given = {"log_level": log_level, "listen": " ".join(listen), "open_loopback": open_loopback}
    daemon.run(settings.model_copy(update={name: value for name, value in given.items() if value}))
    return os.EX_OK


@click.command()
@FLAGS["admin_socket"]
@as_json
def reload(admin_socket: Path | None, want_json: bool) -> int:
    """Have the running daemon read its manifest again, and say what is wrong with it.

    `systemctl reload` does this.

    It returns when the manifest is in force. The exit code is 78 when the manifest is broken; the
    last good one then stays in force.
    """
    from rkcached.cli import reload as command

    return command.run(admin_socket, want_json=want_json)


@click.command()
@places("manifest", "cache_dir")
@as_json
def doctor(settings: Settings, want_json: bool) -> int:
    """Check whether this board is ready.

    It looks at the NPU, the runtime library, its driver, the clocks, and at what the manifest needs
    of files, memory and disk.

    It works without a manifest, too. The exit code is 1 when something failed, 0 otherwise; a
    warning is not a failure.
    """
    from rkcached.cli import doctor as command

    return command.run(settings, want_json=want_json)


@click.command()
@click.argument("name", metavar="[MODEL[/PROMPT]]", required=False, shell_complete=completion.both)
@places("socket")
@click.option("--follow", "-f", is_flag=True, help="Stay, and show new lines as they come.")
@click.option(
    "--lines",
    "-n",
    type=Whole(min=0, max=1_000_000),
    default=50,
    show_default=True,
    metavar="N",
    help="Show the last N lines first.",
)
def logs(*, settings: Settings, name: str | None, follow: bool, lines: int) -> int:
    """Show the service's log lines, of everything or of one model or prompt.

    They come from systemd's journal, whose fields journalctl(1) searches, too. The exit code is 66
    where the service is not installed.
    """
    from rkcached.cli import logs as command

    return command.run(settings, name, follow=follow, lines=lines)


@click.group()
def key() -> None:
    """Manage the keys by which programs use a TCP port."""


@key.command("add")
@click.argument("name", metavar="NAME")
@places("manifest", "cache_dir", "state_dir")
@click.option("--admin", is_flag=True, help="Let it also make changes, as on the admin socket.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="MODEL",
    help="Let it use and see only this model; may be given several times.",
)
@as_json
def key_add(
    *, settings: Settings, name: str, admin: bool, models: Sequence[str], want_json: bool
) -> int:
    """Create a key, and print it.

    It is shown only once, because only its SHA-256 is kept. NAME appears in the log and in the
    metrics. The daemon accepts the key at once. Other keys and users cannot see what this key asks.
    Every key gets the same share of the engine's time as a user.
    """
    from rkcached.cli import key as command

    return command.add(settings, name, admin=admin, models=models, want_json=want_json)


@key.command("list")
@places("manifest", "cache_dir", "state_dir")
@as_json
def key_list(settings: Settings, want_json: bool) -> int:
    """List the keys: their names, what they may do, and when they were created."""
    from rkcached.cli import key as command

    return command.show_all(settings, want_json=want_json)


@key.command("revoke")
@click.argument("name", metavar="NAME")
@places("manifest", "cache_dir", "state_dir")
@as_json
def key_revoke(settings: Settings, name: str, want_json: bool) -> int:
    """Remove a key. The daemon rejects it from the next request on.

    An answer that has begun is not stopped. The exit code is 66 if there is no such key.
    """
    from rkcached.cli import key as command

    return command.revoke(settings, name, want_json=want_json)


@click.group()
def port() -> None:
    """Open and close a TCP port of the service."""


@port.command("enable")
@click.argument("address", metavar="ADDRESS")
@click.option(
    "--container", is_flag=True, help="Also accept requests from Docker and Podman containers."
)
@click.option(
    "--container-address",
    metavar="IP",
    help="The address by which containers reach this machine, where it is not that of docker0, "
    "podman0 or cni-podman0; it implies --container.",
)
@click.option(
    "--without-key",
    is_flag=True,
    help="Let every program on this machine send requests without a key. Only for a loopback "
    "address.",
)
@click.option("--name", default="default", show_default=True, help="The name of the key to create.")
@as_json
def port_enable(
    *,
    address: str,
    container: bool,
    container_address: str | None,
    without_key: bool,
    name: str,
    want_json: bool,
) -> int:
    """Have systemd open a TCP port for the service, and print its base URL and a key for it.

    ADDRESS is HOST:PORT, such as 127.0.0.1:11434. The command writes a drop-in for rkcached.socket,
    and restarts the socket and a running service. The port replaces one that this command opened
    before. If a key with the name in --name exists already, it is kept and not shown again. Only
    root may use this command.
    """
    from rkcached.cli import port as command

    wish = command.Wish(
        address=address,
        container=container,
        container_address=container_address,
        without_key=without_key,
        name=name,
    )
    return command.enable(wish, want_json=want_json)


@port.command("disable")
@as_json
def port_disable(want_json: bool) -> int:
    """Close the port that `rkcached port enable` opened, and say which keys remain.

    Only root may use this command.
    """
    from rkcached.cli import port as command

    return command.disable(want_json=want_json)


COMMANDS = (run, reload, logs, doctor, key, port)
