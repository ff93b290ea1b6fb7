# SPDX-License-Identifier: Apache-2.0
"""`eigenprune card`."""

from pathlib import Path
from typing import Annotated

import typer


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a pruned model.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The owner/name that it will have on the Hub.")],
    results: Annotated[
        list[Path] | None,
        typer.Option(help="What `eigenprune eval --json` wrote, of this folder and of the dense model; repeatable."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Id of the base model on the Hub, if the folder does not know it.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--branch", help="The branch that it goes to.")] = None,
    stdout: Annotated[bool, typer.Option("--stdout", help="Print it, and write nothing.")] = False,
) -> None:
    """Write the model card, README.md, of a pruned model; `push` writes it by itself if there is none.

    Example: `eigenprune card ./small me/small --results dense.json --results small.json`
    """
    from eigenprune.hub import build_card, write_card

    if stdout:
        typer.echo(build_card(folder, repo, results=results or (), base_model=base_model, revision=revision), nl=False)
    else:
        path = write_card(folder, repo, results=results or (), base_model=base_model, revision=revision)
        typer.echo(f"wrote {path}", err=True)
