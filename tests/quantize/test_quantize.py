# SPDX-License-Identifier: Apache-2.0
"""Weights in few bits: what is computed, saved and reloaded, and what is refused."""

import copy
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from eigenprune import EigenpruneConfig, prune_, save_model
from eigenprune.errors import CheckpointError, ConfigError, EigenpruneError, WeightError
from eigenprune.layers import LowRankLinear, dequantize_, low_rank_layers, quantised_bytes, quantised_linears, to_dense_
from eigenprune.layers.quantised import group_size, tensor_bytes
from tests.helpers.compare import tensor_hash
from tests.helpers.reload import reload_in_new_process
from tests.helpers.tiny_models import logits, saved_dense, tiny_model, token_windows

pytest.importorskip("torchao", reason="quantising needs torchao: pip install 'eigenprune[quantize]'")

from eigenprune.quantize import plain_state_, quantised_weight, quantize_
from eigenprune.quantize.stored import packed, unpacked

LAYER = "model.layers.1.mlp.down_proj"
ALONE = "model.layers.0.self_attn.q_proj"  # quantised without being factored


def pruned(kind: str = "llama", layout: str = "pivot", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    model = tiny_model(kind, dtype)
    config = EigenpruneConfig(**{"keep": 0.6, "layout": layout, "method": "svd", "allocation": "uniform"} | more)
    with pytest.warns(UserWarning, match="looks at no data"):
        prune_(model, config, progress=False)
    return model


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [96, 48, 40, 13])
def test_every_entry_is_off_by_half_a_step_at_most(bits: int, columns: int) -> None:
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(columns))
    made = quantised_weight(weight, bits)
    group = group_size(bits, columns)
    # Symmetric: the steps of a group are its largest entry / 127.5 or / 7.5, so that the largest itself may lie half a
    # step beyond the last level; a bfloat16 scale is off by 2^-8 of itself, times up to 8 levels.
    step = weight.unflatten(1, (-1, group)).abs().amax(2) / (127.5 if bits == 8 else 7.5)
    most = step.repeat_interleave(group, 1) * (0.5 + (1e-4 if bits == 8 else 8 * 2**-8))
    assert ((made.dequantize() - weight).abs() <= most).all()
    assert made.dtype == weight.dtype
    assert made.shape == weight.shape


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(24, 96), (7, 48), (5, 13)])
def test_bytes_are_those_of_the_stored_tensors(bits: int, shape: tuple[int, int]) -> None:
    holder = nn.Module()
    holder.part = nn.Linear(shape[1], shape[0], bias=False)
    holder.part.weight = nn.Parameter(quantised_weight(torch.randn(shape), bits), requires_grad=False)
    tensors = dict(holder.state_dict())
    plain_state_(tensors, holder)
    found = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert found == quantised_bytes(bits, *shape) == tensor_bytes(holder.part.weight)


