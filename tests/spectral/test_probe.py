# SPDX-License-Identifier: Apache-2.0
"""What the model does with one matrix pruned, and what its blocks do, against the definitions in float64."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eigenprune.layers import LowRankLinear, dense_weight, replace_module_, select_layers
from eigenprune.spectral.probe import block_influence, probe_ranks
from tests.helpers.tiny_models import logits, tiny_model, token_windows

RANKS = {"model.layers.0.self_attn.q_proj": [4, 16], "model.layers.1.mlp.down_proj": [8]}
# Of a float32 forward of two blocks, some 20 products deep with sums over 64 terms, in logits of size one; the KL
# divergence, a second-order quantity, adds its square root's conditioning.
RUN = 20 * 8 * torch.finfo(torch.float32).eps


def factored(layers: dict[str, nn.Module]):
    def make(name: str, rank: int) -> nn.Module:
        u, s, vh = torch.linalg.svd(dense_weight(layers[name]).detach(), full_matrices=False)
        return LowRankLinear.from_factors(u[:, :rank] * s[:rank], vh[:rank])

    return make


def literal(model: nn.Module, name: str, rank: int, ids: Tensor, measure: str) -> float:
    """KL(dense || pruned), or the pruned model's loss, token by token in float64."""
    dense, pruned = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    weight = pruned.get_submodule(name).weight
    u, s, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
    with torch.no_grad():
        weight.copy_((u[:, :rank] * s[:rank]) @ vh[:rank])
        values = []
        for row in ids:
            logp, logq = (m(input_ids=row[None]).logits[0].log_softmax(-1) for m in (dense, pruned))
            if measure == "kl":
                values += [float((logp[t].exp() * (logp[t] - logq[t])).sum()) for t in range(len(row))]
            else:
                values += [-float(logq[t, row[t + 1]]) for t in range(len(row) - 1)]
    return sum(values) / len(values)


@pytest.mark.parametrize("measure", ["kl", "loss"])
def test_probes_measure_what_they_say_and_leave_the_model_alone(measure: str) -> None:
    model = tiny_model("llama")
    layers, ids, before = select_layers(model).chosen, token_windows(2, 16), logits(model)
    model.train()
    found = probe_ranks(model, layers, factored(layers), RANKS, ids, measure=measure, progress=False)
    assert model.training
    assert {name: list(table) for name, table in found.items()} == RANKS
    assert torch.equal(logits(model.eval()), before)
    for name, ranks in RANKS.items():
        assert model.get_submodule(name) is layers[name]
        for rank in ranks:
            wanted = literal(model, name, rank, ids, measure)
            assert found[name][rank] == pytest.approx(wanted, rel=RUN, abs=RUN * wanted**0.5)
            assert wanted > 1e-3


def test_probes_of_an_encoder_without_a_head_are_squared_errors() -> None:
    model = tiny_model("bert").bert
    layers, ids = select_layers(model).chosen, token_windows(1, 12)
    name = next(iter(layers))
    found = probe_ranks(model, layers, factored_with_bias(layers), {name: [4]}, ids, measure="loss", progress=False)
    with torch.no_grad():
        dense = model(input_ids=ids).last_hidden_state
        replace_module_(model, name, factored_with_bias(layers)(name, 4))
        pruned = model(input_ids=ids).last_hidden_state
    wanted = 0.5 * float((dense - pruned).double().square().sum()) / 12
    assert found[name][4] == pytest.approx(wanted, rel=1e-4)


def factored_with_bias(layers: dict[str, nn.Module]):
    def make(name: str, rank: int) -> nn.Module:
        u, s, vh = torch.linalg.svd(dense_weight(layers[name]).detach(), full_matrices=False)
        return LowRankLinear.from_factors(u[:, :rank] * s[:rank], vh[:rank], bias=layers[name].bias)

    return make


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model = tiny_model("llama")
    layers, ids, file = select_layers(model).chosen, token_windows(1, 12), tmp_path / "probes.jsonl"
    calls: list[tuple[str, int]] = []

    def make(name: str, rank: int) -> nn.Module:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append((name, rank))
        return factored(layers)(name, rank)

    with pytest.raises(KeyboardInterrupt):
        probe_ranks(model, layers, make, RANKS, ids, file=file, progress=False)
    assert all(model.get_submodule(name) is layers[name] for name in RANKS)
    with file.open("a") as out:
        out.write('["model.layers.1.mlp.down_')  # cut off by the kill
    calls.clear()
    resumed = probe_ranks(model, layers, make, RANKS, ids, file=file, progress=False)
    assert calls == [("model.layers.1.mlp.down_proj", 8)]
    assert resumed == probe_ranks(model, layers, factored(layers), RANKS, ids, progress=False)


def test_influence_is_one_minus_the_cosine_over_a_block() -> None:
    model, ids = tiny_model("llama"), token_windows(2, 16)
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "lm_head"]
    found = block_influence(model, ids, names)
    with torch.no_grad():
        states = model.double()(input_ids=ids, output_hidden_states=True).hidden_states
    for block in (0,):  # the last state of transformers has the final norm in it
        wanted = 1 - torch.cosine_similarity(states[block], states[block + 1], dim=-1).mean()
        assert found[names[block]] == pytest.approx(float(wanted), rel=1e-4)
    assert found["lm_head"] == 1.0
    assert 0 < found[names[1]] < 2
