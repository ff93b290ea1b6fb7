# SPDX-License-Identifier: Apache-2.0
"""Level 0 of eigenpruning's tests: the pieces are the SVD, their worth is the derivative, fused or apart."""

import pytest
import torch
from torch import Tensor, nn

from eigenprune.calibrate import Passage, passage_gradients, passage_losses
from eigenprune.errors import WeightError
from eigenprune.layers import dense_weight
from eigenprune.spectral import LayerView, layer_views, slice_parts, slice_pieces, without_pieces
from tests.helpers.tiny_models import tiny_model
from tests.helpers.worth import passages, piece_matrices, tokens_of

SINGLE = 1e-5  # relative, of float32 sums of some hundred products: 100 roundings of 2^-24, and some room


def close(found: Tensor, wanted: Tensor, relative: float = SINGLE) -> bool:
    return float((found - wanted).abs().max()) <= relative * float(wanted.abs().max())


def views_of(kind: str, view: str = "head") -> tuple[nn.Module, dict[str, LayerView]]:
    model = tiny_model(kind)
    return model, layer_views(model, view)


@pytest.mark.parametrize("view", ["head", "matrix"])
@pytest.mark.parametrize("kind", ["gpt2", "phi3", "qwen2"])
def test_pieces_are_the_svd_and_sum_to_the_weight(kind: str, view: str) -> None:
    model, views = views_of(kind, view)
    for name, one in views.items():
        weight = dense_weight(model.get_submodule(name)).detach()
        pieces = slice_pieces(weight, one)
        whole = torch.stack([piece for own in piece_matrices(weight, one, pieces) for piece in own]).sum(0)
        assert close(whole, weight.double(), 1e-12)
        for part, found in zip(slice_parts(weight.double(), one), pieces, strict=True):
            u, s, vh = torch.linalg.svd(part, full_matrices=False)
            assert close(found.sigmas, s, 1e-9)
            mask = torch.arange(len(s)) == 2
            assert close(found.removed(part, mask), s[2] * torch.outer(u[:, 2], vh[2]), 1e-8)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_closed_form_equals_the_sum_over_tokens(kind: str) -> None:
    model, views = views_of(kind)
    chosen = passages()
    layers = {name: model.get_submodule(name) for name in views}
    found = passage_gradients(model, chosen, layers, batch=4)
    for name, one in views.items():
        tokens = tokens_of(model, layers[name], chosen)
        mean = torch.cat([x for x, _ in tokens]).mean(0)
        assert close(found.input_mean[name].double(), mean)
        weight = dense_weight(layers[name]).detach()
        pieces = slice_pieces(weight, one)
        parts, gradient = slice_parts(weight.double(), one), slice_parts(found.frozen(name), one)
        worth = torch.cat([p.products(a, m) for p, a, m in zip(pieces, parts, gradient, strict=True)])
        literal = torch.stack(
            [
                sum((g * ((mean - x) @ piece.T)).sum() for x, g in tokens) / len(chosen)
                for own in piece_matrices(weight, one, pieces)
                for piece in own
            ]
        )
        assert close(worth, literal, 10 * SINGLE)  # sums over tokens cancel: their terms are larger than they are


def test_worth_is_the_derivative_of_the_loss_along_the_freeze() -> None:
    model, views = views_of("llama")
    model.double()
    chosen = passages(3)
    name = "model.layers.0.mlp.up_proj"
    module = model.get_submodule(name)
    weight, one = dense_weight(module).detach(), views[name]
    pieces = slice_pieces(weight, one)
    matrices = piece_matrices(weight, one, pieces)[0]
    mean = torch.cat([x for x, _ in tokens_of(model, module, chosen)]).mean(0)
    found = passage_gradients(model, chosen, {name: module})
    worth = pieces[0].products(weight, found.frozen(name))

    def loss(step: float, piece: Tensor) -> float:
        handle = module.register_forward_hook(lambda _m, args, output: output + step * (mean - args[0]) @ piece.T)
        with torch.no_grad():
            total = passage_losses(model, chosen)[0].double().mean()
        handle.remove()
        return float(total)

    step = 1e-2  # the losses are float32: 1e-7 of them over the step, beside a curvature of its square
    slopes = torch.tensor([(loss(step, matrices[i]) - loss(-step, matrices[i])) / (2 * step) for i in range(6)])
    assert close(slopes.double(), worth[:6], 2e-2)


