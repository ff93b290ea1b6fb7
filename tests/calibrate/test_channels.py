# SPDX-License-Identifier: Apache-2.0
"""Hidden channels are found by asking the model, and nothing else passes for one."""

import pytest
from torch import Tensor, nn

from eigenprune.calibrate import ChannelGroup, channel_groups
from eigenprune.errors import CalibrationError
from eigenprune.layers import select_layers
from tests.helpers.pruned import picture
from tests.helpers.tiny_models import tiny_model, token_windows

FOUND = {
    "llama": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    "qwen2": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    "gpt2": (("mlp.c_fc",), "mlp.c_proj"),
    "bert": (("intermediate.dense",), "output.dense"),
    "albert": (("ffn",), "ffn_output"),
    "t5": (("DenseReluDense.wi",), "DenseReluDense.wo"),
    "phi3": None,  # gate and up are one layer of twice the width
}


def groups_of(model: nn.Module) -> list[ChannelGroup]:
    return channel_groups(model, token_windows(), select_layers(model).chosen)


@pytest.mark.parametrize("kind", FOUND)
def test_mlps_of_every_family_are_found_and_no_attention(kind: str) -> None:
    model = tiny_model(kind)
    before = picture(model)
    groups = groups_of(model)
    assert picture(model) == before
    wanted = FOUND[kind]
    if wanted is None:
        assert groups == []
        return
    producers, consumer = wanted
    layers = select_layers(model).chosen
    assert [group.consumer for group in groups] == [name for name in layers if name.endswith(f".{consumer}") and (
        kind != "bert" or "attention" not in name
    )]  # fmt: skip
    for group in groups:
        prefix = group.consumer.removesuffix(consumer)
        assert group.producers == tuple(prefix + name for name in producers)


class Norm(nn.Module):
    """Without weights, so that it treats all channels alike, and still each of them sees the others."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).sqrt()


class Shift(nn.Module):
    """Each channel reads its neighbour."""

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, -1)


@pytest.mark.parametrize("between", [Norm(), nn.Softmax(dim=-1), Shift()])
def test_channels_that_meet_are_none(between: nn.Module) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.act_fn = between
    assert groups_of(model) == []  # blocks of the same names pass together or not at all


def test_producers_that_something_else_reads_are_none() -> None:
    model = tiny_model("gpt2")
    mlp = model.transformer.h[1].mlp
    plain = mlp.forward

    def leaking(x: Tensor) -> Tensor:
        return plain(x) + mlp.c_fc(x)[..., : x.shape[-1]]

    mlp.forward = leaking
    assert groups_of(model) == []


def test_skipped_layers_are_in_no_group() -> None:
    model = tiny_model("llama")
    layers = select_layers(model, ["layers.0.mlp.up_proj"]).chosen
    groups = channel_groups(model, token_windows(), layers)
    # A channel of `gate_proj` alone cannot go: that of `up_proj` would be left behind.
    assert all("layers.0" not in group.consumer for group in groups)


def test_model_that_does_not_run_on_tokens_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with pytest.raises(CalibrationError, match="token ids alone"):
        channel_groups(model, token_windows(), dict(model.named_children()))


def test_training_mode_comes_back() -> None:
    model = tiny_model("bert").train()
    assert groups_of(model)
    assert all(module.training for module in model.modules())


def test_of_three_layers_in_a_row_the_first_two_are_a_group() -> None:
    model = tiny_model("gpt2")
    model.transformer.h[1].mlp.c_fc = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 256))
    assert [(group.producers, group.consumer) for group in groups_of(model)] == [
        (("transformer.h.0.mlp.c_fc",), "transformer.h.0.mlp.c_proj"),
        (("transformer.h.1.mlp.c_fc.0",), "transformer.h.1.mlp.c_fc.2"),
    ]