@pytest.mark.parametrize("columns", [1, 2, 7, 32])
def test_packing_two_numbers_in_a_byte_is_exact(columns: int) -> None:
    numbers = torch.arange(-8, 8, dtype=torch.int8).repeat(columns).view(16, columns)
    assert torch.equal(unpacked(packed(numbers), columns), numbers)
    assert packed(numbers).shape == (16, (columns + 1) // 2)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("layout", ["pivot", "pair"])
def test_layer_computes_with_the_quantised_factors(bits: int, layout: str) -> None:
    """The output, the `weight` property and the layer made dense all belong to the same, rounded, factors."""
    model = pruned(layout=layout)
    layer = low_rank_layers(model)[LAYER]
    left, right = layer.left.weight.detach().clone(), layer.right.weight.detach().clone()
    quantize_(model, bits)
    pivots = layer.pivots if layout == "pivot" else None
    values = [quantised_weight(part, bits).dequantize() for part in (left, right)]
    reference = LowRankLinear.from_factors(*values, pivots=pivots, bias=layer.bias).weight.detach()
    assert torch.equal(layer.weight, reference)
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ reference.double().t()
    size = x.double().abs() @ values_product(values, pivots, layer).t()
    # Two matrix products in float32: rounding grows with the sums of absolute values.
    bound = 4 * torch.finfo(torch.float32).eps * (layer.in_features + layer.rank) * size
    assert ((layer(x).double() - exact).abs() <= bound).all()
    assert f"bits={bits}" in layer.extra_repr()
    before = logits(model)
    to_dense_(model)
    assert not quantised_linears(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)


def values_product(values: list[Tensor], pivots: Tensor | None, layer: LowRankLinear) -> Tensor:
    """The product of the absolute values of the factors, [out, in], float64."""
    left, right = (value.double().abs() for value in values)
    return LowRankLinear.from_factors(left, right, pivots=pivots).weight.detach()


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whichever shard they are in."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("bits", [8, 4])
def test_reload_in_a_new_process_computes_the_same_bits(bits: int, tmp_path: Path) -> None:
    plan, expected = [], []
    for kind, dtype, layout in (
        ("llama", torch.float32, "pivot"),
        ("qwen2", torch.bfloat16, "pair"),
        ("gpt2", torch.float32, "pivot"),
    ):
        model = pruned(kind, layout, dtype)
        quantize_(model, bits, dense=False)
        folder = tmp_path / kind
        model.save_pretrained(folder, max_shard_size="40KB")
        again = {"resave": str(tmp_path / f"{kind}-again"), "max_shard_size": "40KB"}
        plan.append({"folder": str(folder), "auto": "AutoModelForCausalLM", **again})
        expected.append(tensor_hash(logits(model)))
    for entry, seen, wanted in zip(plan, reload_in_new_process(plan, tmp_path), expected, strict=True):
        assert seen.get("logits") == wanted, seen
        assert seen["info"] == {}
        first, again = (stored_tensors(Path(entry[key])) for key in ("folder", "resave"))
        assert first.keys() == again.keys()
        assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_prune_with_bits_quantises_dense_layers_too_and_saves_fewer_bytes(tmp_path: Path) -> None:
    plain = pruned(keep=0.9, allocation="global")
    assert type(plain.get_submodule(ALONE)) is nn.Linear or low_rank_layers(plain)
    model = pruned(keep=0.9, allocation="global", bits=8)
    chosen = low_rank_layers(model)
    linears = quantised_linears(model)
    for layer in chosen:
        assert {f"{layer}.left", f"{layer}.right"} <= linears.keys()
    assert "lm_head" not in linears
    save_model(model, tmp_path / "eight")
    save_model(plain, tmp_path / "plain")
    config = json.loads((tmp_path / "eight/config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    assert config["bits"] == 8
    assert config["quantized"].keys() == linears.keys()
    assert json.loads((tmp_path / "plain/config.json").read_text())["quantization_config"]["format_version"] == 1
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("eight", "plain")]
    assert sizes[0] < 0.6 * sizes[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "eight").eval()
    assert torch.equal(logits(again), logits(model))


def test_report_counts_the_bytes_that_are_saved(tmp_path: Path) -> None:
    model = tiny_model("llama")
    config = EigenpruneConfig(keep=0.6, method="svd", allocation="uniform", bits=4, layout="pair")
    with pytest.warns(UserWarning, match="looks at no data"):
        report = prune_(model, config, progress=False)
    save_model(model, tmp_path / "model", report=report)
    stored = load_file(tmp_path / "model/model.safetensors")
    assert report.model_bytes[1] == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert {layer.bits for layer in report.chosen} == {4}
    assert report.settings["bits"] == 4


def test_int4_on_pivot_factors_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="layout pivot"):
        quantize_(pruned(layout="pivot"), 4)
    pair, pivot = pruned(layout="pair"), pruned(layout="pivot")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(pair, 4)
        quantize_(pivot, 8)


def test_dense_layers_are_quantised_without_pruning(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    before = logits(model)
    quantize_(model, 8, dense=True)
    assert "lm_head" not in quantised_linears(model)
    assert ALONE in quantised_linears(model)
    assert model.get_submodule(ALONE).bias is not None
    changed = logits(model)
    assert not torch.equal(changed, before)
    torch.testing.assert_close(changed, before, rtol=0.1, atol=0.1)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(again), changed)
    assert type(again.get_submodule(ALONE)) is nn.Linear


def test_loading_in_another_dtype_keeps_the_integers(tmp_path: Path) -> None:
    model = pruned(dtype=torch.bfloat16)
    quantize_(model, 4)
    model.save_pretrained(tmp_path / "model")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for name, linear in quantised_linears(model).items():
        other = wide.get_submodule(name).weight
        assert other.dtype == torch.float32
        assert torch.equal(other.qdata, linear.weight.qdata)
        assert torch.equal(other.scale, linear.weight.scale.float())


def test_dequantize_keeps_the_function_and_allows_merges() -> None:
    model = pruned()
    quantize_(model, 8)
    before = low_rank_layers(model)[LAYER].weight.detach().clone()
    dequantize_(model)
    layer = low_rank_layers(model)[LAYER]
    assert type(layer.left.weight) is nn.Parameter
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("action", "error", "text"),
    [
        (lambda model: quantize_(model, 8), ConfigError, "quantised already"),
        (lambda model: quantize_(copy.deepcopy(dequantize_(model)), 3), ConfigError, "bits 3"),
        (lambda model: quantize_(dequantize_(model), {"no.such": 8}), ConfigError, "no.such"),
        (lambda model: quantize_(tiny_model("llama"), 8), ConfigError, "dense=True"),
        (lambda model: quantize_(dequantize_(model).double(), 8), ConfigError, "float64"),
        (lambda model: prune_(model, EigenpruneConfig()), ConfigError, "pruned already"),
        (lambda model: prune_(_dense_int8(), EigenpruneConfig()), WeightError, "quantised by torchao"),
        (lambda model: save_model(model, "/nowhere/model", remote_code=True), CheckpointError, "no modelling file"),
    ],
)
def test_what_cannot_be_done_says_so(action: Callable[[Any], Any], error: type[Exception], text: str) -> None:
    model = pruned()
    quantize_(model, 8)
    with pytest.raises(error, match=text):
        action(model)


