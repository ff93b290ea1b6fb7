# SPDX-License-Identifier: Apache-2.0
"""`prune_` by `kfac-channels`: smaller layers, saved and loaded again, and everything else that works on a model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from eigenprune import EigenpruneConfig, PruneReport, prune_, save_model
from eigenprune.calibrate import collect_statistics
from eigenprune.errors import CheckpointError, ConfigError
from eigenprune.hub import build_card
from eigenprune.hub.facts import read_facts
from eigenprune.layers import layer_shape, low_rank_layers, select_layers
from eigenprune.recover import recover_
from eigenprune.recover.trained_parameters import narrowed_layers
from tests.helpers.compare import tensor_hash
from tests.helpers.pruned import picture, pruned_by
from tests.helpers.reload import reload_in_new_process
from tests.helpers.tiny_models import logits, tiny_model, token_windows

METHOD = "kfac-channels"
AUTO: dict[str, Any] = {
    "llama": AutoModelForCausalLM,
    "qwen2": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "bert": AutoModelForMaskedLM,
    "albert": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
}


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Up to float32 rounding of sums over some hundred numbers, several layers deep."""
    return bool((found - wanted).abs().max() <= 1e-4 * wanted.abs().max())


def test_fewer_channels_are_saved_and_loaded_bit_for_bit_in_a_new_process(tmp_path: Path) -> None:
    wanted, plan = [], []
    for kind, auto in AUTO.items():
        for dtype in (torch.float32, torch.bfloat16):
            model = tiny_model(kind, dtype)
            report = pruned_by(model, method=METHOD, keep=0.5)
            check_sizes(model, report)
            folder = tmp_path / f"{kind} {dtype}"
            model.save_pretrained(folder)
            wanted.append((folder.name, tensor_hash(logits(model)), {}))
            plan.append({"folder": str(folder), "auto": auto.__name__})
    seen = reload_in_new_process(plan, tmp_path)
    found = [
        (Path(entry["folder"]).name, result.get("logits", result.get("message")), result.get("info"))
        for entry, result in zip(plan, seen, strict=True)
    ]
    assert found == wanted


def check_sizes(model: nn.Module, report: PruneReport) -> None:
    """The report says what is there."""
    narrowed = {layer.name: layer for layer in report.layers if layer.kept_shape is not None}
    assert narrowed
    for name, layer in narrowed.items():
        assert layer_shape(model.get_submodule(name)) == layer.kept_shape != layer.shape
    linear = sum(p.numel() for name in narrowed for n, p in model.get_submodule(name).named_parameters() if n != "bias")
    assert linear == sum(layer.parameters for layer in narrowed.values())
    assert report.keep <= 0.5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_dequantized_model_is_stock_again_and_says_the_same(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    shapes = {name: layer_shape(layer) for name, layer in select_layers(model).chosen.items()}
    pruned_by(model, method=METHOD, keep=0.5)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "saved")
    again = AUTO[kind].from_pretrained(tmp_path / "saved")
    again.dequantize()
    assert {name: layer_shape(layer) for name, layer in select_layers(again).chosen.items()} == shapes
    assert close(logits(again), wanted)
    again.save_pretrained(tmp_path / "stock")
    assert "quantization_config" not in json.loads((tmp_path / "stock" / "config.json").read_text())
    assert close(logits(AUTO[kind].from_pretrained(tmp_path / "stock")), wanted)


def test_channels_lose_less_than_ranks_alone_by_the_estimate() -> None:
    estimates = {method: pruned_by(tiny_model("llama"), method=method, keep=0.4).loss for method in ("kfac", METHOD)}
    assert 0 < estimates[METHOD] < estimates["kfac"]


def test_nothing_is_lost_where_everything_is_kept() -> None:
    model = tiny_model("llama")
    wanted = logits(model)
    report = pruned_by(model, method=METHOD, keep=1.0)
    assert not any(layer.kept_shape for layer in report.layers)
    assert close(logits(model), wanted)


