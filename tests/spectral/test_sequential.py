# SPDX-License-Identifier: Apache-2.0
"""Layer-by-layer factoring: against a literal float64 version that runs the whole model for every layer."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eigenprune.calibrate import collect_statistics, sequential_moments
from eigenprune.errors import WeightError
from eigenprune.layers import dense_weight, low_rank_layers
from eigenprune.spectral import factor_sequentially_
from eigenprune.spectral.methods import Method
from tests.calibrate.tiny import EPS, albert, bert, gpt2, linears, llama, t5, windows

SHRINK_INPUT, SHRINK_OUTPUT = 0.05, 0.1
METHODS = {
    "two-sided": Method("gram", "gram", "global", "", SHRINK_INPUT, SHRINK_OUTPUT, shift=1.0),
    "two-sided, residual": Method(
        "gram", "gram", "global", "", SHRINK_INPUT, SHRINK_OUTPUT, shift=1.0, mend_residual=True
    ),
    "one-sided, mixed": Method("gram", "none", "uniform", "", SHRINK_INPUT, shift=0.4),
}
RANK = 8


def _inputs(model: nn.Module, layer: str, ids: Tensor) -> Tensor:
    """All inputs of `layer`, [tokens, in]: the whole model runs, one window after another."""
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for row in ids:
            model(row.unsqueeze(0))
    handle.remove()
    return torch.cat(seen)


# What the output of the layers that end in the first of these is added to is what the second reads (None: the block).
STREAMS = {"o_proj": None, "down_proj": "post_attention_layernorm", "attn.c_proj": None, "mlp.c_proj": "ln_2"}


def _stream(model: nn.Module, layer: str, ids: Tensor) -> Tensor | None:
    """The residual stream to which `layer` adds its output, [tokens, width]; None for the other layers."""
    for end, reader in STREAMS.items():
        if layer.endswith(end):
            block = ".".join(layer.split(".")[:3])
            return _inputs(model, block if reader is None else f"{block}.{reader}", ids)
    return None


def _literal(model: nn.Module, ids: Tensor, order: list[list[str]], method: Method, statistics) -> nn.Module:
    """Dense weights of the product of the factors, made layer by layer with explicit inverses and an SVD."""
    pruned = copy.deepcopy(model)
    for members in order:
        x, shifted = _inputs(model, members[0], ids), _inputs(pruned, members[0], ids)
        for name in members:
            weight = dense_weight(model.get_submodule(name)).detach()
            gram, cross = shifted.t() @ shifted / len(x), x.t() @ shifted / len(x)
            pull = SHRINK_INPUT * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
            lower = torch.linalg.cholesky((1 - SHRINK_INPUT) * gram + pull)
            beta = method.shift or 0.0
            moment = weight @ ((1 - SHRINK_INPUT) * (beta * cross + (1 - beta) * gram) + pull)
            stream = _stream(model, name, ids) if method.mend_residual else None
            if stream is not None:
                lost = stream - _stream(pruned, name, ids)
                moment += (1 - SHRINK_INPUT) * lost.t() @ shifted / len(x)
            wanted = moment @ lower.inverse().t()
            root = torch.eye(len(weight), dtype=weight.dtype)
            if method.output_metric == "gram":
                fisher = statistics.output_gram(name).double()
                mean = fisher.diagonal().mean() * torch.eye(len(fisher), dtype=fisher.dtype)
                root = torch.linalg.cholesky((1 - SHRINK_OUTPUT) * fisher + SHRINK_OUTPUT * mean).t()
            u, s, vh = torch.linalg.svd(root @ wanted, full_matrices=False)
            product = root.inverse() @ (u[:, :RANK] * s[:RANK]) @ vh[:RANK] @ lower.inverse()
            target = dense_weight(pruned.get_submodule(name))
            with torch.no_grad():
                target.copy_(product)
    return pruned


def _order(kind: str, layers: dict[str, nn.Module]) -> list[list[str]]:
    if kind == "gpt2":
        return [[name] for name in layers]
    steps = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    return [
        [name for name in layers if f"layers.{block}." in name and name.endswith(step)]
        for block in range(2)
        for step in steps
    ]


def _factor(model: nn.Module, ids: Tensor, method: Method, statistics, **settings) -> None:
    layers = linears(model)
    ranks = dict.fromkeys(layers, RANK)
    factor_sequentially_(model, layers, ranks, method, statistics, ids, "pair", progress=False, **settings)


def _measured(model: nn.Module, ids: Tensor):
    return collect_statistics(model, ids, linears(model), progress=False)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_matches_the_literal_version(kind: str, method: Method) -> None:
    ids = windows(6)
    model = {"llama": llama, "gpt2": gpt2}[kind]().double().eval()
    statistics = _measured(model, ids)
    wanted = _literal(model, ids, _order(kind, linears(model)), method, statistics)
    _factor(model, ids, method, statistics)
    assert low_rank_layers(model).keys() == linears(wanted).keys()
    with torch.no_grad():
        difference = model(ids).logits - wanted(ids).logits
        size = wanted(ids).logits
    # Moments are summed in float32; a shrinkage of 0.05 bounds their condition by some 20 x 48, the truncation's gap
    # costs the same again, and errors add along the 14 layers of the two blocks.
    assert float(difference.norm() / size.norm()) < 14 * EPS * (20 * 48) ** 1.5


def test_layers_that_are_not_chosen_stay_and_the_first_ones_see_no_shift() -> None:
    ids = windows(3)
    model = llama().double().eval()
    layers = linears(model)
    wanted = {name: module for name, module in layers.items() if "layers.1.mlp" in name}
    groups = _measured(model, ids).input_group
    seen = []
    for moments in sequential_moments(model, ids, wanted, groups, progress=False):
        seen += moments.layers
        if moments.layers[0].endswith("gate_proj"):
            assert torch.equal(moments.gram, moments.gram.t())
            assert float((moments.gram - moments.cross).norm() / moments.gram.norm()) < 100 * EPS
    assert seen == list(wanted)
    assert low_rank_layers(model) == {}


@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_leaves_modes_flags_and_hooks_as_they_were(make) -> None:
    ids = windows(3)
    model = make().train()
    model.get_parameter(next(iter(linears(model))) + ".weight").requires_grad_(False)
    statistics = _measured(model, ids)
    flags = {name: module.weight.requires_grad for name, module in linears(model).items()}
    _factor(model, ids, METHODS["two-sided"], statistics)
    assert all(module.training for module in model.modules())
    assert {n: m.left.weight.requires_grad for n, m in low_rank_layers(model).items()} == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("make", [albert, t5])
def test_blocks_that_cannot_run_on_their_own_are_left_dense(make) -> None:
    ids = windows(3)
    model = make().eval()
    _factor(model, ids, METHODS["two-sided"], _measured(model, ids))
    left = low_rank_layers(model)
    assert make is t5 or left == {}
    assert not any("decoder" in name for name in left)


@pytest.mark.parametrize("keep_dense", [True, False])
def test_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path, keep_dense: bool) -> None:
    ids = windows(4)
    whole, broken = llama().eval(), llama().eval()
    statistics = _measured(whole, ids)
    _factor(whole, ids, METHODS["two-sided"], statistics)

    class Kill(Exception):
        pass

    def kill(_module: nn.Module, _args: tuple[Tensor, ...]) -> None:
        if len(low_rank_layers(broken)) == 11:
            raise Kill

    handle = broken.model.layers[1].mlp.gate_proj.register_forward_pre_hook(kill)
    with pytest.raises(Kill):
        _factor(broken, ids, METHODS["two-sided"], statistics, cache_dir=tmp_path)
    handle.remove()
    assert len(list(tmp_path.rglob("*.safetensors"))) >= 5
    (next(tmp_path.rglob("*self_attn.o_proj.safetensors"))).write_bytes(b"damaged")
    resumed = llama().eval()
    layers = linears(resumed)
    factor_sequentially_(
        resumed,
        layers,
        dict.fromkeys(layers, RANK),
        METHODS["two-sided"],
        statistics,
        ids,
        "pair",
        cache_dir=tmp_path,
        keep_dense=keep_dense,
        progress=False,
    )
    assert list(tmp_path.iterdir()) == []
    assert bool(layers) == keep_dense
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_infinity_behind_the_pruned_prefix_is_named() -> None:
    ids = windows(2)
    model = llama().eval()
    groups = _measured(model, ids).input_group
    moments = sequential_moments(model, ids, linears(model), groups, progress=False)
    next(moments)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(torch.inf)
    with pytest.raises(WeightError, match=r"layers\.0\.self_attn\.o_proj"):
        next(moments)
