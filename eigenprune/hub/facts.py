# SPDX-License-Identifier: Apache-2.0
"""What a card says about a checkpoint, read from the very files that are published: config and safetensors headers."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from eigenprune.config import QUANT_METHOD, EigenpruneConfig
from eigenprune.errors import CheckpointError
from eigenprune.hub.limits import LARGEST_INDEX, check_header, read_json
from eigenprune.hub.names import is_weight_name
from eigenprune.layers import factored_parameters
from eigenprune.quantize import NUMBERS, SCALE

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
QUANTISED = "quantised"  # in the place of a dtype
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class FactoredLayer:
    """One pruned layer: name, (out, in) of the dense weight, layout, rank, and, if it lost channels, (out, in) now."""

    name: str
    shape: tuple[int, int]
    layout: str
    rank: int
    kept_shape: tuple[int, int] | None = None

    @property
    def parameters(self) -> int:
        """Of the factors."""
        return factored_parameters(self.rank, *(self.kept_shape or self.shape), self.layout)

    @property
    def kept(self) -> float:
        """Parameters of the factors over those of the dense weight."""
        return self.parameters / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class CheckpointFacts:
    """A pruned checkpoint.

    Attributes:
        architecture: the model class, as the config names it.
        config: how it was pruned.
        layers: the factored ones, by name.
        dtype: of most parameters, as safetensors writes it.
        parameters: of the whole model (dense, pruned).
        weight_bytes: of all tensors (dense in the same floating dtype, pruned).
        files: SHA-256 of each weight file.
    """

    architecture: str
    config: EigenpruneConfig
    layers: tuple[FactoredLayer, ...]
    dtype: str
    parameters: tuple[int, int]
    weight_bytes: tuple[int, int]
    files: dict[str, str]

    @property
    def weights_hash(self) -> str:
        """One hash for all weight files."""
        return joint_hash(self.files)


def read_facts(folder: Path) -> CheckpointFacts:
    """The facts of the pruned model in `folder`.

    Raises:
        CheckpointError: it holds no pruned model, or not all of it, or files that contradict each other.
        ConfigError: its settings are impossible.
    """
    config = read_json(folder / "config.json")
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping) or settings.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{folder.name} holds no model pruned by eigenprune; others have push_to_hub of their own"
        )
    pruned: EigenpruneConfig = EigenpruneConfig.from_dict(settings)
    files = weight_files(folder)
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        headers |= _header(file)
    weight_bytes = sum(math.prod(shape) * ITEM_BYTES.get(dtype, 1) for dtype, shape in headers.values())
    headers = _unquantised(headers, pruned.quantized)
    layers = tuple(
        _layer(name, layout, rank, pruned.shapes.get(name), headers)
        for name, (layout, rank) in sorted(pruned.modules.items())
    )
    sizes = {key: math.prod(shape) for key, (_, shape) in headers.items()}
    floating = {key for key, (dtype, _) in headers.items() if dtype.startswith(("F", "BF"))}
    amounts: Counter[str] = Counter()
    for key in floating:
        amounts[headers[key][0]] += sizes[key]
    dtype = amounts.most_common(1)[0][0] if amounts else "F32"
    parameters = sum(size for key, size in sizes.items() if key in floating or headers[key][0] == QUANTISED)
    floating_bytes = sum(
        sizes[key] * ITEM_BYTES.get(dtype if kind == QUANTISED else kind, 1) for key, (kind, _) in headers.items()
    )
    removed = sum(layer.shape[0] * layer.shape[1] - layer.parameters for layer in layers)
    for name, (out, inside, *before) in pruned.shapes.items():
        if name not in pruned.modules:
            removed += before[0] * before[1] - out * inside
        if f"{name}.bias" in headers:
            removed += before[0] - out
    pivots = sum(sizes.get(f"{layer.name}.pivots", 0) * ITEM_BYTES["I32"] for layer in layers)
    architectures = config.get("architectures") or [""]
    return CheckpointFacts(
        architecture=str(architectures[0]),
        config=pruned,
        layers=layers,
        dtype=dtype,
        parameters=(parameters + removed, parameters),
        weight_bytes=(floating_bytes + removed * ITEM_BYTES.get(dtype, 1) - pivots, weight_bytes),
        files={file.name: file_hash(file) for file in files},
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, all that its index names.

    Raises:
        CheckpointError: there is none, one is missing, or the index names something else than files beside it.
    """
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise CheckpointError(f"{folder.name} holds no {SINGLE}: is it a saved model?")
        return [folder / SINGLE]
    weight_map = read_json(folder / INDEX, LARGEST_INDEX).get("weight_map")
    values = list(weight_map.values()) if isinstance(weight_map, dict) else []
    for name in values:
        if not is_weight_name(name):
            raise CheckpointError(f"{INDEX} names {name!r:.80}, which is no safetensors file beside it")
    names = sorted(set(values))
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{INDEX} names {name}, which is not there: save or download the model again")
    if not names:
        raise CheckpointError(f"{INDEX} names no file")
    return [folder / name for name in names]


def file_hash(path: Path) -> str:
    """SHA-256, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_weights(folder: Path) -> str:
    """One hash for all weight files of a checkpoint, dense or pruned; errors as `weight_files`."""
    return joint_hash({file.name: file_hash(file) for file in weight_files(folder)})


def joint_hash(files: Mapping[str, str]) -> str:
    """SHA-256 over names and hashes, as `sha256sum` prints them."""
    lines = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor: (dtype, shape)}; no data is read."""
    try:
        check_header(file)
        with safe_open(file, framework="pt") as opened:
            foreign = set(opened.metadata() or {}) - {"format"}
            if foreign:
                raise CheckpointError(f"{file.name} carries notes in its header ({len(foreign)}): save the model again")
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - no dict
            return {key: (str(part.get_dtype()), tuple(part.get_shape())) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.name} is cut short or damaged: save or download the model again") from error


def _unquantised(
    headers: Mapping[str, tuple[str, tuple[int, ...]]], quantized: Mapping[str, list[int]]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """`headers` with one weight in the place of the parts of each quantised one, of the dtype `QUANTISED`."""
    found = dict(headers)
    for name, (_, group) in quantized.items():
        numbers, scale = found.pop(f"{name}.{NUMBERS}", None), found.pop(f"{name}.{SCALE}", None)
        if numbers is None or scale is None or len(scale[1]) != 2:
            raise CheckpointError(f"the weight files hold no quantised weight of {name}, as config.json says")
        found[f"{name}.weight"] = (QUANTISED, (scale[1][0], scale[1][1] * group))
    return found


def _layer(
    name: str,
    layout: str,
    rank: int,
    sides: Sequence[int] | None,
    headers: Mapping[str, tuple[str, tuple[int, ...]]],
) -> FactoredLayer:
    try:
        right, left = headers[f"{name}.right.weight"][1], headers[f"{name}.left.weight"][1]
        out_features = left[0] + (rank if layout == "pivot" else 0)
        agree = right[0] == rank == left[1] and (sides is None or list(sides[:2]) == [out_features, right[1]])
    except (KeyError, IndexError):
        agree = False
    if not agree:
        raise CheckpointError(f"the weight files hold no factors of {name} with rank {rank}, as config.json says")
    kept = (out_features, right[1])
    if sides is None:
        return FactoredLayer(name, kept, layout, rank)
    return FactoredLayer(name, (sides[2], sides[3]), layout, rank, kept)
