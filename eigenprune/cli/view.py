# SPDX-License-Identifier: Apache-2.0
"""`eigenprune view`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eigenprune.cli.output import show

if TYPE_CHECKING:
    from eigenprune.hub.delta_decode import DeltaFile
    from eigenprune.report.entries_page import KeptEntries


def view(
    delta: Annotated[str, typer.Argument(metavar="DIR", help="Folder or hub id of a delta.")],
    out: Annotated[Path, typer.Option(help="The page to write; with --png, a folder beside it gets the pictures.")],
    tensor: Annotated[
        list[str] | None, typer.Option(help="Show this tensor large; repeatable; default: one of the middle layer.")
    ] = None,
    png: Annotated[
        bool, typer.Option("--png", help="Also draw PNG pictures with axes (pip install 'eigenprune[plots]').")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a page that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    quiet: Annotated[bool, typer.Option(help="No words.")] = False,
) -> None:
    """Show where the stored entries of a delta lie: one HTML page, and pictures if asked for.

    Kept neighbours are counted beside what a random mask of the same density has.

    Examples:

    - `eigenprune view ./delta --out delta.html`

    - `eigenprune view ./delta --out delta.html --tensor model.layers.0.mlp.up_proj.weight --png`
    """
    from eigenprune.cli.loading import checkpoint_folder
    from eigenprune.errors import CheckpointError
    from eigenprune.hub.delta_folder import open_delta
    from eigenprune.report.entries_page import entries_page
    from eigenprune.report.entries_pictures import new_figure

    if out.exists() and not (overwrite and out.is_file()):
        raise CheckpointError(f"{out} is there already: choose another name, or pass --overwrite")
    if png:
        new_figure(1, 1)  # says at once that the drawing library is missing
    folder = checkpoint_folder(delta)
    with open_delta(folder) as opened:
        kept = stored_entries(opened)
        text = entries_page(kept, f"Entries of {Path(delta).name}", tensor or ())
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{out} cannot be written: {error}") from error
        written = [out, *(_draw(kept, out.with_suffix(""), tensor or ()) if png else ())]
    names = [str(path) for path in written]
    show([f"wrote {name}" for name in names], {"written": names}, as_json=as_json, quiet=quiet)


def stored_entries(delta: "DeltaFile") -> "KeptEntries":
    """The stored entries of a `DeltaFile` as the page wants them: those that were selected and differ from the base."""
    import torch
    from torch import Tensor

    from eigenprune.report.entries_page import KeptEntries

    manifest = delta.manifest

    def mask(name: str) -> Tensor:
        found = torch.zeros(manifest.tensors[name].entries, dtype=torch.bool)
        found[delta.stored_numbers(name)] = True
        return found.view(manifest.tensors[name].shape)

    def values(name: str) -> Tensor:
        found = torch.zeros(manifest.tensors[name].entries, dtype=delta.values(name).dtype)
        found[delta.stored_numbers(name)] = delta.values(name)
        return found.view(manifest.tensors[name].shape)

    share = manifest.stored / max(manifest.entries, 1)
    facts = {
        "base": manifest.base_model,
        "rule": f"{manifest.rule}, keep {manifest.keep:g} per {manifest.scope}",
        "stored": f"{manifest.stored:,} of {manifest.entries:,} entries ({share:.2%})",
        "shown as kept": "entries that were selected and differ from the base's",
    }
    return KeptEntries(list(manifest.tensors), mask, values, facts)


def _draw(kept: "KeptEntries", folder: Path, shown: "list[str] | tuple[str, ...]") -> list[Path]:
    from eigenprune.report.entries_page import typical
    from eigenprune.report.entries_pictures import draw_layers, draw_matrix, draw_neighbours
    from eigenprune.report.entries_view import NUMBER, same_in_every_layer

    partly = [name for name in kept.names if kept.mask(name).ndim > 1 and 0 < kept.mask(name).float().mean() < 1]
    names = list(shown) or typical(partly)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in names:
        stem = folder / re.sub(r"[^A-Za-z0-9._-]", "-", name)
        members = same_in_every_layer(kept.names, name)
        layers = [(".".join(NUMBER.findall(member)) or member, kept.mask(member)) for member in members]
        paths = [stem.with_name(f"{stem.name}.{kind}.png") for kind in ("values", "neighbours", "layers")]
        draw_matrix(paths[0], name, kept.values(name), kept.mask(name))
        draw_neighbours(paths[1], name, kept.mask(name))
        draw_layers(paths[2], NUMBER.sub("*", name), layers)
        written += paths
    return written
