# SPDX-License-Identifier: Apache-2.0
"""`eigenprune extract-lora`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eigenprune.cli.output import show

if TYPE_CHECKING:
    from rich.table import Table

    from eigenprune.calibrate import Statistics
    from eigenprune.hub import LoraExtraction

MOST_OTHERS = 12  # rows of the second table


def extract_lora(
    base: Annotated[str, typer.Argument(help="Folder or hub id of the model to start from.")],
    tuned: Annotated[str, typer.Argument(help="Folder or hub id of what was made of it.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the adapter; without it, only the report.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of every adapter; with --energy, the largest.")] = None,
    energy: Annotated[float | None, typer.Option(help="Least rank that keeps this part of the squared length.")] = None,
    method: Annotated[str, typer.Option(help="Metric of the truncation: svd, asvd, svd-llm, kfac.")] = "svd",
    texts: Annotated[
        list[Path] | None, typer.Option(help="Text for the metric, measured on BASE; repeat for more files.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of that text.")] = 40,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    save_others: Annotated[
        bool, typer.Option("--save-others", help="Also save embeddings, norms and biases that differ, exactly.")
    ] = False,
    base_name: Annotated[str | None, typer.Option(help="What the adapter names as its base; default: BASE.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the adapter: auto, float32, bfloat16 or float16.")] = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace an adapter that is in the folder already.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")
    ] = False,
    quiet: Annotated[bool, typer.Option(help="No progress, no tables.")] = False,
) -> None:
    """Make a LoRA adapter of the difference of two models, in the files of peft.

    Examples:

    - `eigenprune extract-lora ./base ./finetuned --rank 32 --out ./adapter`

    - `eigenprune extract-lora ./pruned ./dense --energy 0.9 --method kfac --texts domain.jsonl --out ./recovery`
    """
    import torch

    from eigenprune.cli.loading import DTYPES, checkpoint_folder
    from eigenprune.errors import ConfigError
    from eigenprune.hub import extract_lora as extract

    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; there are: {', '.join(DTYPES)}")
    wanted = DTYPES[dtype]
    folders = [checkpoint_folder(name) for name in (base, tuned)]
    found = extract(
        folders[0],
        folders[1],
        out,
        rank=rank,
        energy=energy,
        method=method,
        statistics=_statistics(base, method, texts, windows, window, quiet=quiet),
        save_others=save_others,
        base_name=base_name or base,
        dtype=wanted if isinstance(wanted, torch.dtype) else None,
        overwrite=overwrite,
        progress=not quiet,
    )
    words = f"adapter: {found.parameters:,} parameters" + ("" if out is None else f", saved in {out}")
    show([*_tables(found), words], found.to_dict(), as_json=as_json, quiet=quiet)


def _statistics(
    base: str, method: str, texts: list[Path] | None, windows: int, window: int, *, quiet: bool
) -> "Statistics | None":
    """What `method` needs to know about the layers of the base; None for a data-free one."""
    from eigenprune.calibrate import builtin_texts, collect_statistics, cut_windows, default_cache_dir, read_texts
    from eigenprune.cli.loading import load_model, load_tokenizer
    from eigenprune.layers import select_layers, to_dense_
    from eigenprune.spectral import find_method

    kinds = find_method(method).statistics
    if not kinds:
        return None
    documents = builtin_texts() if texts is None else read_texts(texts)
    model = to_dense_(load_model(base, quiet=quiet))
    positions = getattr(model.config, "max_position_embeddings", None) or window
    cut = cut_windows(load_tokenizer(base), documents, count=windows, window=min(window, positions))
    layers = select_layers(model).chosen
    return collect_statistics(model, cut, layers, kinds=kinds, cache_dir=default_cache_dir(), progress=not quiet)


def _tables(found: "LoraExtraction") -> list["Table"]:
    from rich.table import Table

    layers = Table(box=None, header_style="bold")
    for number, title in enumerate(("layer", "shape", "rank", "change", "error kept", "energy kept")):
        layers.add_column(title, justify="right" if number else "left", no_wrap=True)
    for layer in found.layers:
        shape = f"{layer.shape[0]} x {layer.shape[1]}"
        layers.add_row(
            layer.name, shape, str(layer.rank), f"{layer.change:.2e}", f"{layer.error:.4f}", f"{layer.energy:.4f}"
        )
    if not found.others:
        return [layers]
    others = Table("also differs", "change", "in the adapter", box=None, header_style="bold")
    for other in found.others[:MOST_OTHERS]:
        others.add_row(other.name, f"{other.change:.2e}", other.saved or "no (--save-others)")
    if len(found.others) > MOST_OTHERS:
        others.add_row(f"and {len(found.others) - MOST_OTHERS} more, see --json", "", "")
    return [layers, others]
