# SPDX-License-Identifier: Apache-2.0
"""The `eigenprune` command and its exit codes.

0 done; 1 an error that the message explains; 2 wrong usage; 130 interrupted.
"""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import typer

from eigenprune import __version__
from eigenprune.cli import delta
from eigenprune.cli.apply import apply
from eigenprune.cli.card import card
from eigenprune.cli.evaluate import evaluate
from eigenprune.cli.extract_lora import extract_lora
from eigenprune.cli.inspect import inspect
from eigenprune.cli.output import fail
from eigenprune.cli.prune import prune
from eigenprune.cli.push import push
from eigenprune.cli.task import task
from eigenprune.cli.view import view
from eigenprune.errors import EigenpruneError

app = typer.Typer(
    name="eigenprune",
    help="Make a Hugging Face model smaller by pruning singular components of its weight matrices.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with this package's errors and Ctrl-C turned into one line and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except EigenpruneError as error:
            fail(str(error))
        except KeyboardInterrupt:
            fail(
                "interrupted; statistics and training so far are kept, and the same command goes on from there",
                code=130,
            )

    return run


app.command("prune")(explained(prune))
app.command("eval")(explained(evaluate))
app.command("inspect")(explained(inspect))
app.command("extract-lora")(explained(extract_lora))
app.command("task")(explained(task))
app.command("apply")(explained(apply))
app.command("card")(explained(card))
app.command("push")(explained(push))
deltas = typer.Typer(
    help="Store fine-tuned models as the entries that differ from their base.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
deltas.command("make")(explained(delta.make))
deltas.command("apply")(explained(delta.apply))
deltas.command("inspect")(explained(delta.inspect))
app.add_typer(deltas, name="delta")
app.command("view")(explained(view))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"eigenprune {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Say the version."),
) -> None:
    """Make a Hugging Face model smaller by pruning singular components of its weight matrices."""


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.captureWarnings(True)
    warnings.simplefilter("default", UserWarning)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    app(args=with_bare_recover(sys.argv[1:]))


def with_bare_recover(arguments: Sequence[str]) -> list[str]:
    """`arguments`, with a method after every `--recover` that has none: Typer knows no optional values."""
    found: list[str] = []
    for argument, after in zip(arguments, [*arguments[1:], "-"], strict=False):
        found += [argument, "distil"] if argument == "--recover" and after.startswith("-") else [argument]
    return found
