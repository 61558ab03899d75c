"""The command line: declares commands and options.

The work of a command is in the module of its name.

A command imports its module when it runs, so that help is instant. Exit codes follow sysexits.h;
`plan`, `status`, `wait`, `verify` and `bench` explain theirs in their help. An expected error is
printed as one sentence and the next thing to do, never as a traceback.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rkcached import __version__
from rkcached.cli import exit_codes
from rkcached.cli.options import FLAGS, PATH, as_json, places

if TYPE_CHECKING:
    from rkcached.host.settings import Settings


MAX_WAIT_S = 31_536_000
"""A year."""


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


@cli.command()
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


@cli.command()
@places("manifest", as_service=True)
@as_json
def check(settings: Settings, want_json: bool) -> int:
    """List every problem of the manifest and of its files, with file:line and what to do.

    It also lists warnings, and files that are skipped because their names cannot be a prompt's.
    With sudo it checks the service's own manifest as the service sees the files. The exit code is 0
    when there is no problem, 78 otherwise.
    """
    from rkcached.cli import check as command

    return command.run(settings, want_json=want_json)


@cli.command()
@places("manifest", "cache_dir", "state_dir", as_service=True)
@as_json
@click.option(
    "--exit-code", is_flag=True, help="Exit with 2 when there is something to do, 0 when not."
)
def plan(settings: Settings, want_json: bool, exit_code: bool) -> int:
    """Print what would be built, adopted, retired and removed, and why.

    It changes nothing, and needs no daemon.

    The exit code is 66 when there is no store yet; each prompt is then shown as missing.
    """
    from rkcached.cli import plan as command

    return command.run(settings, want_json=want_json, exit_code=exit_code)


@cli.command()
@click.argument("name", metavar="MODEL[/PROMPT]")
@places("manifest", "cache_dir", "state_dir", as_service=True)
@as_json
def explain(settings: Settings, name: str, want_json: bool) -> int:
    """Say whether a prompt cache is fresh, or name each component that changed, old -> new.

    For a model without a prompt, show its chat template and its special tokens, and the files that
    state them. The command needs no daemon.

    The exit code is 66 when there is no store yet, or no such prompt or model.
    """
    from rkcached.cli import explain as command

    return command.run(settings, name, want_json=want_json)


@cli.command()
@places("socket")
@as_json
@click.option(
    "--watch",
    "-w",
    is_flag=True,
    help="Stay, and show every change as it happens; q or Ctrl-C ends it.",
)
@click.option(
    "--exit-code",
    is_flag=True,
    help="Exit with 2 when a declared prompt is not fresh, or the files of a prompts_from folder "
    "are gone; with 0 when all are fresh.",
)
def status(*, settings: Settings, want_json: bool, watch: bool, exit_code: bool) -> int:
    """Show models and prompts of the running daemon: state, reason, size, cold and warm times.

    The times are those to the first token. Prompts that need attention come first; --json keeps the
    manifest's order. Figures are shown only for the text that is declared now. With --watch and no
    terminal it prints a line for each change; --json makes each line a JSON document.
    """
    from rkcached.cli.status import command

    return command.run(settings, want_json=want_json, watch=watch, exit_code=exit_code)


@cli.command()
@click.argument("prompts", metavar="[MODEL[/PROMPT]]...", nargs=-1)
@places("socket")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True, max=MAX_WAIT_S),
    default=300,
    show_default=True,
    metavar="S",
    help="Give up after S seconds.",
)
@as_json
def wait(*, settings: Settings, prompts: Sequence[str], timeout_s: float, want_json: bool) -> int:
    """Wait until prompt caches are fresh: those that are named, or all that are declared.

    The daemon looks at the files first, so a change made just before counts. If no daemon runs yet,
    or it is being restarted, the command waits for it. The exit code is 0 when all are fresh, 65
    when one needs more than waiting, or the files of a prompts_from folder are gone (it says why),
    75 when time is up (it says what is not fresh yet), 66 for a name that is not declared, 78 while
    the manifest is rejected.
    """
    from rkcached.cli import wait as command

    return command.run(settings, prompts, timeout_s=timeout_s, want_json=want_json)


@cli.command()
@FLAGS["admin_socket"]
def reload(admin_socket: Path | None) -> int:
    """Have the running daemon read its manifest again, and say what is wrong with it.

    `systemctl reload` does this.

    It returns when the manifest is in force. The exit code is 78 when the manifest is broken; the
    last good one then stays in force.
    """
    from rkcached.cli import reload as command

    return command.run(admin_socket)


@cli.command()
@click.argument("prompts", metavar="[MODEL[/PROMPT]]...", nargs=-1)
@places("socket", "admin_socket")
@click.option("--all", "everything", is_flag=True, help="Every prompt of every model.")
@as_json
def regenerate(
    settings: Settings, prompts: Sequence[str], everything: bool, want_json: bool
) -> int:
    """Build prompt caches again, even if they are fresh, and wait until they are published."""
    from rkcached.cli import regenerate as command

    return command.run(settings, prompts, everything=everything, want_json=want_json)


@cli.command()
@click.argument("prompts", metavar="[MODEL[/PROMPT]]...", nargs=-1)
@places("manifest", "cache_dir", "state_dir", as_service=True)
@click.option("--deep", is_flag=True, help="Also load each fresh prompt cache into its model.")
@click.option(
    "--prove",
    is_flag=True,
    help="Also ask each a question, with its prompt cache and without, and compare the answers.",
)
@as_json
def verify(
    settings: Settings, prompts: Sequence[str], deep: bool, prove: bool, want_json: bool
) -> int:
    """Check every artifact against its sidecar: size and SHA-256 of prompt cache and text.

    It changes nothing. --deep and --prove load a second copy of the model; --prove reads each
    prompt as a whole, which takes as long as to build it, and only where the runtime answers alike
    each time.

    The exit code is 0 when all are good, 65 otherwise, 66 when there is no store.
    """
    from rkcached.cli import verify as command

    return command.run(settings, prompts, deep=deep, prove=prove, want_json=want_json)


@cli.command()
@places("manifest", "cache_dir", "state_dir", "socket", "admin_socket")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option(
    "--strangers",
    is_flag=True,
    help="Also remove what is not the store's, except what the manifest names.",
)
@as_json
def gc(settings: Settings, *, dry_run: bool, strangers: bool, want_json: bool) -> int:
    """Remove prompt caches that no prompt uses now, and quarantined ones, and print their size.

    Files and folders that are not the store's are only listed. A running daemon owns the store, so
    the command asks it, over its socket for changes, to remove them. The exit code is 66 when there
    is no store.
    """
    from rkcached.cli import gc as command

    return command.run(settings, dry_run=dry_run, strangers=strangers, want_json=want_json)


@cli.command()
@click.argument("file", type=PATH)
@as_json
def inspect(file: Path, want_json: bool) -> int:
    """Say what a prompt cache file is, and whether the sidecar beside it matches.

    It prints engine, tokens and size. FILE may come from anywhere; it may also be the sidecar or
    the text of an artifact. The exit code is 0 when all is well, 65 for a file that is no prompt
    cache, is damaged or does not match its sidecar, 66 when it cannot be read.
    """
    from rkcached.cli import inspect_cache as command

    return command.run(file, want_json=want_json)


@cli.group()
def prompts() -> None:
    """Find prompts that are worth a cache."""


@prompts.command("import")
@click.argument("file", metavar="FILE.jsonl", type=PATH)
@places("manifest")
@click.option(
    "--to",
    "folder",
    type=PATH,
    default=Path("prompts"),
    show_default=True,
    metavar="FOLDER",
    help="Where to write the files.",
)
@click.option(
    "--at-least",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    metavar="N",
    help="Make no prompt of what fewer requests begin with.",
)
@as_json
def import_prompts(
    *, settings: Settings, file: Path, folder: Path, at_least: int, want_json: bool
) -> int:
    """Make prompts of recorded requests: of each system message, with its tools, that came often.

    FILE.jsonl has the body of a chat completion in each line, alone or as `body`, as in OpenAI's
    batches. Requests that begin alike become one prompt: a file for its text, and one for its
    tools. The command prints the lines for the manifest, and how many requests each prompt would
    have served. It overwrites no file, and needs no daemon. The exit code is 65 for a file without
    a request.
    """
    from rkcached.cli import prompts as command

    return command.run(settings, file, folder, at_least=at_least, want_json=want_json)


@cli.command()
@click.argument("suggestion", metavar="[ID]", required=False)
@places("socket", "admin_socket")
@click.option(
    "--write",
    "name",
    metavar="NAME",
    help="Store the text of the next request that begins so, as the prompt NAME.",
)
@as_json
def suggest(
    *, settings: Settings, suggestion: str | None, name: str | None, want_json: bool
) -> int:
    """List the beginnings that your requests repeat, and that would be worth a prompt.

    A beginning is listed when three requests had it, no prompt has it, and it was prefilled more
    than once. Who may open the socket for changes sees those of all users, and may use --write.

    The daemon keeps no text of requests, so --write takes it from the next one that begins so: its
    system message, or the whole lines of it within the beginning, becomes a stored prompt, which
    all users share. ID, the first word of a suggestion, may be left out if there is only one. The
    exit code is 66 if there is no such suggestion.
    """
    from rkcached.cli import suggest as command

    return command.run(settings, suggestion, name, want_json=want_json)


@cli.group()
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


@cli.group()
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


@cli.command()
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


@cli.command()
@click.argument("model", metavar="MODEL[/PROMPT]")
@click.argument("message", required=False)
@places("socket")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Length of the answer.")
@click.option("--cold", is_flag=True, help="Answer without any prompt cache.")
@as_json
def chat(
    *,
    settings: Settings,
    model: str,
    message: str | None,
    max_tokens: int | None,
    cold: bool,
    want_json: bool,
) -> int:
    """Ask a model; stream the answer, and show its time to first token and its cached tokens.

    Without MESSAGE it reads standard input: one question from a pipe, a conversation at a terminal.
    """
    from rkcached.cli import chat as command

    return command.run(
        settings, model, message, max_tokens=max_tokens, cold=cold, want_json=want_json
    )


@cli.command()
@click.argument("names", metavar="[MODEL[/PROMPT]]...", nargs=-1)
@places("manifest", "cache_dir", "state_dir", "socket", "admin_socket")
@click.option(
    "--runs",
    type=click.IntRange(min=1, max=10_000),
    default=5,
    show_default=True,
    help="Runs of each.",
)
@click.option(
    "--sweep",
    is_flag=True,
    help="Measure prompts of 128 to 4,096 tokens, which the daemon stores only for this.",
)
@click.option(
    "--direct/--no-direct",
    default=None,
    help="Measure the engine without the daemon, too. Default: yes, but on rkllm no.",
)
@click.option(
    "--from", "kept", type=PATH, metavar="FILE", help="Measure nothing: show and draw what -o kept."
)
@click.option(
    "--output", "-o", type=PATH, metavar="FILE", help="Keep the JSON, for `rkcached compare`."
)
@click.option(
    "--plot",
    "plot_file",
    type=PATH,
    metavar="FILE",
    help="Draw it: FILE.svg or FILE.png (needs matplotlib).",
)
@as_json
def bench(
    *,
    settings: Settings,
    names: Sequence[str],
    runs: int,
    sweep: bool,
    direct: bool | None,
    kept: Path | None,
    output: Path | None,
    plot_file: Path | None,
    want_json: bool,
) -> int:
    """Measure what the prompt caches gain on the running daemon: time to first token.

    It measures each prompt cold, from file and in memory. It shows how much of the time is queue,
    load, prefill and first decode, and what the daemon adds to the engine alone; for that it loads
    the model a second time. On rkllm only --direct does this, and the daemon unloads the model
    meanwhile, as an NPU should not hold it twice. It warns where the figures are not to be trusted,
    and says why a cache does not help. Ctrl-C ends it and keeps the prompts that were measured
    until then. The exit code is 1 if some could not be measured at all.
    """
    from rkcached.cli.bench import command, runner

    files = command.Files(kept=kept, output=output, plot=plot_file)
    options = runner.Options(runs=runs, sweep=sweep, direct=direct)
    return command.bench(settings, names, options, files, want_json=want_json)


@cli.command()
@click.argument("before", metavar="A.json", type=PATH)
@click.argument("after", metavar="B.json", type=PATH)
@as_json
def compare(before: Path, after: Path, want_json: bool) -> int:
    """Compare two results of `rkcached bench`, as before and after an upgrade, prompt by prompt.

    First it prints what differs in machine, versions, models and parameters; then medians, their
    ratio, and whether it is beyond the noise of the runs. The exit code is 65 for a file that is no
    result.
    """
    from rkcached.cli.bench import command

    return command.compare(before, after, want_json=want_json)


@cli.command()
def schema() -> int:
    """Print the JSON schema of the manifest, for editors that complete and check YAML."""
    from rkcached.sources.manifest import json_schema

    click.echo(json.dumps(json_schema(), indent=2))  # our own text: nothing in it to escape
    return os.EX_OK


@cli.command()
@click.option(
    "--dir",
    "directory",
    type=PATH,
    default=Path("demo"),
    show_default=True,
    help="The demo's workspace.",
)
@click.option(
    "--model",
    type=PATH,
    metavar="FILE",
    help="A GGUF model with a ChatML template; default: SmolLM2-135M.",
)
@click.option(
    "--once", is_flag=True, help="End after the table; exit code 0 only if every cache was hit."
)
def demo(directory: Path, model: Path | None, once: bool) -> int:
    """Show what caches gain: start the daemon with a small model; compare cold and warm answers."""
    from rkcached.cli.demo import runner

    return runner.run_demo(directory, model, once=once)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program."""
    exit_codes.run(cli, arguments)
