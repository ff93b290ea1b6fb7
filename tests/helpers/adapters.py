# SPDX-License-Identifier: Apache-2.0
"""Pruned tiny models with LoRA adapters, and loading them in a new process with only `import eigenprune` before.

Run as a program: `python -m tests.helpers.adapters PLAN.json OUT.json`. The plan has entries {"base", "adapter",
"auto", "way"}; one process does many: its start costs seconds.
"""

import copy
import functools
import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eigenprune import EigenpruneConfig, prune_
from tests.helpers.tiny_models import tiny_model, token_windows

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# Names that get an adapter; the first is an attention layer, the second one of the feed-forward block.
TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "qwen2": ["q_proj", "down_proj"],
    "bert": ["query", "intermediate.dense"],
}
WAYS = ("peft", "auto-peft", "load_adapter", "auto")


@functools.cache
def _pruned(kind: str, layout: str, dtype: torch.dtype) -> PreTrainedModel:
    model = tiny_model(kind, dtype)
    config = EigenpruneConfig(keep=0.6, layout=layout, method="svd", allocation="uniform")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # data-free is good enough here
        prune_(model, config, progress=False)
    return model


def pruned_model(kind: str = "llama", layout: str = "pivot", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A pruned tiny model, the same at every call; every layer but the head is factored."""
    return copy.deepcopy(_pruned(kind, layout, dtype))


def trained_(model: nn.Module, steps: int = 3, seed: int = 0) -> nn.Module:
    """Move whatever is trainable by a few large steps, so that an adapter that is dropped shows; returns `model`."""
    torch.manual_seed(seed)
    ids = token_windows(2, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def difference(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def load_in_new_process(plan: list[dict[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    """What a new process saw for every entry of `plan`: hashes of the logits and of the state."""
    plan_file, out_file = scratch / "adapters.json", scratch / "adapters-out.json"
    plan_file.write_text(json.dumps(plan))
    command = [sys.executable, "-m", "tests.helpers.adapters", str(plan_file), str(out_file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the loading process failed:\n{done.stderr[-3000:]}")
    results: list[dict[str, Any]] = json.loads(out_file.read_text())
    return results


def load(entry: dict[str, Any]) -> nn.Module:
    """Load an adapter in one of four ways, or (way `plain`) a model."""
    import peft
    import transformers

    auto = getattr(transformers, entry["auto"])
    if entry["way"] == "peft":
        model = peft.PeftModel.from_pretrained(auto.from_pretrained(entry["base"]), entry["adapter"])
    elif entry["way"] == "auto-peft":
        model = peft.AutoPeftModelForCausalLM.from_pretrained(entry["adapter"])
    elif entry["way"] == "load_adapter":
        model = auto.from_pretrained(entry["base"])
        model.load_adapter(entry["adapter"])
    elif entry["way"] == "auto":
        model = auto.from_pretrained(entry["adapter"])
    else:
        model = auto.from_pretrained(entry["base"])
    return model.eval()


def _main() -> None:
    importlib.util.find_spec("peft")  # what transformers and accelerate ask; it must not use the import hook up
    from tests.helpers.compare import state_hashes, tensor_hash
    from tests.helpers.tiny_models import logits

    results = []
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        model = load(entry)
        around = sum(type(module).__name__ == "LoraLowRankLinear" for module in model.modules())
        results.append({"logits": tensor_hash(logits(model)), "around": around, "state": state_hashes(model)})
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    _main()
