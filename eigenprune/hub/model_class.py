# SPDX-License-Identifier: Apache-2.0
"""The class of a checkpoint's model, and the model without its weights."""

from typing import Any

import torch


def model_class(config: Any) -> Any:
    """The class that `config` names, if transformers itself lists it for one of its automatic classes; else None."""
    import transformers

    architecture = (config.architectures or ["AutoModel"])[0]
    return getattr(transformers, architecture, None) if architecture in _listed_classes() else None


def empty_model(config: Any) -> Any:
    """A model of the class that `config` names, on the meta device: names, types and shapes, and no data."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        found = model_class(config)
        model = found(config) if found else AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.tie_weights()
    return model


def _listed_classes() -> set[str]:
    """The class names that transformers itself lists for its automatic classes: the closed list a config may name."""
    from transformers.models.auto import modeling_auto

    tables = [value for name, value in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    names: set[str] = set()
    for table in tables:
        for entry in table.values():
            names.update([entry] if isinstance(entry, str) else entry)
    return names
