"""Declares the commands that ask models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rkcached.cli import completion
from rkcached.cli.options import PATH, Whole, as_json, places

if TYPE_CHECKING:
    from rkcached.host.settings import Settings


@click.command()
@click.argument("model", metavar="[MODEL[/PROMPT]]", required=False, shell_complete=completion.both)
@click.argument("message", required=False)
@places("socket")
@click.option("--max-tokens", type=Whole(min=1), help="Length of the answer.")
@click.option("--cold", is_flag=True, help="Answer without any prompt cache.")
@as_json
def chat(
    *,
    settings: Settings,
    model: str | None,
    message: str | None,
    max_tokens: int | None,
    cold: bool,
    want_json: bool,
) -> int:
    """Ask a model; stream the answer, and show its time to first token and its cached tokens.

    Without MESSAGE it reads standard input: one question from a pipe, a conversation at a terminal.
    There, /help lists commands, Ctrl-C ends an answer, and without MODEL you choose from a list.
    Otherwise MODEL is required. The lines that are typed are kept in
    ~/.local/state/rkcached/chat_history.
    """
    from rkcached.cli.chat import command

    return command.run(
        settings, model, message, max_tokens=max_tokens, cold=cold, want_json=want_json
    )


@click.command()
@click.argument("model", metavar="MODEL", shell_complete=completion.models)
@places("socket", "admin_socket")
@as_json
def load(settings: Settings, model: str, want_json: bool) -> int:
    """Load a model now, so that the first request does not wait for it."""
    from rkcached.cli import loading as command

    return command.load(settings, model, want_json=want_json)


@click.command()
@click.argument("model", metavar="MODEL", shell_complete=completion.models)
@places("socket", "admin_socket")
@as_json
def unload(settings: Settings, model: str, want_json: bool) -> int:
    """Unload a model, when its answer is over. The next request, or a build, loads it again."""
    from rkcached.cli import loading as command

    return command.unload(settings, model, want_json=want_json)


@click.command()
@places("socket")
@as_json
def ps(settings: Settings, want_json: bool) -> int:
    """Show the models in memory: for how long, how much memory, and CPU time."""
    from rkcached.cli import loading as command

    return command.ps(settings, want_json=want_json)


@click.command()
@click.argument("names", metavar="[MODEL[/PROMPT]]...", nargs=-1, shell_complete=completion.both)
@places("manifest", "cache_dir", "state_dir", "socket", "admin_socket")
@click.option(
    "--runs",
    type=Whole(min=1, max=10_000),
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


@click.command()
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


@click.command()
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
    help="A model of your own, .gguf or .rkllm; default: SmolLM2-135M.",
)
@click.option(
    "--library",
    type=PATH,
    metavar="FILE",
    help="librkllmrt.so, for an .rkllm model; default: the one beside the model, else the one in "
    "/usr/lib.",
)
@click.option(
    "--once",
    is_flag=True,
    help="End after the table; exit code 0 only if every warm answer came from its cache.",
)
def demo(directory: Path, model: Path | None, library: Path | None, once: bool) -> int:
    """Show what caches gain: start the daemon with a model; compare cold and warm answers.

    It makes a folder with a manifest and two prompts, and changes nothing that is there already.
    The engine is chosen by the end of the model's name. The chat template comes from a GGUF model's
    own file; for an .rkllm model, from the tokenizer's files in a folder with its name, in a folder
    `tokenizer` or beside it, or else from the model's name.
    """
    from rkcached.cli.demo import runner

    return runner.run_demo(directory, model, library, once=once)


COMMANDS = (chat, load, unload, ps, bench, compare, demo)
