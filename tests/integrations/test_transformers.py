# SPDX-License-Identifier: Apache-2.0
"""Save with the model's own `save_pretrained`, reload in a new process with plain `from_pretrained`: nothing may
change.

All folders are made first and one process reloads them all.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from eigenprune import EigenpruneConfig, prune_
from eigenprune.layers import low_rank_layers
from tests.helpers.compare import file_hashes, state_hashes, tensor_hash, tied_groups
from tests.helpers.reload import reload_in_new_process
from tests.helpers.tiny_models import logits, saved_dense, tiny_model, token_windows

AUTO = {"bert": "AutoModelForMaskedLM", "albert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}
CLASSES = {
    "AutoModelForCausalLM": AutoModelForCausalLM,
    "AutoModelForMaskedLM": AutoModelForMaskedLM,
    "AutoModelForSeq2SeqLM": AutoModelForSeq2SeqLM,
}
SHARD = {"one": "5GB", "sharded": "60KB"}
KEEP = 0.6


@dataclass(frozen=True)
class Case:
    """One saved model and how it came to be pruned."""

    kind: str
    dtype: str
    shards: str
    route: str  # in memory, or while loading
    layout: str

    def __str__(self) -> str:
        return "-".join((self.kind, self.dtype, self.shards, self.route, self.layout))

    @property
    def auto(self) -> str:
        return AUTO.get(self.kind, "AutoModelForCausalLM")

    def config(self, **settings: Any) -> EigenpruneConfig:
        values = {"keep": KEEP, "layout": self.layout, "windows": 2, "window": 32}
        return EigenpruneConfig(**values | settings)


def _cases() -> list[Case]:
    """The full matrix of kind x dtype x shards; route and layout take turns so that each meets every kind and dtype."""
    cases = []
    for i, kind in enumerate(("llama", "gpt2", "qwen2", "phi3", "bert")):
        for j, dtype in enumerate(("float32", "bfloat16")):
            for k, shards in enumerate(("one", "sharded")):
                cases.append(Case(kind, dtype, shards, ("memory", "load")[(j + k) % 2], ("pivot", "pair")[(i + k) % 2]))
    extra = [Case(kind, "float32", "sharded", "load", "pivot") for kind in ("albert", "t5")]
    return cases + extra


CASES = _cases()


@dataclass(frozen=True)
class Saved:
    """What was in memory when the folder was written, and what the new process saw."""

    folder: Path
    state: dict[str, str]
    logits: str
    tied: list[list[str]]
    classes: dict[str, str]
    factored: int
    files: dict[str, str]
    seen: dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    scratch = tmp_path_factory.mktemp("matrix")
    made, plan = {}, []
    for case in CASES:
        folder = scratch / str(case)
        model = _pruned(case, scratch)
        model.save_pretrained(folder, max_shard_size=SHARD[case.shards])
        made[str(case)] = (model, folder)
        plan.append(
            {
                "folder": str(folder),
                "auto": case.auto,
                "load": {"dtype": "auto"},
                "generate": case.kind not in ("bert", "albert"),
                "resave": str(scratch / f"{case}-again"),
                "max_shard_size": SHARD[case.shards],
            }
        )
    results = {}
    for case, seen in zip(CASES, reload_in_new_process(plan, scratch), strict=True):
        model, folder = made[str(case)]
        results[str(case)] = Saved(
            folder,
            state_hashes(model),
            tensor_hash(logits(model)),
            tied_groups(model),
            {name: type(module).__name__ for name, module in model.named_modules()},
            len(low_rank_layers(model)),
            file_hashes(folder),
            seen,
        )
    return results


def _pruned(case: Case, scratch: Path) -> Any:
    dense = scratch / f"dense-{case.kind}-{case.dtype}"
    if not dense.exists():
        saved_dense(case.kind, dense, getattr(torch, case.dtype))
    auto = CLASSES[case.auto]
    if case.route == "load":
        return auto.from_pretrained(dense, quantization_config=case.config()).eval()
    model = auto.from_pretrained(dense).eval()
    prune_(model, case.config(), windows=token_windows(), progress=False)
    return model


@pytest.mark.parametrize("case", CASES, ids=str)
def test_saved_model_reloads_bit_equal_in_a_new_process(case: Case, saved: dict[str, Saved]) -> None:
    was = saved[str(case)]
    assert "error" not in was.seen, was.seen
    assert was.factored >= 3  # else the case shows nothing
    assert was.seen["info"] == {}  # no missing, unexpected or mismatched key, no conversion error
    assert was.seen["state"] == was.state  # dtype, shape and bytes of every tensor, pivots included
    assert was.seen["modules"] == was.classes
    assert was.seen["tied"] == was.tied
    assert was.seen["logits"] == was.logits


@pytest.mark.parametrize("case", CASES, ids=str)
def test_resaved_reloaded_model_has_the_same_files(case: Case, saved: dict[str, Saved]) -> None:
    was = saved[str(case)]
    assert was.seen["resaved"] == was.files
    shards = [name for name in was.files if name.endswith(".safetensors")]
    assert (len(shards) > 1) == (case.shards == "sharded")


def test_pivot_case_has_int32_pivots_and_tied_case_is_tied(saved: dict[str, Saved]) -> None:
    """The matrix above compares equal things; here, that the interesting ones are in it."""
    assert any("pivots" in name and "int32" in value for name, value in saved[str(CASES[0])].state.items())
    assert saved[str(CASES[0])].tied == [["lm_head.weight", "model.embed_tokens.weight"]]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_reloaded_model_generates_what_the_saved_one_generates(kind: str, saved: dict[str, Saved]) -> None:
    case = next(case for case in CASES if case.kind == kind and case.dtype == "float32")
    model = CLASSES[case.auto].from_pretrained(saved[str(case)].folder).eval()
    expected = model.generate(token_windows(1, 6), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert saved[str(case)].seen["generated"] == expected.tolist()


def test_two_saves_give_identical_files(tmp_path: Path) -> None:
    model = tiny_model("llama")
    prune_(model, EigenpruneConfig(keep=KEEP), windows=token_windows(), progress=False)
    model.save_pretrained(tmp_path / "a", max_shard_size="60KB")
    for round_ in range(4):  # metadata of our own would come in random order: one save in two differs
        model.save_pretrained(tmp_path / f"b{round_}", max_shard_size="60KB")
        assert file_hashes(tmp_path / f"b{round_}") == file_hashes(tmp_path / "a")


def test_dequantized_model_saves_as_a_stock_dense_checkpoint(tmp_path: Path) -> None:
    plan, states = [], []
    for kind, auto in (("gpt2", "AutoModelForCausalLM"), ("bert", "AutoModelForMaskedLM")):
        model = tiny_model(kind)
        classes = {name: type(module).__name__ for name, module in model.named_modules()}
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        prune_(model, EigenpruneConfig(keep=KEEP), windows=token_windows(), progress=False)
        pruned = logits(model)
        model = model.dequantize()
        assert {name: type(module).__name__ for name, module in model.named_modules()} == classes  # Conv1D again
        assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
        assert float((logits(model) - pruned).abs().max()) <= _rounding(pruned)
        model.save_pretrained(tmp_path / kind)
        assert "quantization_config" not in (tmp_path / kind / "config.json").read_text()
        plan.append({"folder": str(tmp_path / kind), "auto": auto})
        states.append(state_hashes(model))
    for seen, state in zip(reload_in_new_process(plan, tmp_path, plugin=False), states, strict=True):
        assert "error" not in seen
        assert seen["info"] == {}
        assert seen["state"] == state


def _rounding(values: torch.Tensor) -> float:
    """What two orders of the same float32 sums may differ by: sums of at most 128 terms, some 10 of them in a row."""
    return 128 * 10 * torch.finfo(torch.float32).eps * float(values.abs().max())


def test_pruned_checkpoint_without_the_plug_in_is_an_error_never_random_weights(
    saved: dict[str, Saved], tmp_path: Path
) -> None:
    cases = [case for case in CASES if case.dtype == "float32"]
    plan = [{"folder": str(saved[str(case)].folder), "auto": case.auto} for case in cases]
    plan += [{"folder": str(saved[str(case)].folder), "auto": "AutoModel"} for case in cases]
    for entry, seen in zip(plan, reload_in_new_process(plan, tmp_path, plugin=False), strict=True):
        assert seen.get("error") == "RuntimeError", (entry, seen.get("class"), seen.get("info"))


def _any_saved(saved: dict[str, Saved], kind: str, dtype: str = "float32", layout: str | None = None) -> Saved:
    return next(
        saved[str(case)] for case in CASES if (case.kind, case.dtype) == (kind, dtype) and layout in (None, case.layout)
    )


def test_reload_with_a_device_map_equals_the_saved_model(saved: dict[str, Saved]) -> None:
    for kind in ("llama", "gpt2"):
        was = _any_saved(saved, kind)
        model = AutoModelForCausalLM.from_pretrained(was.folder, device_map="cpu").eval()
        assert state_hashes(model) == was.state
        assert tensor_hash(logits(model)) == was.logits


@pytest.mark.parametrize("layout", ["pivot", "pair"])
def test_reload_with_layers_on_disk_gives_the_same_logits(layout: str, saved: dict[str, Saved], tmp_path: Path) -> None:
    was = _any_saved(saved, "llama", layout=layout)
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        was.folder, device_map=places, offload_folder=tmp_path / "offload"
    ).eval()
    assert model.model.layers[1].mlp.down_proj.right.weight.device.type == "meta"  # it is on disk
    expected = AutoModelForCausalLM.from_pretrained(was.folder).eval()
    # The offloaded layer runs its children one after the other, the other one the fused operator: other orders of sums.
    assert float((logits(model) - logits(expected)).abs().max()) <= _rounding(logits(expected))


def test_dtype_given_at_reload_casts_the_factors_and_not_the_pivots(saved: dict[str, Saved]) -> None:
    was = _any_saved(saved, "llama", layout="pivot")
    kept = AutoModelForCausalLM.from_pretrained(was.folder)
    cast = AutoModelForCausalLM.from_pretrained(was.folder, dtype=torch.bfloat16)
    assert state_hashes(cast) == state_hashes(kept.to(torch.bfloat16))
    assert {layer.pivots.dtype for layer in low_rank_layers(cast).values()} == {torch.int32}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_trunk_loads_from_a_checkpoint_with_a_head_and_back(kind: str, saved: dict[str, Saved], tmp_path: Path) -> None:
    was = _any_saved(saved, kind)
    trunk, info = AutoModel.from_pretrained(was.folder, output_loading_info=True)
    assert [key for key in info["missing_keys"] if "pooler" not in key] == []  # BERT's pooler is new, and random
    assert not info["mismatched_keys"]
    assert low_rank_layers(trunk)
    prefix = {"llama": "model.", "gpt2": "transformer.", "bert": "bert.", "t5": ""}[kind]
    common = {name: value for name, value in state_hashes(trunk).items() if "pooler" not in name}
    assert common == {name: was.state[prefix + name] for name in common}
    trunk.save_pretrained(tmp_path / "trunk")
    auto = CLASSES[AUTO.get(kind, "AutoModelForCausalLM")]
    back = state_hashes(auto.from_pretrained(tmp_path / "trunk"))
    assert {name: back[prefix + name] for name in common} == common


def test_masked_language_model_loads_as_a_classifier_with_a_new_head(saved: dict[str, Saved]) -> None:
    """A factored layer in the head that the classifier does not have is no lie of the checkpoint."""
    model = tiny_model("bert")
    prune_(model, EigenpruneConfig(keep=KEEP, allocation="uniform"), windows=token_windows(), progress=False)
    assert "cls.predictions.transform.dense" in low_rank_layers(model)
    folder = _any_saved(saved, "bert").folder.parent / "bert-head"
    model.save_pretrained(folder)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert low_rank_layers(classifier).keys() == {
        name for name in low_rank_layers(model) if not name.startswith("cls.")
    }
    for name, layer in low_rank_layers(classifier).items():
        assert torch.equal(layer.weight, model.get_submodule(name).weight)


def test_loaded_model_is_a_plain_float_model_of_the_stock_class(saved: dict[str, Saved]) -> None:
    model = AutoModelForCausalLM.from_pretrained(_any_saved(saved, "llama").folder)
    assert type(model).__module__.startswith("transformers.")
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.half().dtype == torch.float16  # transformers refuses this for quantised models
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_checkpoint_names_no_local_path(saved: dict[str, Saved]) -> None:
    case = next(case for case in CASES if case.route == "load")
    folder = saved[str(case)].folder
    for path in folder.glob("*.json"):
        assert str(folder.parent) not in path.read_text()