def _dense_int8() -> PreTrainedModel:
    model = tiny_model("llama")
    quantize_(model, 8, dense=True)
    return model


def test_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    last = low_rank_layers(model)[list(low_rank_layers(model))[-1]]
    last.right = nn.Sequential(last.right)  # what a wrapper looks like
    with pytest.raises(ConfigError, match="not a plain Linear"):
        quantize_(model, 8)
    last.right = last.right[0]
    assert not quantised_linears(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_trainers_of_factors_refuse_integers() -> None:
    from eigenprune.recover import recover_, retruncate_

    model = pruned()
    quantize_(model, 8)
    with pytest.raises(ConfigError, match="recover first"):
        recover_(model, tiny_model("llama"), token_windows(), progress=False)
    with pytest.raises(ConfigError, match="quantised"):
        retruncate_(model, {LAYER: 8})


def test_pruning_and_quantising_while_loading(tmp_path: Path) -> None:
    dense = saved_dense("llama", tmp_path / "dense")
    config = EigenpruneConfig(keep=0.6, method="svd", allocation="uniform", bits=8)
    with pytest.warns(UserWarning, match="looks at no data"):
        model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert quantised_linears(model)
    assert model.is_quantized  # transformers then refuses .half() and .float(), which torchao's tensors do not follow
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(again), logits(model))
    dequantize_(model).half()
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_layers_on_disk_are_refused(honest: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(CheckpointError, match="onto one device"):
        AutoModelForCausalLM.from_pretrained(honest, device_map=places, offload_folder=tmp_path / "offload")


@pytest.mark.parametrize("bits", [8, 4])
def test_a_lora_around_quantised_factors_trains_and_is_not_merged(bits: int) -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft: pip install 'eigenprune[peft]'")
    model = quantize_(pruned(), bits)
    before = logits(model)
    config = peft.LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights="gaussian")
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(logits(adapted), before)
    ids = token_windows(2, 12)
    adapted(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert gradients
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    with pytest.raises(ConfigError, match="quantised"):
        adapted.merge_and_unload()


def test_command_line_prunes_quantises_and_inspects(tmp_path: Path) -> None:
    dense, out = saved_dense("llama", tmp_path / "dense"), tmp_path / "out"
    command = [sys.executable, "-m", "eigenprune.cli"]
    settings = ["--keep", "0.6", "--method", "svd", "--allocation", "uniform", "--bits", "8", "--json"]
    for arguments in (["prune", str(dense), "--out", str(out), *settings], ["inspect", str(out), "--json"]):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        layers = json.loads(done.stdout)["layers"]
        assert {layer["bits"] for layer in layers if layer["layout"] == "pivot"} == {8}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = pruned("qwen2", skip=("q_proj",))
    quantize_(model, dict.fromkeys([*low_rank_layers(model), ALONE], 8) | {LAYER: 4})
    folder = tmp_path_factory.mktemp("honest") / "model"
    model.save_pretrained(folder)
    return folder


def _forget(name: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, tensors: config["quantized"].pop(name) and None


def _set(name: str, entry: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, tensors: config["quantized"].update({name: entry})


def _tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_forget(f"{LAYER}.right"), id="a factor is not named"),
        pytest.param(_forget(ALONE), id="a layer alone is not named"),
        pytest.param(_set(f"{LAYER}.right", [8, 96]), id="other bits"),
        pytest.param(_set(f"{LAYER}.right", [4, 7]), id="a group that does not fit"),
        pytest.param(_set(f"{LAYER}.right", [4, 48]), id="another group"),
        pytest.param(_set(f"{LAYER}.right", [2, 32]), id="bits that there are not"),
        pytest.param(_set(f"{LAYER}.right", "8"), id="no list"),
        pytest.param(_set("lm_head", [8, 64]), id="a dense layer is named"),
        pytest.param(_set("model.norm", [8, 64]), id="a norm is named"),
        pytest.param(_set("model.layers.9.mlp", [8, 64]), id="no such layer"),
        pytest.param(_set("../up", [8, 64]), id="a path"),
        pytest.param(_tensor(f"{LAYER}.left.weight_scale", lambda t: t.float()), id="scales of another type"),
        pytest.param(_tensor(f"{LAYER}.left.weight_scale", lambda t: t * torch.nan), id="scales that are no numbers"),
        pytest.param(_tensor(f"{LAYER}.left.weight_qdata", lambda t: t[1:].clone()), id="a row is missing"),
        pytest.param(_tensor(f"{LAYER}.left.weight_qdata", lambda t: t.to(torch.int8)), id="integers of another type"),
    ],
)
def test_files_that_lie_are_refused(
    honest: Path, tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]
) -> None:
    folder = Path(shutil.copytree(honest, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(folder)
    change(config["quantization_config"], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EigenpruneError):
        AutoModelForCausalLM.from_pretrained(folder)


def test_without_torchao_the_extra_is_named(honest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)  # what an import meets where nothing is installed
    with pytest.raises(ConfigError, match=r"eigenprune\[quantize\]"):
        AutoModelForCausalLM.from_pretrained(honest)
    with pytest.raises(ConfigError, match=r"eigenprune\[quantize\]"):
        prune_(tiny_model("llama"), EigenpruneConfig(method="svd", bits=8), progress=False)


def test_card_counts_logical_parameters(honest: Path) -> None:
    from eigenprune.hub.card import build_card
    from eigenprune.hub.facts import read_facts

    facts = read_facts(honest)
    plain = pruned("qwen2", skip=("q_proj",))
    assert facts.parameters[1] == sum(p.numel() for p in plain.parameters())
    assert facts.parameters[0] == sum(p.numel() for p in tiny_model("qwen2").parameters())
    assert facts.weight_bytes[0] == 4 * facts.parameters[0]
    stored = load_file(honest / "model.safetensors").values()
    assert facts.weight_bytes[1] == sum(tensor.numel() * tensor.element_size() for tensor in stored)
    card = build_card(honest, "me/model")
    assert "in int4 and" in card
    assert 'pip install "eigenprune[quantize]"' in card
