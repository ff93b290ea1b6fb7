# SPDX-License-Identifier: Apache-2.0
"""The file of an adapter: which components of which layers are removed, and nothing that could be run.

One safetensors file. For each layer `LAYER.mask`, uint8 [slices, ceil(rank / 8)], one bit a component, the first
component in the lowest bit, 1 where it is removed; and, where the bias changes, `LAYER.bias`, float32 [out], what is
added to it. One JSON object in the header, under `eigenprune`: format_version, base {model, revision, weights},
layers {LAYER: {kind, view, rank, weights}}, provenance. (One key: with several, safetensors orders them at random, and
no hash of a file would repeat.)
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from eigenprune.config import LARGEST_SIDE, MODULE_NAME
from eigenprune.errors import CheckpointError
from eigenprune.hub.base_weights import SHORT, BaseWeights
from eigenprune.hub.limits import MIB, check_header, parse_json
from eigenprune.hub.names import is_weight_name
from eigenprune.removal import Removal
from eigenprune.spectral.slices import KINDS, VIEWS

ADAPTER_VERSION = 1
HEADER_KEY = "eigenprune"
FORMAT = "eigenprune-adapter"
LARGEST_ADAPTER = 256 * MIB  # 40,000 layers of 1,500 outputs; one of a 70B model has 8 MB
LONGEST_NAME = 512
LAYER_FIELDS = {"kind", "view", "rank", "weights"}
FIELDS = {"format", "format_version", "base", "layers", "provenance"}
WHOLE_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
LAYER_HASH = re.compile(rf"[0-9a-f]{{{SHORT}}}", re.ASCII)


@dataclass(frozen=True)
class Adapter:
    """What turns one base model into one that is better at a task.

    Attributes:
        removal: which components are removed, and what is added to the biases.
        base: the weights that it was made for.
        base_model: name of that model, without local path; empty where unknown.
        base_revision: of a model on the Hub.
        provenance: how it was made; plain JSON values.
    """

    removal: Removal
    base: BaseWeights
    base_model: str = ""
    base_revision: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def write_adapter(adapter: Adapter, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write `adapter` to one file, whole or not at all; the same adapter gives the same bytes.

    Raises:
        CheckpointError: the file is there already and `overwrite` is not set, its name does not end in `.safetensors`,
            or the disk refuses.
    """
    path = Path(path)
    if not is_weight_name(path.name):
        raise CheckpointError(f"{path.name!r:.80}: the file of an adapter is named NAME.safetensors")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} is there already: choose another file, or say overwrite=True (--overwrite)")
    raw = save(_tensors(adapter.removal), {HEADER_KEY: json.dumps(_header(adapter), sort_keys=True)})
    staged = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("wb") as file:
            file.write(raw)
            os.fsync(file.fileno())
        os.replace(staged, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}; nothing was changed") from error
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
    return path