def test_fused_and_separate_weights_have_the_same_worth() -> None:
    fused = tiny_model("phi3")
    apart = tiny_model("qwen2")
    for module in apart.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = fused.config.rms_norm_eps
    with torch.no_grad():
        apart.load_state_dict(_unfused(fused.state_dict(), apart.state_dict()))
    chosen = passages()
    one, other = layer_views(fused), layer_views(apart)
    first = passage_gradients(fused, chosen, {name: fused.get_submodule(name) for name in one})
    second = passage_gradients(apart, chosen, {name: apart.get_submodule(name) for name in other})
    attention = "model.layers.1.self_attn."
    whole = _worths(fused, one[attention + "qkv_proj"], first.frozen(attention + "qkv_proj"))
    parts = [_worths(apart, other[attention + n], second.frozen(attention + n)) for n in ("q_proj", "k_proj", "v_proj")]
    assert close(whole, torch.cat(parts), 10 * SINGLE)


def _unfused(fused: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for name, value in like.items():
        layer, _, leaf = name.rpartition(".")
        stem, _, last = layer.rpartition(".")
        if last in ("q_proj", "k_proj", "v_proj"):
            place = {"q_proj": (0, 64), "k_proj": (64, 32), "v_proj": (96, 32)}[last]
            whole = fused.get(f"{stem}.qkv_proj.{leaf}")
            made[name] = torch.zeros_like(value) if whole is None else whole.narrow(0, *place)
        elif last in ("gate_proj", "up_proj"):
            made[name] = fused[f"{stem}.gate_up_proj.weight"].narrow(0, 96 * (last == "up_proj"), 96)
        else:
            made[name] = fused[name]
    return made


def _worths(model: nn.Module, view: LayerView, gradient: Tensor) -> Tensor:
    weight = dense_weight(model.get_submodule(view.name)).detach()
    parts = zip(
        slice_pieces(weight, view), slice_parts(weight.double(), view), slice_parts(gradient, view), strict=True
    )
    return torch.cat([pieces.products(part, own) for pieces, part, own in parts])


def test_slices_that_lose_nothing_keep_their_bits_and_one_that_loses_all_is_zero() -> None:
    model, views = views_of("gpt2")
    name = "transformer.h.0.attn.c_attn"
    weight, one = dense_weight(model.get_submodule(name)).detach(), views[name]
    mask = torch.zeros(len(one.slices), max(one.ranks), dtype=torch.bool)
    mask[1], mask[2, 0] = True, True
    parts = slice_parts(without_pieces(weight, one, slice_pieces(weight, one), mask), one)
    for index, (part, base) in enumerate(zip(parts, slice_parts(weight, one), strict=True)):
        assert bool((part == 0).all()) == (index == 1)
        assert torch.equal(part, base) == (index not in (1, 2))


def test_equal_singular_values_are_told_apart_from_others() -> None:
    one = layer_views(tiny_model("llama"), "matrix")["model.layers.0.self_attn.q_proj"]
    left, _ = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))
    values = torch.linspace(2, 1, 64, dtype=torch.float64)
    values[7], values[63] = values[6], 0
    found = slice_pieces(left @ torch.diag(values) @ right, one)[0].separable()
    assert (~found).nonzero().flatten().tolist() == [6, 7, 63]


def test_a_weight_with_nan_is_named() -> None:
    _, views = views_of("llama")
    one = views["model.layers.0.mlp.up_proj"]
    with pytest.raises(WeightError, match=r"layers\.0\.mlp\.up_proj"):
        slice_pieces(torch.full(one.shape, torch.nan), one)


def test_memory_of_gradients_does_not_grow_with_the_passages() -> None:
    model, views = views_of("llama")
    layers = {name: model.get_submodule(name) for name in views}
    few, many = passages(4, 4), passages(64, 4)
    sizes = [
        sum(t.untyped_storage().nbytes() for part in (g.weight, g.output, g.input_mean) for t in part.values())
        for g in (passage_gradients(model, chosen, layers, batch=4) for chosen in (few, many))
    ]
    assert sizes[0] == sizes[1] == 4 * sum(o * i + o + i for o, i in (view.shape for view in views.values()))


def test_a_batch_of_one_is_enough_for_the_exact_worth() -> None:
    model, views = views_of("llama")
    name = next(iter(views))
    layers = {name: model.get_submodule(name)}
    one = passage_gradients(model, [Passage((5, 6, 7))], layers, batch=1)
    assert torch.isfinite(one.frozen(name)).all()
