# SPDX-License-Identifier: Apache-2.0
"""Components kept on disk: the same layers as without, read for the next budget, made anew where damaged."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from eigenprune import EigenpruneConfig
from eigenprune.calibrate import collect_statistics
from eigenprune.layers import dense_weight, select_layers
from eigenprune.prune import prune_
from eigenprune.spectral import METHODS, Decomposed, component_bytes, find_method
from tests.helpers.tiny_models import logits, tiny_model, token_windows

KINDS = ("input_gram", "output_gram", "weight_gradient_square")


@pytest.fixture(scope="module")
def measured():
    model = tiny_model("llama")
    layers = select_layers(model).chosen
    return layers, collect_statistics(model, token_windows(), layers, kinds=KINDS, progress=False)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.worth != "importance"])
def test_layers_from_disk_are_those_made_on_the_spot(measured, method: str, tmp_path: Path) -> None:
    layers, statistics = measured
    plain = Decomposed(find_method(method), statistics)
    kept = Decomposed(find_method(method), statistics, folder=tmp_path)
    for name in list(layers)[:7]:
        wanted, got = plain.spectrum(name, layers[name]).energies, kept.spectrum(name, layers[name]).energies
        assert float((wanted - got).abs().max()) <= 1e-9 * float(wanted.max())  # both float64, by other routes
        one, two = (where.layer(name, layers[name], 16, "pair").weight.detach() for where in (plain, kept))
        # Rounded to float32 in the file and again in the layer; the truncation itself is the same to 1e-9.
        size = float(dense_weight(layers[name]).detach().norm())
        assert float((one - two).norm()) <= 64 * torch.finfo(torch.float32).eps * size


def test_what_is_on_disk_is_read_and_needs_no_statistics(measured, tmp_path: Path) -> None:
    layers, statistics = measured
    name = next(iter(layers))
    before = Decomposed(find_method("kfac"), statistics, folder=tmp_path).layer(name, layers[name], 8, "pivot")
    again = Decomposed(find_method("kfac"), None, folder=tmp_path).layer(name, layers[name], 8, "pivot")
    assert torch.equal(before.weight, again.weight)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= component_bytes({name: layers[name]}) + 1000


@pytest.mark.parametrize("damage", ["cut", "empty", "other shape"])
def test_a_damaged_file_is_made_anew(measured, tmp_path: Path, damage: str) -> None:
    layers, statistics = measured
    first, other = next(iter(layers)), next(n for n in layers if n.endswith("up_proj"))
    made = Decomposed(find_method("kfac"), statistics, folder=tmp_path)
    wanted = made.layer(first, layers[first], 8, "pair").weight
    (file,) = tmp_path.iterdir()
    if damage == "other shape":
        Decomposed(find_method("kfac"), statistics, folder=tmp_path / "b").spectrum(other, layers[other])
        file.write_bytes(next((tmp_path / "b").iterdir()).read_bytes())
    else:
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else 1000])
    assert torch.equal(made.layer(first, layers[first], 8, "pair").weight, wanted)


def test_another_budget_decomposes_nothing(tmp_path: Path) -> None:
    windows = token_windows()
    prune_(tiny_model("llama"), EigenpruneConfig(keep=0.8), windows=windows, cache_dir=tmp_path, progress=False)
    (folder,) = tmp_path.glob("components-*")
    stamps = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    time.sleep(0.01)
    kept = tiny_model("llama")
    prune_(kept, EigenpruneConfig(keep=0.6), windows=windows, cache_dir=tmp_path, progress=False)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == stamps
    fresh = tiny_model("llama")
    prune_(fresh, EigenpruneConfig(keep=0.6), windows=windows, cache_dir=tmp_path / "other", progress=False)
    assert torch.equal(logits(kept), logits(fresh))
    for changed in (EigenpruneConfig(keep=0.6, method="svd-llm"), EigenpruneConfig(keep=0.6, prior=0.5)):
        prune_(tiny_model("llama"), changed, windows=windows, cache_dir=tmp_path, progress=False)
    assert len(list(tmp_path.glob("components-*"))) == 3


def test_a_model_of_other_weights_has_other_components(tmp_path: Path) -> None:
    for scale in (1.0, 1.5):
        model = tiny_model("llama")
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.weight.mul_(scale)
        prune_(model, EigenpruneConfig(keep=0.8), windows=token_windows(), cache_dir=tmp_path, progress=False)
    assert len(list(tmp_path.glob("components-*"))) == 2
