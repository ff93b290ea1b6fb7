# SPDX-License-Identifier: Apache-2.0
"""Streamed statistics against a slow float64 computation that keeps every activation and gradient."""

import pytest
import torch
from torch import Tensor, nn

from eigenprune.calibrate import collect_statistics
from eigenprune.calibrate.objective import model_inputs
from tests.calibrate import tiny
from tests.calibrate.tiny import error, linears, slow_statistics

ALL = ("input_gram", "output_gram", "weight_gradient")


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eigenprune.calibrate.collect.has_fast_bfloat16", lambda device: False)


def seed_of(index: int) -> torch.Generator:
    return torch.Generator().manual_seed(index)  # of window `index` at seed 0


def sampled_loss(draws_from: nn.Module):
    """Summed loss on labels drawn from the float32 model, as the definition of the sampled Fisher says."""

    def loss(model: nn.Module, ids: Tensor, index: int) -> Tensor:
        with torch.no_grad():
            drawn_from = draws_from(**model_inputs(draws_from, ids)).logits[0].softmax(-1)
        labels = torch.multinomial(drawn_from, 1, generator=seed_of(index))
        return -model(**model_inputs(model, ids)).logits[0].log_softmax(-1).gather(1, labels).sum()

    return loss


def noise_loss(model: nn.Module, ids: Tensor, index: int) -> Tensor:
    hidden = model(**model_inputs(model, ids)).last_hidden_state
    return (hidden * torch.randn(hidden.shape, generator=seed_of(index))).sum()


MODELS = {
    "llama": (tiny.llama, None),
    "gpt2": (tiny.gpt2, None),
    "bert-mlm": (tiny.bert, sampled_loss),
    "bert-trunk": (lambda: tiny.bert("BertModel"), noise_loss),
    "albert": (tiny.albert, sampled_loss),  # every layer runs three times a window
    "t5": (tiny.t5, sampled_loss),
}


