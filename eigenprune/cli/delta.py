# SPDX-License-Identifier: Apache-2.0
"""`eigenprune delta make | apply | inspect`: fine-tuned models stored as entries over their base."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eigenprune.cli.output import show

if TYPE_CHECKING:
    from rich.table import Table

    from eigenprune.hub.delta_manifest import DeltaManifest

# Said wherever a delta is made: the question comes up every time.
NO_FASTER = "smaller on disk only: the model that comes out is dense, as large in memory and as fast as before"


def make(
    base: Annotated[str, typer.Argument(help="Folder or hub id of the model that was fine-tuned.")],
    tuned: Annotated[str, typer.Argument(help="Folder or hub id of the fine-tuned model.")],
    out: Annotated[Path, typer.Option(help="Folder for the delta.")],
    rule: Annotated[str, typer.Option(help="Which entries are kept, by name: delta, ken, magnitude, random, ...")],
    keep: Annotated[float, typer.Option(help="Kept share of the entries chosen among, in [0, 1].")] = 0.75,
    scope: Annotated[
        str | None, typer.Option(help="Of which the share is kept: row, layer or global; default: the rule's own.")
    ] = None,
    row_entries: Annotated[
        int | None, typer.Option(help="In the place of --keep: so many entries of every row (the k of KEN).")
    ] = None,
    least: Annotated[float, typer.Option(help="With scope global, the share that every tensor keeps at least.")] = 0.0,
    keep_whole: Annotated[
        list[str] | None, typer.Option(help="Regular expression of tensors to keep whole; default: heads; repeatable.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Regular expression: tensors that match none are kept whole; repeatable.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Of the stored values: exact, bfloat16 or float16 (rounded, half the bytes of float32).")
    ] = "exact",
    base_id: Annotated[
        str | None, typer.Option(help="Id of the base on the Hub, where BASE is a local copy of it.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the base on the Hub.")] = None,
    seed: Annotated[int, typer.Option(help="Of the rule random.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a delta or model that is in the folder already.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")
    ] = False,
    quiet: Annotated[bool, typer.Option(help="No progress, no tables.")] = False,
) -> None:
    """Store a fine-tuned model as a sparse delta: the entries that a rule keeps; the others go back to the base's.

    The folder loads with plain `from_pretrained` where its base is found, and goes to the Hub with `eigenprune push`.

    Examples:

    - `eigenprune delta make google-bert/bert-base-uncased ./finetuned --rule ken --keep 0.75 --out ./delta`

    - `eigenprune delta make ./base ./finetuned --rule delta --keep 0.1 --precision bfloat16 --out ./delta`
    """
    from eigenprune.cli.loading import checkpoint_folder, folder_bytes
    from eigenprune.entries import HEADS, select_entries
    from eigenprune.entries.rules import find_rule
    from eigenprune.hub.delta_folder import check_free, plain_config, save_delta
    from eigenprune.hub.weight_source import WeightSource

    check_free(out, overwrite)  # before minutes of work, not after
    base_folder, tuned_folder = checkpoint_folder(base, revision=revision), checkpoint_folder(tuned, tokenizer=True)
    plain_config(tuned_folder)
    with WeightSource(base_folder) as base_weights, WeightSource(tuned_folder) as tuned_weights:
        masks = select_entries(
            base_weights,
            tuned_weights,
            rule,
            keep,
            scope=scope,
            row_entries=row_entries,
            least=least,
            keep_whole=HEADS if keep_whole is None else keep_whole,
            only=only or (),
            seed=seed,
            progress=not quiet,
        )
        with _bar("writing", len(base_weights) + len(tuned_weights), quiet) as progress:
            manifest = save_delta(
                out,
                base_weights,
                tuned_weights,
                tuned_folder,
                masks.get,
                base_card_folder=base_folder,
                overwrite=overwrite,
                progress=progress,
                rule=rule,
                keep=keep,
                scope=scope or find_rule(rule).scope,
                precision=precision,
                **base_identity(base, base_folder, base_id, revision),
            )
        bytes_of = (_data_bytes(tuned_weights), folder_bytes(out))
    result = _facts(manifest) | {"out": str(out), "tuned_bytes": bytes_of[0], "delta_bytes": bytes_of[1]}
    words = f"saved in {out}; each tensor: eigenprune delta inspect {out}"
    show([_summary(manifest, *bytes_of), words, NO_FASTER], result, as_json=as_json, quiet=quiet)


def apply(
    base: Annotated[str, typer.Argument(help="Folder or hub id of the base model.")],
    delta: Annotated[str, typer.Argument(metavar="DIR", help="Folder or hub id of the delta.")],
    out: Annotated[Path, typer.Option(help="Folder for the whole model.")],
    revision: Annotated[str | None, typer.Option(help="Commit of the base on the Hub.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a model that is in the folder already.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")
    ] = False,
    quiet: Annotated[bool, typer.Option(help="No progress, no words.")] = False,
) -> None:
    """Make the whole fine-tuned model, an ordinary checkpoint, of a delta and its base; another base is refused.

    Example: `eigenprune delta apply google-bert/bert-base-uncased ./delta --out ./finetuned`
    """
    from eigenprune.cli.loading import checkpoint_folder, folder_bytes
    from eigenprune.hub.delta_folder import apply_delta, check_free, open_delta

    check_free(out, overwrite)
    folder = checkpoint_folder(delta, tokenizer=True)
    with open_delta(folder) as opened:
        manifest = opened.manifest
    base_folder = checkpoint_folder(base, revision=revision or (None if Path(base).is_dir() else _recorded(manifest)))
    with _bar("writing", len(manifest.base_tensors) + len(manifest.tensors), quiet) as progress:
        apply_delta(base_folder, folder, out, overwrite=overwrite, progress=progress)
    result = {"out": str(out), "base": base, "delta": delta, "file_bytes": folder_bytes(out)}
    show([f"saved in {out}, {folder_bytes(out):,} bytes"], result, as_json=as_json, quiet=quiet)


def inspect(
    delta: Annotated[str, typer.Argument(metavar="DIR", help="Folder or hub id of a delta.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")
    ] = False,
    quiet: Annotated[bool, typer.Option(help="No table.")] = False,
) -> None:
    """What a delta stores: its base, and per tensor the shape, the form, and the share of entries that are stored.

    Example: `eigenprune delta inspect ./delta`
    """
    from eigenprune.cli.loading import checkpoint_folder, folder_bytes
    from eigenprune.hub.delta_folder import open_delta

    folder = checkpoint_folder(delta)
    with open_delta(folder) as opened:
        manifest = opened.manifest
    dense = _whole_bytes(manifest)
    tensors = {name: vars(tensor) | {"shape": list(tensor.shape)} for name, tensor in manifest.tensors.items()}
    result = _facts(manifest) | {"tuned_bytes": dense, "delta_bytes": folder_bytes(folder), "tensors": tensors}
    tables = [_tensor_table(manifest), _summary(manifest, dense, folder_bytes(folder))]
    show([*tables, NO_FASTER], result, as_json=as_json, quiet=quiet)


def base_identity(base: str, folder: Path, base_id: str | None, revision: str | None) -> dict[str, str]:
    """`base_model` and `base_revision` as a delta records them: no local path.

    Raises:
        HubError: `base_id` is no id.
    """
    import re

    from eigenprune.hub.names import check_repo

    if base_id is not None:
        return {"base_model": check_repo(base_id), "base_revision": revision or ""}
    if not Path(base).is_dir():  # a folder of the Hub's cache is called by its commit
        commit = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else ""
        return {"base_model": base, "base_revision": commit}
    name = re.sub(r"[^A-Za-z0-9._-]", "-", folder.resolve().name).lstrip("._-")
    return {"base_model": name[:96] or "base", "base_revision": ""}


def _recorded(manifest: "DeltaManifest") -> str | None:
    return manifest.base_revision or None


@contextmanager
def _bar(words: str, total: int, quiet: bool) -> Iterator[Callable[[str], object]]:
    from tqdm import tqdm

    with tqdm(total=total, desc=words, unit="tensor", disable=quiet, leave=False) as bar:
        yield lambda _name: bar.update()


def _data_bytes(weights: Any) -> int:
    from eigenprune.hub.write_tensors import spec_bytes

    return sum(map(spec_bytes, weights.specs.values()))


def _whole_bytes(manifest: "DeltaManifest") -> int:
    from eigenprune.hub.write_tensors import spec_bytes

    return sum(spec_bytes((tensor.dtype, tensor.shape)) for tensor in manifest.tensors.values())


def _facts(manifest: "DeltaManifest") -> dict[str, Any]:
    return manifest.header() | {"stored": manifest.stored, "entries": manifest.entries}


def _summary(manifest: "DeltaManifest", dense: int, stored_bytes: int) -> "Table":
    from rich.table import Table

    share = manifest.stored / max(manifest.entries, 1)
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    revision = f" at {manifest.base_revision}" if manifest.base_revision else ""
    table.add_row("base", f"{manifest.base_model}{revision}, SHA-256 {manifest.base_sha256[:16]}...")
    table.add_row("rule", f"{manifest.rule}, keep {manifest.keep:g}, scope {manifest.scope}")
    table.add_row("entries", f"{manifest.stored:,} of {manifest.entries:,} stored ({share:.4f}), {manifest.precision}")
    table.add_row("bytes", f"{dense:,} -> {stored_bytes:,} ({stored_bytes / max(dense, 1):.4f})")
    return table


def _tensor_table(manifest: "DeltaManifest") -> "Table":
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("tensor", no_wrap=True)
    for name in ("shape", "type", "stored as", "entries", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, tensor in manifest.tensors.items():
        table.add_row(
            name,
            " x ".join(map(str, tensor.shape)) or "scalar",
            tensor.dtype,
            tensor.form,
            f"{tensor.stored:,}",
            f"{tensor.stored / max(tensor.entries, 1):.4f}",
        )
    return table
