"""The command line.

`commands` declares each command with its options; its work is in the module of its name. A command
imports its module when it runs, so that help is instant. Exit codes follow sysexits.h;
`plan`, `status`, `wait`, `verify` and `bench` explain theirs in their help. An expected error is
printed as one sentence and the next thing to do, never as a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from rkcached import __version__
from rkcached.cli import exit_codes
from rkcached.cli.commands import caches, manifest, models, service


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "-V", "--version", message="%(prog)s %(version)s")
def cli() -> None:
    """Keep the prompt caches of language models fresh, and serve them over a Unix socket.

    \b
    Examples:
      rkcached demo                            see it work in a minute, with a small model
      rkcached check -m manifest.yaml          is the manifest right?
      rkcached plan                            what would be built or removed, and why
      rkcached run                             the daemon, in the foreground
      rkcached status                          what is fresh, what is being built
      rkcached wait --timeout 60               return when everything is fresh
      rkcached bench --plot gain.svg           what the caches gain on this machine
      rkcached chat qwen3-0.6b/coding_rules    talk to a model with a cached prompt
    """  # noqa: D301 - click knows a paragraph not to wrap by the backspace character


for command in (*manifest.COMMANDS, *caches.COMMANDS, *models.COMMANDS, *service.COMMANDS):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program."""
    exit_codes.run(cli, arguments)
