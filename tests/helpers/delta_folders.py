# SPDX-License-Identifier: Apache-2.0
"""A base and a fine-tuned tiny model in folders, and a delta folder made of them, with every second entry kept."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenprune.hub.delta_folder import save_delta
from eigenprune.hub.delta_manifest import DeltaManifest
from eigenprune.hub.weight_source import WeightSource
from tests.helpers.tiny_models import saved_dense, tiny_model, tiny_tokenizer


def saved_tuned(kind: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """`tiny_model(kind)` with every parameter changed a little, as a stock checkpoint with a tokenizer."""
    model = tiny_model(kind, dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.05)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def every_second(tuned: WeightSource) -> dict[str, Tensor]:
    """{name: a mask of every second entry}."""
    return {name: (torch.arange(t.numel()) % 2 == 0).view(t.shape) for name, t in tuned.items()}


def delta_folder(base: Path, tuned: Path, out: Path, base_model: str = "", **options: Any) -> DeltaManifest:
    """The delta of two folders in `out`; the base is called as its folder unless told otherwise."""
    facts = {"base_model": base_model or base.name, "rule": "random", "keep": 0.5, **options}
    with WeightSource(base) as base_weights, WeightSource(tuned) as tuned_weights:
        masks = every_second(tuned_weights)
        return save_delta(out, base_weights, tuned_weights, tuned, masks.get, base_card_folder=base, **facts)


def base_and_delta(scratch: Path, kind: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Path, Path, Path]:
    """Folders (base, tuned, delta) beside each other in `scratch`."""
    base = saved_dense(kind, scratch / "base", dtype)
    tuned = saved_tuned(kind, scratch / "tuned", dtype)
    delta_folder(base, tuned, scratch / "delta")
    return base, tuned, scratch / "delta"


def merged_state(base: Path, tuned: Path) -> dict[str, Tensor]:
    """What the delta of two folders must come out as, tensor by tensor of the file."""
    with WeightSource(base) as first, WeightSource(tuned) as second:
        masks = every_second(second)
        return {name: torch.where(masks[name], second[name], first[name]) for name in second}
