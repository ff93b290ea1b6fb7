# SPDX-License-Identifier: Apache-2.0
"""`eigenprune eval`."""

from pathlib import Path
from typing import Annotated

import typer

from eigenprune.cli.output import show


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or hub id.")],
    texts: Annotated[list[Path], typer.Option(help="Text files (plain, .jsonl, .gz); repeat for more.")],
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    windows: Annotated[
        int | None, typer.Option(help="Only this many windows, evenly spaced; default: every token is predicted once.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="For `push`: the Hub's id of the data set that the texts are (owner/name).")
    ] = None,
    task_id: Annotated[str | None, typer.Option(help="With --dataset: the task in it, as its page says.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")
    ] = False,
    quiet: Annotated[bool, typer.Option(help="No progress, no table.")] = False,
) -> None:
    """Perplexity of a model on text files, without special tokens.

    Example: `eigenprune eval ./small --texts test.txt.gz --window 1024 --json`
    """
    import torch
    from rich.table import Table

    from eigenprune.calibrate import SEPARATOR, read_texts, token_ids
    from eigenprune.cli.loading import load_model, load_tokenizer
    from eigenprune.evaluate import contiguous_windows, perplexity, spaced_windows
    from eigenprune.hub import hash_weights
    from eigenprune.hub.measured import check_dataset
    from eigenprune.layers import low_rank_layers

    if dataset is not None or task_id is not None:
        check_dataset(dataset, task_id)
    documents = read_texts(texts)
    loaded = load_model(model, dtype, revision=revision, quiet=quiet)
    tokenizer = load_tokenizer(model, revision=revision)
    ids = torch.tensor(token_ids(tokenizer, SEPARATOR.join(documents)))
    cut = contiguous_windows(ids, window) if windows is None else spaced_windows(ids, window, windows)
    measured = perplexity(loaded, cut, progress=not quiet)
    table = Table("perplexity", "nats per token", "tokens predicted", "windows", "seconds", box=None)
    table.add_row(
        f"{measured.perplexity:.3f}",
        f"{measured.loss:.4f}",
        f"{measured.tokens:,}",
        str(measured.windows),
        f"{measured.seconds:.0f}",
    )
    settings = {"model": model, "window": window, "texts": [path.name for path in texts], "dtype": str(loaded.dtype)}
    if dataset is not None:
        settings |= {"dataset": dataset, "task_id": task_id}
    # By these a card tells which model was measured.
    settings["parameters"] = sum(parameter.numel() for parameter in loaded.parameters())
    settings["factored_layers"] = len(low_rank_layers(loaded))
    settings["weights"] = hash_weights(Path(model)) if as_json and Path(model).is_dir() else None
    show([table], measured.to_dict() | settings, as_json=as_json, quiet=quiet)
