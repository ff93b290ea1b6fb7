# SPDX-License-Identifier: Apache-2.0
"""Which layers are chosen, and the reason given for every other (row G22)."""

import pytest
import torch
import transformers
from torch import nn

from eigenprune.errors import ConfigError
from eigenprune.layers import LowRankLinear, dense_weight, replace_module_, select_layers


def llama(tied: bool) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


class Net(nn.Module):
    """A plain module with one layer of each kind of trouble."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(32, 24)
        self.thin = nn.Linear(32, 15)
        self.enough = nn.Linear(16, 16, bias=False)
        self.other = nn.Bilinear(16, 16, 16)
        self.special = type("MyLinear", (nn.Linear,), {})(32, 24)
        self.router = nn.Linear(32, 24)
        self.block = nn.ModuleDict({"classifier": nn.Linear(32, 24), "score_mixer": nn.Linear(32, 24)})


BLOCK = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("tied", "reason"), [(True, "tied"), (False, "output embeddings")])
def test_a_language_model_gives_all_layers_of_its_blocks_in_order(device: str, tied: bool, reason: str) -> None:
    with torch.device(device):
        model = llama(tied)
        model.tie_weights()
    found = select_layers(model)
    assert [name.split(".")[-1] for name in found.chosen] == BLOCK * 2
    assert found.skipped.keys() == {"lm_head"}
    assert found.skipped["lm_head"].startswith(reason)
    assert found.shapes["model.layers.0.self_attn.k_proj"] == (16, 32)
    assert found.shapes["lm_head"] == (50, 32)
    assert all(model.get_submodule(name) is module for name, module in found.chosen.items())


def test_every_skipped_layer_has_its_reason() -> None:
    found = select_layers(Net())
    assert list(found.chosen) == ["plain", "enough", "block.score_mixer"]
    assert found.skipped == {
        "thin": "a side is below 16",
        "special": "MyLinear is a subclass of Linear",
        "router": "head or router",
        "block.classifier": "head or router",
    }
    assert list(found.shapes) == [
        "plain",
        "thin",
        "enough",
        "special",
        "router",
        "block.classifier",
        "block.score_mixer",
    ]


@pytest.mark.parametrize(
    ("make", "head"),
    [("BertForSequenceClassification", "classifier"), ("BertForQuestionAnswering", "qa_outputs"), ("BertModel", None)],
)
def test_heads_and_poolers_of_bert_stay_dense(make: str, head: str | None) -> None:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    found = select_layers(getattr(transformers, make)(config))
    assert len(found.chosen) == 6
    assert head is None or found.skipped[head] == "head or router"
    assert all("pooler" in name or name == head for name in found.skipped)


def test_layers_of_gpt2_are_seen_as_out_by_in() -> None:
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=4)
    found = select_layers(transformers.GPT2LMHeadModel(config))
    assert found.shapes["transformer.h.0.attn.c_attn"] == (96, 32)
    assert dense_weight(found.chosen["transformer.h.0.attn.c_attn"]).shape == (96, 32)
    assert "transformer.h.0.mlp.c_proj" in found.chosen


@pytest.mark.parametrize("how", ["same parameter", "views of one storage", "embedding", "same module"])
def test_layers_that_share_memory_stay_dense(how: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32), "c": nn.Linear(32, 32)})
    if how == "same parameter":
        model["b"].weight = model["a"].weight
    elif how == "views of one storage":
        flat = torch.randn(64, 32)
        model["a"].weight, model["b"].weight = nn.Parameter(flat[:32]), nn.Parameter(flat[32:])
    elif how == "embedding":
        model["e"] = nn.Embedding(32, 32)
        model["e"].weight = model["a"].weight
    else:
        model["b"] = model["a"]
    found = select_layers(model)
    assert "c" in found.chosen
    assert found.skipped["a"].startswith("tied")
    if how not in ("embedding", "same module"):  # torch lists a module once, whatever its names
        assert found.skipped["b"].startswith("tied")


def test_a_block_that_stands_in_two_places_is_pruned_once() -> None:
    block = nn.ModuleDict({"x": nn.Linear(32, 32)})
    assert list(select_layers(nn.ModuleList([block, block])).chosen) == ["0.x"]


@pytest.mark.parametrize(
    ("pattern", "count"), [("down_proj", 2), (r"^model\.layers\.0\.", 7), (r"layers\.1\.mlp", 3), ("k_proj|v_proj", 4)]
)
def test_a_skip_pattern_is_found_anywhere_in_the_name(pattern: str, count: int) -> None:
    found = select_layers(llama(True), [pattern])
    assert sum(reason == "asked to skip" for reason in found.skipped.values()) == count
    assert len(found.chosen) == 14 - count


def test_several_patterns_add_up() -> None:
    assert len(select_layers(llama(True), ["q_proj", r"layers\.0"]).chosen) == 6


@pytest.mark.parametrize("pattern", ["(", "[a", "*proj"])
def test_a_pattern_that_is_no_regular_expression_is_a_config_error(pattern: str) -> None:
    with pytest.raises(ConfigError, match="is no regular expression") as caught:
        select_layers(llama(True), [pattern])
    assert repr(pattern) in str(caught.value)


@pytest.mark.parametrize("pattern", ["dwon_proj", r"layers\.2\.", "embed_tokens"])
def test_a_pattern_that_matches_no_layer_is_a_config_error(pattern: str) -> None:
    with pytest.raises(ConfigError, match="matches no layer"):
        select_layers(llama(True), [pattern])


def test_the_parts_of_a_factored_layer_are_no_layers_to_prune() -> None:
    model = Net()
    replace_module_(model, "plain", LowRankLinear(32, 24, 16))
    found = select_layers(model)
    assert not any(name.startswith("plain") for name in (*found.chosen, *found.skipped))


def test_a_model_without_linear_layers_gives_nothing() -> None:
    found = select_layers(nn.Sequential(nn.Embedding(8, 8), nn.LayerNorm(8)))
    assert (found.chosen, found.skipped, found.shapes) == ({}, {}, {})
