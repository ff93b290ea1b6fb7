# SPDX-License-Identifier: Apache-2.0
"""`eigenprune push`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from eigenprune.cli.output import show
from eigenprune.errors import HubError


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a pruned model.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub; made if it is not there.")],
    results: Annotated[
        list[Path] | None,
        typer.Option(help="For the card: what `eigenprune eval --json` wrote; repeatable."),
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="For the card: id of the base model on the Hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make it private; refuse a public one.")] = False,
    branch: Annotated[str | None, typer.Option(help="Branch; made if it is not there.")] = None,
    pull_request: Annotated[bool, typer.Option("--pr", help="Open a pull request instead.")] = False,
    token_from_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Take the token from this variable; default: `hf auth login`, HF_TOKEN."),
    ] = None,
    message: Annotated[str | None, typer.Option(help="First line of the commit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress, no words.")] = False,
) -> None:
    """Publish a pruned model in one commit, with its card; only known files go, and none that holds a secret.

    Example: `eigenprune push ./small me/small --private --results dense.json --results small.json`
    """
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    from eigenprune.hub import push_to_hub

    token = None
    if token_from_env is not None:
        token = os.environ.get(token_from_env)
        if not token:
            raise HubError(
                f"--token-from-env wants the name of a variable that holds the token; {_shown(token_from_env)}"
            )
    if quiet:
        disable_progress_bars()
    commit = push_to_hub(
        folder,
        repo,
        results=results or (),
        base_model=base_model,
        private=private or None,
        revision=branch,
        create_pr=pull_request,
        token=token,
        commit_message=message,
    )
    show([f"pushed to {repo}, commit {commit}"], {"repo": repo, "commit": commit}, as_json=as_json, quiet=quiet)


def _shown(name: str) -> str:
    """The name, unless it looks like a token itself, given by mistake."""
    return f"{name} is not set" if name.isidentifier() and len(name) <= 24 else "that is none"
