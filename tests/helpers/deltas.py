# SPDX-License-Identifier: Apache-2.0
"""A base and a fine-tuned model as tensors, with masks, in every form that a delta can store."""

from pathlib import Path

import torch
from torch import Tensor

from eigenprune.hub.delta_encode import write_delta
from eigenprune.hub.delta_manifest import DeltaManifest

# name -> (shape, density of the mask); None keeps the tensor whole.
SHAPES: dict[str, tuple[tuple[int, ...], float | None]] = {
    "one.bias": ((13,), 0.5),
    "one.weight": ((13, 37), 0.5),
    "two.weight": ((300, 400), 0.01),
    "three.weight": ((3, 5, 7), 0.4),
    "long.weight": ((2, 70_001), 0.02),
    "none.weight": ((8, 9), 0.0),
    "all.weight": ((8, 9), 1.0),
    "whole.weight": ((6, 4), None),
    "scalar": ((), 1.0),
    "empty.weight": ((0, 5), 0.5),
}
FORMS = {
    "one.bias": "mask",
    "one.weight": "mask",
    "two.weight": "positions",
    "three.weight": "mask",
    "long.weight": "positions",
    "none.weight": "base",
    "all.weight": "whole",
    "whole.weight": "whole",
    "scalar": "whole",
    "empty.weight": "base",
    "equal.weight": "base",
    "new.weight": "whole",
    "steps": "whole",
}


def tensors(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Random values, some of them zeros of either sign."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, _) in SHAPES.items()}
    made["one.weight"][0, :4] = torch.tensor([0.0, -0.0, 0.0, -0.0], dtype=dtype)
    return made


def pair(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(base, tuned, masks): the tuned model lacks one tensor of the base, and has one of its own."""
    base, tuned = tensors(dtype, 1), tensors(dtype, 2)
    base["one.weight"][0, :4] = -tuned["one.weight"][0, :4]
    base["equal.weight"] = torch.arange(12, dtype=dtype).view(3, 4)
    tuned["equal.weight"] = base["equal.weight"].clone()
    base["old.weight"] = torch.ones(2, 2, dtype=dtype)
    tuned["new.weight"] = torch.full((2, 3), 7, dtype=dtype)
    base["steps"], tuned["steps"] = torch.tensor([1, 2]), torch.tensor([3, 4])
    generator = torch.Generator().manual_seed(3)
    masks = {
        name: torch.rand(shape, generator=generator) < density
        for name, (shape, density) in SHAPES.items()
        if density is not None
    }
    masks["one.weight"][0, :4] = torch.tensor([True, True, False, False])
    masks["equal.weight"] = torch.ones(3, 4, dtype=torch.bool)
    return base, tuned, masks


def expected(base: dict[str, Tensor], tuned: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """`where(mask, tuned, base)`, and the tuned tensor where there is no mask."""
    return {
        name: torch.where(masks[name], tensor, base[name]) if name in masks else tensor
        for name, tensor in tuned.items()
    }


def written(path: Path, dtype: torch.dtype = torch.float32, **options: str) -> DeltaManifest:
    """Such a delta in a file."""
    base, tuned, masks = pair(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_delta(path, base, tuned, masks.get, base_model="org/base", rule="random", keep=0.5, **options)
