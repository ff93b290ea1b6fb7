# SPDX-License-Identifier: Apache-2.0
"""Sparse deltas on disk: what comes back is `where(mask, tuned, base)` to the bit, over the right base only."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eigenprune.entries.packing import packed_bytes
from eigenprune.errors import CheckpointError, ConfigError, WeightError
from eigenprune.hub.delta_decode import DeltaFile
from eigenprune.hub.delta_encode import write_delta
from eigenprune.hub.delta_manifest import DeltaManifest
from eigenprune.hub.weight_source import WeightSource
from eigenprune.hub.write_tensors import file_bytes
from tests.helpers.compare import file_hashes, tensor_hash
from tests.helpers.deltas import FORMS, expected, pair, written

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def hashes(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: tensor_hash(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_exact_in_every_form(dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned, masks = pair(dtype)
    before = hashes(base), hashes(tuned), hashes(masks)
    manifest = written(tmp_path / "d.safetensors", dtype)
    assert {name: tensor.form for name, tensor in manifest.tensors.items()} == FORMS
    with DeltaFile(tmp_path / "d.safetensors") as delta:
        assert delta.manifest == manifest
        merged = {name: delta.merged(name, base.get(name)) for name in tuned}
        delta.write_merged(tmp_path / "m.safetensors", base)
    assert hashes(merged) == hashes(expected(base, tuned, masks))
    assert hashes(load_file(tmp_path / "m.safetensors")) == hashes(merged)
    assert (hashes(base), hashes(tuned), hashes(masks)) == before


def test_tied_tensors_stay_whole_and_inputs_share_no_memory_with_the_result(tmp_path: Path) -> None:
    shared = torch.randn(4, 5)
    base = {"a": shared, "b": shared}
    tuned = {"a": shared + 1, "b": shared + 1}
    mask = torch.rand(4, 5) < 0.5
    write_delta(tmp_path / "d", base, tuned, lambda _name: mask, base_model="b", rule="r", keep=0.5)
    with DeltaFile(tmp_path / "d") as delta:
        first, second = delta.merged("a", base["a"]), delta.merged("b", base["b"])
    assert torch.equal(first, torch.where(mask, tuned["a"], shared))
    assert torch.equal(first, second)
    first.zero_()
    assert shared.abs().min() > 0


def test_views_are_stored_as_their_contiguous_copies(tmp_path: Path) -> None:
    base, tuned = torch.randn(6, 8), torch.randn(12, 8)[::2]
    mask = (torch.rand(8, 6) < 0.5).t()
    write_delta(
        tmp_path / "d", {"w": base.t()}, {"w": tuned.t()}, {"w": mask.t()}.get, base_model="b", rule="r", keep=1
    )
    with DeltaFile(tmp_path / "d") as delta:
        assert torch.equal(delta.merged("w", base.t()), torch.where(mask.t(), tuned.t(), base.t()))


def test_file_is_the_same_to_the_byte_and_of_the_announced_size(tmp_path: Path) -> None:
    manifest = written(tmp_path / "a.safetensors")
    written(tmp_path / "b.safetensors")
    first, second = (tmp_path / name for name in ("a.safetensors", "b.safetensors"))
    assert first.read_bytes() == second.read_bytes()
    raw = manifest.to_bytes()
    assert first.stat().st_size == file_bytes(manifest.file_specs(len(raw), manifest.sentinel()))
    data = sum(
        tensor.stored * (8 if tensor.dtype == "I64" else 4)
        + (packed_bytes(tensor.form, tensor.entries, tensor.stored) if tensor.form in ("mask", "positions") else 0)
        for tensor in manifest.tensors.values()
    )
    tensors = load_file(first)
    assert data == sum(tensor.nbytes for tensor in tensors.values()) - len(raw)


def test_unchanged_model_costs_its_manifest_only(tmp_path: Path) -> None:
    base, _, _ = pair()
    base.pop("steps")
    manifest = write_delta(tmp_path / "d", base, base, lambda _name: None, base_model="b", rule="r", keep=1)
    assert {tensor.form for tensor in manifest.tensors.values()} == {"base"}
    assert manifest.stored == 0
    # The manifest, and the name, type and place of two tensors: the manifest itself and the sentinel.
    assert (tmp_path / "d").stat().st_size < len(manifest.to_bytes()) + 400


@pytest.mark.parametrize(("precision", "rounded"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_rounded_values_are_the_rounded_ones_and_the_rest_is_the_base(
    precision: str, rounded: torch.dtype, tmp_path: Path
) -> None:
    base, tuned, masks = pair()
    exact = written(tmp_path / "exact")
    assert written(tmp_path / "d", precision=precision).stored == exact.stored
    coarse = {name: t.to(rounded).to(t.dtype) if t.is_floating_point() else t for name, t in tuned.items()}
    coarse["equal.weight"] = base["equal.weight"]
    with DeltaFile(tmp_path / "d") as delta:
        merged = {name: delta.merged(name, base.get(name)) for name in tuned}
    assert hashes(merged) == hashes(expected(base, coarse, masks))
    assert (tmp_path / "d").stat().st_size < (tmp_path / "exact").stat().st_size


def test_base_of_another_type_is_rounded_to_the_tuned_one(tmp_path: Path) -> None:
    base, tuned = {"w": torch.randn(9, 9)}, {"w": torch.randn(9, 9).to(torch.bfloat16)}
    mask = torch.rand(9, 9) < 0.5
    write_delta(tmp_path / "d", base, tuned, {"w": mask}.get, base_model="b", rule="r", keep=0.5)
    with DeltaFile(tmp_path / "d") as delta:
        delta.check_base(base)
        merged = delta.merged("w", base["w"])
    assert tensor_hash(merged) == tensor_hash(torch.where(mask, tuned["w"], base["w"].to(torch.bfloat16)))


def test_wrong_base_is_refused_and_what_differs_is_named(tmp_path: Path) -> None:
    base, _, _ = pair()
    written(tmp_path / "d")
    one_bit = {name: tensor.clone() for name, tensor in base.items()}
    one_bit["two.weight"][7, 7] = torch.nextafter(one_bit["two.weight"][7, 7], torch.tensor(9.0))
    zero_sign = {**base, "one.weight": torch.where(base["one.weight"] == 0, 0.0, base["one.weight"])}
    cases = {
        "two[.]weight differs": one_bit,
        "one[.]weight differs": zero_sign,
        "one[.]bias differs": {**base, "one.bias": base["one.bias"].double()},
        "three[.]weight differs": {**base, "three.weight": base["three.weight"].view(5, 3, 7)},
        "old[.]weight is missing": {name: t for name, t in base.items() if name != "old.weight"},
        "extra is not in the right one": {**base, "extra": torch.ones(1)},
    }
    with DeltaFile(tmp_path / "d") as delta:
        delta.check_base(base)
        for message, wrong in cases.items():
            with pytest.raises(CheckpointError, match=rf"not the base.*{message}.*org/base"):
                delta.write_merged(tmp_path / "m", wrong)
        assert not (tmp_path / "m").exists()


def test_base_may_be_cut_into_other_files(tmp_path: Path) -> None:
    base, tuned, _ = pair()
    written(tmp_path / "d")
    save_file({name: tensor for name, tensor in base.items() if "weight" in name}, tmp_path / "model-1.safetensors")
    save_file({name: tensor for name, tensor in base.items() if "weight" not in name}, tmp_path / "model-2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    )
    before = file_hashes(tmp_path)
    with DeltaFile(tmp_path / "d") as delta, WeightSource(tmp_path) as source:
        assert set(source) == set(base)
        delta.write_merged(tmp_path / "m", source)
    assert set(load_file(tmp_path / "m")) == set(tuned)
    assert before.items() <= file_hashes(tmp_path).items()


def test_what_cannot_be_stored_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    good = torch.randn(4, 4)
    base = {"w": good}
    half = torch.zeros(4, 4, dtype=torch.bool)
    cases = [
        ({"w": torch.full((4, 4), torch.nan)}, None, {}, WeightError, "NaN"),
        ({"w": torch.full((4, 4), 1e9)}, None, {"precision": "float16"}, WeightError, "too large"),
        ({"w": good}, None, {"precision": "int4"}, ConfigError, "int4"),
        ({"w": good + 1}, torch.ones(4, 5, dtype=torch.bool), {}, CheckpointError, "mask of w"),
        ({"w": good + 1}, torch.ones(4, 4), {}, CheckpointError, "mask of w"),
        ({"w": torch.randn(5, 4)}, torch.zeros(5, 4, dtype=torch.bool), {}, CheckpointError, "kept whole"),
        ({"v": good}, half, {}, CheckpointError, "kept whole"),
        ({"w.delta_mask": good}, None, {}, CheckpointError, "no name"),
        ({"../w": good}, None, {}, CheckpointError, "no name"),
        ({"w": good.to(torch.complex64)}, None, {}, CheckpointError, "complex64"),
    ]
    for tuned, mask, options, error, message in cases:
        with pytest.raises(error, match=message):
            write_delta(
                tmp_path / "d", base, tuned, lambda _n, m=mask: m, base_model="b", rule="r", keep=0.5, **options
            )
        assert not (tmp_path / "d").exists()
    tuned = {"w": torch.where(half, good, torch.nan)}  # a NaN that is reset does no harm
    assert isinstance(
        write_delta(tmp_path / "d", base, tuned, {"w": half}.get, base_model="b", rule="r", keep=0), DeltaManifest
    )
