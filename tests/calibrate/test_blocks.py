# SPDX-License-Identifier: Apache-2.0
"""Chains of blocks: what is found, what is refused, and that a chain computes what the model does."""

import pytest
import torch
from torch import Tensor, nn

from eigenprune.calibrate import find_chain
from tests.calibrate.tiny import bert, gpt2, linears, llama, windows


class Toy(nn.Module):
    """Blocks on an embedding, wired in the way that `wiring` says."""

    def __init__(self, wiring: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(97, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.wiring = wiring

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            if self.wiring == "scaled between":
                x = layer(x) * 0.5
            elif self.wiring == "twice":
                x = layer(layer(x))
            elif self.wiring == "flat":
                x = layer(x.flatten(0, 1)).unflatten(0, input_ids.shape)
            else:
                x = layer(x)
        return x


@pytest.mark.parametrize("wiring", ["plain", "scaled between", "twice", "flat"])
def test_only_blocks_that_run_once_on_the_output_of_the_one_before_are_a_chain(wiring: str) -> None:
    model = Toy(wiring)
    with torch.no_grad():
        chain = find_chain(model, windows(2), dict(model.layers.named_children()))
    assert (chain is not None) == (wiring == "plain")


def test_blocks_that_are_told_more_about_the_text_are_no_chain() -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(97, 8)
            self.layers = nn.ModuleList([Add(), Add()])

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            for layer in self.layers:
                x = layer(x, input_ids)
            return x

    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return self.linear(x) + ids.unsqueeze(-1)

    model = Told()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    with torch.no_grad():
        assert find_chain(model, windows(2), layers) is None
        assert find_chain(model, windows(1), layers) is not None  # one window: nothing differs


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_a_chain_run_block_by_block_computes_what_the_model_does(make) -> None:
    model, ids = make().eval(), windows(3)
    layers = linears(model)
    with torch.no_grad():
        chain = find_chain(model, ids, layers)
        assert chain is not None
        assert [layer for order in chain.orders for layer in order] == list(layers)
        hidden = chain.first_hidden(model, ids)
        for block in range(len(chain.names)):
            hidden = chain.run(model, block, hidden)
        for row, state in zip(ids.split(1), hidden, strict=True):
            with chain.ended_with(model, state):
                got = model(row).logits
            assert torch.equal(got, model(row).logits)
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())
