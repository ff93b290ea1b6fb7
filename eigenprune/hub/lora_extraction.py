# SPDX-License-Identifier: Apache-2.0
"""Turn the difference of two models into a LoRA adapter, in the files of peft; peft itself is not needed for it."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from eigenprune.calibrate import Statistics
from eigenprune.errors import CheckpointError, WeightError
from eigenprune.hub.pairing import Pair, open_pair
from eigenprune.hub.whole_folder import whole_folder
from eigenprune.spectral import Metric, find_method, layer_metric
from eigenprune.spectral.difference import check_rank_and_energy, thin_difference

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What peft calls the kind of model; others load with the general class.
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


@dataclass(frozen=True)
class ExtractedLayer:
    """What became of one weight.

    Attributes:
        name: of the layer.
        shape: (out, in).
        rank: of its adapter.
        change: length of the difference over that of the base weight.
        error: length of what the adapter, as it is stored, leaves of the difference, over that of the difference.
        energy: the part of the squared length that is kept, in the metric; `1 - error^2` where that is the plain one.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    change: float
    error: float
    energy: float


@dataclass(frozen=True)
class OtherChange:
    """A parameter that differs and is no weight of a linear layer: an embedding, a norm, a bias.

    `saved` is how it is in the adapter: `lora_bias`, `modules_to_save`, or empty for not at all.
    """

    name: str
    change: float
    saved: str


@dataclass(frozen=True)
class LoraExtraction:
    """What `extract_lora` found and wrote; `folder` is None where nothing was to be written."""

    layers: tuple[ExtractedLayer, ...]
    others: tuple[OtherChange, ...]
    parameters: int
    folder: Path | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"folder": None if self.folder is None else str(self.folder)}