@pytest.mark.parametrize("name", MODELS)
def test_all_statistics_equal_the_slow_computation(exact: None, name: str) -> None:
    make, loss = MODELS[name]
    model, ids = make().eval(), tiny.windows()
    if loss is sampled_loss:
        loss = sampled_loss(model)
    layers = linears(model)
    wanted = slow_statistics(model, ids, layers, loss or tiny.causal_loss, drop_edges=loss is None)
    got = collect_statistics(model, ids, layers, kinds=ALL, progress=False)
    assert set(got.input_group) == set(layers)
    for layer, kinds in wanted.items():
        for kind, value in kinds.items():
            found = getattr(got, kind)(layer)
            assert found.dtype == torch.float32
            assert found.shape == value.shape
            # A mean may cancel, as the gradient of a key's bias does: its error is that of what was summed.
            gram = {"input_mean": "input_gram", "output_gradient_mean": "output_gram"}.get(kind)
            size = kinds[gram].trace().sqrt() if gram else value.norm()
            slack = 0.0
            if name == "t5" and kind == "output_gram" and layer.endswith(("SelfAttention.q", "SelfAttention.k")):
                # The first decoder position attends to itself alone, so the gradient is zero; rounding gives it a
                # direction, and clipping a tenth of the mean norm: one token a window of a hundredth of the trace.
                slack = 2 * 0.1**2 / tiny.WINDOW * float(value.trace() / value.norm())
            assert float((found.double() - value).norm() / size) <= tiny.FLOAT32_RUN + slack, f"{layer} {kind}"
    assert got.facts.tokens == ids.numel()
    assert got.facts.output_tokens == (4 * (tiny.WINDOW - 2 * (tiny.WINDOW // 8)) if loss is None else ids.numel())


def test_bfloat16_runs_stay_near_the_slow_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eigenprune.calibrate.collect.has_fast_bfloat16", lambda device: True)
    model, ids = tiny.llama().eval(), tiny.windows()
    wanted = slow_statistics(model, ids, linears(model), tiny.causal_loss, drop_edges=True)
    got = collect_statistics(model, ids, linears(model), kinds=ALL, progress=False)
    assert got.facts.compute_dtype == "bfloat16"
    # Operands rounded to 8 bits in each of some 40 products; the errors add like a random walk.
    bound = 40**0.5 * torch.finfo(torch.bfloat16).eps
    for layer in linears(model):
        for kind in ALL:
            assert error(getattr(got, kind)(layer), wanted[layer][kind]) <= bound, f"{layer} {kind}"
    assert next(model.parameters()).dtype == torch.float32


def test_a_bfloat16_model_runs_as_it_is_and_sums_in_float32() -> None:
    model = tiny.llama().bfloat16()
    got = collect_statistics(model, tiny.windows(), linears(model), progress=False)
    assert got.facts.compute_dtype == "bfloat16"
    assert all(tensor.dtype == torch.float32 for tensor in got.tensors.values())


def test_token_norms_are_clipped_before_they_are_squared(exact: None) -> None:
    # With one embedding a thousand times smaller, a norm below it meets a gradient of another size: clipping matters.
    model, ids = tiny.llama(num_hidden_layers=1).eval(), tiny.windows(2)
    ids[:, 10] = 7
    with torch.no_grad():
        model.model.embed_tokens.weight[7] *= 1e-4
    loss = tiny.causal_loss
    layers = {"model.layers.0.self_attn.v_proj": model.model.layers[0].self_attn.v_proj}
    wanted = slow_statistics(model, ids, layers, loss, drop_edges=True)
    got = collect_statistics(model, ids, layers, progress=False)
    for layer in layers:
        assert error(got.output_gram(layer), wanted[layer]["output_gram"]) <= tiny.FLOAT32_RUN


def test_layers_that_read_one_input_share_its_gram_and_others_do_not(exact: None) -> None:
    model = tiny.llama()
    got = collect_statistics(model, tiny.windows(1), linears(model), kinds=("input_gram",), progress=False)
    for i in range(2):
        block = f"model.layers.{i}"
        wanted = {
            "self_attn.q_proj": "self_attn.q_proj",
            "self_attn.k_proj": "self_attn.q_proj",
            "self_attn.v_proj": "self_attn.q_proj",
            "self_attn.o_proj": "self_attn.o_proj",
            "mlp.gate_proj": "mlp.gate_proj",
            "mlp.up_proj": "mlp.gate_proj",
            "mlp.down_proj": "mlp.down_proj",
        }
        for layer, group in wanted.items():
            assert got.input_group[f"{block}.{layer}"] == f"{block}.{group}"
    assert sum(name.startswith("input_gram.") for name in got.tensors) == 8  # 4 a block
    assert got.facts.objective == "none"


def test_a_layer_that_is_not_run_has_no_statistics(exact: None) -> None:
    model = tiny.llama()
    model.spare = nn.Linear(tiny.WIDTH, tiny.WIDTH)
    got = collect_statistics(model, tiny.windows(1), linears(model), progress=False)
    assert "spare" in linears(model)
    assert "spare" not in got
    assert "model.layers.0.mlp.up_proj" in got


def test_the_dropped_activations_are_computed_again_but_counted_once(exact: None) -> None:
    model, ids = tiny.llama(), tiny.windows(3)
    calls = 0

    def count(*_args: object) -> None:
        nonlocal calls
        calls += 1

    handle = model.model.layers[0].mlp.up_proj.register_forward_pre_hook(count)
    got = collect_statistics(model, ids, linears(model), kinds=ALL, progress=False)
    handle.remove()
    assert calls == 1 + 2 * len(ids)  # to find the groups; then forward and again in backward
    assert float(got.input_gram("model.layers.0.mlp.up_proj").diagonal().sum()) > 0
    rows = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda m, args: rows.append(args[0][0]))
    with torch.no_grad():
        for i in range(len(ids)):
            model.eval()(ids[i : i + 1])
    handle.remove()
    wanted = torch.cat(rows).double()
    wanted = wanted.t() @ wanted / len(wanted)
    assert error(got.input_gram("model.layers.0.mlp.up_proj"), wanted) <= tiny.FLOAT32_RUN


@pytest.mark.parametrize("wanted", [("weight_gradient",), ("output_gram",), ("input_gram",)])
def test_kinds_asked_for_alone_equal_those_of_a_full_run(exact: None, wanted: tuple[str, ...]) -> None:
    model, ids = tiny.llama(), tiny.windows(2)
    full = collect_statistics(model, ids, linears(model), kinds=ALL, progress=False)
    got = collect_statistics(model, ids, linears(model), kinds=wanted, progress=False)
    for layer in linears(model):
        assert torch.equal(getattr(got, wanted[0])(layer), getattr(full, wanted[0])(layer))


def test_sampled_labels_of_another_seed_give_another_fisher_and_of_the_same_seed_the_same(exact: None) -> None:
    model, ids = tiny.bert(), tiny.windows(2)
    layer = "bert.encoder.layer.0.output.dense"
    grams = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(grams))  # the global generator must not matter
        grams.append(collect_statistics(model, ids, linears(model), seed=seed, progress=False).output_gram(layer))
    assert torch.equal(grams[0], grams[1])
    assert not torch.equal(grams[0], grams[2])
