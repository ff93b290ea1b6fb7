# SPDX-License-Identifier: Apache-2.0
"""`eigenprune eval`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from eigenprune.cli.output import show
from eigenprune.errors import ConfigError

if TYPE_CHECKING:
    from eigenprune.evaluate import Perplexity, TaskScore

OTHER_DOMAIN_WINDOWS = 8


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or hub id.")],
    texts: Annotated[
        list[Path] | None, typer.Option(help="Text files (plain, .jsonl, .gz) for perplexity; repeat for more.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    windows: Annotated[
        int | None, typer.Option(help="Only this many windows, evenly spaced; default: every token is predicted once.")
    ] = None,
    other_domain: Annotated[
        bool, typer.Option(help="With --texts: also a few windows of Python's manual, what another domain loses.")
    ] = True,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, with commas between them; needs the extra lm-eval.")
    ] = None,
    task_files: Annotated[
        Path | None,
        typer.Option(help="Folder of lm-eval task files (*.yaml) with local data files: nothing is fetched."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first items of each task.")] = None,
    shots: Annotated[
        int | None, typer.Option(help="Solved examples before each item; default: the task's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Requests of tasks in a forward pass.")] = 8,
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
    """Perplexity of a model on text files, without special tokens, and its scores in tasks of lm-eval.

    Pruning loses more on text unlike that it was calibrated on, so a few windows of Python's manual are always beside.

    Examples:

    - `eigenprune eval ./small --texts test.txt.gz --window 1024 --json`

    - `eigenprune eval ./small --tasks arc_easy,hellaswag --limit 200`

    - `HF_HUB_OFFLINE=1 eigenprune eval ./small --tasks arc_easy,copa --task-files ./my_tasks --json`
    """
    from eigenprune.cli.loading import load_model, load_tokenizer
    from eigenprune.hub import hash_weights
    from eigenprune.hub.measured import check_dataset
    from eigenprune.layers import low_rank_layers

    if dataset is not None or task_id is not None:
        check_dataset(dataset, task_id)
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if not texts and not names:
        raise ConfigError("nothing to evaluate on: give --texts FILE, or --tasks NAME, or both")
    if not names and (task_files, limit, shots) != (None, None, None):
        raise ConfigError("--task-files, --limit and --shots are of tasks: say which with --tasks NAME")
    # Texts and tasks first: a mistake in their names costs no loading.
    documents = _documents(texts) if texts else None
    loaded_tasks = _load_tasks(names, task_files, quiet=quiet) if names else None
    loaded = load_model(model, dtype, revision=revision, quiet=quiet)
    tokenizer = load_tokenizer(model, revision=revision)
    result: dict[str, Any] = {}
    tables: list[Any] = []
    if documents is not None:
        measured = _perplexity(loaded, tokenizer, documents, window, windows, quiet=quiet)
        names_of_texts = [path.name for path in texts or ()]
        result |= measured.to_dict() | {"window": window, "texts": names_of_texts}
        rows = {", ".join(names_of_texts): measured}
        if other_domain:
            name, elsewhere = _other_domain(loaded, tokenizer, window, quiet=quiet)
            result["other_domain"] = elsewhere.to_dict() | {"text": name}
            rows[name] = elsewhere
        tables.append(_perplexity_table(rows))
    if loaded_tasks is not None:
        from eigenprune.evaluate.harness import run_tasks

        scores = run_tasks(
            loaded, tokenizer, loaded_tasks, limit=limit, batch_size=batch_size, shots=shots, progress=not quiet
        )
        result["tasks"] = [score.to_dict() for score in scores]
        tables.append(_task_table(scores))
    result |= {"model": model, "dtype": str(loaded.dtype)}
    if dataset is not None:
        result |= {"dataset": dataset, "task_id": task_id}
    # By these a card tells which model was measured.
    result["parameters"] = sum(parameter.numel() for parameter in loaded.parameters())
    result["factored_layers"] = len(low_rank_layers(loaded))
    result["weights"] = hash_weights(Path(model)) if as_json and Path(model).is_dir() else None
    show(tables, result, as_json=as_json, quiet=quiet)


def _documents(texts: list[Path]) -> list[str]:
    from eigenprune.calibrate import read_texts

    return read_texts(texts)


def _load_tasks(names: list[str], task_files: Path | None, *, quiet: bool) -> dict[str, Any]:
    from eigenprune.evaluate.harness import load_tasks

    return load_tasks(names, task_files=task_files, progress=not quiet)


def _perplexity(
    model: Any, tokenizer: Any, documents: list[str], window: int, windows: int | None, *, quiet: bool
) -> "Perplexity":
    import torch

    from eigenprune.calibrate import SEPARATOR, token_ids
    from eigenprune.evaluate import contiguous_windows, perplexity, spaced_windows

    ids = torch.tensor(token_ids(tokenizer, SEPARATOR.join(documents)))
    cut = contiguous_windows(ids, window) if windows is None else spaced_windows(ids, window, windows)
    return perplexity(model, cut, progress=not quiet)


def _other_domain(model: Any, tokenizer: Any, window: int, *, quiet: bool) -> "tuple[str, Perplexity]":
    import torch

    from eigenprune.calibrate import BUILTIN, SEPARATOR, builtin_texts, token_ids
    from eigenprune.evaluate import perplexity, spaced_windows

    ids = torch.tensor(token_ids(tokenizer, SEPARATOR.join(builtin_texts())))
    return BUILTIN, perplexity(model, spaced_windows(ids, window, OTHER_DOMAIN_WINDOWS), progress=not quiet)


def _perplexity_table(rows: "dict[str, Perplexity]") -> Table:
    table = Table("text", "perplexity", "nats per token", "tokens predicted", "windows", "seconds", box=None)
    for text, measured in rows.items():
        table.add_row(
            text,
            f"{measured.perplexity:.3f}",
            f"{measured.loss:.4f}",
            f"{measured.tokens:,}",
            str(measured.windows),
            f"{measured.seconds:.0f}",
        )
    return table


def _task_table(scores: "list[TaskScore]") -> Table:
    table = Table("task", "metric", "score", "95 %", "items", "shots", "seconds", box=None)
    for score in scores:
        for metric, value in score.scores.items():
            interval = score.intervals.get(metric)
            between = "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
            cells = (score.task, metric, f"{value:.4f}", between, score.items, score.shots, f"{score.seconds:.0f}")
            table.add_row(*map(str, cells))
    return table
