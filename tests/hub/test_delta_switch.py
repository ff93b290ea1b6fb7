# SPDX-License-Identifier: Apache-2.0
"""Switching between deltas in memory: bit for bit what loading gives, and bit for bit back."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from eigenprune.errors import CheckpointError, WeightError
from eigenprune.hub import delta_applied, switch_delta_
from tests.helpers.compare import file_hashes, state_hashes
from tests.helpers.delta_folders import delta_folder, saved_tuned
from tests.helpers.tiny_models import saved_dense


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(base, one delta, another)."""
    scratch = tmp_path_factory.mktemp("switch")
    base = saved_dense("llama", scratch / "base")
    for seed in (1, 2):
        delta_folder(base, saved_tuned("llama", scratch / f"tuned{seed}", seed=seed), scratch / f"delta{seed}")
    return base, scratch / "delta1", scratch / "delta2"


def loaded(folder: Path, **options: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def test_switching_gives_what_loading_gives_and_goes_back_bit_for_bit(folders: tuple[Path, Path, Path]) -> None:
    base, one, two = folders
    before = file_hashes(base.parent)
    model = loaded(base)
    pristine = state_hashes(model)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    wanted = {delta: state_hashes(loaded(delta)) for delta in (one, two)}
    assert wanted[one] != wanted[two]
    for delta in (one, two, one, one, None, two, None):
        switch_delta_(model, delta)
        assert state_hashes(model) == (pristine if delta is None else wanted[delta])
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
    with delta_applied(model, two, check=False) as inside:
        assert inside is model
        assert state_hashes(model) == wanted[two]
    assert state_hashes(model) == pristine
    with pytest.raises(ZeroDivisionError), delta_applied(model, one):
        _ = 1 / 0
    assert state_hashes(model) == pristine
    assert file_hashes(base.parent) == before


def test_copy_of_a_switched_model_goes_back_by_itself(folders: tuple[Path, Path, Path]) -> None:
    base, one, _ = folders
    model = loaded(base)
    pristine = state_hashes(model)
    switch_delta_(model, one)
    twin = copy.deepcopy(model)
    switch_delta_(twin, None)
    assert state_hashes(twin) == pristine
    assert state_hashes(model) == state_hashes(loaded(one))


def test_failed_switch_leaves_the_delta_that_was_in(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, two = folders
    damaged = Path(shutil.copytree(two, tmp_path / "damaged"))
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1  # in the last mask: its count is another then
    (damaged / "model.safetensors").write_bytes(content)
    (damaged / "SHA256SUMS").unlink()
    model = loaded(base)
    switch_delta_(model, one)
    before = state_hashes(model)
    for bad in (damaged, base, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError):
            switch_delta_(model, bad)
        assert state_hashes(model) == before
    switch_delta_(model, None)
    assert state_hashes(model) == state_hashes(loaded(base))


def test_model_that_is_not_the_base_is_refused_unchanged(folders: tuple[Path, Path, Path]) -> None:
    base, one, _ = folders
    changed = loaded(base)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 1] += 1
    cases = {
        "up_proj.weight differs": changed,
        "bfloat16": loaded(base, dtype=torch.bfloat16),
        "missing": changed.model,
    }
    for message, model in cases.items():
        before = state_hashes(model)
        with pytest.raises(CheckpointError, match=message):
            switch_delta_(model, one)
        assert state_hashes(model) == before
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(changed.config)
    with pytest.raises(WeightError, match="no data"):
        switch_delta_(empty, one)


def test_weights_tied_in_the_model_and_not_in_the_delta_are_refused(tmp_path: Path) -> None:
    base = saved_dense("qwen2", tmp_path / "base")  # two tensors
    delta_folder(base, saved_tuned("qwen2", tmp_path / "tuned"), tmp_path / "delta")
    model = loaded(base)
    model.lm_head.weight = model.model.embed_tokens.weight
    before = state_hashes(model)
    with pytest.raises(WeightError, match="one tensor in this model"):
        switch_delta_(model, tmp_path / "delta")
    assert state_hashes(model) == before