def test_channels_that_nothing_reads_go_first_and_nothing_changes() -> None:
    model = tiny_model("gpt2")
    generator = torch.Generator().manual_seed(3)
    dead = 0
    for block in model.transformer.h:
        gone = torch.randperm(256, generator=generator)[:64]
        block.mlp.c_proj.weight.data[gone] = 0  # a Conv1D: [in, out]
        dead += 2 * 64 * len(gone)
    wanted = logits(model)
    linear = sum(layer.weight.numel() for layer in select_layers(model).chosen.values())
    # Ranks of 64 are none for layers of width 64, so that channels alone can go.
    report = pruned_by(model, method=METHOD, keep=(linear - dead) / linear, rank_multiple=64)
    assert [layer.kept_shape for layer in report.layers if layer.kept_shape] == [(192, 64), (64, 192)] * 2
    assert close(logits(model), wanted)


@pytest.mark.parametrize("budget", ["parameters", "bytes", "flops"])
def test_budget_is_met(budget: str) -> None:
    report = pruned_by(tiny_model("gpt2"), method=METHOD, keep=0.55, budget=budget, rank_multiple=1)
    # Pivots take four bytes each beside four for every parameter; the others count parameters, here or doubled.
    assert 0.55 - 0.02 <= report.keep <= 0.55


def test_statistics_alone_suffice() -> None:
    by_windows, by_statistics = tiny_model("llama"), tiny_model("llama")
    report = pruned_by(by_windows, method=METHOD)
    layers = select_layers(by_statistics).chosen
    statistics = collect_statistics(by_statistics, token_windows(), layers, progress=False)
    config = EigenpruneConfig(keep=0.6, method=METHOD)
    other = prune_(by_statistics, config, statistics=statistics, progress=False)
    assert [layer.kept_shape for layer in other.layers] == [layer.kept_shape for layer in report.layers]
    assert close(logits(by_statistics), logits(by_windows))  # components kept on disk are float32


def test_statistics_alone_suffice_for_the_smallest_vocabulary() -> None:
    settings = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=5, hidden_size=32, intermediate_size=64, **settings)).eval()
    windows = token_windows() % 5
    statistics = collect_statistics(model, windows, select_layers(model).chosen, progress=False)
    report = prune_(model, EigenpruneConfig(keep=0.4, method=METHOD), statistics=statistics, progress=False)
    assert any(layer.kept_shape for layer in report.layers)


@pytest.mark.parametrize(
    "sides", [[9, 8, 8, 8], [8, 9, 8, 8], [0, 8, 8, 8], [8, -1, 8, 8], [8, 8, 8], [8, 8, 8, 2**40]]
)
def test_impossible_shapes_are_no_config(sides: list[int]) -> None:
    with pytest.raises(ConfigError, match="shapes"):
        EigenpruneConfig(shapes={"layer": sides})


@pytest.mark.parametrize(
    "settings",
    [
        {"allocation": "uniform"},
        {"budget": "latency"},
        {"budget": "bytes", "bits": 8},
        {"budget": "bytes", "bits": "auto"},
    ],
)
def test_what_channels_cannot_be_weighed_by_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=METHOD):
        EigenpruneConfig(method=METHOD, **settings)


def test_failure_half_way_puts_the_dense_layers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = picture(model)
    from eigenprune.prune import factor

    def stop(*_args: object) -> None:
        if narrowed := [m for n, m in model.named_modules() if n.endswith("down_proj") and layer_shape(m) != (64, 96)]:
            raise KeyboardInterrupt(len(narrowed))

    monkeypatch.setattr(factor, "release_unused", stop)
    with pytest.raises(KeyboardInterrupt):
        pruned_by(model, method=METHOD, keep=0.4)
    monkeypatch.undo()
    assert picture(model) == before


