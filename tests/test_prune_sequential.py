# SPDX-License-Identifier: Apache-2.0
"""`prune_` with methods that factor block by block."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from eigenprune import EigenpruneConfig, prune_
from eigenprune.layers import low_rank_layers
from tests.helpers.pruned import picture, pruned_by
from tests.helpers.tiny_models import logits, tiny_model, token_windows


@pytest.mark.parametrize("method", ["kfac-seq", "kfac-probe-seq"])
def test_sequential_method_factors_for_the_pruned_prefix_and_saves_as_any_other(method: str, tmp_path: Path) -> None:
    plain, sequential = tiny_model("llama"), tiny_model("llama")
    report = pruned_by(plain, method="kfac")
    other = prune_(
        sequential,
        EigenpruneConfig(keep=0.6, method=method),
        windows=token_windows(),
        cache_dir=tmp_path,
        progress=False,
    )
    losses = [(layer.name, layer.rank, layer.loss) for layer in other.layers]
    assert (losses == [(layer.name, layer.rank, layer.loss) for layer in report.layers]) == (method == "kfac-seq")
    assert not list(tmp_path.rglob("factors-*"))
    others = low_rank_layers(plain)
    common = {name: layer for name, layer in low_rank_layers(sequential).items() if name in others}
    different = [name for name, layer in common.items() if not torch.equal(layer.weight, others[name].weight)]
    assert len(different) > len(others) // 2
    sequential.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(sequential))


@pytest.mark.parametrize("restore", [True, False])
def test_interrupted_sequential_run_gives_the_dense_layers_back(tmp_path: Path, restore: bool) -> None:
    model = tiny_model("llama")
    before = picture(model)

    def stop(_module: nn.Module, _args: tuple[Tensor, ...]) -> None:
        if len(low_rank_layers(model)) >= 4:
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        prune_(
            model,
            EigenpruneConfig(keep=0.6, method="kfac-seq"),
            windows=token_windows(),
            cache_dir=tmp_path,
            restore_on_error=restore,
            progress=False,
        )
    handle.remove()
    assert list(tmp_path.rglob("factors-*/*.safetensors"))
    assert (picture(model) == before) == restore
