# SPDX-License-Identifier: Apache-2.0
"""`eigenprune apply`."""

from pathlib import Path
from typing import Annotated

import typer

from eigenprune.cli.output import show
from eigenprune.errors import CheckpointError


def apply(
    adapter: Annotated[Path, typer.Argument(help="File that `eigenprune task --adapter` wrote.")],
    model: Annotated[str, typer.Option(help="Folder or hub id of the base that it was made for.")],
    out: Annotated[Path, typer.Option(help="Folder to write; loads with plain `from_pretrained`.")],
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that is in the folder already.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")
    ] = False,
    quiet: Annotated[bool, typer.Option(help="No progress, no table.")] = False,
) -> None:
    """Apply a task's adapter to its base model, and save the result as an ordinary checkpoint.

    Example: `eigenprune apply mult.safetensors --model HuggingFaceTB/SmolLM2-135M-Instruct --out ./better`
    """
    from eigenprune.cli.loading import load_model, load_tokenizer
    from eigenprune.hub import apply_adapter_, read_adapter, save_model

    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} is there already: choose another folder, or pass --overwrite")
    found = read_adapter(adapter)  # before the model, which takes longer to load
    loaded = load_model(model, dtype, revision=revision, quiet=quiet)
    tokenizer = load_tokenizer(model, revision=revision)
    apply_adapter_(loaded, found)
    save_model(loaded, out, tokenizer=tokenizer, overwrite=overwrite)
    count, layers = found.removal.count, len(found.removal.masks)
    result = {"out": str(out), "removed": count, "layers": layers, "provenance": found.provenance}
    show([f"{count:,} components of {layers} layers removed; saved in {out}"], result, as_json=as_json, quiet=quiet)
