# SPDX-License-Identifier: Apache-2.0
"""`eigenprune prune`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType

from eigenprune.cli.output import errors, show
from eigenprune.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from eigenprune.config import EigenpruneConfig

RECOVER_MINUTES = 30.0


def prune(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the dense model.")],
    out: Annotated[Path, typer.Option(help="Folder to write; loads with plain `from_pretrained`.")],
    keep: Annotated[float, typer.Option(help="Kept fraction of the parameters of the linear layers, in (0, 1].")],
    method: Annotated[str, typer.Option(help="Row of the method table: kfac, svd-llm, zs, asvd, svd, ...")] = "kfac",
    layout: Annotated[str, typer.Option(help="How factors are stored: pivot or pair.")] = "pivot",
    allocation: Annotated[
        str | None, typer.Option(help="Ranks: global, uniform, lems, ...; default: the method's own.")
    ] = None,
    budget: Annotated[
        str, typer.Option(help="What keep is a fraction of: parameters, bytes, flops, or latency (measured here).")
    ] = "parameters",
    min_keep: Annotated[float, typer.Option(help="No layer keeps a smaller fraction than this.")] = 0.0,
    faster_at: Annotated[
        list[int] | None,
        typer.Option(help="Tokens in one call at which no layer may be slower than dense, measured here; repeatable."),
    ] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(help="Calibration text (plain, .jsonl with 'text' or 'messages', .gz); repeat for more files."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Without --texts: sampled (by the model; the default where it can), python-docs, random-tokens."
        ),
    ] = None,
    prior: Annotated[float, typer.Option(help="Part of the input statistics that random tokens make up.")] = 0.0,
    windows: Annotated[int, typer.Option(help="Windows of calibration text.")] = 40,
    choose_windows: Annotated[
        str, typer.Option(help="Which of four times as many: first, random, el2n, grand, prototypes, coverage.")
    ] = "first",
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    rank_multiple: Annotated[int, typer.Option(help="Ranks are multiples of this.")] = 8,
    skip: Annotated[
        list[str] | None, typer.Option(help="Regular expression of layers to leave dense; repeatable.")
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            help="Then quantise what was pruned, by torchao: 8 or 4; auto (with --budget bytes) chooses ranks and bits "
            "together. pip install 'eigenprune[quantize]'"
        ),
    ] = None,
    recover: Annotated[
        str | None,
        typer.Option(
            help="Get loss back after pruning, without labels: distil, block, closed or perp. "
            "Alone, before another option or last: distil."
        ),
    ] = None,
    recover_minutes: Annotated[
        float | None, typer.Option(help=f"Bound on distil and perp; default {RECOVER_MINUTES:g}.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampled text, and of methods that draw labels.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    remote_code: Annotated[
        bool, typer.Option(help="Add a modelling file, for readers without eigenprune who trust remote code.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that is in the folder already.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")
    ] = False,
    quiet: Annotated[bool, typer.Option(help="No progress, no tables.")] = False,
) -> None:
    """Prune a model and save it as an ordinary checkpoint.

    Examples:

    - `eigenprune prune HuggingFaceTB/SmolLM2-135M-Instruct --out small --keep 0.8 --texts my_domain.jsonl`

    - `eigenprune prune ./model --out ./small --keep 0.8 --texts my_domain.jsonl --recover --recover-minutes 20`

    - `eigenprune prune ./model --out ./small --keep 0.8 --texts my_domain.jsonl --bits 8`

    - `eigenprune prune ./model --out ./small --keep 0.4 --budget bytes --bits auto --texts my_domain.jsonl`

    - `eigenprune prune ./model --out ./small --keep 0.8 --faster-at 1 --faster-at 512 --texts my_domain.jsonl`

    - `eigenprune prune ./model --out ./small --keep 0.6 --layout pair --skip 'layers[.]0[.]' --json`
    """
    from eigenprune.cli.loading import folder_bytes, load_model, load_tokenizer
    from eigenprune.config import EigenpruneConfig
    from eigenprune.hub import save_model
    from eigenprune.prune import prune_
    from eigenprune.report import summary_table

    config = EigenpruneConfig(
        keep=keep,
        method=method,
        layout=layout,
        allocation=allocation,
        rank_multiple=rank_multiple,
        budget=budget,
        min_keep=min_keep,
        faster_at=tuple(faster_at or ()),
        prior=prior,
        skip=tuple(skip or ()),
        texts=None if texts is None else [str(path) for path in texts],
        calibration=calibration,
        windows=windows,
        choose_windows=choose_windows,
        window=window,
        seed=seed,
        bits=int(bits) if bits is not None and bits.isdecimal() else bits,
    )
    minutes = minutes_of(recover, recover_minutes)
    if out.exists() and not overwrite:  # before minutes of work, not after
        raise CheckpointError(f"{out} is there already: choose another folder, or pass --overwrite")
    dense = load_model(model, dtype, revision=revision, quiet=quiet)
    needs_text = config_needs_text(config) or recover is not None
    tokenizer = load_tokenizer(model, revision=revision) if needs_text else None
    if config.texts is None and needs_text and not quiet:
        errors.print("calibrating without texts of your own; --texts FILE like those of the model's use is better")
    report = prune_(
        dense,
        config,
        tokenizer=tokenizer,
        recover=recover,
        recover_minutes=minutes,
        progress=not quiet,
    )
    save_model(dense, out, tokenizer=tokenizer, report=report, overwrite=overwrite, remote_code=remote_code)
    result = report.to_dict() | {"out": str(out), "file_bytes": folder_bytes(out)}
    tables: list[RenderableType] = [summary_table(report), f"saved in {out}; each layer: eigenprune inspect {out}"]
    show(tables, result, as_json=as_json, quiet=quiet)


def minutes_of(recover: str | None, minutes: float | None) -> float | None:
    """The bound on recovery: what was asked for, else the default where the method takes one."""
    from eigenprune.recover import find_recovery

    if recover is None and minutes is not None:
        raise ConfigError("--recover-minutes bounds a recovery: say --recover too")
    if recover is None or minutes is not None or find_recovery(recover).blockwise:
        return minutes
    return RECOVER_MINUTES


def config_needs_text(config: "EigenpruneConfig") -> bool:
    """Whether the method of `config`, or its allocation, measures the model on text."""
    from eigenprune.spectral import ALLOCATIONS, find_method

    method = find_method(config.method)
    return bool(method.statistics or ALLOCATIONS[config.allocation or method.allocation].needs)
