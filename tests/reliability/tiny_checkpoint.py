# SPDX-License-Identifier: Apache-2.0
"""The smallest pruned checkpoint: one factored layer, in a folder that the readers of this package take for a model."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from eigenprune import LowRankLinear

LAYER = "block.layer"
# How many times the usual number of examples: `make test-slow` asks for more.
ROUNDS = int(os.environ.get("EIGENPRUNE_ROUNDS", "1"))


def layer(out_features: int = 48, in_features: int = 32, rank: int = 4) -> LowRankLinear:
    """A factored layer with values that are the same at every call."""
    torch.manual_seed(0)
    return LowRankLinear(in_features, out_features, rank, layout="pivot", bias=False)


def settings(rank: int = 4) -> dict[str, Any]:
    """What its config.json says."""
    modules = {LAYER: ["pivot", rank]}
    pruned = {"quant_method": "eigenprune", "modules": modules, "provenance": {"base_model": "org/base"}}
    # transformers opens a weight file by itself where the config does not name the dtype.
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "quantization_config": pruned,
        "dtype": "float32",
    }


def write(folder: Path, made: LowRankLinear | None = None, *, index: bool = False) -> Path:
    """Such a checkpoint in a new `folder`, with an index where asked for."""
    made = made or layer()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{LAYER}.{name}": tensor.detach() for name, tensor in made.state_dict().items()}
    name = "model-00001-of-00001.safetensors" if index else "model.safetensors"
    save_file(tensors, folder / name, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings(made.rank)))
    if index:
        content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder
