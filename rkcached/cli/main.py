"""The command line.

Thin: parses, calls, prints. Every command imports only what it needs, so that help is instant.

Exit codes follow sysexits.h; `plan`, `status`, `wait`, `verify` and `bench` say theirs in their
help. An expected error is printed as one sentence and the next thing to do, never as a traceback.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from rkcached import __version__
from rkcached.cli import exit_codes
from rkcached.cli.options import FLAGS, PATH, as_json, places
from rkcached.errors import SourceError, StoreError, StoreLocked, UsageError, printable

if TYPE_CHECKING:
    from rich.console import Console

    from rkcached.host.settings import Settings
    from rkcached.reconcile.observer import Look


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
    help="[RKCACHED_LOG_LEVEL]",
)
def run(settings: Settings, log_level: str | None) -> None:
    """Run the daemon in the foreground.

    It ends on SIGTERM or Ctrl-C, and looks again at once on SIGHUP. Under systemd it reports to it.
    """
    from rkcached import daemon

    daemon.run(settings.model_copy(update={"log_level": log_level}) if log_level else settings)


@cli.command()
@places("manifest", as_service=True)
@as_json
def check(settings: Settings, want_json: bool) -> None:
    """Report every problem of the manifest and of the files it names, each with file:line and what to do.

    Warnings, and files that are skipped because their names cannot be a prompt's, are listed too. With sudo it checks
    the service's own manifest as the service sees the files. Exit code 0 when there is no problem, 78 otherwise.
    """
    from rkcached.cli.check import check_manifest

    found = check_manifest(settings)
    notes = list(found.warnings)
    if found.skipped_files:
        from rkcached.cli.status.show import skipped_files_line

        notes.append(skipped_files_line(found.skipped_files))

    if want_json:
        _print_json(
            [
                {"file": p.file, "line": p.line, "message": p.message, "hint": p.hint}
                for p in found.problems
            ]
        )
    else:
        for problem in found.problems:
            click.echo(printable(str(problem)), err=True)
    for note in notes:
        click.echo(printable(note), err=True)
    if not want_json:
        click.echo(f"{settings.manifest}: {found.summary}", err=bool(found.problems))
    sys.exit(os.EX_CONFIG if found.problems else os.EX_OK)


@cli.command()
@places("manifest", "cache_dir", "state_dir", as_service=True)
@as_json
@click.option(
    "--exit-code", is_flag=True, help="Exit with 2 when there is something to do, 0 when not."
)
def plan(settings: Settings, want_json: bool, exit_code: bool) -> None:
    """Print what would be built, adopted, retired and removed, and why.

    Changes nothing; needs no daemon.

    Exit code 66 when there is no store yet; each prompt is then shown as missing.
    """
    from rkcached.cli.status import show
    from rkcached.plan.planner import Blocked

    look = _service_look(settings)
    actions = look.actions
    if want_json:
        _print_json([show.action_data(action) for action in actions])
    else:
        show.print_plan(_console(), actions, look.assessments, settings.cache_dir)
        if look.sources.skipped_files:
            click.echo(printable(show.skipped_files_line(look.sources.skipped_files)))
    _need_store(settings)
    if exit_code and any(not isinstance(action, Blocked) for action in actions):
        sys.exit(2)


@cli.command()
@click.argument("prompt", metavar="MODEL/PROMPT")
@places("manifest", "cache_dir", "state_dir", as_service=True)
@as_json
def explain(settings: Settings, prompt: str, want_json: bool) -> None:
    """Say whether a prompt cache is fresh, or name each component that changed, old -> new.

    Needs no daemon.

    Exit code 66 when there is no store yet, or no such prompt.
    """
    from rkcached.cli.explain import explain_data, print_explanation

    data = {
        **explain_data(_service_look(settings, ask=True), _key(prompt)),
        "store": str(settings.cache_dir),
    }
    if want_json:
        _print_json(data)
    else:
        print_explanation(_console(), data)
    _need_store(settings)


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
    help="Exit with 2 when a declared prompt is not fresh, 0 when all are.",
)
def status(*, settings: Settings, want_json: bool, watch: bool, exit_code: bool) -> None:
    """Show the running daemon's models and prompts: state, reason, size, time to first token cold and warm.

    Prompts that need attention come first; --json keeps the manifest's order. Figures are shown only for the text
    that is declared now. With --watch and no terminal it prints a line for each change, with --json a document in a
    line.
    """
    from rkcached.cli.client import Client
    from rkcached.cli.status import show

    if watch and exit_code:
        raise UsageError(
            "--watch does not end, so it gives no exit code",
            hint="`rkcached wait` ends when all is fresh",
        )
    if watch:
        from rkcached.cli.status import live

        live.watch(settings.socket, _console(), want_json=want_json)
        return
    with Client(settings.socket) as client:
        answer = client.status()
    if want_json:
        _print_json(answer)
    else:
        show.print_status(_console(), answer)
    if exit_code and not show.all_fresh(answer):
        sys.exit(2)


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
def wait(*, settings: Settings, prompts: Sequence[str], timeout_s: float, want_json: bool) -> None:
    """Wait until prompt caches are fresh: those that are named, or all that are declared.

    The daemon looks at the files first, so a change made just before counts. A daemon that is not
    there yet, or is started again, is waited for. Exit code 0 when all are fresh, 65 when one needs
    more than waiting (it says why), 75 when time is up (it says what it still waits for), 66 for a
    name that is not declared, 78 while the manifest is rejected.
    """
    if math.isnan(timeout_s):
        raise UsageError(
            "--timeout: nan is not a number of seconds", hint="name some, as in --timeout 60"
        )

    from rkcached.cli import wait as command

    with _progress() as tell:
        result = command.wait(settings.socket, prompts, timeout_s=timeout_s, tell=tell)
    if want_json:
        _print_json(result.data())
    elif not result.errors:
        click.echo(f"{len(result.prompts)} fresh, after {result.waited_s:.1f} s")
    for error in result.errors:
        exit_codes.complain(error)
    sys.exit(result.exit_code)


@cli.command()
@FLAGS["admin_socket"]
def reload(admin_socket: Path | None) -> None:
    """Have the running daemon read its manifest again, and say what is wrong with it.

    `systemctl reload` does this.

    Returns when the manifest is in force. Exit code 78 when it is broken; the last good one then
    stays in force.
    """
    from rkcached.cli import reload as command
    from rkcached.host import places

    click.echo(command.reload(admin_socket or places.admin_socket_to_ask()))


@cli.command()
@click.argument("prompts", metavar="[MODEL[/PROMPT]]...", nargs=-1)
@places("socket", "admin_socket")
@click.option("--all", "everything", is_flag=True, help="Every prompt of every model.")
@as_json
def regenerate(
    settings: Settings, prompts: Sequence[str], everything: bool, want_json: bool
) -> None:
    """Build prompt caches anew, even if they are fresh. Waits until they are published."""
    from rkcached.cli import regenerate as command

    if not prompts and not everything:
        raise UsageError("nothing to regenerate", hint="name MODEL or MODEL/PROMPT, or say --all")
    declared = command.declared_prompts(settings.socket)
    wanted = declared if everything else _matching(prompts, declared)
    answers, refusals = command.regenerate(
        settings.socket, settings.admin_socket, wanted, _console(quiet=want_json)
    )
    if want_json:
        _print_json(answers)
    for refusal in refusals:
        exit_codes.complain(refusal)
    if refusals:
        sys.exit(exit_codes.exit_code(refusals[0]))


@cli.command()
@click.argument("prompts", metavar="[MODEL[/PROMPT]]...", nargs=-1)
@places("manifest", "cache_dir", "state_dir", as_service=True)
@click.option("--deep", is_flag=True, help="Also load each fresh prompt cache into its model.")
@as_json
def verify(settings: Settings, prompts: Sequence[str], deep: bool, want_json: bool) -> None:
    """Check every artifact against its sidecar: size and SHA-256 of prompt cache and text.

    Changes nothing.

    Exit code 0 when all are good, 65 otherwise, 66 when there is no store.
    """
    from rkcached.cli.verify import verify_artifacts
    from rkcached.host import logs

    logs.configure("error")
    _need_store(settings)
    look = _service_look(settings)
    stored = [*look.inventory.artifacts, *look.inventory.unreadable]
    chosen = _matching(prompts, stored) if prompts else stored
    results = []
    for result in verify_artifacts(
        settings.cache_dir, look, [_key("/".join(key)) for key in chosen], deep=deep
    ):
        results.append(result)
        if not want_json:
            mark = "ok" if result["ok"] else "FAILED"
            click.echo(
                printable(f"{mark:<7} {result['model']}/{result['prompt']}  {result['detail']}")
            )
    if want_json:
        _print_json(results)
    else:
        good = sum(result["ok"] for result in results)
        what = f"{good} of {len(results)} good" if results else "no artifacts"
        click.echo(printable(f"{what} in the store {settings.cache_dir}"))
    sys.exit(os.EX_OK if all(result["ok"] for result in results) else os.EX_DATAERR)


@cli.command("gc")
@places("manifest", "cache_dir", "state_dir", "socket", "admin_socket")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option(
    "--strangers",
    is_flag=True,
    help="Also remove what is not the store's, except what the manifest names.",
)
@as_json
def gc_(settings: Settings, *, dry_run: bool, strangers: bool, want_json: bool) -> None:
    """Remove artifacts that no prompt uses now, and quarantined ones, and say how much it was.

    Files and folders that are not the store's are only listed. A running daemon owns the store, so
    it does this when asked over its socket for changes. Exit code 66 when there is no store.
    """
    from rkcached.api.words import size
    from rkcached.cli.client import Client
    from rkcached.reconcile import collection
    from rkcached.store import garbage
    from rkcached.store.store import Store

    _need_store(settings)
    store = Store(settings.cache_dir)
    try:
        if not dry_run:
            store.open()
        look = _look(settings)
        named = collection.named_in(look, *_inputs(settings, look))
        rubbish = collection.find(store, look, named, strangers=strangers)
        if not dry_run:
            rubbish = garbage.remove_rubbish(store, rubbish, named)
        found = garbage.as_data(rubbish)
    except StoreLocked:
        with Client(settings.admin_socket) as client:
            if Path(client.status()["cache"]["directory"]) != settings.cache_dir:
                raise
            found = client.collect(strangers=strangers)
    finally:
        store.close()

    total = sum(item["size_bytes"] for item in found["items"])
    if want_json:
        data = {"store": str(settings.cache_dir), "removed": not dry_run, "size_bytes": total}
        _print_json({**data, "items": found["items"], "strangers": found["strangers"]})
        return
    for item in (*found["items"], *found["strangers"]):
        click.echo(printable(f"{size(item['size_bytes']):>9}  {item['path']}  {item['reason']}"))
    left = sum(item["size_bytes"] for item in found["strangers"])
    stay = (
        f"; {len(found['strangers'])} that are not the store's stay, {size(left)}"
        if found["strangers"]
        else ""
    )
    done = "would remove" if dry_run else "removed"
    what = "1 item" if len(found["items"]) == 1 else f"{len(found['items'])} items"
    click.echo(printable(f"{done} {what}, {size(total)}{stay}; store {settings.cache_dir}"))


@cli.command("inspect")
@click.argument("file", type=PATH)
@as_json
def inspect_(file: Path, want_json: bool) -> None:
    """Say what a prompt cache file is: engine, tokens, size, and whether the sidecar beside it matches.

    FILE may come from anywhere; it may also be the sidecar or the text of an artifact. Exit code 0 when all is well,
    65 for a file that is no prompt cache, is damaged or does not match its sidecar, 66 when it cannot be read.
    """
    from rkcached.cli.inspect_cache import inspect, print_inspection

    data = inspect(file)
    if want_json:
        _print_json(data)
    else:
        print_inspection(_console(), data)
    sys.exit(os.EX_DATAERR if data["problem"] else os.EX_OK)


@cli.command()
@places("manifest", "cache_dir")
@as_json
def doctor(settings: Settings, want_json: bool) -> None:
    """Check whether this board is ready.

    Looks at the NPU, the runtime library, its driver, the clocks, and at what the manifest needs of
    files, memory and disk.

    Works without a manifest, too. Exit code 1 when something failed, 0 otherwise; a warning is not
    a failure.
    """
    from rkcached.cli import doctor as command

    # Where none was named, one that is not there is no mistake.
    named = "manifest" in settings.model_fields_set or os.path.lexists(settings.manifest)
    report = command.examine(settings.manifest if named else None, settings.cache_dir)
    if named:
        report = command.as_service(report, settings)
    if want_json:
        _print_json(command.report_data(report))
    else:
        command.print_report(_console(), report)
    sys.exit(1 if report.failed else os.EX_OK)


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
) -> None:
    """Ask a model, with the answer streamed, its time to first token and its cached tokens.

    Without MESSAGE it reads standard input: one question from a pipe, a conversation at a terminal.
    """
    from rkcached.cli.chat import Conversation

    options: dict[str, Any] = {"model": model}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if cold:
        options["cache"] = False
    conversation = Conversation(settings.socket, options, want_json=want_json)
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
        if not message:
            raise UsageError(
                "there is no question", hint="give it as an argument or on standard input"
            )
    if message is not None:
        conversation.ask(message)
    else:
        conversation.talk()


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
    help="Measure prompts of 128 to 4,096 tokens, stored for as long as it takes.",
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
) -> None:
    """Measure what the prompt caches gain, on the running daemon: time to first token cold, from file, in memory.

    Shows how much of it is queue, load, prefill and first decode, and what the daemon adds to the engine alone; for
    that the model is loaded a second time. On rkllm only --direct does this, and the daemon unloads the model
    meanwhile, as an NPU should not hold it twice. Says so where the figures are not to be trusted, and why a cache does
    not help. Ctrl-C ends it with the prompts that were measured until then. Exits with 1 where some could not be
    measured at all.
    """
    from rich.console import Console

    from rkcached.cli.bench import plots, results, runner, table

    if kept is not None:
        _refuse_beside_from()
    if plot_file is not None:
        plots.check(plot_file)
    for file in filter(None, (output, plot_file)):
        results.check_writable(file)
    if kept is not None:
        found = results.read(kept)
    else:
        options = runner.Options(runs=runs, sweep=sweep, direct=direct)
        try:
            found = runner.run(settings, names, options, Console(stderr=True, highlight=False))
        except KeyboardInterrupt:
            left = "; the sweep's prompts were removed" if sweep else ""
            with contextlib.suppress(OSError):  # the terminal may be closed
                click.echo(f"interrupted: nothing of it was kept{left}", err=True)
            raise
    with contextlib.ExitStack() as keeping:  # each is tried, whatever becomes of the others
        if plot_file is not None:
            keeping.callback(plots.plot, found, plot_file)
        if output is not None:
            keeping.callback(results.write, found, output)
        if want_json:
            click.echo(results.to_json(found))
        else:
            table.print_results(_unwrapped(), found)
    if kept is None:
        runner.end(found)
        sys.exit(1 if found.refused else os.EX_OK)


def _refuse_beside_from() -> None:
    """Errors: UsageError for what asks to measure."""
    context = click.get_current_context()
    words = {
        "names": "a name",
        "runs": "--runs",
        "sweep": "--sweep",
        "direct": "--direct",
        "output": "--output",
    }
    for name, word in words.items():
        # A missing argument counts as given by default, too.
        if (
            context.get_parameter_source(name) is ParameterSource.COMMANDLINE
            and context.params[name] != ()
        ):
            raise UsageError(
                f"--from measures nothing, {word} does not go with it",
                hint="leave one of them out; --plot and --json go with --from",
            )


@cli.command()
@click.argument("before", metavar="A.json", type=PATH)
@click.argument("after", metavar="B.json", type=PATH)
@as_json
def compare(before: Path, after: Path, want_json: bool) -> None:
    """Compare two results of `rkcached bench`, as before and after an upgrade, prompt by prompt.

    First what differs of machine, versions, models and parameters; then medians, their ratio, and
    whether it is beyond the noise of the runs. Exit code 65 for a file that is no result.
    """
    from rkcached.cli.bench import compare as command
    from rkcached.cli.bench import results, table

    comparison = command.compare(results.read(before), results.read(after))
    if want_json:
        click.echo(results.to_json(comparison))
    else:
        table.print_comparison(_unwrapped(), comparison)


@cli.command()
def schema() -> None:
    """Print the JSON schema of the manifest, for editors that complete and check YAML."""
    from rkcached.sources.manifest import json_schema

    click.echo(json.dumps(json_schema(), indent=2))  # ours alone, so nothing to escape


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
def demo(directory: Path, model: Path | None, once: bool) -> None:
    """See it work: write a small workspace, start the daemon on it, and compare cold with warm answers."""
    from rkcached.cli.demo.runner import run_demo

    sys.exit(run_demo(directory, model, once=once))


def main(arguments: Sequence[str] | None = None) -> None:
    """The program."""
    exit_codes.run(cli, arguments)


def _look(settings: Settings) -> Look:
    from rkcached.reconcile.observer import Observer
    from rkcached.sources.manifest_file import read_manifest
    from rkcached.sources.stored_texts import StoredTexts
    from rkcached.store.store import Store

    look = Observer(Store(settings.cache_dir), StoredTexts(settings.state_dir)).look(
        read_manifest(settings.manifest)
    )
    if look.store_trouble is not None:
        _need_store(settings)
        raise look.store_trouble
    return look


def _inputs(settings: Settings, look: Look) -> tuple[list[Path], list[Path]]:
    """The files and folders that a look depends on."""
    from rkcached.sources.manifest_file import inputs
    from rkcached.sources.stored_texts import StoredTexts

    return inputs(look.manifest, settings.manifest, StoredTexts(settings.state_dir))


def _need_store(settings: Settings) -> None:
    """Errors: SourceError where there is none; StoreError where nobody can say."""
    from rkcached.store import marks

    try:
        why = marks.why_no_store(settings.cache_dir)
    except OSError as error:
        raise StoreError(
            f"the store {settings.cache_dir} cannot be read: {error.strerror}",
            hint="check the directory's permissions",
        ) from error
    if not why:
        return

    made = "if there is none yet, `rkcached run` makes it"
    hint = f"name the daemon's store with --cache-dir or RKCACHED_CACHE_DIR; {made}"
    beside = settings.manifest.parent / "cache"
    with contextlib.suppress(OSError):
        if beside != settings.cache_dir and not marks.why_no_store(beside):
            hint = (
                f"there is a store beside the manifest: use --cache-dir {shlex.quote(str(beside))}"
            )
    raise SourceError(f"there is no store at {settings.cache_dir}: {why}", hint=hint)


def _service_look(settings: Settings, *, ask: bool = False) -> Look:
    """With the daemon's word where it sees something else."""
    from rkcached.cli.service_view import view_of

    look = _look(settings)
    return view_of(settings, look.manifest, look.sources, ask=ask).over(look)


