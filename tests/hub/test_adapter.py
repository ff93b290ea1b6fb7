# SPDX-License-Identifier: Apache-2.0
"""Adapters in real files: saved, applied to the base bit for bit, undone bit for bit, refused on anything else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from eigenprune.errors import CheckpointError
from eigenprune.hub import apply_adapter_, base_weights, read_adapter, save_adapter
from eigenprune.hub.adapter_file import HEADER_KEY, LARGEST_ADAPTER, pack_mask, unpack_mask
from tests.helpers.removals import some_removal
from tests.helpers.tiny_models import logits, tiny_model

KINDS = ("llama", "gpt2", "qwen2", "phi3")  # no biases, Conv1D and fused, grouped queries with biases, fused


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def saved(kind: str, path: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Path]:
    """A pruned tiny model and the file of its adapter."""
    model = tiny_model(kind, dtype)
    base = base_weights(model)
    removal = some_removal(model)
    return model, save_adapter(removal, base, path, model=model, provenance={"task": "int-mult"})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("adapter") / "mult.safetensors")[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_applied_is_the_pruned_model_and_undone_is_the_base_bit_for_bit(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    pruned, path = saved(kind, tmp_path / "a.safetensors", dtype)
    model = tiny_model(kind, dtype)
    before, output = state(model), logits(model)
    applied = apply_adapter_(model, path)
    assert same(state(model), state(pruned))
    assert not same(state(model), before)
    assert not torch.equal(logits(model), output)
    assert applied.undo_() is model
    assert same(state(model), before)
    assert torch.equal(logits(model), output)
    with pytest.raises(CheckpointError, match="undone already"):
        applied.undo_()


def test_applied_model_is_saved_whole_and_undone_one_is_stock_again(llama: Path, tmp_path: Path) -> None:
    """Llama has no biases: those that the adapter gives are read back, and the config forgets them after it."""
    model = tiny_model("llama")
    stock = model.config.to_dict()
    applied = apply_adapter_(model, llama)
    assert applied.given
    model.save_pretrained(tmp_path / "better")
    assert same(state(type(model).from_pretrained(tmp_path / "better")), state(model))
    applied.undo_()
    assert model.config.to_dict() == stock | {"architectures": ["LlamaForCausalLM"]}  # saving sets that
    model.save_pretrained(tmp_path / "stock")
    assert "quantization_config" not in json.loads((tmp_path / "stock" / "config.json").read_text())


def test_file_is_kilobytes_of_masks_and_biases_and_always_the_same(llama: Path, tmp_path: Path) -> None:
    """The bound: one bit a component, four bytes an output, and 300 bytes of names and hashes a layer."""
    model = tiny_model("llama")
    base, removal = base_weights(model), some_removal(model)
    bits = sum(-(-mask.shape[1] // 8) * mask.shape[0] for mask in removal.masks.values())
    floats = sum(delta.numel() for delta in removal.bias_deltas.values())
    assert llama.stat().st_size <= bits + 4 * floats + 300 * len(removal.masks) + 1000
    again = save_adapter(removal, base, tmp_path / "b.safetensors", model=model, provenance={"task": "int-mult"})
    assert again.read_bytes() == llama.read_bytes()
    found = read_adapter(again)
    assert found.removal.kinds == removal.kinds
    assert found.removal.views == removal.views
    assert all(torch.equal(found.removal.masks[name], mask) for name, mask in removal.masks.items())
    assert found.provenance["task"] == "int-mult"
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 8), (5, 9), (1, 64), (4, 65)])
def test_packed_bits_are_those_of_a_loop_and_come_back(shape: tuple[int, int]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    packed = pack_mask(mask)
    for row in range(shape[0]):
        number = sum(int(mask[row, column]) << column for column in range(shape[1]))
        assert bytes(packed[row].tolist()) == number.to_bytes(packed.shape[1], "little")
    assert torch.equal(unpack_mask(packed, shape[1]), mask)


def test_base_in_a_wider_type_with_the_same_values_is_the_same_base(tmp_path: Path) -> None:
    _, path = saved("llama", tmp_path / "a.safetensors", torch.bfloat16)
    apply_adapter_(tiny_model("llama", torch.bfloat16).float(), path)


def test_other_weights_are_refused_by_name_and_nothing_changes(llama: Path) -> None:
    layer = "model.layers.1.mlp.down_proj"
    cases: dict[str, Any] = {
        "another model": (tiny_model("qwen2"), "layers that it changes differ"),
        "another architecture": (tiny_model("gpt2"), "no layer model.layers.0"),
        "coarser": (tiny_model("llama", torch.bfloat16), "coarser dtype"),
    }
    one, norm = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        one.get_submodule(layer).weight[3, 5] += 1e-6
        norm.model.norm.weight[0] += 1e-6
    cases["one entry"] = (one, f"1 of the 6 layers that it changes differ here, among them {layer}")
    cases["a norm"] = (norm, "others (embeddings, norms, heads) differ")
    for name, (model, says) in cases.items():
        before = state(model)
        with pytest.raises(CheckpointError) as error:
            apply_adapter_(model, llama)
        assert says in str(error.value), name
        assert same(state(model), before), name


def test_second_application_is_refused(llama: Path) -> None:
    model = tiny_model("llama")
    applied = apply_adapter_(model, llama)
    with pytest.raises(CheckpointError, match="applied already"):
        apply_adapter_(model, llama)
    assert same(state(applied.undo_()), state(tiny_model("llama")))


def test_existing_file_and_bad_names_are_refused(llama: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    base = base_weights(model)
    removal = some_removal(model)
    before = llama.read_bytes()
    with pytest.raises(CheckpointError, match="--overwrite"):
        save_adapter(removal, base, llama)
    assert llama.read_bytes() == before
    for name in ("a.bin", "a.safetensors.pkl", "con.safetensors", ".safetensors"):
        with pytest.raises(CheckpointError, match=r"NAME\.safetensors"):
            save_adapter(removal, base, tmp_path / name)
        with pytest.raises(CheckpointError, match=r"NAME\.safetensors"):
            read_adapter(tmp_path / name)
    with pytest.raises(CheckpointError, match="nothing was removed"):
        save_adapter(some_removal(model, ("down",)).__class__({}, {}, {}, {}), base, tmp_path / "a.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_adapter(removal, base, tmp_path / "file" / "a.safetensors")


def test_no_local_path_is_kept(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "my-base")
    loaded = type(model).from_pretrained(tmp_path / "my-base")
    base = base_weights(loaded)
    path = save_adapter(some_removal(loaded), base, tmp_path / "a.safetensors", model=loaded)
    assert str(tmp_path).encode() not in path.read_bytes()
    assert read_adapter(path).base_model == "my-base"


def changed(path: Path, target: Path, header: Any = None, tensors: Any = None) -> Path:
    """A copy of an adapter with its header or tensors changed by a function."""
    with safe_open(path, framework="pt") as opened:
        values = json.loads(opened.metadata()[HEADER_KEY])
    held = load_file(path)
    if tensors is not None:
        tensors(held)
    if header is not None:
        header(values)
    save_file(held, target, {HEADER_KEY: json.dumps(values)})
    return target


DOWN = "model.layers.0.mlp.down_proj"
HEADERS: list[tuple[Any, str]] = [
    (lambda h: h.update(format_version=2), "update it"),
    (lambda h: h.update(format_version="1"), "not that of an eigenprune adapter"),
    (lambda h: h.update(format="lora"), "not that of an eigenprune adapter"),
    (lambda h: h.update(extra=1), "fields of an adapter"),
    (lambda h: h.pop("provenance"), "fields of an adapter"),
    (lambda h: h.update(layers=[]), "fields of an adapter"),
    (lambda h: h["base"].update(weights="0" * 63), "which weights"),
    (lambda h: h["base"].update(weights=None), "which weights"),
    (lambda h: h["base"].update(model="x" * 1000), "which weights"),
    (lambda h: h["layers"].update({"../evil": h["layers"].pop(DOWN)}), "no layer name"),
    (lambda h: h["layers"][DOWN].update(rank=True), "no possible number"),
    (lambda h: h["layers"][DOWN].update(rank=10**12), "no possible number"),
    (lambda h: h["layers"][DOWN].update(rank=32), "not the bits of 32"),
    (lambda h: h["layers"][DOWN].update(rank=63), "beyond its 63"),
    (lambda h: h["layers"][DOWN].update(kind="import os"), "known kind"),
    (lambda h: h["layers"][DOWN].update(view="cube"), "known kind and view"),
    (lambda h: h["layers"][DOWN].update(weights="zz"), "for which weights"),
    (lambda h: h["layers"][DOWN].update(more=1), "fields of a layer"),
    (lambda h: h["layers"].pop(DOWN), "of no layer"),
]


@pytest.mark.parametrize(("header", "says"), HEADERS, ids=range(len(HEADERS)))
def test_damaged_header_is_refused(header: Any, says: str, llama: Path, tmp_path: Path) -> None:
    def all_bits(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{DOWN}.mask"].fill_(255)

    path = changed(llama, tmp_path / "a.safetensors", header, all_bits)
    with pytest.raises(CheckpointError, match=r"a\.safetensors") as error:
        read_adapter(path)
    assert says in str(error.value)


TENSORS: list[tuple[Any, str]] = [
    (lambda t: t.pop(f"{DOWN}.mask"), "is missing"),
    (lambda t: t.update({f"{DOWN}.mask": t[f"{DOWN}.mask"].int()}), "not the bits of"),
    (lambda t: t.update({f"{DOWN}.mask": t[f"{DOWN}.mask"][0]}), "not the bits of"),
    (lambda t: t.update({f"{DOWN}.mask": t[f"{DOWN}.mask"][:0]}), "not the bits of"),
    (lambda t: t[f"{DOWN}.bias"].fill_(float("nan")), "no finite float32"),
    (lambda t: t.update({f"{DOWN}.bias": t[f"{DOWN}.bias"].double()}), "no finite float32"),
    (lambda t: t.update({"lm_head.weight": torch.zeros(2)}), "of no layer"),
]


@pytest.mark.parametrize(("tensors", "says"), TENSORS, ids=range(len(TENSORS)))
def test_damaged_tensors_are_refused(tensors: Any, says: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        read_adapter(changed(llama, tmp_path / "a.safetensors", tensors=tensors))
    assert says in str(error.value)


def test_removal_that_does_not_fit_the_right_base_changes_nothing(llama: Path, tmp_path: Path) -> None:
    """Hashes that are right do not make the rest right: such a file is a lie, and is refused layer by layer."""
    lies: list[tuple[Any, Any]] = [
        (lambda h: h["layers"][DOWN].update(kind="q"), None),
        (None, lambda t: t.update({f"{DOWN}.bias": torch.zeros(3)})),
        (None, lambda t: t.update({f"{DOWN}.mask": torch.cat([t[f"{DOWN}.mask"]] * 2)})),
        (
            lambda h: h["layers"].update({"model.nowhere": h["layers"].pop(DOWN)}),
            lambda t: t.update({"model.nowhere.mask": t.pop(f"{DOWN}.mask"), "x": t.pop(f"{DOWN}.bias")}) or t.pop("x"),
        ),
    ]
    for header, tensors in lies:
        path = changed(llama, tmp_path / "a.safetensors", header, tensors)
        model = tiny_model("llama")
        with pytest.raises(CheckpointError):
            apply_adapter_(model, path)
        assert same(state(model), state(tiny_model("llama")))


def test_files_that_are_no_adapter_are_refused(llama: Path, tmp_path: Path) -> None:
    raw = llama.read_bytes()
    files = {
        "cut": raw[: len(raw) // 2],
        "header-cut": raw[:20],
        "empty": b"",
        "pickle": b"\x80\x04N.",
        "long-header": (1 << 40).to_bytes(8, "little") + raw[8:],
    }
    for name, content in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors", {"format": "pt"})
    save_file({"a": torch.zeros(1)}, tmp_path / "bad-json.safetensors", {HEADER_KEY: "{"})
    save_file({"a": torch.zeros(1)}, tmp_path / "deep.safetensors", {HEADER_KEY: '{"a":' * 50 + "1" + "}" * 50})
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.truncate(LARGEST_ADAPTER + 1)
    for path in sorted(tmp_path.glob("*.safetensors")):
        with pytest.raises(CheckpointError, match=path.name):
            read_adapter(path)
    with pytest.raises(CheckpointError, match="missing"):
        read_adapter(tmp_path / "none.safetensors")


def test_model_without_data_is_refused(llama: Path) -> None:
    with torch.device("meta"):
        model = tiny_model("llama").__class__(tiny_model("llama").config)
    with pytest.raises(CheckpointError, match="no data"):
        apply_adapter_(model, llama)
