# SPDX-License-Identifier: Apache-2.0
"""A sparse delta as a folder that `from_pretrained` and the Hub take for a model, and the whole model made of it."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from eigenprune.config import QUANT_METHOD, EigenpruneConfig
from eigenprune.errors import CheckpointError
from eigenprune.hub.delta_decode import DeltaFile
from eigenprune.hub.delta_encode import write_delta
from eigenprune.hub.delta_manifest import DeltaManifest
from eigenprune.hub.digests import check_digests, write_digests
from eigenprune.hub.limits import check_folder, read_json
from eigenprune.hub.names import ALLOWED
from eigenprune.hub.weight_source import WeightSource
from eigenprune.hub.whole_folder import whole_folder
from eigenprune.hub.write_tensors import spec_bytes
from eigenprune.report import base_card, versions

DELTA_NAME = "model.safetensors"  # the name that transformers looks for, and pulls
CONFIG = "config.json"
# Written anew, or about the other model.
NOT_COPIED = {CONFIG, "README.md", "SHA256SUMS", "prune_report.json"}
# Fields of a config that say where it was, or name code.
LEFT_OUT = ("_name_or_path", "auto_map", "transformers_version", "torch_dtype", "quantization_config")
SPACE = 1.05


def save_delta(
    out: str | Path,
    base: WeightSource,
    tuned: WeightSource,
    tuned_folder: Path,
    masks: Callable[[str], Tensor | None],
    *,
    base_card_folder: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[str], object] | None = None,
    **facts: Any,
) -> DeltaManifest:
    """Write the delta folder `out`: config, delta file, tokenizer and digests, in one step.

    Args:
        out: to write; missing parents are made.
        base, tuned: the weights of both models.
        tuned_folder: whose config and tokenizer are taken over.
        masks: see `write_delta`.
        base_card_folder: of the base model, for its licence on the card, where the fine-tuned one states none.
        overwrite: replace a model or delta that is there.
        progress: see `write_delta`.
        facts: base_model, base_revision, rule, keep, scope, precision: see `write_delta`.

    Raises:
        CheckpointError: `out` is there and `overwrite` is not set, the fine-tuned model is quantised or pruned, or the
            disk refuses. What was there before stays.
        WeightError: see `write_delta`.
    """
    out = Path(out)
    check_free(out, overwrite)
    config = plain_config(tuned_folder)
    card = base_card(tuned_folder) or (base_card(base_card_folder) if base_card_folder else {})
    with whole_folder(out) as staged:
        manifest = write_delta(staged / DELTA_NAME, base, tuned, masks, progress=progress, **facts)
        provenance = {"versions": versions(), "base_card": card} if card else {"versions": versions()}
        settings = EigenpruneConfig(delta=manifest.header(), provenance=provenance).to_dict()
        dtypes = [tensor.dtype for tensor in manifest.tensors.values() if tensor.dtype.startswith(("F", "BF"))]
        config["dtype"] = config.get("dtype") or _NAMES[max(set(dtypes), key=dtypes.count)] if dtypes else "float32"
        _write_config(staged, config | {"quantization_config": settings})
        _copy_others(tuned_folder, staged)
        write_digests(staged)
    return manifest


_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def apply_delta(
    base: str | Path,
    delta: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[str], object] | None = None,
) -> Path:
    """Write the whole fine-tuned model, an ordinary checkpoint, from the folders `base` and `delta`; a few tensors are
    in memory at a time.

    Raises:
        CheckpointError: a wrong base, a damaged delta, `out` is there and `overwrite` is not set, or the disk refuses.
    """
    delta, out = Path(delta), Path(out)
    check_free(out, overwrite)
    with open_delta(delta) as opened, WeightSource(base) as weights:
        check_space(opened.manifest, out.absolute().parent)
        config = read_json(delta / CONFIG)
        config.pop("quantization_config", None)
        with whole_folder(out) as staged:
            opened.write_merged(staged / DELTA_NAME, weights, progress)
            _write_config(staged, config)
            _copy_others(delta, staged)
            write_digests(staged)
    return out


def open_delta(folder: str | Path) -> DeltaFile:
    """The delta in a folder, with digests checked, and its config against its file.

    Raises:
        CheckpointError: the folder holds no delta, a file is damaged, or the two contradict each other.
    """
    folder = Path(folder)
    if not is_delta_folder(folder):
        raise CheckpointError(f"{folder.name} holds no sparse delta of eigenprune")
    check_folder(folder)
    check_digests(folder)
    opened = DeltaFile(folder / DELTA_NAME)
    try:
        header = read_json(folder / CONFIG)["quantization_config"]["delta"]
        check_header_agrees(opened.manifest, header, folder.name)
    except BaseException:
        opened.close()
        raise
    return opened


def check_header_agrees(manifest: DeltaManifest, header: Mapping[str, Any], place: str) -> None:
    """Check that a config says of a delta what its file says.

    Raises:
        CheckpointError: it does not.
    """
    if manifest.header() != dict(header):
        raise CheckpointError(f"config and delta file of {place} contradict each other: get both again")


def is_delta_folder(folder: Path) -> bool:
    """Whether the config in `folder` says that a sparse delta lies there."""
    if not (folder / CONFIG).is_file():
        return False
    settings = read_json(folder / CONFIG).get("quantization_config")
    if not isinstance(settings, Mapping) or settings.get("quant_method") != QUANT_METHOD:
        return False
    return bool(settings.get("delta"))


def plain_config(folder: Path) -> dict[str, Any]:
    """The config of an ordinary model, without what says where it was.

    Raises:
        CheckpointError: there is none, or its model is quantised, pruned, or a delta itself.
    """
    config = read_json(folder / CONFIG)
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{folder.name} is quantised, pruned or a delta itself: give the plain fine-tuned model (a delta becomes "
            "one with eigenprune delta apply)"
        )
    dtype = config.get("dtype") or config.get("torch_dtype")
    kept = {key: value for key, value in config.items() if key not in LEFT_OUT}
    return kept | ({"dtype": dtype} if isinstance(dtype, str) else {})


def check_free(out: Path, overwrite: bool) -> None:
    """Check that `out` may be written.

    Raises:
        CheckpointError: it is there already, and is no model or `overwrite` is not set.
    """
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} is there already: choose another folder, or say overwrite=True (--overwrite)")
    if out.exists() and not (out.is_dir() and ((out / CONFIG).is_file() or not any(out.iterdir()))):
        raise CheckpointError(f"{out} holds something other than a model; it is not overwritten")


def check_space(manifest: DeltaManifest, folder: Path) -> None:
    """Check that the whole model fits on the disk of `folder`, or of its nearest parent that is there.

    Raises:
        CheckpointError: it does not.
    """
    needed = int(SPACE * sum(spec_bytes((t.dtype, t.shape)) for t in manifest.tensors.values()))
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise CheckpointError(f"the whole model needs {needed:,} bytes, and {there} has {free:,} free")


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_others(source: Path, target: Path) -> None:
    """Tokenizer, generation config, licence: the files that a push may have. In the Hub's cache they are links."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        wanted = ALLOWED.fullmatch(name) and name not in NOT_COPIED and "safetensors" not in name
        if wanted and path.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
