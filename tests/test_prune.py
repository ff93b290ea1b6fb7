# SPDX-License-Identifier: Apache-2.0
"""`prune_`: what it refuses leaves the model as it was; what it reports is what is there; budgets are met."""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from eigenprune import EigenpruneConfig, PruneReport, prune_, to_dense_
from eigenprune.calibrate import collect_statistics
from eigenprune.errors import BudgetError, CalibrationError, ConfigError, EigenpruneError, WeightError
from eigenprune.layers import LowRankLinear, factored_parameters, low_rank_layers, select_layers
from tests.helpers.compare import state_hashes, tied_groups
from tests.helpers.pruned import picture, pruned_by
from tests.helpers.tiny_models import logits, saved_dense, tiny_model, tiny_tokenizer, token_windows

factor = importlib.import_module("eigenprune.prune.factor")


def _set(name: str, value: float) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_parameter(name)[3, 5] = value

    return change


WEIGHT = "model.layers.1.mlp.up_proj.weight"
IDS = token_windows()
REFUSED: dict[
    str, tuple[type[EigenpruneError], str, Callable[[nn.Module], None] | None, dict[str, Any], dict[str, Any]]
] = {
    "NaN weight": (WeightError, r"layers\.1\.mlp\.up_proj .*\[3, 5\]", _set(WEIGHT, math.nan), {}, {"windows": IDS}),
    "infinite weight": (WeightError, r"layers\.1\.mlp\.up_proj", _set(WEIGHT, -math.inf), {}, {"windows": IDS}),
    "NaN embedding": (
        WeightError,
        "NaN",
        lambda model: (
            _set("model.embed_tokens.weight", math.nan)(model) or model.model.embed_tokens.weight.data.fill_(math.nan)
        ),
        {},
        {"windows": IDS},
    ),
    "weight on the meta device": (
        WeightError,
        "meta device",
        lambda model: model.model.layers[0].mlp.down_proj.to("meta"),
        {},
        {"windows": IDS},
    ),
    "no windows": (CalibrationError, "windows", None, {}, {"windows": IDS[:0]}),
    "empty windows": (CalibrationError, "windows", None, {}, {"windows": IDS[:, :0]}),
    "one row of windows": (CalibrationError, "windows", None, {}, {"windows": IDS[0]}),
    "no texts": (CalibrationError, "0 tokens", None, {}, {"texts": [], "tokenizer": tiny_tokenizer()}),
    "blank texts": (CalibrationError, "tokens", None, {}, {"texts": ["  "], "tokenizer": tiny_tokenizer()}),
    "texts shorter than a window": (
        CalibrationError,
        "less than one window",
        None,
        {"window": 64},
        {"texts": ["too short"], "tokenizer": tiny_tokenizer()},
    ),
    "no tokenizer": (CalibrationError, "tokenizer", None, {}, {"texts": ["text"]}),
    "token ids above the vocabulary": (CalibrationError, "vocabulary", None, {}, {"windows": IDS + 100}),
    "negative token ids": (CalibrationError, "token id", None, {}, {"windows": IDS - 100}),
    "text file that is not there": (
        CalibrationError,
        "no text file",
        None,
        {"texts": ["nowhere.txt"]},
        {"tokenizer": tiny_tokenizer()},
    ),
    "budget below the smallest ranks": (BudgetError, "keep at least", None, {"keep": 0.01}, {"windows": IDS}),
    "skip pattern that matches nothing": (ConfigError, "matches no", None, {"skip": ["nothing"]}, {"windows": IDS}),
    "skip pattern that is none": (ConfigError, "regular expression", None, {"skip": ["("]}, {"windows": IDS}),
    "all layers skipped": (ConfigError, "no layer to prune", None, {"skip": ["layers"]}, {"windows": IDS}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_a_typed_error_and_the_model_stays_as_it_was(case: str) -> None:
    error, words, damage, settings, arguments = REFUSED[case]
    model = tiny_model("llama").train()
    if damage is not None:
        damage(model)
    meta = any(parameter.device.type == "meta" for parameter in model.parameters())
    before = None if meta else picture(model)
    with pytest.raises(error, match=words):
        prune_(model, EigenpruneConfig(**{"keep": 0.6} | settings), progress=False, **arguments)
    assert low_rank_layers(model) == {}
    assert meta or picture(model) == before


def test_pruned_model_is_not_pruned_again_and_stays_as_it_was() -> None:
    model = tiny_model("llama")
    pruned_by(model)
    before = state_hashes(model)
    with pytest.raises(ConfigError, match="pruned already"):
        pruned_by(model)
    assert state_hashes(model) == before


def test_statistics_of_another_model_are_refused() -> None:
    other = tiny_model("gpt2")
    statistics = collect_statistics(other, token_windows(), select_layers(other).chosen, progress=False)
    model = tiny_model("llama")
    before = picture(model)
    with pytest.raises(EigenpruneError):
        prune_(model, EigenpruneConfig(keep=0.6), statistics=statistics, progress=False)
    assert picture(model) == before


def test_prune_on_load_without_a_tokenizer_is_a_typed_error(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(CalibrationError, match="tokenizer"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "bare", quantization_config=EigenpruneConfig(keep=0.6))


def test_prune_on_load_onto_the_disk_is_a_typed_error(tmp_path: Path) -> None:
    folder = saved_dense("llama", tmp_path / "dense")
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(WeightError, match="prune the model in memory"):
        AutoModelForCausalLM.from_pretrained(
            folder,
            device_map=places,
            offload_folder=tmp_path / "offload",
            quantization_config=EigenpruneConfig(keep=0.6, window=32, windows=2),
        )


def test_data_free_method_warns_that_it_is_no_default_and_says_what_is() -> None:
    with pytest.warns(UserWarning, match="method='kfac'"):
        prune_(tiny_model("llama"), EigenpruneConfig(keep=0.6, method="svd"), progress=False)


@pytest.mark.parametrize("failing", [0, 1, 7])
@pytest.mark.parametrize("error", [WeightError("degenerate"), RuntimeError("no memory"), KeyboardInterrupt()], ids=repr)
def test_failure_while_factoring_gives_every_dense_layer_back(
    failing: int, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt2").train()
    before, output = picture(model), logits(model.eval())
    model.train()
    real, done = factor.layer_of_factors, []

    def flaky(*args: Any, **kwargs: Any) -> Any:
        done.append(1)
        if len(done) > failing:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(factor, "layer_of_factors", flaky)
    with pytest.raises(type(error)):
        pruned_by(model, allocation="uniform")
    assert len(done) == failing + 1  # it did get that far
    assert picture(model) == before
    assert torch.equal(logits(model.eval()), output)


def _rebuilt(model: nn.Module, report: PruneReport) -> None:
    """Every number of the report, counted anew on the model."""
    layers = {layer.name: layer for layer in report.layers}
    for name, module in low_rank_layers(model).items():
        layer = layers[name]
        assert (layer.layout, layer.rank, layer.shape) == (
            module.layout,
            module.rank,
            (module.out_features, module.in_features),
        )
        assert layer.parameters == module.left.weight.numel() + module.right.weight.numel()
        assert layer.parameters == factored_parameters(layer.rank, *layer.shape, layer.layout)
    for name, layer in layers.items():
        if layer.layout == "dense":
            assert layer.parameters == model.get_submodule(name).weight.numel() == layer.dense_parameters
            assert layer.reason
        else:
            assert name in low_rank_layers(model)
            assert not layer.reason
    unique = {id(parameter): parameter for parameter in model.parameters()}.values()
    assert report.model_parameters[1] == sum(parameter.numel() for parameter in unique)
    saved = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values()
    assert report.model_bytes[1] == sum(tensor.numel() * tensor.element_size() for tensor in saved)
    chosen = [layer for layer in report.layers if layer.loss is not None]
    assert report.keep == sum(layer.parameters for layer in chosen) / sum(math.prod(layer.shape) for layer in chosen)


@pytest.mark.parametrize("layout", ["pivot", "pair"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "phi3", "bert", "albert", "t5"])
def test_report_equals_a_fresh_count(kind: str, layout: str) -> None:
    model = tiny_model(kind)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tied = tied_groups(model)
    report = pruned_by(model, layout=layout)
    assert len(low_rank_layers(model)) >= 3
    assert report.model_parameters[0] == parameters
    _rebuilt(model, report)
    assert tied_groups(model) == tied
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("layout", ["pivot", "pair"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.8, 0.9])
def test_budget_is_met_and_no_smaller_upgrade_was_left_over(keep: float, allocation: str, layout: str) -> None:
    model = tiny_model("llama")
    report = pruned_by(model, keep=keep, allocation=allocation, layout=layout)
    chosen = [layer for layer in report.layers if layer.loss is not None]
    budget = keep * sum(layer.dense_parameters for layer in chosen)
    spent = sum(layer.parameters for layer in chosen)
    upgrades = [
        _next_cost(layer.shape, layer.parameters, layout) - layer.parameters
        for layer in chosen
        if layer.parameters < layer.dense_parameters
    ]
    assert spent <= budget
    assert budget - spent < min(upgrades)  # the bound of 0.1 % at the ranks of real models is this one in small


def _next_cost(shape: tuple[int, int], parameters: int, layout: str) -> int:
    """The least cost above `parameters` among ranks that are multiples of 8, and the dense weight."""
    costs = [factored_parameters(rank, *shape, layout) for rank in range(8, min(shape) + 1, 8)]
    return min([cost for cost in [*costs, math.prod(shape)] if parameters < cost <= math.prod(shape)])


def test_budget_is_met_to_a_thousandth_where_multiples_allow() -> None:
    model = tiny_model("llama")
    for keep in (0.4, 0.55, 0.7, 0.85):
        report = pruned_by(model, keep=keep, rank_multiple=1)
        assert keep - 0.001 <= report.keep <= keep
        to_dense_(model)


def test_keep_one_leaves_every_layer_dense() -> None:
    model = tiny_model("llama")
    before = state_hashes(model)
    report = pruned_by(model, keep=1.0)
    assert report.keep == 1.0
    assert low_rank_layers(model) == {}
    assert state_hashes(model) == before


def test_smaller_budget_costs_more_estimated_loss_and_more_real_change() -> None:
    losses, changes = [], []
    for keep in (0.9, 0.6, 0.3):
        model = tiny_model("qwen2")
        output = logits(model)
        losses.append(pruned_by(model, keep=keep).loss)
        changes.append(float((logits(model) - output).norm()))
    assert losses == sorted(losses)
    assert changes == sorted(changes)


def test_tied_embeddings_are_skipped_and_reported() -> None:
    model = tiny_model("llama")
    reasons = {layer.name: layer.reason for layer in pruned_by(model).layers}
    assert "tied" in reasons["lm_head"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_skip_patterns_leave_layers_dense_and_out_of_the_budget() -> None:
    model = tiny_model("llama")
    report = pruned_by(model, skip=[r"layers\.0\.", "o_proj$"])
    assert not [name for name in low_rank_layers(model) if ".0." in name or name.endswith("o_proj")]
    reasons = {layer.name: (layer.reason, layer.loss) for layer in report.layers}
    assert reasons["model.layers.0.mlp.up_proj"] == ("asked to skip", None)
    assert report.keep <= 0.6


class _Twice(nn.Module):
    """One Linear under two names, another under one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = self.first
        self.other = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.second(self.first(x)))


def test_layer_under_two_names_stays_one_layer() -> None:
    torch.manual_seed(0)
    model = _Twice()
    with pytest.warns(UserWarning, match="looks at no data"):
        report = prune_(model, EigenpruneConfig(keep=0.5, method="svd"), progress=False)
    assert model.first is model.second
    assert isinstance(model.other, LowRankLinear)
    assert {layer.name for layer in report.layers} >= {"first", "other"}


def test_shared_block_of_albert_is_pruned_once_and_used_everywhere() -> None:
    model = tiny_model("albert")
    pruned_by(model, allocation="uniform")
    names = list(low_rank_layers(model))
    assert any("albert_layer_groups.0" in name for name in names)
    assert len(names) == len(set(map(id, low_rank_layers(model).values())))


def test_both_halves_of_an_encoder_decoder_are_pruned() -> None:
    model = tiny_model("t5")
    pruned_by(model, allocation="uniform")
    names = list(low_rank_layers(model))
    assert any(name.startswith("encoder.") for name in names)
    assert any("EncDecAttention" in name for name in names)


def test_pruned_conv1d_reads_its_weight_the_way_gpt2_stores_it() -> None:
    model = tiny_model("gpt2")
    shape = tuple(model.transformer.h[0].mlp.c_fc.weight.shape)
    pruned_by(model, allocation="uniform")
    layer = model.transformer.h[0].mlp.c_fc
    assert isinstance(layer, LowRankLinear)
    assert tuple(layer.weight.shape) == shape


def test_gradient_flags_and_mode_follow_the_dense_layers() -> None:
    model = tiny_model("llama").train()
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    pruned_by(model, allocation="uniform")
    flags = {name: {p.requires_grad for p in layer.parameters()} for name, layer in low_rank_layers(model).items()}
    assert {name: flag == {".1." in name} for name, flag in flags.items()} == dict.fromkeys(flags, True)
    assert all(module.training for module in model.modules())


def test_same_input_gives_bit_equal_models() -> None:
    states = []
    for _ in range(2):
        model = tiny_model("qwen2")
        pruned_by(model)
        states.append(state_hashes(model))
    assert states[0] == states[1]
