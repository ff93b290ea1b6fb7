# SPDX-License-Identifier: Apache-2.0
"""What cannot work around a factored layer is refused before the model is touched, and the error says what to do."""

import copy
import warnings
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from eigenprune import EigenpruneConfig, prune_
from eigenprune.errors import ConfigError, WeightError
from eigenprune.integrations.merging import truncate_merged_
from eigenprune.layers import low_rank_layers
from tests.helpers.adapters import difference, pruned_model, trained_
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import logits, tiny_model

peft = pytest.importorskip("peft")

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner  # noqa: E402

# What a config insists on; all else is its default.
NEEDED: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "IA3": {"feedforward_modules": []},
    "VBLORA": {"vector_length": 8, "num_vectors": 4},
    "SHIRA": {"r": 2},
}
# These look for layers they know before anything else, find none, and say so.
OWN_ERROR = ("FROD", "PVERA", "RANDLORA", "VERA")
# No targets of their own.
NO_TARGETS = ("XLORA",)


def other_tuners() -> list[str]:
    return sorted(
        kind.value
        for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if issubclass(tuner, BaseTuner) and kind.value not in ("LORA", *NO_TARGETS)
    )


@pytest.mark.parametrize("kind", other_tuners())
def test_another_tuner_around_a_factored_layer_is_refused_and_the_model_untouched(kind: str) -> None:
    model = pruned_model()
    before = {name: type(module) for name, module in model.named_modules()}
    try:
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](target_modules=["q_proj"], **NEEDED.get(kind, {}))
    except ImportError as error:
        pytest.skip(f"{kind} needs another package: {error}")
    error = ValueError if kind in OWN_ERROR else ConfigError
    words = "compatible with" if kind in OWN_ERROR else r"target the plain Linears inside it .*\"right\", \"left\""
    with pytest.raises(error, match=words):
        peft.get_peft_model(model, config)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("kind", ["LOHA", "IA3", "OFT", "VERA", "ADALORA"])
def test_another_tuner_works_on_the_parts(kind: str) -> None:
    settings = NEEDED.get(kind, {}) | ({"oft_block_size": 8, "r": 0} if kind == "OFT" else {})
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](target_modules=["right", "left"], **settings)
    model = peft.get_peft_model(pruned_model(), config)
    if kind != "ADALORA":  # whose loss wants labels in a form of its own
        trained_(model)
    output = logits(model)
    assert difference(logits(model.merge_and_unload()), output) <= 1e-5


def test_default_targets_of_another_tuner_are_refused_too() -> None:
    with pytest.raises(ConfigError, match="LOHA cannot be put around the factored layer"):
        peft.get_peft_model(pruned_model(), peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=r".*\.q_proj"))
    with pytest.raises(ConfigError, match="IA3 cannot be put around"):
        peft.get_peft_model(pruned_model(), peft.IA3Config(task_type="CAUSAL_LM"))


def test_another_tuner_is_refused_by_the_keys_of_a_state_dict_too() -> None:
    config = peft.LoHaConfig(target_modules=["no_such_name"])
    keys = {"model.layers.1.self_attn.q_proj.hada_w1_a": torch.zeros(1)}
    with pytest.raises(ConfigError, match=r"LOHA .* factored layer model.layers.1.self_attn.q_proj"):
        peft.inject_adapter_in_model(config, pruned_model(), state_dict=keys)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' subtracts from the base weight"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' subtracts"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights='loftq' subtracts"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga' subtracts"),
        ({"kasa_config": {}}, "KaSA truncates"),
        ({"init_lora_weights": "pissa", "r": 60}, "PiSSA needs an adapter of a rank below"),
        ({"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 60}}, "PiSSA needs an adapter of a rank below"),
        ({"target_modules": r".*q_proj.*"}, r"match both .*q_proj and .*q_proj.right inside it"),
        ({"target_modules": ["q_proj", "left"]}, "match both"),
        ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "not a parameter but a product"),
    ],
)
def test_an_adapter_that_would_silently_go_wrong_is_refused_and_the_model_untouched(
    settings: dict[str, Any], words: str
) -> None:
    model = pruned_model()
    before = state_hashes(model)
    if "kasa_config" in settings:
        settings = {"kasa_config": peft.tuners.lora.KasaConfig()}
    with pytest.raises(ConfigError, match=words):
        peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ["q_proj"], "r": 4} | settings))
    assert state_hashes(model) == before


def test_what_is_refused_around_a_factored_layer_is_allowed_on_a_dense_one() -> None:
    """The check looks at factored layers only: other models, and dense layers of pruned ones, are peft's business."""
    for model in (tiny_model("llama"), pruned_model()):
        targets = ["lm_head"] if low_rank_layers(model) else ["q_proj"]
        config = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights="olora")
        assert peft.get_peft_model(model, config).peft_config["default"] is config


def test_around_after_inside_is_refused() -> None:
    model = peft.get_peft_model(pruned_model(), peft.LoraConfig(target_modules=["right"], r=2))
    with pytest.raises(ConfigError, match="has adapters inside it"):
        model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], r=2))


@pytest.mark.parametrize("variant", ["alora", "bd"])
def test_a_variant_without_a_merged_form_is_refused_when_merged(variant: str) -> None:
    settings: dict[str, Any] = {"alora_invocation_tokens": [5]}
    if variant == "bd":
        settings = {"use_bdlora": peft.tuners.lora.BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)}
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(pruned_model(), config)
    state = state_hashes(model)
    with pytest.raises(ConfigError, match="has no merged form"):
        model.merge_adapter()
    assert state_hashes(model) == state


def test_broken_adapters_are_not_merged() -> None:
    model = peft.get_peft_model(pruned_model(), peft.LoraConfig(target_modules=["q_proj"], r=4))
    state = state_hashes(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(WeightError, match="NaN or infinity"):
        model.merge_adapter()
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    assert state_hashes(model) == state


def test_quantised_or_wrapped_factors_are_not_merged() -> None:
    model = peft.get_peft_model(pruned_model(), peft.LoraConfig(target_modules=["q_proj"], r=4))
    base = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    base.right = torch.nn.Sequential(base.right)
    base.right.weight = base.right[0].weight
    with pytest.raises(ConfigError, match="'right' of this layer is wrapped or quantised"):
        model.merge_adapter()


def test_an_offloaded_layer_is_not_merged() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = trained_(peft.get_peft_model(pruned_model(), peft.LoraConfig(target_modules=["q_proj"], r=4)))
    output = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert difference(logits(model), output) <= 1e-5  # the adapter works all the same
    with pytest.raises(WeightError, match="offloaded"):
        model.merge_adapter()


def test_truncation_under_adapters_is_refused() -> None:
    model = trained_(peft.get_peft_model(pruned_model(), peft.LoraConfig(target_modules=["q_proj"], r=4)))
    model.merge_adapter()
    with pytest.raises(ConfigError, match="merge_and_unload first"):
        truncate_merged_(model)


def test_adapters_on_a_model_pruned_since_it_was_loaded_warn_that_they_name_the_dense_one(tmp_path: Any) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match="data"):
        prune_(pruned, EigenpruneConfig(keep=0.6, method="svd"), progress=False)
    config = peft.LoraConfig(target_modules=["q_proj"], r=4)
    with pytest.warns(UserWarning, match="will name the dense dense as their base"):
        peft.get_peft_model(copy.deepcopy(pruned), config)
    pruned.save_pretrained(tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft.get_peft_model(loaded, peft.LoraConfig(target_modules=["q_proj"], r=4))