@torch.no_grad()
def extract_lora(
    base: Path,
    tuned: Path,
    out: Path | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    method: str = "svd",
    statistics: Statistics | None = None,
    save_others: bool = False,
    base_name: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> LoraExtraction:
    """Make a LoRA adapter that turns the model in `base` into that in `tuned`, as nearly as its rank allows.

    Each difference of two weights becomes `B A` by a truncated SVD, plain or in the metric of `method`; layers that do
    not differ get no adapter. Either model may be pruned: a factored layer counts as its product, so that the adapter
    of a pruned base and its dense original gives back most of what pruning took. Memory: two weights in float64 and
    the workspace of their SVD, besides the adapter.

    Args:
        base, tuned: folders of safetensors checkpoints of one architecture.
        out: folder for `adapter_config.json` and `adapter_model.safetensors`; None only measures.
        rank: of every adapter, or with `energy` the largest.
        energy: the least rank of each is taken that keeps this part, in (0, 1], of the squared length.
        method: a row of the method table; all but `svd` need `statistics`, collected on the base.
        statistics: of the inputs (and output gradients) of the layers; one that they do not know is measured plainly.
        save_others: also save what is no linear weight and differs, exactly: biases in the adapter (`lora_bias`) where
            all its layers have one, other modules whole (`modules_to_save`), tied ones each by itself. What has parts
            of its own, or is tied to a layer with a bias, cannot be saved.
        base_name: what the adapter names as its base; None takes `base` as it was given.
        dtype: of the adapter; None takes that of the tuned weights.
        overwrite: replace an adapter that is in `out` already.
        progress: show a bar on standard error.

    Raises:
        ConfigError: neither rank nor energy, one is out of range, or the method is unknown or lacks its statistics.
        CheckpointError: the models do not fit each other, do not differ, or a folder cannot be read or written.
        WeightError: a weight is not finite; the layer is named.
    """
    check_rank_and_energy(rank, energy)
    row = find_method(method)
    if statistics is None:
        layer_metric(row, None, "")  # refuses a method that needs them
    if out is not None:
        _check_target(Path(out), overwrite)
    pair = open_pair(Path(base), Path(tuned))
    layers, tensors = [], dict[str, Tensor]()
    for name in tqdm(pair.layers, desc="differences", unit="layer", disable=not progress, leave=False):
        known = statistics is not None and name in statistics
        metric = layer_metric(row, statistics, name) if known else Metric()
        layer = _extract_layer(pair, name, metric, rank, energy, dtype, tensors)
        if layer is not None:
            layers.append(layer)
    others = _other_changes(pair, {layer.name for layer in layers}, save_others)
    if not layers and not others:
        raise CheckpointError(f"{pair.base.name} and {pair.tuned.name} are the same model: nothing differs")
    kept = _save_others(pair, layers, others, tensors)
    if out is not None:
        if not kept:
            raise CheckpointError("no weight of a linear layer differs, so that there is nothing for an adapter")
        config = _adapter_config(pair, kept, others, base_name or str(base))
        with whole_folder(Path(out)) as staged:
            save_file(tensors, staged / WEIGHTS_NAME, {"format": "pt"})
            (staged / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return LoraExtraction(tuple(kept), tuple(others), parameters, None if out is None else Path(out))


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{out} is there already: choose another folder, or say overwrite=True (--overwrite)")
    if not out.is_dir() or (any(out.iterdir()) and not (out / CONFIG_NAME).is_file()):
        raise CheckpointError(f"{out} holds something other than an adapter; it is not overwritten")


def _extract_layer(
    pair: Pair,
    name: str,
    metric: Metric,
    rank: int | None,
    energy: float | None,
    dtype: torch.dtype | None,
    tensors: dict[str, Tensor],
) -> ExtractedLayer | None:
    """The adapter of one layer, put into `tensors`; None where the weights are equal."""
    old, new = (one.weight(name, conv1d=pair.layers[name]) for one in (pair.base, pair.tuned))
    if old is None or new is None or old.shape != new.shape:
        raise CheckpointError(f"{name}: the factors of the pruned model do not have the shape of the weight")
    stored = pair.tuned.parameter(f"{name}.weight")
    stored = pair.tuned.parameter(f"{name}.right.weight") if stored is None or not stored.numel() else stored
    difference = new.double() - old.double()
    length = float(torch.linalg.vector_norm(difference))
    if not torch.isfinite(difference).all():
        raise WeightError(f"{name} holds NaN or infinity in {pair.base.name} or {pair.tuned.name}")
    if length == 0:
        return None
    thin = thin_difference(difference, metric, rank=rank, energy=energy)
    dtype = dtype or (torch.float32 if stored is None else stored.dtype)
    left, right = thin.left.to(dtype).contiguous(), thin.right.to(dtype).contiguous()
    tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = right, left
    rest = float(torch.linalg.vector_norm(difference.addmm_(left.double(), right.double(), alpha=-1)))
    return ExtractedLayer(
        name=name,
        shape=(old.shape[0], old.shape[1]),
        rank=thin.rank,
        change=length / max(float(torch.linalg.vector_norm(old.double())), 1e-300),
        error=rest / length,
        energy=thin.energy,
    )


def _other_changes(pair: Pair, adapted: set[str], save: bool) -> list[OtherChange]:
    """Everything else that differs, and how it can be saved."""
    # peft's biases come with every layer of an adapter or with none, and merge only into layers that have one.
    biased = {name.removesuffix(".bias") for name in pair.others if name.endswith(".bias")}
    by_bias = bool(adapted) and adapted <= biased
    found = []
    for name in pair.others:
        old, new = pair.base.parameter(name), pair.tuned.parameter(name)
        if old is None or new is None:  # checked when they were opened
            continue
        difference = new.double() - old.double()
        length = float(torch.linalg.vector_norm(difference))
        if length == 0:
            continue
        owner, _, part = name.rpartition(".")
        how = "modules_to_save" if owner in pair.whole else ""
        how = "lora_bias" if by_bias and part == "bias" and owner in adapted else how
        size = max(float(torch.linalg.vector_norm(old.double())), 1e-300)
        found.append(OtherChange(name, length / size, how if save else ""))
    return found


def _save_others(
    pair: Pair, layers: list[ExtractedLayer], others: list[OtherChange], tensors: dict[str, Tensor]
) -> list[ExtractedLayer]:
    """Put the other changes into `tensors`; the layers that still have an adapter, since one saved whole needs none."""
    whole = {other.name.rpartition(".")[0] for other in others if other.saved == "modules_to_save"}
    kept = [layer for layer in layers if layer.name not in whole]
    for other in others:
        if other.saved and other.name in pair.tied:
            head = pair.tuned.parameter(other.name)
            if head is not None:  # a copy: peft loads each module that it holds whole by itself
                tensors[f"{PREFIX}{pair.tied[other.name]}.weight"] = head.clone()
    for name in whole:
        for part in ("lora_A.weight", "lora_B.weight"):
            tensors.pop(f"{PREFIX}{name}.{part}", None)
        conv1d = pair.layers.get(name, False)
        weight = pair.tuned.weight(name, conv1d=conv1d) if name in pair.layers else None
        if name in pair.base.pruned or name in pair.tuned.pruned:
            raise CheckpointError(f"{name} is pruned and its bias differs: extract without save_others (--save-others)")
        if weight is not None:
            tensors[f"{PREFIX}{name}.weight"] = (weight.t() if conv1d else weight).contiguous()
        for key in pair.others:
            tensor = pair.tuned.parameter(key) if key.rpartition(".")[0] == name else None
            if tensor is not None:
                tensors[PREFIX + key] = tensor.contiguous()
    if any(other.saved == "lora_bias" for other in others):
        for layer in kept:
            old, new = pair.base.parameter(f"{layer.name}.bias"), pair.tuned.parameter(f"{layer.name}.bias")
            if old is not None and new is not None:
                difference = (new.double() - old.double()).to(tensors[f"{PREFIX}{layer.name}.lora_B.weight"].dtype)
                tensors[f"{PREFIX}{layer.name}.lora_B.bias"] = difference
    return kept


def _adapter_config(
    pair: Pair, layers: list[ExtractedLayer], others: list[OtherChange], base_name: str
) -> Mapping[str, Any]:
    """What peft reads; a scaling of one everywhere."""
    ranks = {layer.name: layer.rank for layer in layers}
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    # peft looks for these as patterns at the end of a name: anchored, none matches another layer.
    pattern = {"^" + name.replace(".", r"\."): rank for name, rank in ranks.items() if rank != common}
    saved = [other.name for other in others if other.saved == "modules_to_save"]
    whole = sorted(
        {name.rpartition(".")[0] for name in saved} | {pair.tied[name] for name in saved if name in pair.tied}
    )
    architecture = str((pair.base.config.get("architectures") or [""])[0])
    task = next((task for ending, task in TASKS.items() if architecture.endswith(ending)), None)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": any(other.saved == "lora_bias" for other in others),
        "fan_in_fan_out": any(pair.layers[name] for name in ranks),
        "target_modules": sorted(ranks),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "modules_to_save": whole or None,
        "init_lora_weights": True,
    }
