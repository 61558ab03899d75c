"""Declares the commands about prompts and their caches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rkcached.cli import completion
from rkcached.cli.options import PATH, Whole, as_json, places, waits_for_fresh

if TYPE_CHECKING:
    from rkcached.host.settings import Settings


@click.command()
@places("socket")
@as_json
@click.option(
    "--watch",
    "-w",
    is_flag=True,
    help="Stay, and show every change as it happens; q or Ctrl-C ends it.",
)
@click.option(
    "--verbose",
    "-v",
    is_flag=True,
    help="Show each warning whole, and say what the states mean.",
)
@click.option(
    "--exit-code",
    is_flag=True,
    help="Exit with 2 when a declared prompt is not fresh, or the files of a prompts_from folder "
    "are gone; with 0 when all are fresh.",
)
def status(
    *, settings: Settings, want_json: bool, watch: bool, verbose: bool, exit_code: bool
) -> int:
    """Show models and prompts of the running daemon: state, reason, size, cold and warm times.

    The times are those to the first token. Prompts that need attention come first; --json keeps the
    manifest's order. Figures are shown only for the text that is declared now. With --watch and no
    terminal it prints a line for each change; --json makes each line a JSON document.

    Keys of --watch: / searches, s sorts, Enter shows all about a prompt, ? lists all keys.
    """
    from rkcached.cli.status import command

    view = command.View(want_json=want_json, watch=watch, verbose=verbose)
    return command.run(settings, view, exit_code=exit_code)


@click.command()
@click.argument("prompts", metavar="[MODEL[/PROMPT]]...", nargs=-1, shell_complete=completion.both)
@places("socket")
@waits_for_fresh("Give up after S seconds.")
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


@click.command()
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


@click.command()
@click.argument("name", metavar="MODEL[/PROMPT]", shell_complete=completion.both)
@places("manifest", "cache_dir", "state_dir", as_service=True)
@click.option(
    "--diff",
    "want_diff",
    is_flag=True,
    help="Also show which lines of the text changed since the prompt cache was built.",
)
@as_json
def explain(*, settings: Settings, name: str, want_diff: bool, want_json: bool) -> int:
    """Say whether a prompt cache is fresh, or name each component that changed, old -> new.

    --diff compares the prompt's own text, or the rendered text, if template or tools changed, too;
    at most 400 lines are shown.

    For a model without a prompt, show its chat template and its special tokens, and the files that
    state them. The command needs no daemon.

    The exit code is 66 when there is no store yet, or no such prompt or model.
    """
    from rkcached.cli import explain as command

    return command.run(settings, name, want_diff=want_diff, want_json=want_json)


@click.command()
@click.argument("prompts", metavar="[MODEL[/PROMPT]]...", nargs=-1, shell_complete=completion.both)
@places("socket", "admin_socket")
@click.option("--all", "everything", is_flag=True, help="Every prompt of every model.")
@as_json
def regenerate(
    settings: Settings, prompts: Sequence[str], everything: bool, want_json: bool
) -> int:
    """Build prompt caches again, even if they are fresh, and wait until they are published."""
    from rkcached.cli import regenerate as command

    return command.run(settings, prompts, everything=everything, want_json=want_json)


@click.command()
@click.argument("prompts", metavar="[MODEL[/PROMPT]]...", nargs=-1, shell_complete=completion.both)
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


@click.command()
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


@click.command()
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


@click.command()
@click.argument("prompts", metavar="[MODEL[/PROMPT]]...", nargs=-1, shell_complete=completion.both)
@places("manifest", "cache_dir", "state_dir")
@click.option(
    "--output", "-o", "file", type=PATH, required=True, metavar="FILE", help="The bundle."
)
@click.option(
    "--sign",
    "key_file",
    type=PATH,
    metavar="KEYFILE",
    help="Sign it with this secret key, which `rkcached bundle-key` made.",
)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@as_json
def export(
    *,
    settings: Settings,
    prompts: Sequence[str],
    file: Path,
    key_file: Path | None,
    force: bool,
    want_json: bool,
) -> int:
    """Write prompt caches into a bundle, which other machines import without a prefill.

    Those that are named must be fresh; without a name, all that are fresh are exported. FILE can be
    read by its owner only, because a prompt can be read back from its cache. The command needs no
    daemon. The exit code is 65 when a prompt is not fresh, 66 for a name that is not declared, 73
    when FILE exists or cannot be written.
    """
    from rkcached.cli import bundles

    return bundles.export(
        settings, prompts, file, key_file=key_file, replace=force, want_json=want_json
    )


@click.command("import")
@click.argument("file", metavar="FILE", type=PATH)
@places("socket", "admin_socket")
@click.option(
    "--prove",
    is_flag=True,
    help="Compare each prompt cache with a prefill. The bundle then needs no trusted signature.",
)
@as_json
def import_bundle(settings: Settings, file: Path, prove: bool, want_json: bool) -> int:
    """Import the prompt caches of a bundle, FILE, that are declared and not fresh.

    Each is loaded and asked the question that proved it where it was built. It is published if the
    prompt's tokens are reused and, where the runtime can repeat an answer, the answer is the same.
    The bundle must be signed by a key in cache.trust of the manifest. No other builds run
    meanwhile. FILE may be - for standard input.

    What is not declared here, is quarantined or uncacheable, or is built from something else is
    skipped, with the reason. The
    exit code is 65 when a prompt cache did not prove itself, or the bundle is damaged or not
    trusted.
    """
    from rkcached.cli import bundles

    return bundles.import_(settings, file, prove=prove, want_json=want_json)


@click.command("bundle-key")
@click.argument("file", metavar="FILE", type=PATH)
@as_json
def bundle_key(file: Path, want_json: bool) -> int:
    """Make a key pair for bundles: the secret key FILE, and FILE.pub.

    It prints the line for cache.trust in the manifests of other machines. FILE can be read by its
    owner only, and has no password. The keys are those of minisign. No file is overwritten; the
    exit code is then 73.
    """
    from rkcached.cli import bundles

    return bundles.bundle_key(file, want_json=want_json)


@click.group()
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
    type=Whole(min=1),
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


@click.command()
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


COMMANDS = (
    status,
    wait,
    plan,
    explain,
    regenerate,
    verify,
    gc,
    inspect,
    export,
    import_bundle,
    bundle_key,
    prompts,
    suggest,
)