def read_adapter(path: str | Path) -> Adapter:
    """The adapter in a file, with everything in it checked.

    Raises:
        CheckpointError: there is none, or it is damaged, of a newer format, or holds what no adapter does.
    """
    path = Path(path)
    if not is_weight_name(path.name):
        raise CheckpointError(f"{path.name!r:.80} is no adapter: it is one file, NAME.safetensors")
    try:
        if path.stat().st_size > LARGEST_ADAPTER:
            raise CheckpointError(f"{path.name} is larger than {LARGEST_ADAPTER // MIB} MiB, which no adapter is")
        check_header(path)
        with safe_open(path, framework="pt") as opened:
            notes = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name} is missing, cut short or damaged ({error}): get it again") from error
    if set(notes) != {HEADER_KEY}:
        raise CheckpointError(f"{path.name} is no adapter of eigenprune: its header has no {HEADER_KEY!r} alone")
    header = parse_json(notes[HEADER_KEY].encode(), f"the header of {path.name}", path.parent.name)
    try:
        return _adapter(header, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from None


def pack_mask(mask: Tensor) -> Tensor:
    """[slices, rank] bool as [slices, ceil(rank / 8)] uint8, the first component in the lowest bit."""
    slices, rank = mask.shape
    wide = torch.zeros(slices, -(-rank // 8) * 8, dtype=torch.uint8)
    wide[:, :rank] = mask
    return (wide.view(slices, -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, rank: int) -> Tensor:
    """The [slices, rank] bool mask of `pack_mask`.

    Raises:
        CheckpointError: `packed` is not the uint8 of that many components, or a bit beyond them is set.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != -(-rank // 8) or not packed.shape[0]:
        raise CheckpointError(f"a mask is {packed.dtype} {list(packed.shape)}, not the bits of {rank} components")
    wide = ((packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1).bool()
    if bool(wide[:, rank:].any()):
        raise CheckpointError(f"a mask marks components beyond its {rank}")
    return wide[:, :rank].clone()


def _tensors(removal: Removal) -> dict[str, Tensor]:
    masks = {f"{name}.mask": pack_mask(mask.cpu()) for name, mask in removal.masks.items()}
    biases = {f"{name}.bias": delta.float().cpu().contiguous() for name, delta in removal.bias_deltas.items()}
    return masks | biases


def _header(adapter: Adapter) -> dict[str, Any]:
    removal = adapter.removal
    layers = {
        name: {
            "kind": removal.kinds[name],
            "view": removal.views[name],
            "rank": mask.shape[1],
            "weights": adapter.base.layers[name],
        }
        for name, mask in removal.masks.items()
    }
    base = {"model": adapter.base_model, "revision": adapter.base_revision, "weights": adapter.base.whole}
    return {
        "format": FORMAT,
        "format_version": ADAPTER_VERSION,
        "base": base,
        "layers": layers,
        "provenance": adapter.provenance,
    }


def _adapter(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    version = header.get("format_version")
    if header.get("format") != FORMAT or isinstance(version, bool) or not isinstance(version, int):
        raise CheckpointError("the header is not that of an eigenprune adapter")
    if version != ADAPTER_VERSION:
        raise CheckpointError(
            f"the adapter has format {version}, and this eigenprune knows {ADAPTER_VERSION}: update it "
            "(pip install -U eigenprune)"
        )
    if set(header) != FIELDS or not all(isinstance(header[part], dict) for part in ("base", "layers", "provenance")):
        raise CheckpointError("the header does not have the fields of an adapter")
    base, layers, provenance = header["base"], header["layers"], header["provenance"]
    names, whole, revision = _base(base)
    removal = Removal({}, {}, {}, {})
    digests = {}
    wanted = set()
    for name, facts in layers.items():
        rank, digests[name] = _layer_facts(name, facts)
        mask = tensors.get(f"{name}.mask")
        if mask is None:
            raise CheckpointError(f"the mask of {name} is missing")
        removal.masks[name] = unpack_mask(mask, rank)
        removal.kinds[name], removal.views[name] = facts["kind"], facts["view"]
        wanted.add(f"{name}.mask")
        if f"{name}.bias" in tensors:
            removal.bias_deltas[name] = _checked_bias(name, tensors[f"{name}.bias"])
            wanted.add(f"{name}.bias")
    if set(tensors) != wanted:
        raise CheckpointError(f"{min(set(tensors) - wanted)!r:.80} is of no layer of the adapter")
    return Adapter(removal, BaseWeights(whole, digests), names, revision, provenance)


def _base(base: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """(name, hash of all weights, revision)."""
    model, revision, weights = base.get("model"), base.get("revision"), base.get("weights")
    texts = all(isinstance(value, str) and len(value) <= LONGEST_NAME for value in (model, revision or "", weights))
    if set(base) != {"model", "revision", "weights"} or not texts or not WHOLE_HASH.fullmatch(str(weights)):
        raise CheckpointError("the header does not say for which weights the adapter was made")
    return str(model), str(weights), revision


def _layer_facts(name: str, facts: object) -> tuple[int, str]:
    """(components in a slice, hash of the layer)."""
    if len(name) > LONGEST_NAME or not MODULE_NAME.fullmatch(name):
        raise CheckpointError(f"{name!r:.80} is no layer name")
    if not isinstance(facts, dict) or set(facts) != LAYER_FIELDS:
        raise CheckpointError(f"{name} does not have the fields of a layer")
    rank = facts["rank"]
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= LARGEST_SIDE:
        raise CheckpointError(f"{name}: {rank!r:.80} is no possible number of components")
    kind, view = facts["kind"], facts["view"]
    if view not in VIEWS or not isinstance(kind, str) or not set(kind.split("+")) <= set(KINDS):
        raise CheckpointError(f"{name} has no known kind and view")
    if not isinstance(facts["weights"], str) or not LAYER_HASH.fullmatch(facts["weights"]):
        raise CheckpointError(f"{name} does not say for which weights it was made")
    return rank, facts["weights"]


def _checked_bias(name: str, delta: Tensor) -> Tensor:
    if delta.dtype != torch.float32 or delta.ndim != 1 or not bool(torch.isfinite(delta).all()):
        raise CheckpointError(f"the bias of {name} is no finite float32 vector")
    return delta
