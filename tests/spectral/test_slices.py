# SPDX-License-Identifier: Apache-2.0
"""Slices cover a weight once, follow the heads, and mean the same fused or apart."""

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from eigenprune.errors import ConfigError
from eigenprune.spectral import is_rotary, layer_view, layer_views
from tests.helpers.tiny_models import tiny_model

SIDE = 64
SIZES = {"vocab_size": 128, "hidden_size": SIDE, "num_hidden_layers": 1, "num_attention_heads": 4}


def neox() -> nn.Module:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=96, max_position_embeddings=64))


def bloom() -> nn.Module:
    return BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=SIDE, n_layer=1, n_head=4))


def opt() -> nn.Module:
    config = OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=SIDE, max_position_embeddings=64)
    return OPTForCausalLM(config)


def qwen3() -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, intermediate_size=96, num_key_value_heads=2, head_dim=32))


@pytest.mark.parametrize("view", ["head", "matrix"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "phi3", "neox", "bloom", "opt", "qwen3"])
def test_slices_of_every_layer_cover_it_once_and_no_layer_is_unknown(kind: str, view: str) -> None:
    made = {"neox": neox, "bloom": bloom, "opt": opt, "qwen3": qwen3}
    views = layer_views(made[kind]() if kind in made else tiny_model(kind), view)
    kinds = set()
    for one in views.values():
        assert one.slices[0].start == 0
        assert one.slices[-1].stop == one.shape[one.axis]
        assert all(a.stop == b.start for a, b in zip(one.slices, one.slices[1:], strict=False))
        kinds |= {part.kind for part in one.slices}
    assert {"q", "k", "v", "o", "up", "down"} <= kinds
    assert "other" not in kinds


def test_one_slice_a_key_head_where_queries_are_grouped() -> None:
    views = layer_views(tiny_model("qwen2"))
    counts = {name.rpartition(".")[2]: len(view.slices) for name, view in views.items()}
    assert counts == {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 4, "gate_proj": 1, "up_proj": 1, "down_proj": 1}
    fused = layer_views(tiny_model("phi3"))["model.layers.0.self_attn.qkv_proj"]
    assert [part.kind for part in fused.slices] == ["q"] * 4 + ["k"] * 2 + ["v"] * 2
    assert [part.head for part in fused.slices] == [0, 1, 2, 3, 0, 1, 0, 1]


def test_interleaved_heads_are_cut_as_the_model_reads_them() -> None:
    view = layer_view(neox(), "gpt_neox.layers.0.attention.query_key_value", (192, 64), "head")
    assert [(part.kind, part.head) for part in view.slices[:4]] == [("q", 0), ("k", 0), ("v", 0), ("q", 1)]


@pytest.mark.parametrize(("kind", "rotary"), [("llama", True), ("gpt2", False)])
def test_rotary_models_are_told_from_others(kind: str, rotary: bool) -> None:
    assert is_rotary(tiny_model(kind)) is rotary
    assert not is_rotary(opt())
    assert is_rotary(qwen3())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kinds": ["keys"]}, "kinds"),
        ({"kinds": []}, "kinds"),
        ({"kinds": "k"}, "kinds"),
        ({"view": "heads"}, "view 'heads'"),
        ({"kinds": ["gate"]}, "no layer of kind gate"),
    ],
)
def test_what_is_not_there_is_a_typed_error(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        layer_views(tiny_model("gpt2"), **arguments)


def test_heads_that_do_not_divide_a_matrix_are_named() -> None:
    model = tiny_model("llama")
    model.model.layers[0].self_attn.q_proj = nn.Linear(64, 60, bias=False)
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj.*matrix"):
        layer_views(model)
    assert torch.Size((60, 64)) == layer_views(model, "matrix")["model.layers.0.self_attn.q_proj"].shape
