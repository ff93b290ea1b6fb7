# SPDX-License-Identifier: Apache-2.0
"""`eigenprune card`."""

from pathlib import Path
from typing import Annotated

import typer

from eigenprune.cli.output import show
from eigenprune.errors import HubError


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a pruned model.")],
    repo: Annotated[
        str | None, typer.Argument(metavar="REPO", help="The owner/name that it will have on the Hub.")
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="What `eigenprune eval --json` wrote, of this folder and of the dense model; repeatable."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Id of the base model on the Hub, if the folder does not know it.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--branch", help="The branch that it goes to.")] = None,
    stdout: Annotated[bool, typer.Option("--stdout", help="Print it, and write nothing.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Prune the base again and compare all tensors; exit code 1 if one differs.")
    ] = False,
    base: Annotated[str | None, typer.Option(help="With --check: folder or id of the dense base model.")] = None,
    texts: Annotated[list[Path] | None, typer.Option(help="With --check: its calibration files, in order.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --check: one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option(help="With --check: no progress, no words.")] = False,
) -> None:
    """Write the model card, README.md, of a pruned model; `push` writes it by itself if there is none.

    Examples:

    - `eigenprune card ./small me/small --results dense.json --results small.json`

    - `eigenprune card ./small --check --base ./model --texts my_domain.jsonl`
    """
    if check:
        _check(folder, base, texts or [], as_json=as_json, quiet=quiet)
        return
    from eigenprune.hub import build_card, write_card

    if repo is None:
        raise HubError("say the owner/name that the model will have: its card tells how to load it")
    if stdout:
        typer.echo(build_card(folder, repo, results=results or (), base_model=base_model, revision=revision), nl=False)
    else:
        path = write_card(folder, repo, results=results or (), base_model=base_model, revision=revision)
        typer.echo(f"wrote {path}", err=True)


def _check(folder: Path, base: str | None, texts: list[Path], *, as_json: bool, quiet: bool) -> None:
    from eigenprune.cli.check import check_rebuild

    result = check_rebuild(folder, base, texts, quiet=quiet)
    if result["same"]:
        words = "rebuilt: every tensor is the same to the bit"
    else:
        changed = ", ".join(f"{name} {then} -> {now}" for name, (then, now) in result["changed_versions"].items())
        some = ", ".join(result["differing_tensors"][:3])
        words = f"{result['differing']} tensors differ, among them {some}; changed versions: {changed or 'none'}"
    show([words], result, as_json=as_json, quiet=quiet)
    if not result["same"]:
        raise typer.Exit(1)