def test_recovery_trains_what_has_lost_channels_too() -> None:
    dense, model = tiny_model("llama"), tiny_model("llama")
    pruned_by(model, method=METHOD, keep=0.4, min_keep=0.0)
    plain = {name: layer for name, layer in narrowed_layers(model).items() if isinstance(layer, nn.Linear)}
    before = {name: layer.weight.detach().clone() for name, layer in plain.items()}
    report = recover_(model, dense, token_windows(16), progress=False)
    assert report.kept
    assert report.after < report.before
    assert all(not torch.equal(layer.weight, before[name]) for name, layer in plain.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("gpt2")
    prune_(model, EigenpruneConfig(keep=0.5, method=METHOD), windows=token_windows(), progress=False)
    return save_model(model, tmp_path_factory.mktemp("channels") / "gpt2")


def test_facts_count_the_dense_model_as_it_was(folder: Path) -> None:
    dense = tiny_model("gpt2")
    facts = read_facts(folder)
    assert facts.parameters[0] == sum(parameter.numel() for parameter in dense.parameters())
    pruned = AutoModelForCausalLM.from_pretrained(folder)
    assert facts.parameters[1] == sum(parameter.numel() for parameter in pruned.parameters())
    shapes = {name: layer_shape(layer) for name, layer in select_layers(dense).chosen.items()}
    assert {layer.name: layer.shape for layer in facts.layers} == {
        layer.name: shapes[layer.name] for layer in facts.layers
    }


def edited(folder: Path, target: Path, change: Any) -> Path:
    """A copy of the checkpoint whose saved settings, and tensors, went through `change`."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(config["quantization_config"], tensors)
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def wrong_before(settings: dict[str, Any], _tensors: dict[str, Any]) -> None:
    entry = next(iter(settings["shapes"].values()))
    entry[2] += 8


def larger_than_before(settings: dict[str, Any], _tensors: dict[str, Any]) -> None:
    entry = next(iter(settings["shapes"].values()))
    entry[0] = entry[2] + 1


def no_number(settings: dict[str, Any], _tensors: dict[str, Any]) -> None:
    next(iter(settings["shapes"].values()))[1] = 2.5


def other_size(settings: dict[str, Any], _tensors: dict[str, Any]) -> None:
    for entry in settings["shapes"].values():
        entry[0] = min(entry[0] + 8, entry[2])


def no_layer(settings: dict[str, Any], _tensors: dict[str, Any]) -> None:
    settings["shapes"]["transformer.h.7.mlp.c_fc"] = [8, 8, 16, 16]


@pytest.mark.parametrize("lie", [wrong_before, larger_than_before, no_number, other_size, no_layer])
def test_config_that_lies_about_channels_is_refused(folder: Path, tmp_path: Path, lie: Any) -> None:
    target = edited(folder, tmp_path / "lie", lie)
    with pytest.raises((CheckpointError, ConfigError)):
        AutoModelForCausalLM.from_pretrained(target)


def test_missing_weight_of_a_dense_layer_that_lost_channels_is_refused(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    # Ranks of 64 are none for layers of width 64, so that channels alone can go.
    report = pruned_by(model, method=METHOD, keep=0.7, rank_multiple=64)
    assert not low_rank_layers(model)
    assert report.keep <= 0.7
    name = next(iter(narrowed_layers(model)))
    model.save_pretrained(tmp_path / "whole")

    def drop(_settings: dict[str, Any], tensors: dict[str, Any]) -> None:
        del tensors[f"{name}.weight"]

    with pytest.raises(CheckpointError, match=name):
        AutoModelForCausalLM.from_pretrained(edited(tmp_path / "whole", tmp_path / "cut", drop))


def test_inspection_shows_both_shapes(folder: Path) -> None:
    from eigenprune.cli.inspect import describe_layers

    layers = describe_layers(AutoModelForCausalLM.from_pretrained(folder))
    narrowed = [layer for layer in layers if layer.kept_shape is not None]
    assert narrowed
    assert all(layer.kept_shape != layer.shape and layer.parameters < layer.dense_parameters for layer in narrowed)


def test_card_says_how_many_channels_are_left(folder: Path) -> None:
    card = build_card(folder, "me/gpt2-channels")
    kept = sum(entry[0] for name, entry in read_facts(folder).config.shapes.items() if name.endswith("c_fc"))
    assert f"{kept} of 512 kept in the 2 layers that lost some" in card
