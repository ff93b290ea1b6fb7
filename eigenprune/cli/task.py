# SPDX-License-Identifier: Apache-2.0
"""`eigenprune task`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from eigenprune.cli.output import errors, fail, show
from eigenprune.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from eigenprune.removal.task_report import TaskReport

RETENTION_WINDOWS, RETENTION_WINDOW = 16, 256


def task(
    model: Annotated[str | None, typer.Option(help="Folder or hub id of the model.")] = None,
    task: Annotated[str | None, typer.Option(help="A task of --list, or a .jsonl file with prompt and answer.")] = None,
    data: Annotated[Path | None, typer.Option(help="Rows of the task: a .jsonl file, or a folder of them.")] = None,
    remove: Annotated[float, typer.Option(help="At most this fraction of all components is removed.")] = 0.01,
    adapter: Annotated[Path | None, typer.Option(help="File to write what was removed to (NAME.safetensors).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write the whole model to.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="Folder to write PNG pictures to (needs matplotlib).")] = None,
    retention: Annotated[
        list[Path] | None,
        typer.Option(help="Text that it must not get worse on; repeatable. Default: Python's own documentation."),
    ] = None,
    retention_bound: Annotated[float, typer.Option(help="How far its loss may rise, nats a token.")] = 0.05,
    worth: Annotated[str, typer.Option(help="Rule: exact, paper, compat, random, smallest-sigma or laser.")] = "exact",
    kinds: Annotated[
        list[str] | None, typer.Option(help="Only matrices of this kind (q, k, v, o, gate, up, down); repeatable.")
    ] = None,
    view: Annotated[str, typer.Option(help="Components of each head, or of each matrix: head or matrix.")] = "head",
    objective: Annotated[
        str, typer.Option(help="What is lowered: margin (right answers come first) or loss (they are likely).")
    ] = "margin",
    checks: Annotated[int, typer.Option(help="At most this many forward checks.")] = 300,
    fast: Annotated[bool, typer.Option(help="Search in bfloat16 where the machine multiplies it in hardware.")] = False,
    train: Annotated[int, typer.Option(help="Questions to learn from, at most.")] = 256,
    held_out: Annotated[int, typer.Option(help="Questions to stop by, at most.")] = 64,
    test: Annotated[int | None, typer.Option(help="Questions of the test, at most; default: all.")] = None,
    batch: Annotated[int, typer.Option(help="Questions in one run.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the division into the three, and of what is drawn.")] = 42,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an adapter or a model that is there already.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Name the known tasks, and do nothing.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")
    ] = False,
    quiet: Annotated[bool, typer.Option(help="No progress, no tables.")] = False,
) -> None:
    """Make a model better at one task by removing the components that stand in its way; nothing is trained.

    The test questions are answered before and after, and never looked at in between. Ctrl-C ends the search, and keeps
    what its finished rounds have found; a second one drops it.

    Examples:

    - `eigenprune task --model HuggingFaceTB/SmolLM2-135M-Instruct --task int-mult --adapter mult.safetensors`

    - `eigenprune task --model ./model --task cb --data ./cb --retention my_text.txt --out ./better --json`

    - `eigenprune apply mult.safetensors --model HuggingFaceTB/SmolLM2-135M-Instruct --out ./better`
    """
    from eigenprune.cli.loading import load_model, load_tokenizer
    from eigenprune.evaluate.tasks import TASKS, find_task
    from eigenprune.hub import base_weights
    from eigenprune.hub.given_biases import without_bias
    from eigenprune.removal.task_run import run_task_, task_splits

    if listed:
        show([_listed()], {name: row.about for name, row in TASKS.items()}, as_json=as_json, quiet=quiet)
        return
    if model is None or task is None:
        raise typer.BadParameter("--model and --task are needed (or --list)")
    _check_targets(adapter, out, pictures, overwrite)
    chosen = find_task(task, data)
    loaded = load_model(model, dtype, revision=revision, quiet=quiet)
    tokenizer = load_tokenizer(model, revision=revision)
    examples = task_splits(chosen, tokenizer, train=train, held_out=held_out, test=test, seed=seed)
    text, source = _retention(loaded, tokenizer, retention)
    if retention is None and not quiet:
        errors.print("guarded by Python's own documentation; --retention FILE like your own use is better")
    base, bare = base_weights(loaded), without_bias(loaded)
    try:
        report = run_task_(
            loaded,
            chosen.name,
            examples,
            text,
            batch=batch,
            settings={"model": Path(model).name if Path(model).exists() else model, "retention": source, "split": seed},
            worth=worth,
            kinds=kinds,
            view=view,
            remove=remove,
            retention_bound=retention_bound,
            objective=objective,
            checks=checks,
            autocast=fast,
            seed=seed,
            progress=not quiet,
            keep_on_interrupt=True,
        )
    except KeyboardInterrupt:
        fail("interrupted before a round was finished; nothing was written", code=130)
    saved = _save(report, loaded, tokenizer, base, bare, adapter, out, pictures, overwrite)
    tables: list[RenderableType] = [_test_table(report), _removal_table(report), *saved.values()]
    if not report.removal.removal.count:
        tables.append("nothing was found whose removal the held-out questions and the guard agree to")
    written = {name: str(path) for name, path in (("adapter", adapter), ("out", out)) if name in saved}
    show(tables, report.to_dict() | written, as_json=as_json, quiet=quiet)
    if report.removal.settings.get("interrupted"):
        fail("interrupted; what the finished rounds had found was kept", code=130)


def _check_targets(adapter: Path | None, out: Path | None, pictures: Path | None, overwrite: bool) -> None:
    """Refuse before minutes of work what would fail after them."""
    from eigenprune.hub.names import is_weight_name

    for path in (adapter, out):
        if path is not None and path.exists() and not overwrite:
            raise CheckpointError(f"{path} is there already: choose another name, or pass --overwrite")
    if adapter is not None and not is_weight_name(adapter.name):
        raise ConfigError(f"--adapter {adapter.name}: the file of an adapter is named NAME.safetensors")
    if pictures is not None:
        from eigenprune.report.task_pictures import check_matplotlib

        check_matplotlib()


def _retention(model: Any, tokenizer: Any, files: list[Path] | None) -> tuple["Tensor", str]:
    """Windows of the text that must not be lost, and its name."""
    from eigenprune.calibrate import BUILTIN, builtin_texts, cut_windows, read_texts

    texts = builtin_texts() if files is None else read_texts(files, tokenizer)
    positions = getattr(model.config, "max_position_embeddings", None) or RETENTION_WINDOW
    windows = cut_windows(tokenizer, texts, count=RETENTION_WINDOWS, window=min(RETENTION_WINDOW, positions))
    return windows, BUILTIN if files is None else ", ".join(path.name for path in files)


def _save(
    report: "TaskReport",
    model: Any,
    tokenizer: Any,
    base: Any,
    bare: set[str],
    adapter: Path | None,
    out: Path | None,
    pictures: Path | None,
    overwrite: bool,
) -> dict[str, str]:
    """Write what was asked for; what to say of each."""
    from eigenprune.hub import save_adapter, save_model
    from eigenprune.hub.given_biases import name_biases_

    said = {}
    removal = report.removal.removal
    if adapter is not None and removal.count:
        facts = {"task": report.task, "test": report.test.to_dict(), "settings": report.removal.settings}
        save_adapter(removal, base, adapter, model=model, provenance=facts, overwrite=overwrite)
        said["adapter"] = f"adapter: {adapter}, {adapter.stat().st_size:,} bytes; use it: eigenprune apply {adapter}"
    if out is not None:
        name_biases_(model, [name for name in removal.bias_deltas if name in bare])
        save_model(model, out, tokenizer=tokenizer, overwrite=overwrite)
        said["out"] = f"saved in {out}"
    if pictures is not None:
        from eigenprune.report.task_pictures import write_pictures

        written = write_pictures(report.views(), pictures, report.task)
        said["pictures"] = "pictures: " + ", ".join(map(str, written))
    return said


def _listed() -> "Table":
    from rich.table import Table

    from eigenprune.evaluate.tasks import TASKS

    table = Table("task", "about", box=None, header_style="bold")
    for name, row in TASKS.items():
        table.add_row(name, row.about)
    table.add_row("FILE.jsonl", "your own rows: prompt, answer, and where there are some choices")
    return table


def _test_table(report: "TaskReport") -> "Table":
    from rich.table import Table

    table = Table("", "right", "share", "95 % interval", "answer loss", box=None, header_style="bold")
    test = report.test
    rows = (
        ("before", test.before, test.before_interval, report.test_loss[0]),
        ("after", test.after, test.after_interval, report.test_loss[1]),
    )
    for name, right, (low, high), loss in rows:
        share = f"{100 * right / test.total:.2f} %"
        table.add_row(
            name, f"{right} of {test.total}", share, f"{100 * low:.1f} to {100 * high:.1f} %", f"{loss:.3f} nats"
        )
    return table


def _removal_table(report: "TaskReport") -> "Table":
    from rich.table import Table

    removal, test = report.removal, report.test
    before, after = removal.before, removal.after
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("task", f"{report.task}: {test.gained} gained, {test.lost} lost, McNemar p = {test.p_value:.2g}")
    counts: dict[str, int] = {}
    for piece in removal.pieces:
        counts[piece.kind] = counts.get(piece.kind, 0) + 1
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items(), key=lambda item: -item[1]))
    amount = f"{removal.removal.count:,} of {removal.components:,} components ({100 * report.removed:.3f} %)"
    table.add_row("removed", amount + (f": {kinds}" if kinds else ""))
    table.add_row("held out", f"{100 * before.held_out_accuracy:.1f} -> {100 * after.held_out_accuracy:.1f} % right")
    rise = after.retention_loss - before.retention_loss
    bound = removal.settings.get("retention_bound")
    table.add_row(
        "retention",
        f"{before.retention_loss:.4f} -> {after.retention_loss:.4f} nats a token ({rise:+.4f}, bound +{bound}) on "
        f"{report.settings.get('retention', 'examples')}",
    )
    table.add_row("time", ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in report.seconds.items()))
    return table
