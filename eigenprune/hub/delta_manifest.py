# SPDX-License-Identifier: Apache-2.0
"""What a sparse delta says about itself: its base, how its entries were chosen, and how each tensor is stored."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from eigenprune.entries.delta_header import DELTA_VERSION, DIGEST, HEADER, PRECISIONS, check_delta_header
from eigenprune.entries.packing import BLOCK, blocks
from eigenprune.errors import CheckpointError, ConfigError
from eigenprune.hub.limits import MIB, MOST_TENSORS, parse_json
from eigenprune.hub.weight_source import DTYPES
from eigenprune.hub.write_tensors import Spec

MANIFEST = "eigenprune.delta"  # the name of the uint8 tensor that holds it as JSON
SUFFIXES = (".delta_values", ".delta_mask", ".delta_counts", ".delta_positions")
FORMS = ("base", "mask", "positions", "whole")
FLOATING = ("F64", "F32", "F16", "BF16")
LARGEST = 64 * MIB  # 250 bytes a tensor
MOST_ENTRIES = 16 * MOST_TENSORS
LARGEST_TENSOR = 1 << 44
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,511}", re.ASCII)


@dataclass(frozen=True)
class StoredTensor:
    """How one tensor of the fine-tuned model is stored.

    Attributes:
        dtype: of the tensor that comes out, as safetensors names it.
        shape: of it.
        form: `base` (nothing stored, the base's tensor), `mask` or `positions` (some entries), `whole` (all).
        stored: how many entries are stored.
    """

    dtype: str
    shape: tuple[int, ...]
    form: str
    stored: int

    @property
    def entries(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class DeltaManifest:
    """A sparse delta without its data.

    Attributes:
        base_model: id on the Hub, or the last part of the name of a local folder.
        base_revision: commit on the Hub, or empty.
        base_sha256: over all weights of the base, see `joint_digest`.
        base_tensors: {tensor name: its SHA-256}, so that a wrong base can be told from a right one by name.
        rule: by which entries were selected.
        keep: the kept share that was asked for.
        scope: of the budget: `row`, `layer` or `global`.
        precision: of the values: `exact`, or the type they were rounded to.
        tensors: {name: how it is stored}, all of the fine-tuned model.
    """

    base_model: str
    base_revision: str
    base_sha256: str
    rule: str
    keep: float
    scope: str
    precision: str
    base_tensors: Mapping[str, str] = field(repr=False)
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    format_version: int = DELTA_VERSION

    @property
    def stored(self) -> int:
        """Stored entries in all tensors."""
        return sum(tensor.stored for tensor in self.tensors.values())

    @property
    def entries(self) -> int:
        """Entries of the whole model."""
        return sum(tensor.entries for tensor in self.tensors.values())

    def header(self) -> dict[str, Any]:
        """What the config repeats: all but the tensors."""
        return {name: value for name, value in vars(self).items() if name in HEADER}

    def to_bytes(self) -> bytes:
        """As JSON, the same bytes for the same delta."""
        tensors = {name: [t.dtype, list(t.shape), t.form, t.stored] for name, t in self.tensors.items()}
        value = self.header() | {"base_tensors": dict(self.base_tensors), "tensors": tensors}
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, raw: bytes, place: str) -> "DeltaManifest":
        """The manifest in `raw`, every part of it checked.

        Raises:
            CheckpointError: it is no manifest, of a newer version, or says something impossible.
        """
        value = parse_json(raw, f"the tensor {MANIFEST}", place, MOST_ENTRIES)
        header, tensors, base_tensors = dict(value), value.get("tensors"), value.get("base_tensors")
        header.pop("tensors", None), header.pop("base_tensors", None)
        try:
            check_delta_header(header)
        except ConfigError as error:
            raise CheckpointError(f"the delta in {place}: {error}") from None
        if not isinstance(base_tensors, dict) or not isinstance(tensors, dict) or not tensors:
            raise CheckpointError(f"the delta in {place} does not list its tensors")
        for name, digest in base_tensors.items():
            _check_name(name, place)
            _check(isinstance(digest, str) and DIGEST.fullmatch(digest), "digest", digest, place)
        stored = {_check_name(name, place): _stored(name, entry, place) for name, entry in tensors.items()}
        lost = sorted(name for name, tensor in stored.items() if tensor.form != "whole" and name not in base_tensors)
        if lost:
            raise CheckpointError(f"the delta in {place} needs {lost[0]} of its base, which has none by its own list")
        return cls(base_tensors=base_tensors, tensors=stored, **header)

    def file_specs(self, manifest_bytes: int, sentinel: str = "") -> dict[str, Spec]:
        """{name: (dtype, shape)} of every tensor of the file, and of no other."""
        specs: dict[str, Spec] = {MANIFEST: ("U8", (manifest_bytes,))}
        for name, tensor in self.tensors.items():
            values = PRECISIONS[self.precision] if tensor.dtype in FLOATING else None
            shape = tensor.shape if tensor.form == "whole" else (tensor.stored,)
            if tensor.form != "base":
                specs[f"{name}.delta_values"] = (values or tensor.dtype, shape)
            if tensor.form == "mask":
                specs[f"{name}.delta_mask"] = ("U8", (-(-tensor.entries // 8),))
            elif tensor.form == "positions":
                specs[f"{name}.delta_counts"] = ("I32", (blocks(tensor.entries),))
                specs[f"{name}.delta_positions"] = ("U16", (tensor.stored,))
        if sentinel:
            specs[sentinel] = (self.tensors[sentinel].dtype, (0,))
        return specs

    def sentinel(self) -> str:
        """The tensor under whose own name a zero-size one is stored, or empty where none can be.

        A transformers without this package meets a shape that cannot be there, and stops, instead of going on with
        random weights.
        """
        return min((name for name, t in self.tensors.items() if len(t.shape) > 1 and t.entries), default="")


def _stored(name: str, entry: object, place: str) -> StoredTensor:
    what = f"tensors[{name}]"
    parts: list[Any] = entry if isinstance(entry, list) else []
    _check(len(parts) == 4, what, entry, place)
    dtype, shape, form, stored = parts
    _check(dtype in DTYPES if isinstance(dtype, str) else False, what, dtype, place)
    sides = isinstance(shape, list) and len(shape) <= 8 and all(type(s) is int and 0 <= s <= BLOCK**2 for s in shape)
    _check(sides and math.prod(shape) <= LARGEST_TENSOR, what, shape, place)
    tensor = StoredTensor(dtype, tuple(shape), form, stored)
    right = {"base": 0, "whole": tensor.entries}
    _check(isinstance(form, str) and form in FORMS, what, form, place)
    _check(type(stored) is int and 0 <= stored <= tensor.entries, what, stored, place)
    _check(right.get(form, stored) == stored, what, stored, place)
    return tensor


def _check_name(name: str, place: str) -> str:
    _check(NAME.fullmatch(name) and name != MANIFEST and not name.endswith(SUFFIXES), "tensor name", name, place)
    return name


def _check(good: object, what: str, value: object, place: str) -> None:
    if not good:
        raise CheckpointError(f"the delta in {place}: {what} cannot be {value!r:.120}")
