# SPDX-License-Identifier: Apache-2.0
"""eigenprune: smaller and faster Hugging Face models by pruning singular components of their weights.

    from transformers import AutoModelForCausalLM
    from eigenprune import EigenpruneConfig

    model = AutoModelForCausalLM.from_pretrained(repo, quantization_config=EigenpruneConfig(keep=0.8))

Importing this package is light: it loads neither torch nor transformers, and registers with transformers and peft when
those are imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from eigenprune.errors import EigenpruneError
from eigenprune.integrations.registration import register_plugins

if TYPE_CHECKING:
    from eigenprune.calibrate import Statistics, collect_statistics
    from eigenprune.config import EigenpruneConfig
    from eigenprune.evaluate import perplexity
    from eigenprune.hub import push_to_hub, save_model
    from eigenprune.layers import LowRankLinear, to_dense_
    from eigenprune.prune import prune_
    from eigenprune.report import PruneReport

__version__ = "0.1.0"

_HOMES = {
    "EigenpruneConfig": "config",
    "LowRankLinear": "layers",
    "PruneReport": "report",
    "Statistics": "calibrate",
    "collect_statistics": "calibrate",
    "perplexity": "evaluate",
    "prune_": "prune",
    "push_to_hub": "hub",
    "save_model": "hub",
    "to_dense_": "layers",
}

__all__ = [
    "EigenpruneConfig",
    "EigenpruneError",
    "LowRankLinear",
    "PruneReport",
    "Statistics",
    "collect_statistics",
    "perplexity",
    "prune_",
    "push_to_hub",
    "save_model",
    "to_dense_",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


register_plugins()
