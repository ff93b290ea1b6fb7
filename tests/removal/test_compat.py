# SPDX-License-Identifier: Apache-2.0
"""Level 1: the released rule against a slow NumPy version, written from its description, with identical masks."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eigenprune.calibrate import Passage
from eigenprune.errors import CalibrationError
from eigenprune.removal import FrozenPieces, remove_
from eigenprune.removal.compat import compat_scores, pooled_masks
from eigenprune.spectral import layer_views
from tests.helpers.tiny_models import tiny_model, token_windows
from tests.removal.test_remove import examples

HEADS, WIDTH, BATCH, LENGTH = 4, 16, 5, 6


def prompts(count: int = 10) -> list[Passage]:
    return [Passage(tuple(row), LENGTH) for row in token_windows(count, LENGTH + 1).tolist()]


def parts(model: nn.Module, layer: int, kind: str) -> tuple[np.ndarray, slice]:
    """W of one kind as [in, out] in float64, and where its outputs stand in those of its module."""
    if model.config.model_type == "gpt2":
        place = slice(64 * "qkv".index(kind), 64 * "qkv".index(kind) + 64)
        return model.transformer.h[layer].attn.c_attn.weight.detach().double().numpy()[:, place], place
    weight = getattr(model.model.layers[layer].self_attn, f"{kind}_proj").weight
    return weight.detach().double().numpy().T, slice(0, 64)


def gradients_and_inputs(
    model: nn.Module, rows: list[Passage]
) -> tuple[list[np.ndarray], dict[tuple[int, str], np.ndarray]]:
    """Block inputs by layer, and the gradient of the batch's mean loss at each layer's q, k and v."""
    kept: dict[tuple[int, str], torch.Tensor] = {}
    handles = []
    for layer in range(2):
        if model.config.model_type == "gpt2":
            modules = {"qkv": model.transformer.h[layer].attn.c_attn}
        else:
            attention = model.model.layers[layer].self_attn
            modules = {kind: getattr(attention, f"{kind}_proj") for kind in "qkv"}
        for kind, module in modules.items():

            def keep(_m: nn.Module, _a: object, output: torch.Tensor, key: tuple[int, str] = (layer, kind)) -> None:
                output.retain_grad()
                kept[key] = output

            handles.append(module.register_forward_hook(keep))
    ids = torch.tensor([row.ids[:LENGTH] for row in rows])
    output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    F.cross_entropy(output.logits[:, -1], torch.tensor([row.ids[LENGTH] for row in rows])).backward()
    for handle in handles:
        handle.remove()
    found = {}
    for (layer, names), value in kept.items():
        gradient = value.grad.double().numpy()
        for index, kind in enumerate(names):
            found[layer, kind] = gradient[..., 64 * index : 64 * index + 64] if len(names) > 1 else gradient
    return [hidden.detach().double().numpy() for hidden in output.hidden_states], found


def oracle(model: nn.Module, rows: list[Passage], kinds: str, fraction: float) -> set[tuple[int, str, int, int]]:
    """The components that go: (layer, kind, head, piece)."""
    scores: dict[tuple[int, str, int, int], float] = {}
    for start in range(0, len(rows), BATCH):
        inputs, gradients = gradients_and_inputs(model, rows[start : start + BATCH])
        for layer in range(2):
            for kind in kinds:
                weight, _ = parts(model, layer, kind)
                for head in range(HEADS):
                    place = slice(WIDTH * head, WIDTH * head + WIDTH)
                    u, s, vt = np.linalg.svd(weight[:, place], full_matrices=False)
                    for n in range(BATCH):
                        for t in range(LENGTH):
                            swapped = inputs[layer][n - 1, t] - inputs[layer][n, t]
                            for i in range(WIDTH):
                                effect = s[i] * (u[:, i] @ swapped) * (vt[i] @ gradients[layer, kind][n, t, place])
                                key = (layer, kind, head, i)
                                scores[key] = max(scores.get(key, -np.inf), float(effect))
    order = sorted(scores, key=lambda key: (scores[key], key[0], "qkv".index(key[1]), key[2], key[3]))
    gone = set()
    for kind in kinds:
        quota = int(fraction * sum(key[1] == kind for key in order))
        gone |= {key for key in order[:quota] if key[1] == kind}
    return gone


@pytest.mark.parametrize("kinds", ["k", "qv"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_masks_are_those_of_the_slow_version(kind: str, kinds: str) -> None:
    model = tiny_model(kind)
    rows = prompts()
    frozen = FrozenPieces(model, layer_views(model, kinds=list(kinds)))
    scores = compat_scores(frozen, rows, BATCH)
    for fraction in (0.1, 0.5):
        masks = pooled_masks(frozen, scores.worth, tuple(kinds), fraction)
        found = set()
        for name, mask in masks.items():
            layer = int(name.split(".")[2])
            parted = frozen.views[name].slices
            found |= {(layer, parted[i].kind, parted[i].head, j) for i, j in mask.nonzero().tolist()}
        assert found == oracle(model, rows, kinds, fraction)
        assert found


def test_the_bias_sums_the_last_batch_over_positions() -> None:
    model = tiny_model("llama")
    rows = prompts(7)
    rows = rows[:5] + rows[5:]
    frozen = FrozenPieces(model, layer_views(model, kinds=["k"]))
    scores = compat_scores(frozen, rows, BATCH)
    inputs, _ = gradients_and_inputs(model, rows[5:])
    for layer in range(2):
        wanted = inputs[layer].mean(0).sum(0)
        found = scores.inputs[f"model.layers.{layer}.self_attn.k_proj"].numpy()
        assert np.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_batch_of_one_is_refused_and_not_silently_scored_zero() -> None:
    model = tiny_model("llama")
    frozen = FrozenPieces(model, layer_views(model, kinds=["k"]))
    with pytest.raises(CalibrationError, match="batch of one"):
        compat_scores(frozen, prompts(6), BATCH)


def test_feed_forward_kinds_are_scored_at_what_the_code_calls_their_input() -> None:
    model = tiny_model("gpt2")
    report = remove_(
        model,
        examples(10),
        held_out=examples(5, 4),
        retention=token_windows(2, 12),
        worth="compat",
        kinds=["up", "down", "o"],
        progress=False,
    )
    assert set(report.worth) == {
        f"transformer.h.{i}.{n}" for i in (0, 1) for n in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