def _key(text: str) -> Any:
    from rkcached.sources.records import Key

    model, slash, prompt = text.partition("/")
    if not (model and slash and prompt):
        raise UsageError(
            f"{text!r} names no prompt", hint="write MODEL/PROMPT, for example qwen3-0.6b/system"
        )
    return Key(model, prompt)


def _matching(wanted: Sequence[str], known: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The known prompts that MODEL or MODEL/PROMPT name, in their order.

    Errors: SourceError for a name of none.
    """
    for text in wanted:
        if not any(text in (model, f"{model}/{prompt}") for model, prompt in known):
            names = ", ".join(f"{model}/{prompt}" for model, prompt in known) or "none"
            raise SourceError(f"there is no {text!r}", hint=f"known: {names}")
    return [key for key in known if key[0] in wanted or "/".join(key) in wanted]


def _console(*, quiet: bool = False, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(highlight=False, quiet=quiet, stderr=stderr)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on standard error that says what is waited for; none where that is no terminal."""
    from rich.text import Text

    console = _console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("") as line:
        yield lambda text: line.update(Text(printable(text)))


def _unwrapped() -> Console:
    """As wide as its lines where no terminal shows them, unless COLUMNS says how wide: a path stays whole."""
    console = _console()
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console.width = 100_000
    return console


def _print_json(data: Any) -> None:
    from rkcached.cli.status.show import json_text

    click.echo(json_text(data, indent=2))
