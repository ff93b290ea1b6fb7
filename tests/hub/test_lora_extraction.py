# SPDX-License-Identifier: Apache-2.0
"""Adapters extracted from two checkpoints, loaded by peft, against the tuned model itself."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from eigenprune import collect_statistics
from eigenprune.errors import CheckpointError, ConfigError, WeightError
from eigenprune.hub import extract_lora
from eigenprune.layers import dense_weight, is_dense, select_layers
from tests.helpers.adapters import difference, pruned_model
from tests.helpers.tiny_models import logits, tiny_model, token_windows

peft = pytest.importorskip("peft")

RANK = 4
# The adapter is rounded to float32 once, and adds in another order than the tuned weight.
SAME = 1e-5


def tune_(model: PreTrainedModel, rank: int = RANK, only: str = "") -> PreTrainedModel:
    """Add a change of `rank` to the weights of all dense layers but the head."""
    generator = torch.Generator().manual_seed(1)
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if is_dense(module) and module is not head and only in name:
            weight = dense_weight(module).detach()
            m, n = weight.shape
            left, right = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
            weight += 0.1 / rank**0.5 * (left @ right).to(weight.dtype)
    return model


def shift_(model: PreTrainedModel, *endings: str) -> PreTrainedModel:
    """Change the parameters whose names end so."""
    for name, parameter in model.named_parameters():
        if name.endswith(endings):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return model


def saved(tmp_path: Path, **models: nn.Module) -> list[Path]:
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    return [tmp_path / name for name in models]


def loaded(base: Path, adapter: Path) -> Any:
    auto = AutoModelForMaskedLM if "bert" in (base / "config.json").read_text() else AutoModelForCausalLM
    return peft.PeftModel.from_pretrained(auto.from_pretrained(base), adapter).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "bert", "phi3"])
def test_adapter_of_a_low_rank_change_is_the_tuned_model(kind: str, tmp_path: Path) -> None:
    base, tuned = tiny_model(kind), tune_(tiny_model(kind))
    folders = saved(tmp_path, base=base, tuned=tuned)
    found = extract_lora(*folders, tmp_path / "adapter", rank=RANK)
    assert difference(logits(base), logits(tuned)) > 0.1
    model = loaded(folders[0], tmp_path / "adapter")
    assert difference(logits(model), logits(tuned)) <= SAME
    assert difference(logits(model.merge_and_unload()), logits(tuned)) <= SAME
    assert {layer.rank for layer in found.layers} == {RANK}
    assert max(layer.error for layer in found.layers) <= 1e-5
    assert not found.others
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert found.parameters == sum(tensor.numel() for tensor in stored.values())


def test_energy_gives_every_layer_its_own_rank_which_peft_follows(tmp_path: Path) -> None:
    tuned = tune_(tune_(tiny_model("llama"), rank=2), rank=11, only="layers.1.mlp")
    folders = saved(tmp_path, base=tiny_model("llama"), tuned=tuned)
    found = extract_lora(*folders, tmp_path / "adapter", energy=1.0 - 1e-9)
    ranks = {layer.name: layer.rank for layer in found.layers}
    assert ranks == {name: 13 if "layers.1.mlp" in name else 2 for name in ranks}
    assert difference(logits(loaded(folders[0], tmp_path / "adapter")), logits(tuned)) <= 1e-4  # the energy left out
    limited = extract_lora(*folders, energy=1.0 - 1e-9, rank=5)
    assert {layer.rank for layer in limited.layers} == {2, 5}
    assert limited.folder is None


def test_report_is_the_error_of_the_stored_adapter(tmp_path: Path) -> None:
    base, tuned = tiny_model("gpt2"), tune_(tiny_model("gpt2"), rank=30)
    folders = saved(tmp_path, base=base, tuned=tuned)
    found = extract_lora(*folders, tmp_path / "adapter", rank=6, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for layer in found.layers:
        old, new = (dense_weight(model.get_submodule(layer.name)).detach().double() for model in (base, tuned))
        a, b = (stored[f"base_model.model.{layer.name}.lora_{part}.weight"].double() for part in "AB")
        assert layer.error == pytest.approx(float((new - old - b @ a).norm() / (new - old).norm()), rel=1e-9)
        assert layer.change == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-9)
        assert 0.1 < layer.error < 1


def test_layers_that_do_not_differ_get_no_adapter(tmp_path: Path) -> None:
    folders = saved(tmp_path, base=tiny_model("llama"), tuned=tune_(tiny_model("llama"), only="v_proj"))
    found = extract_lora(*folders, tmp_path / "adapter", rank=RANK)
    assert [layer.name.rpartition(".")[2] for layer in found.layers] == ["v_proj"] * 2
    names = {name for name, module in loaded(folders[0], tmp_path / "adapter").named_modules() if hasattr(module, "r")}
    assert len(names) == 2


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "bert"])
def test_other_changes_are_reported_and_saved_when_asked(kind: str, tmp_path: Path) -> None:
    """Norms, biases and embeddings (tied in all but qwen2) together with the linear layers."""
    base, tuned = tiny_model(kind), tune_(tiny_model(kind))
    shift_(tuned, "norm.weight", "LayerNorm.weight", "ln_f.weight", "embed_tokens.weight", "wte.weight", "key.bias",
           "dense.bias", "proj.bias", "c_attn.bias")  # fmt: skip
    folders = saved(tmp_path, base=base, tuned=tuned)
    without = extract_lora(*folders, tmp_path / "without", rank=RANK)
    assert without.others
    assert not any(other.saved for other in without.others)
    assert difference(logits(loaded(folders[0], tmp_path / "without")), logits(tuned)) > 0.05
    found = extract_lora(*folders, tmp_path / "with", rank=RANK, save_others=True)
    assert {other.name for other in found.others} == {other.name for other in without.others}
    assert all(other.saved for other in found.others)
    model = loaded(folders[0], tmp_path / "with")
    assert difference(logits(model), logits(tuned)) <= SAME
    assert difference(logits(model.merge_and_unload()), logits(tuned)) <= SAME


@pytest.mark.parametrize("layout", ["pair", "pivot"])
def test_adapter_between_a_pruned_model_and_its_dense_original(layout: str, tmp_path: Path) -> None:
    dense, pruned = tiny_model("llama"), pruned_model("llama", layout)
    folders = saved(tmp_path, base=pruned, tuned=dense)
    for rank, most in ((16, 0.9), (64, SAME)):
        extract_lora(*folders, tmp_path / str(rank), rank=rank)
        model = loaded(folders[0], tmp_path / str(rank))
        assert difference(logits(model), logits(dense)) <= most * difference(logits(pruned), logits(dense))


def test_metric_of_statistics_keeps_more_of_the_output(tmp_path: Path) -> None:
    base, tuned = tiny_model("llama"), tune_(tiny_model("llama"), rank=40)
    folders = saved(tmp_path, base=base, tuned=tuned)
    windows = token_windows(16, 32)
    statistics = collect_statistics(base, windows, select_layers(base).chosen, progress=False)
    lost = {}
    for method, given in (("svd", None), ("svd-llm", statistics)):
        extract_lora(*folders, tmp_path / method, rank=8, method=method, statistics=given)
        model = loaded(folders[0], tmp_path / method)
        with torch.no_grad():
            lost[method] = float((model(windows).logits - tuned(windows).logits).norm())
    assert lost["svd-llm"] < lost["svd"]


def test_files_whose_keys_lack_the_prefix_of_the_trunk_are_read(tmp_path: Path) -> None:
    """As the GPT-2 of the hub: `h.0.attn`, not `transformer.h.0.attn`."""
    tuned = tune_(tiny_model("gpt2"))
    folders = saved(tmp_path, base=tiny_model("gpt2"), tuned=tuned)
    file = folders[0] / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    extract_lora(*folders, tmp_path / "adapter", rank=RANK)
    assert difference(logits(loaded(folders[0], tmp_path / "adapter")), logits(tuned)) <= SAME


def test_sharded_bfloat16_checkpoints_give_a_bfloat16_adapter(tmp_path: Path) -> None:
    base = tiny_model("llama", torch.bfloat16)
    tuned = tune_(copy.deepcopy(base))
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name, max_shard_size="60KB")
    extract_lora(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", energy=0.99)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_models_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    base, tuned, gpt2 = saved(
        tmp_path, base=tiny_model("llama"), tuned=tune_(tiny_model("llama")), gpt2=tiny_model("gpt2")
    )
    out = tmp_path / "adapter"

    def refused(says: str, one: Path, other: Path, error: type[Exception] = CheckpointError, **settings: Any) -> None:
        with pytest.raises(error, match=says):
            extract_lora(one, other, out, **{"rank": 2} | settings)
        assert not out.exists()

    refused("architecture", base, gpt2)
    refused("nothing differs", base, base)
    refused("needs calibration statistics", base, tuned, ConfigError, method="kfac")
    refused("say the rank", base, tuned, ConfigError, rank=None)
    refused("config.json", base, tmp_path / "nowhere")
    before = (tuned / "config.json").read_text()
    edit(tuned, vocab_size=130)
    refused("vocabulary", base, tuned)
    edit(tuned, vocab_size=128, quantization_config={"quant_method": "gptq"})
    refused("quantised", base, tuned)
    (tuned / "config.json").write_text(before)
    file = tuned / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    for broken, says, error in (
        ({name: tensors[name][:-1].clone()}, "up_proj.weight is", CheckpointError),
        ({name: tensors[name].to(torch.int8)}, "I8", CheckpointError),
        ({name: torch.full_like(tensors[name], torch.nan)}, "NaN", WeightError),
    ):
        save_file(tensors | broken, file, {"format": "pt"})
        refused(says, base, tuned, error)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, {"format": "pt"})
    refused("holds no model.layers.1", base, tuned)
    file.write_bytes(file.read_bytes()[:1000])
    refused("cut short", base, tuned)


def test_only_an_adapter_is_overwritten_and_only_when_told(tmp_path: Path) -> None:
    folders = saved(tmp_path, base=tiny_model("llama"), tuned=tune_(tiny_model("llama")))
    extract_lora(*folders, tmp_path / "adapter", rank=2)
    with pytest.raises(CheckpointError, match="overwrite"):
        extract_lora(*folders, tmp_path / "adapter", rank=3)
    extract_lora(*folders, tmp_path / "adapter", rank=3, overwrite=True)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 3
    with pytest.raises(CheckpointError, match="something other"):
        extract_lora(*folders, folders[0], rank=3, overwrite=True)


def test_a_change_of_no_linear_layer_is_no_adapter(tmp_path: Path) -> None:
    folders = saved(tmp_path, base=tiny_model("llama"), tuned=shift_(tiny_model("llama"), "norm.weight"))
    with pytest.raises(CheckpointError, match="no weight of a linear layer"):
        extract_lora(*folders, tmp_path / "adapter", rank=2, save_others=True)
    assert extract_lora(*folders, rank=2).others
