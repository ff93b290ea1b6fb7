# SPDX-License-Identifier: Apache-2.0
"""LoRA around factored layers: a matrix of family x layout x dtype x kind of adapter, and what is done with it."""

import copy
import functools
import importlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eigenprune.integrations.merging import truncate_merged_
from eigenprune.layers import LowRankLinear, low_rank_layers
from tests.helpers.adapters import TARGETS, difference, pruned_model, trained_
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import logits, token_windows

peft = pytest.importorskip("peft")

RANK = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"lora_dropout": 0.1},
    "rslora": {"use_rslora": True, "init_lora_weights": "gaussian"},
    "dora": {"use_dora": True},
    "dora-dropout": {"use_dora": True, "lora_dropout": 0.2},
    "pissa": {"init_lora_weights": "pissa"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
}
# A merge in float32 computes the same in another order of sums; the bound.
SAME = 1e-5
# Merged or not, some 15 layers round their values to bfloat16 in turn, at 2^-9 each on average and in random
# directions, and both do so on their own: sqrt(2 * 15) 2^-9 is one standard deviation of the difference at an output of
# the size of the largest; 3 of them cover all outputs.
SAME_BF16 = 3 * (2 * 15) ** 0.5 * 2.0**-9


@dataclass(frozen=True)
class Case:
    """A model and a kind of adapter."""

    kind: str
    layout: str
    dtype: torch.dtype
    option: str

    def __str__(self) -> str:
        return "-".join((self.kind, self.layout, str(self.dtype).removeprefix("torch."), self.option))

    @property
    def same(self) -> float:
        return SAME if self.dtype == torch.float32 else SAME_BF16


CASES = [
    Case(kind, layout, dtype, option)
    for kind in TARGETS
    for layout in ("pair", "pivot")
    for dtype in (torch.float32, torch.bfloat16)
    for option in OPTIONS
]


@dataclass(frozen=True)
class Seen:
    """Logits and states of one model on its way."""

    around: list[str]
    base: Tensor
    fresh: Tensor
    trained: Tensor
    merged: Tensor
    unmerged: Tensor
    disabled: Tensor
    state: dict[str, str]
    state_unmerged: dict[str, str]
    unloaded: Tensor
    classes: tuple[type, type]
    ranks: tuple[dict[str, int], dict[str, int]]


