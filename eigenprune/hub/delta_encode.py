# SPDX-License-Identifier: Apache-2.0
"""Write a sparse delta: the entries of a fine-tuned model that differ from its base and were selected."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from eigenprune.entries.delta_header import PRECISIONS
from eigenprune.entries.packing import pack_mask, pack_positions, smaller_form, unpack_mask
from eigenprune.errors import CheckpointError, ConfigError, WeightError
from eigenprune.hub.delta_manifest import (
    FLOATING,
    MANIFEST,
    NAME,
    SUFFIXES,
    DeltaManifest,
    StoredTensor,
)
from eigenprune.hub.weight_source import DTYPE_NAMES, DTYPES, joint_digest, tensor_digests
from eigenprune.hub.write_tensors import file_order, write_tensors
from eigenprune.memory import release_unused

LARGE = 1 << 18  # entries
# The integer type in which two values of so many bytes are compared bit for bit.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def write_delta(
    path: Path,
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    masks: Callable[[str], Tensor | None],
    *,
    base_model: str,
    base_revision: str = "",
    rule: str,
    keep: float,
    scope: str = "row",
    precision: str = "exact",
    progress: Callable[[str], object] | None = None,
) -> DeltaManifest:
    """Write the safetensors file `path`; what is read from it over `base` is `where(mask, tuned, base)`.

    A selected entry that is the same in both models to the bit is not stored: it comes from the base. In memory at a
    time are a few tensors, and one bit for every entry of the model. Neither model is changed; mappings that read from
    disk (`WeightSource`) are read twice.

    Args:
        path: of the file.
        base: {tensor name: tensor}.
        tuned: of the fine-tuned model; a tensor that the base does not have, or has in another shape, is stored whole.
        masks: the bool mask of a tensor by its name, in its shape, True where the tuned value is kept; None keeps it
            whole. Called once a tensor.
        base_model: id on the Hub, or the name of the folder alone.
        base_revision: commit on the Hub.
        rule, keep, scope: as the selection had them; they are recorded only.
        precision: `exact` stores values as they are; `bfloat16` or `float16` round them to that type, and the result
            has those rounded values in the type of the tuned model.
        progress: called with the name of each tensor that is done, once for every tensor of both models.

    Returns:
        The manifest.

    Raises:
        ConfigError: unknown precision.
        CheckpointError: a name or type cannot be stored, or a mask has another shape than its tensor.
        WeightError: a stored value is not finite, or too large for `precision`.
        OSError: the disk refuses.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is unknown; there are: {', '.join(PRECISIONS)}")
    digests = tensor_digests(base, progress)
    packed: dict[str, Tensor] = {}
    tensors = {}
    for name in sorted(tuned):
        _check_storable(name, tuned[name])
        tensors[name], packed[name] = _plan(name, tuned[name], base.get(name), masks(name), precision)
        _give_back(tensors[name])
        if progress is not None:
            progress(name)
    manifest = DeltaManifest(
        base_model=base_model,
        base_revision=base_revision,
        base_sha256=joint_digest(digests),
        base_tensors=digests,
        rule=rule,
        keep=keep,
        scope=scope,
        precision=precision,
        tensors=tensors,
    )
    raw = manifest.to_bytes()
    DeltaManifest.from_bytes(raw, path.parent.name)  # what cannot be read again is not written
    specs = manifest.file_specs(len(raw), manifest.sentinel())
    write_tensors(path, specs, _contents(file_order(specs), raw, manifest, tuned, packed))
    return manifest


def same_bits(one: Tensor, other: Tensor) -> Tensor:
    """bool, where two tensors of one dtype and shape have the same bits: 0.0 is not -0.0, and a NaN is itself."""
    kind = BITS[one.element_size()]
    return one.contiguous().view(kind) == other.contiguous().view(kind)


def _plan(
    name: str, tuned: Tensor, base: Tensor | None, mask: Tensor | None, precision: str
) -> tuple[StoredTensor, Tensor]:
    """How `tuned` is stored, and the packed mask of the stored entries (empty for `base` and `whole`)."""
    dtype, shape, none = DTYPE_NAMES[tuned.dtype], tuple(tuned.shape), torch.empty(0, dtype=torch.uint8)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != tuned.shape):
        raise CheckpointError(f"the mask of {name} is {mask.dtype} {tuple(mask.shape)}, the tensor is {shape}")
    _check_values(name, tuned, mask, precision)
    if base is None or base.shape != tuned.shape:
        if mask is not None and not mask.all():
            raise CheckpointError(f"{name} has no tensor of its shape in the base: it can only be kept whole")
        return StoredTensor(dtype, shape, "whole", tuned.numel()), none
    stored = ~same_bits(tuned, base.to(tuned.dtype))
    if mask is not None:
        stored &= mask
    count, entries = int(stored.sum()), tuned.numel()
    if count == 0:
        return StoredTensor(dtype, shape, "base", 0), none
    if count == entries:
        return StoredTensor(dtype, shape, "whole", entries), none
    return StoredTensor(dtype, shape, smaller_form(entries, count), count), pack_mask(stored)


def _contents(
    order: list[str], raw: bytes, manifest: DeltaManifest, tuned: Mapping[str, Tensor], packed: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file, made one by one."""
    for key in order:
        if key == MANIFEST:
            yield key, torch.frombuffer(bytearray(raw), dtype=torch.uint8)
            continue
        name, _, part = key.rpartition(".delta_")
        if not name:  # the sentinel
            yield key, torch.empty(0, dtype=tuned[key].dtype)
            continue
        tensor = manifest.tensors[name]
        _give_back(tensor)
        mask = unpack_mask(packed[name], tensor.entries) if tensor.form != "whole" else None
        if part == "values":
            yield key, _values(tuned[name], mask, manifest.precision)
        elif part == "mask":
            yield key, packed[name]
        elif mask is not None:
            counts, positions = pack_positions(mask)
            yield key, counts if part == "counts" else positions


def _give_back(done: StoredTensor) -> None:
    """Return what a large tensor's work left with the allocator, which the small ones that stay would cut up."""
    if done.entries >= LARGE:
        release_unused()


def _values(tuned: Tensor, mask: Tensor | None, precision: str) -> Tensor:
    values = tuned if mask is None else tuned.reshape(-1)[mask]
    name = PRECISIONS[precision]
    return values.to(DTYPES[name]) if name is not None and tuned.is_floating_point() else values


def _check_storable(name: str, tensor: Tensor) -> None:
    if not NAME.fullmatch(name) or name.endswith(SUFFIXES) or name == MANIFEST:
        raise CheckpointError(f"{name!r:.120} is no name of a tensor that a delta can hold")
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{name} is {tensor.dtype}, which a delta cannot hold")


def _check_values(name: str, tuned: Tensor, mask: Tensor | None, precision: str) -> None:
    if not tuned.is_floating_point() or DTYPE_NAMES[tuned.dtype] not in FLOATING:
        return
    if not _finite_where_kept(tuned, mask):
        raise WeightError(f"{name} of the fine-tuned model holds NaN or infinity: there is nothing to keep")
    rounded = PRECISIONS[precision]
    if rounded is not None and not _finite_where_kept(tuned.to(DTYPES[rounded]), mask):
        raise WeightError(f"{name} holds values too large for {precision}: use precision exact or bfloat16")


def _finite_where_kept(tuned: Tensor, mask: Tensor | None) -> bool:
    finite = torch.isfinite(tuned)
    if mask is not None:
        finite |= ~mask
    return bool(finite.all())
