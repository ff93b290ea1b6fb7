# SPDX-License-Identifier: Apache-2.0
"""Adapters and merged models, saved and loaded again: in a new process, in every way there is, bit for bit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from eigenprune.layers import low_rank_layers
from tests.helpers.adapters import TARGETS, WAYS, difference, load_in_new_process, pruned_model, trained_
from tests.helpers.compare import state_hashes, tensor_hash
from tests.helpers.tiny_models import logits

peft = pytest.importorskip("peft")

AUTO = {"bert": "AutoModelForMaskedLM"}
CLASSES = {"AutoModelForCausalLM": AutoModelForCausalLM, "AutoModelForMaskedLM": AutoModelForMaskedLM}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank_pattern": {"layers.1.mlp.down_proj": 2}, "modules_to_save": ["o_proj"]},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
    "inside": {"target_modules": ["right", "left"]},
}


@dataclass(frozen=True)
class Case:
    """A trained adapter on a saved pruned model, and how it is loaded again."""

    kind: str
    layout: str
    dtype: str
    setting: str
    way: str

    def __str__(self) -> str:
        return "-".join((self.kind, self.layout, self.dtype, self.setting, self.way))

    @property
    def adapter(self) -> "Case":
        return Case(self.kind, self.layout, self.dtype, self.setting, "")


def _cases() -> list[Case]:
    cases = [
        Case("llama", layout, "float32", setting, way)
        for layout in ("pair", "pivot")
        for setting in SETTINGS
        for way in (*WAYS, "merged")
        # transformers' own loaders lose the magnitudes of DoRA, on dense models too.
        if not (setting == "dora" and way in ("load_adapter", "auto"))
    ]
    # transformers' own loaders round the adapter to the dtype of the model, dense models too.
    others = {
        ("gpt2", "pivot", "float32"): ("peft", "auto", "merged"),
        ("qwen2", "pair", "bfloat16"): ("peft", "auto-peft", "merged"),
        ("bert", "pivot", "bfloat16"): ("peft", "merged"),
    }
    return cases + [Case(*other, "pissa", way) for other, ways in others.items() for way in ways]


CASES = _cases()


@dataclass(frozen=True)
class Saved:
    """What was in memory, and what the new process saw."""

    logits: str
    state: dict[str, str]
    seen: dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    scratch = tmp_path_factory.mktemp("adapters")
    made: dict[str, Any] = {}
    plan = []
    for case in CASES:
        auto = AUTO.get(case.kind, "AutoModelForCausalLM")
        base = scratch / f"{case.kind}-{case.layout}-{case.dtype}"
        adapter, merged = scratch / str(case.adapter), scratch / f"{case.adapter}-merged"
        if not base.exists():
            pruned_model(case.kind, case.layout, getattr(torch, case.dtype)).save_pretrained(base)
        if str(case.adapter) not in made:
            made[str(case.adapter)] = _train_and_save(CLASSES[auto].from_pretrained(base), case, adapter, merged)
        way = "plain" if case.way == "merged" else case.way
        folder = merged if case.way == "merged" else base
        plan.append({"base": str(folder), "adapter": str(adapter), "auto": auto, "way": way})
    results = {}
    for case, seen in zip(CASES, load_in_new_process(plan, scratch), strict=True):
        trained, merged_logits, state = made[str(case.adapter)]
        results[str(case)] = Saved(merged_logits if case.way == "merged" else trained, state, seen)
    return results


def _train_and_save(base: Any, case: Case, adapter: Path, merged: Path) -> tuple[str, str, dict[str, str]]:
    """Hashes of the logits with the adapter and merged, and of the state merged."""
    task = {} if case.kind == "bert" else {"task_type": "CAUSAL_LM"}
    settings = {"r": 4, "target_modules": TARGETS[case.kind]} | task | SETTINGS[case.setting]
    model = trained_(peft.get_peft_model(base, peft.LoraConfig(**settings)))
    model.save_pretrained(adapter)
    trained = tensor_hash(logits(model))
    model = model.merge_and_unload()
    model.save_pretrained(merged)
    return trained, tensor_hash(logits(model)), state_hashes(model)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loaded_in_a_new_process_it_computes_the_same_bits(case: Case, saved: dict[str, Saved]) -> None:
    was = saved[str(case)]
    assert was.seen["logits"] == was.logits
    around = 0 if case.way == "merged" or case.setting == "inside" else 4
    assert was.seen["around"] == around
    if case.way == "merged":
        assert was.seen["state"] == was.state  # a plain model again: no adapter, the new ranks


def test_the_cases_differ_from_each_other(saved: dict[str, Saved]) -> None:
    """Else an adapter that nobody loads would pass above."""
    first = [saved[f"llama-pivot-float32-{setting}-peft"].logits for setting in SETTINGS]
    assert len({*first, saved["llama-pivot-float32-lora-merged"].logits}) == len(SETTINGS) + 1


def test_an_adapter_given_to_transformers_is_saved_and_loaded_by_it(tmp_path: Path) -> None:
    pruned_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=4))
    output = logits(trained_(model))
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(again), output)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(pruned_model()))


def test_a_merged_model_takes_another_adapter_and_is_merged_again(tmp_path: Path) -> None:
    """Round after round: the config on disk follows the live ranks."""
    model = pruned_model("gpt2")
    name = "transformer.h.0.attn.c_attn"
    first = low_rank_layers(model)[name].rank
    for number in range(2):
        config = peft.LoraConfig(target_modules=TARGETS["gpt2"], r=4)
        adapted = trained_(peft.get_peft_model(model, config), seed=number)
        output = logits(adapted)
        adapted.merge_and_unload().save_pretrained(tmp_path / str(number))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(number)).eval()
        assert difference(logits(model), output) <= 1e-5
        assert model.config.quantization_config.modules[name] == ["pivot", first + 4 * (number + 1)]


def test_a_layer_that_became_dense_reloads_dense(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], r=64)
    model = trained_(peft.get_peft_model(pruned_model(), config)).merge_and_unload()
    name = "model.layers.0.self_attn.q_proj"
    assert type(model.get_submodule(name)) is torch.nn.Linear
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert state_hashes(again) == state_hashes(model)
    assert name not in again.config.quantization_config.modules


def test_a_pissa_adapter_turns_into_a_lora_of_the_unchanged_model(tmp_path: Path) -> None:
    """peft's conversion: the adapter minus the one it started from, at twice the rank."""
    model = peft.get_peft_model(
        pruned_model(), peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights="pissa")
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    output = logits(trained_(model))
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    again = peft.PeftModel.from_pretrained(pruned_model(), tmp_path / "lora").eval()
    assert again.peft_config["default"].r == 8
    assert difference(logits(again), output) <= 1e-5


