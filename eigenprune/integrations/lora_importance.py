# SPDX-License-Identifier: Apache-2.0
"""The importance of singular components, told by the gradients of a LoRA in training: what LoRAPrune prunes by.

The gradient of a weight takes as much memory as the weight. Of a LoRA, B [out, r] and A [r, in], the gradients are at
hand in every training step, and LoRAPrune (arXiv 2305.18403, its equation of the estimated gradient) makes from them

    G ~ dB A + B dA - dB dA,

with dB, dA the gradients of B and A: how a step would move B A, as a stand-in for dL/dW. Its importance of an entry is
(G W)^2; that of a component sigma u v^T is, in the same way, (sigma u^T G v)^2, the squared first-order change of the
loss when it goes.
"""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn
from tqdm import tqdm

from eigenprune.calibrate import Statistics
from eigenprune.calibrate.cache import windows_hash
from eigenprune.calibrate.statistics import Facts
from eigenprune.errors import CalibrationError, ConfigError
from eigenprune.layers import dense_weight, is_dense
from eigenprune.spectral import Components, Metric, components

DECAY = 0.9  # of the running mean over windows, as over the steps of LoRAPrune


def collect_lora_importance(
    model: PeftModel, windows: Tensor, *, adapter: str = "default", progress: bool = True
) -> Statistics:
    """Statistics for the method `lora-prune`: how much each singular component of the adapted weights matters.

        model = get_peft_model(dense, LoraConfig(...))
        ...                                                   # train
        statistics = collect_lora_importance(model, windows)
        merged = model.merge_and_unload()
        prune_(merged, EigenpruneConfig(method="lora-prune", keep=0.8), statistics=statistics)

    Components are those of the weight with the adapter merged into it. The model is as before afterwards, and no layer
    needs the gradient of its weight. Layers without an adapter have no importance, and `prune_` leaves them dense.

    Memory: the components of all adapted layers in float32, twice their weights.

    Args:
        model: with a LoRA, unmerged, around dense layers.
        windows: [windows, window] int64 token ids of the task that the LoRA was trained on.
        adapter: whose gradients.
        progress: show a bar on standard error.

    Raises:
        CalibrationError: no windows, or the model gives no loss on them.
        ConfigError: the adapter is not there, is merged, is no plain LoRA, or is around no dense layer.
    """
    if windows.ndim != 2 or windows.numel() == 0:
        raise CalibrationError(f"windows of shape {tuple(windows.shape)}: [windows, window] with tokens is needed")
    layers = _adapted(model, adapter)
    found = {name: _components(layer, adapter) for name, layer in layers.items()}
    means: dict[str, Tensor] = {}
    training, wanted = model.training, {p: p.requires_grad for p in model.parameters()}
    try:
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for layer in layers.values():
            for part in _factors(layer, adapter):
                part.requires_grad_(True)
        for ids in tqdm(windows, desc="importance", unit="window", disable=not progress, leave=False):
            for name, importance in _of_window(model, ids, layers, found, adapter).items():
                means[name] = importance if name not in means else DECAY * means[name] + (1 - DECAY) * importance
    finally:
        model.train(training)
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
    facts = Facts(
        tokens=windows.numel(),
        output_tokens=windows.numel(),
        windows=windows.shape[0],
        window=windows.shape[1],
        objective="loss of the model",
        compute_dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        texts_hash=windows_hash(windows),
        source="gradients of a LoRA",
    )
    tensors = {f"component_importance.{name}": importance for name, importance in means.items()}
    return Statistics(tensors, {name: name for name in layers}, facts)


def estimated_gradient(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Factors [out, 2 r] and [2 r, in], float64, of the G that the gradients of the adapter stand for.

    dB A + B dA - dB dA = [dB, B - dB] @ [A; dA].
    """
    a, b = _factors(layer, adapter)
    if a.grad is None or b.grad is None:
        raise CalibrationError("the loss does not depend on the adapter: is it active?")
    da, db = a.grad.double(), b.grad.double()
    return torch.cat([db, b.detach().double() - db], 1), torch.cat([a.detach().double(), da])


def _of_window(
    model: nn.Module, ids: Tensor, layers: dict[str, Any], found: dict[str, Components], adapter: str
) -> dict[str, Tensor]:
    """The importances of one window, by layer; gradients that were there stay."""
    parts = [part for layer in layers.values() for part in _factors(layer, adapter)]
    before = [part.grad for part in parts]
    try:
        for part in parts:
            part.grad = None
        batch = ids.unsqueeze(0).to(parts[0].device)
        loss = model(input_ids=batch, labels=batch).loss
        if loss is None or not bool(torch.isfinite(loss)):
            raise CalibrationError("the model gives no finite loss on these windows")
        loss.backward()
        return {name: component_importance(found[name], *estimated_gradient(layers[name], adapter)) for name in layers}
    finally:
        for part, gradient in zip(parts, before, strict=True):
            part.grad = gradient


def component_importance(found: Components, left: Tensor, right: Tensor) -> Tensor:
    """[k] float64 on the CPU: (sigma u^T G v)^2 of every component, with G = left @ right [out, in]."""
    projected = (found.left.double().t() @ left) * (right @ found.right.double().t()).t()  # [k, 2 r]
    return projected.sum(1).square().cpu()


def _components(layer: Any, adapter: str) -> Components:
    weight = dense_weight(layer.get_base_layer()).detach().double()
    a, b = _factors(layer, adapter)
    found = components(weight + layer.scaling[adapter] * b.detach().double() @ a.detach().double(), Metric())
    return Components(found.left.float(), found.right.float())


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r]."""
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def _adapted(model: nn.Module, adapter: str) -> dict[str, Any]:
    """The LoRA layers around dense ones, by the names that the layers have without peft."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {
        name: module
        for name, module in inner.named_modules()
        if isinstance(module, lora.LoraLayer) and is_dense(module.get_base_layer()) and adapter in module.lora_A
    }
    if not layers:
        raise ConfigError(f"the model has no LoRA named {adapter!r} around a dense linear layer")
    if any(layer.merged for layer in layers.values()):
        raise ConfigError("an adapter is merged: call unmerge_adapter() first")
    if any(adapter in layer.lora_variant for layer in layers.values()):
        raise ConfigError(
            f"adapter {adapter!r} is no plain LoRA (DoRA and the like): its gradients mean something else"
        )
    return layers