def adapted(model: Any, kind: str, *, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    values = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": TARGETS[kind]}
    return peft.get_peft_model(model, peft.LoraConfig(**values | settings))


def names_around(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__name__ == "LoraLowRankLinear"]


@functools.cache
def seen(case: Case) -> Seen:
    base = pruned_model(case.kind, case.layout, case.dtype)
    model = adapted(copy.deepcopy(base), case.kind, **OPTIONS[case.option])
    around, fresh = names_around(model), logits(model)
    trained = logits(trained_(model))
    state = state_hashes(model)
    model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()
    unmerged, state_unmerged = logits(model), state_hashes(model)
    with model.disable_adapter():
        disabled = logits(model)
    unloaded = model.merge_and_unload()
    return Seen(
        around,
        logits(base),
        fresh,
        trained,
        merged,
        unmerged,
        disabled,
        state,
        state_unmerged,
        logits(unloaded),
        (type(base), type(unloaded)),
        tuple({name: layer.rank for name, layer in low_rank_layers(m).items()} for m in (base, unloaded)),
    )


all_cases = pytest.mark.parametrize("case", CASES, ids=str)


@all_cases
def test_ordinary_targets_put_an_adapter_around_that_changes_nothing_at_first(case: Case) -> None:
    was = seen(case)
    assert len(was.around) == 4  # two layers in each of two blocks
    # DoRA's norms, and the parts that PiSSA takes the layer into, are rounded to the dtype of the layer.
    assert difference(was.fresh, was.base) <= case.same


@all_cases
def test_training_moves_the_output_and_disabling_brings_it_back(case: Case) -> None:
    was = seen(case)
    assert difference(was.trained, was.base) > 0.1
    if case.option != "pissa":  # what PiSSA took from the layer stays away
        assert torch.equal(was.disabled, was.base)


@all_cases
def test_merged_logits_are_those_of_the_unmerged_model(case: Case) -> None:
    was = seen(case)
    assert difference(was.merged, was.trained) <= case.same
    assert torch.equal(was.unloaded, was.merged)
    assert not torch.equal(was.merged, was.base)


@all_cases
def test_unmerging_restores_every_bit(case: Case) -> None:
    was = seen(case)
    assert was.state_unmerged == was.state
    assert torch.equal(was.unmerged, was.trained)


@all_cases
def test_unloaded_model_is_of_the_old_class_with_ranks_grown_by_that_of_the_adapter(case: Case) -> None:
    was = seen(case)
    assert was.classes[0] is was.classes[1]
    before, after = was.ranks
    touched = {name.removeprefix("base_model.model.") for name in was.around}
    grown = 0 if case.option == "pissa" else RANK  # PiSSA gives back what it took
    assert after == {name: rank + grown * (name in touched) for name, rank in before.items()}


def test_making_training_and_merging_an_adapter_multiplies_no_factors_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """`weight` is a product of the size of the dense matrix, at every access; DoRA alone needs it."""
    model, read = pruned_model(), []
    product = LowRankLinear.weight.fget
    monkeypatch.setattr(LowRankLinear, "weight", property(lambda self: (read.append(self), product(self))[1]))
    model = trained_(adapted(model, "llama"))
    model.merge_adapter()
    model.unmerge_adapter()
    model.merge_and_unload()
    assert read == []


@pytest.mark.parametrize("layout", ["pair", "pivot"])
def test_a_model_that_changes_its_dtype_or_is_copied_while_merged_unmerges_as_it_is_then(layout: str) -> None:
    model = trained_(adapted(pruned_model("llama", layout), "llama"))
    state = state_hashes(copy.deepcopy(model).to(torch.bfloat16))
    trained = logits(model)
    model.merge_adapter()
    twin = copy.deepcopy(model).to(torch.bfloat16)
    twin.unmerge_adapter()
    assert state_hashes(twin) == state
    model.unmerge_adapter()
    assert torch.equal(logits(model), trained)


def test_merging_again_or_nothing_changes_nothing_and_says_so() -> None:
    model = trained_(adapted(pruned_model(), "llama"))
    model.merge_adapter()
    merged = logits(model)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_after_pissa_the_old_rank_is_that_of_the_layer_before() -> None:
    base = pruned_model()
    ranks = {name: layer.rank for name, layer in low_rank_layers(base).items()}
    merged = trained_(adapted(base, "llama", init_lora_weights="pissa")).merge_and_unload()
    output = logits(merged)
    truncate_merged_(merged)
    assert {name: layer.rank for name, layer in low_rank_layers(merged).items()} == ranks
    assert torch.equal(logits(merged), output)


def test_layers_are_found_by_the_keys_of_a_state_dict_too() -> None:
    """As diffusers does, for adapters that come without a list of targets."""
    trained = trained_(adapted(pruned_model(), "llama"))
    tensors = peft.get_peft_model_state_dict(trained)
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    model = pruned_model()
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["no_such_name"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that keys and targets do not agree
        peft.inject_adapter_in_model(config, model, state_dict=tensors)
    peft.set_peft_model_state_dict(model, tensors)
    assert torch.equal(logits(model), logits(trained))


def test_bias_of_an_adapter_is_merged_into_the_bias_and_taken_out_again() -> None:
    for layout in ("pair", "pivot"):
        model = trained_(adapted(pruned_model("gpt2", layout), "gpt2", lora_bias=True))
        state, trained = state_hashes(model), logits(model)
        model.merge_adapter()
        assert difference(logits(model), trained) <= SAME
        model.unmerge_adapter()
        assert state_hashes(model) == state


def test_rank_and_alpha_patterns_are_followed() -> None:
    base = pruned_model()
    model = adapted(base, "llama", rank_pattern={"down_proj": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 1})
    ranks = {name: layer.rank for name, layer in low_rank_layers(base).items()}
    layers = {name: model.get_submodule(name) for name in names_around(model)}
    assert {(layer.r["default"], layer.scaling["default"]) for layer in layers.values()} == {
        (2, 4.0),
        (4, 0.25),
        (4, 2.0),
    }
    trained_(model)
    trained = logits(model)
    merged = model.merge_and_unload()
    assert difference(logits(merged), trained) <= SAME
    grown = {name.rpartition(".")[2]: layer.rank - ranks[name + ".base_layer"] for name, layer in _targets(merged)}
    assert grown == {"q_proj": 4, "down_proj": 2}


def _targets(model: Any) -> list[tuple[str, Any]]:
    return [item for item in low_rank_layers(model).items() if item[0].endswith(("q_proj", "down_proj"))]


@pytest.mark.parametrize("layout", ["pair", "pivot"])
def test_several_adapters_are_added_switched_merged_in_any_order_and_deleted(layout: str) -> None:
    base = pruned_model("llama", layout)
    model = adapted(copy.deepcopy(base), "llama")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], use_dora=True))
    outputs = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        outputs[name] = logits(trained_(model))
    model.set_adapter("default")
    assert torch.equal(logits(model), outputs["default"])
    assert difference(outputs["default"], outputs["other"]) > 0.1
    state = state_hashes(model)

    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    model.merge_adapter(["default", "other"])
    assert difference(logits(model), both) <= SAME
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])  # onto what is merged: one merge of both, not of a merge
    assert difference(logits(model), both) <= SAME
    model.unmerge_adapter()
    assert state_hashes(model) == state

    model.delete_adapter("other")
    assert torch.equal(logits(model), outputs["default"])
    assert torch.equal(logits(model.unload()), logits(base))


def test_mixed_batch_gives_each_row_its_adapter() -> None:
    model = adapted(pruned_model(), "llama")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    outputs = []
    for name in ("default", "other"):
        model.set_adapter(name)
        outputs.append(logits(trained_(model)))
    with torch.no_grad():
        mixed = model(input_ids=token_windows(2, 12), adapter_names=["other", "__base__"]).logits
    assert difference(mixed[0], outputs[1][0]) <= SAME
    assert difference(mixed[1], logits(pruned_model())[1]) <= SAME