@pytest.mark.parametrize("layout", ["pair", "pivot"])
def test_adapters_load_without_memory_of_their_own_first(layout: str, tmp_path: Path) -> None:
    for init in (True, "pissa"):
        config = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=init)
        model = trained_(peft.get_peft_model(pruned_model("llama", layout), config))
        model.save_pretrained(tmp_path / str(init))
        base = pruned_model("llama", layout)
        again = peft.PeftModel.from_pretrained(base, tmp_path / str(init), low_cpu_mem_usage=True).eval()
        assert torch.equal(logits(again), logits(model))


def test_pivots_of_a_merged_layer_are_those_of_its_own_rows() -> None:
    """The pivot layout stores rows of the weight itself; after a merge they are rows of the merged weight."""
    model = trained_(peft.get_peft_model(pruned_model(), peft.LoraConfig(target_modules=["q_proj"], r=4)))
    wrapped = model.base_model.model.model.layers[0].self_attn.q_proj
    dense = wrapped.base_layer.weight.detach().double() + wrapped.get_delta_weight("default").detach().double()
    layer = model.merge_and_unload().model.layers[0].self_attn.q_proj
    rows = layer.right.weight.detach().double()
    assert float((rows - dense[layer.pivots.long()]).abs().max()) <= 1e-5 * float(dense.abs().max())
