# SPDX-License-Identifier: Apache-2.0
"""Freezing at the mean: what it computes, that it can be undone and done again to the bit, and what is refused."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from eigenprune.errors import CheckpointError
from eigenprune.layers import dense_weight
from eigenprune.removal import FrozenPieces, Removal, apply_
from eigenprune.spectral import layer_views
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import logits, tiny_model, token_windows

KINDS = ["llama", "gpt2", "qwen2", "phi3"]
ROUNDINGS = 32 * 2.0**-24  # of one float32 product of 64 to 96 terms, relative to its largest


def removed(model: nn.Module, every: int = 5, mean: float = 0.3, view: str = "head") -> FrozenPieces:
    """`model` without every `every`-th component, frozen at an input of `mean` everywhere."""
    frozen = FrozenPieces(model, layer_views(model, view))
    for name, one in frozen.views.items():
        mask = frozen.empty_mask(name)
        for index, rank in enumerate(one.ranks):
            mask[index, :rank:every] = True
        frozen.set_(name, mask, frozen.delta(name, mask, torch.full((one.shape[1],), mean)))
    return frozen


@pytest.mark.parametrize("view", ["head", "matrix"])
@pytest.mark.parametrize("kind", KINDS)
def test_undoing_gives_every_bit_and_every_missing_bias_back(kind: str, view: str) -> None:
    model = tiny_model(kind)
    before, modes = state_hashes(model), [(n, p.requires_grad) for n, p in model.named_parameters()]
    frozen = removed(model, view=view)
    assert state_hashes(model) != before
    frozen.undo_all_()
    assert state_hashes(model) == before
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == modes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_base_plus_removal_is_the_pruned_model_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(kind, dtype)
    removal = removed(model).removal()
    again = apply_(tiny_model(kind, dtype), removal)
    assert state_hashes(again) == state_hashes(model)
    assert torch.equal(logits(again), logits(model))


def test_a_state_can_be_left_and_brought_back_to_the_bit() -> None:
    model = tiny_model("gpt2")
    frozen = removed(model)
    state, before = frozen.state(), state_hashes(model)
    name = next(iter(frozen.views))
    mask = ~frozen.mask(name)
    frozen.set_(name, mask, frozen.delta(name, mask, torch.ones(64)))
    frozen.undo_(list(frozen.views)[-1])
    assert state_hashes(model) != before
    frozen.restore_(state)
    assert state_hashes(model) == before


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_at_the_mean_input_the_output_is_unchanged_and_elsewhere_it_lacks_the_pieces(kind: str) -> None:
    model = tiny_model(kind)
    base = copy.deepcopy(model)
    frozen = removed(model)
    generator = torch.Generator().manual_seed(0)
    for name, view in frozen.views.items():
        if view.kind == "k" or "k" in view.kind.split("+"):
            continue  # keys of a model without rotary positions get no bias: the next test
        module, old = model.get_submodule(name), base.get_submodule(name)
        mean, x = torch.full((1, view.shape[1]), 0.3), torch.randn(7, view.shape[1], generator=generator)
        assert torch.allclose(module(mean), old(mean), atol=ROUNDINGS * float(old(mean).detach().abs().max()))
        gone = dense_weight(old) - dense_weight(module)
        wanted = old(x) - (x - mean) @ gone.T
        assert torch.allclose(module(x), wanted, atol=ROUNDINGS * float(wanted.detach().abs().max()))


def test_without_all_components_a_layer_says_its_mean_output_whatever_it_reads() -> None:
    model = tiny_model("llama")
    name = "model.layers.0.mlp.up_proj"
    frozen = removed(model)
    mask = torch.ones_like(frozen.empty_mask(name))
    frozen.set_(name, mask, frozen.delta(name, mask, torch.full((64,), 0.3)))
    module = model.get_submodule(name)
    assert bool((dense_weight(module) == 0).all())
    assert torch.equal(module(torch.randn(1, 64)), module(torch.zeros(1, 64)))
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize(("kind", "same"), [("gpt2", True), ("llama", False)])
def test_a_constant_added_to_all_keys_shows_only_where_positions_turn_them(kind: str, same: bool) -> None:
    model = tiny_model(kind).double()
    before = logits(model)
    with torch.no_grad():
        if kind == "gpt2":
            model.transformer.h[0].attn.c_attn.bias[64:128] += torch.randn(64).double()
        else:
            model.model.layers[0].self_attn.k_proj.bias = nn.Parameter(torch.randn(64).double())
    assert torch.allclose(logits(model), before, atol=1e-12) is same


def test_keys_get_no_bias_without_rotary_positions_and_one_with() -> None:
    fused = removed(tiny_model("gpt2"))
    delta = fused.removal().bias_deltas["transformer.h.0.attn.c_attn"]
    assert bool((delta[64:128] == 0).all())
    assert bool((delta[:64] != 0).all())
    assert bool((delta[128:] != 0).all())
    rotary = removed(tiny_model("llama"))
    assert "model.layers.0.self_attn.k_proj" in rotary.removal().bias_deltas


@pytest.mark.parametrize("kind", KINDS)
def test_any_length_and_a_key_value_cache_give_the_same(kind: str) -> None:
    model = tiny_model(kind).double()
    removed(model)
    ids = token_windows(2, 20)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        start = model(input_ids=ids[:, :7], use_cache=True)
        rest = model(input_ids=ids[:, 7:], past_key_values=start.past_key_values, use_cache=True).logits
    assert torch.allclose(torch.cat([start.logits, rest], 1), whole, atol=1e-10)


def test_grouped_queries_share_one_decision_of_their_key_head() -> None:
    model = tiny_model("qwen2")
    frozen = FrozenPieces(model, layer_views(model))
    name = "model.layers.0.self_attn.k_proj"
    mask = frozen.empty_mask(name)
    assert mask.shape == (2, 16)
    mask[1] = True
    frozen.set_(name, mask, frozen.delta(name, mask, torch.zeros(64)))
    weight = dense_weight(model.get_submodule(name))
    assert bool((weight[16:] == 0).all())
    assert bool((weight[:16] != 0).any())


BAD: dict[str, tuple[str, Callable[[Removal], None]]] = {
    "another layer": ("does not have", lambda r: r.masks.update({"model.layers.9.mlp.up_proj": torch.ones(1, 64) > 0})),
    "no dense layer": ("no dense layer", lambda r: r.masks.update({"model.norm": torch.ones(1, 64) > 0})),
    "another shape": ("another model", lambda r: r.masks.update({UP: torch.ones(1, 65) > 0})),
    "no mask": ("of kind", lambda r: r.masks.update({UP: torch.ones(1, 64)})),
    "another kind": ("of kind up here, and of kind down", lambda r: r.kinds.update({UP: "down"})),
    "no view": ("how .* is cut", lambda r: r.views.pop(UP) and None),
    "an unknown view": ("how .* is cut", lambda r: r.views.update({UP: "heads"})),
    "a short bias": ("bias", lambda r: r.bias_deltas.update({UP: torch.ones(3)})),
    "a bias that is no number": ("bias", lambda r: r.bias_deltas.update({UP: torch.full((96,), torch.nan)})),
}
UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("case", BAD)
def test_a_removal_that_does_not_fit_is_refused_and_nothing_changes(case: str) -> None:
    words, damage = BAD[case]
    removal = removed(tiny_model("llama")).removal()
    damage(removal)
    model = tiny_model("llama")
    before = state_hashes(model)
    with pytest.raises(CheckpointError, match=words):
        apply_(model, removal)
    assert state_hashes(model) == before


def test_components_that_a_slice_does_not_have_are_refused() -> None:
    model = tiny_model("phi3")
    removal = removed(tiny_model("phi3"), view="matrix").removal()
    name = "model.layers.0.self_attn.qkv_proj"
    mask: Tensor = removal.masks[name]
    assert mask.shape == (3, 64)
    mask[1, 60] = True  # keys of two heads of 16 have 32
    with pytest.raises(CheckpointError, match="does not have"):
        apply_(model, removal)