@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_weighted_sum_of_adapters_merges_exactly(how: str) -> None:
    model = trained_(adapted(pruned_model("gpt2"), "gpt2"))
    model.add_adapter("other", peft.LoraConfig(r=RANK, target_modules=TARGETS["gpt2"]))
    model.set_adapter("other")
    trained_(model, seed=1)
    model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type=how)
    model.set_adapter("sum")
    output = logits(model)
    assert difference(logits(model.merge_and_unload()), output) <= SAME


def test_a_factored_layer_may_be_trained_whole_by_modules_to_save() -> None:
    base = pruned_model()
    model = trained_(adapted(copy.deepcopy(base), "llama", modules_to_save=["o_proj", "lm_head"]))
    output = logits(model)
    merged = model.merge_and_unload()
    assert difference(logits(merged), output) <= SAME
    for part in ("right", "left"):
        name = f"model.layers.0.self_attn.o_proj.{part}.weight"
        assert not torch.equal(merged.get_parameter(name), base.get_parameter(name))


def test_eva_finds_its_directions_in_the_inputs_of_a_factored_layer() -> None:
    settings = {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=1.0)}
    model = adapted(pruned_model(), "llama", **settings)
    before = state_hashes(model)
    peft.initialize_lora_eva_weights(model, [{"input_ids": token_windows(4, 16)}] * 3, show_progress_bar=False)
    name = f"{names_around(model)[0]}.lora_A.default.weight"
    assert state_hashes(model)[name] != before[name]
    output = logits(trained_(model))
    assert difference(logits(model.merge_and_unload()), output) <= SAME


@pytest.mark.parametrize("variant", ["velora_config", "monteclora_config"])
def test_variants_that_merge_like_a_plain_lora_do(variant: str) -> None:
    lora = peft.tuners.lora
    settings = {"velora_config": lora.VeloraConfig(num_groups=8), "monteclora_config": lora.MontecloraConfig()}
    base = pruned_model()
    model = trained_(adapted(copy.deepcopy(base), "llama", **{variant: settings[variant]}))
    output = logits(model)
    assert difference(output, logits(base)) > 0.1
    assert difference(logits(model.merge_and_unload()), output) <= SAME


def test_adapters_are_swapped_in_place_and_mixed_by_x_lora(tmp_path: Path) -> None:
    outputs, folders = [], [tmp_path / "0", tmp_path / "1"]
    for seed, folder in enumerate(folders):
        model = trained_(adapted(pruned_model(), "llama", seed=seed, task_type="CAUSAL_LM"))
        model.save_pretrained(folder)
        outputs.append(logits(model))
    hotswap = importlib.import_module("peft.utils.hotswap").hotswap_adapter
    hotswap(model, folders[0], "default")
    assert torch.equal(logits(model), outputs[0])

    torch.manual_seed(0)
    base = pruned_model()
    base.config.use_cache = False  # X-LoRA insists
    adapters = {folder.name: str(folder) for folder in folders}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, adapters=adapters)
    mixed = logits(peft.get_peft_model(base, config).eval())
    assert all(difference(mixed, other) > 0.01 for other in (*outputs, logits(pruned_model())))


@pytest.mark.parametrize("layout", ["pair", "pivot"])
@pytest.mark.parametrize("count", [5, 100])  # peft shortens long lists of targets by itself
def test_all_linear_goes_on_the_parts_and_not_around_them_as_well(
    layout: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.tuners.tuners_utils.MIN_TARGET_MODULES_FOR_OPTIMIZATION", count)
    base = pruned_model("llama", layout)
    model = adapted(copy.deepcopy(base), "llama", target_modules="all-linear")
    assert not names_around(model)
    inside = [name for name, module in model.named_modules() if type(module) is peft.tuners.lora.Linear]
    parts = {f"base_model.model.{name}.{part}" for name in low_rank_layers(base) for part in ("right", "left")}
    assert set(inside) == parts
    assert difference(logits(model), logits(base)) <= SAME
    output = logits(trained_(model))
    assert difference(output, logits(base)) > 0.1
    ranks = {name: layer.rank for name, layer in low_rank_layers(base).items()}
    merged = model.merge_and_unload()
    assert difference(logits(merged), output) <= SAME
    assert {name: layer.rank for name, layer in low_rank_layers(merged).items()} == ranks


def test_a_second_adapter_of_all_linear_goes_where_the_first_one_is() -> None:
    """peft looks for "Linear" in the class name of a layer that has an adapter already."""
    model = adapted(pruned_model(), "llama")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear"))
    around = names_around(model)
    assert len(around) == 4
    for name in around:
        assert set(model.get_submodule(name).lora_A) == {"default", "other"}
    nested = [name for name in around if any(".lora_" in other for other in names_around(model.get_submodule(name)))]
    assert not nested
