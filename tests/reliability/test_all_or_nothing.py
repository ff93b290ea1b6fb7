# SPDX-License-Identifier: Apache-2.0
"""`prune_` that fails at any layer and in any stage leaves the model as it was (row G39)."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.quantizers.auto import AutoHfQuantizer

from eigenprune import EigenpruneConfig, prune_
from eigenprune.integrations.transformers import EigenpruneHfQuantizer
from eigenprune.layers import LowRankLinear, select_layers
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import logits, tiny_model, token_windows

choose, factor, main_path, savable = (
    importlib.import_module(f"eigenprune.prune.{step}") for step in ("choose", "factor", "prune", "savable")
)
factored = importlib.import_module("eigenprune.spectral.factored")


class Injected(Exception):
    """A failure that nothing here expects."""


def _picture(model: nn.Module) -> tuple[Any, ...]:
    return (
        state_hashes(model),
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()],
        sorted(vars(model)),
        [sorted(vars(part.config)) for part in model.modules() if hasattr(part, "config")],
        model.config.to_dict(),
    )


def _prune(model: nn.Module) -> None:
    config = EigenpruneConfig(keep=0.6, allocation="uniform")
    prune_(model, config, windows=token_windows(), progress=False)


def _at(call: int, real: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """`real`, but `error` at one call, before anything is done."""
    left = [call]

    def run(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return real(*args, **kwargs)

    return run


LAYERS = len(select_layers(tiny_model("gpt2")).chosen)
# Stage -> (owner, attribute): what the stage calls once for each layer.
PER_LAYER = {
    "spectra": (choose, "rank_options"),
    "factors": (factor, "layer_of_factors"),
    "pivots": (factored, "pivot_factors"),
    "new layer": (LowRankLinear, "from_factors"),
    "swapping": (factor, "replace_module_"),
}


@pytest.mark.parametrize("stage", PER_LAYER)
def test_g39_failure_at_any_layer_leaves_the_model_as_it_was(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = PER_LAYER[stage]
    model = tiny_model("gpt2").train()
    before = _picture(model)
    for layer in range(LAYERS):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, _once(_at(layer, getattr(owner, name), Injected()), getattr(owner, name)))
            with pytest.raises(Injected):
                _prune(model)
        assert _picture(model) == before, layer
    _prune(model)  # and then it goes well
    assert sum(isinstance(module, LowRankLinear) for module in model.modules()) == LAYERS


def _once(flaky: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """`flaky` until it has failed, then `real`: putting things back uses the same functions."""
    failed: list[bool] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        if failed:
            return real(*args, **kwargs)
        try:
            return flaky(*args, **kwargs)
        except BaseException:
            failed.append(True)
            raise

    return run


# After the last layer is swapped: (owner, attribute).
LATE = {
    "report": (main_path, "layer_reports"),
    "facts of the base": (savable, "base_facts"),
    "versions": (savable, "versions"),
    "quantizer": (AutoHfQuantizer, "from_config"),
    "end of the quantizer": (EigenpruneHfQuantizer, "_process_model_after_weight_loading"),
}


@pytest.mark.parametrize("error", [Injected(), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("stage", LATE)
def test_g39_failure_after_the_last_layer_leaves_the_model_as_it_was(
    stage: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = LATE[stage]
    model = tiny_model("llama").eval()
    before, output = _picture(model), logits(model)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _at(0, getattr(owner, name), error))
        with pytest.raises(type(error)):
            _prune(model)
    assert _picture(model) == before
    assert torch.equal(logits(model), output)


def test_g39_name_that_no_config_can_hold_is_found_before_the_model_is_half_pruned() -> None:
    model = tiny_model("llama")
    model.model.layers[1].add_module("odd-name", nn.Linear(64, 64))
    before = _picture(model)
    with pytest.warns(UserWarning, match="no data"), pytest.raises(ValueError, match="odd-name"):
        prune_(model, EigenpruneConfig(keep=0.6, method="svd", allocation="uniform"), progress=False)
    assert _picture(model) == before
