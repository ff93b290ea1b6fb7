# SPDX-License-Identifier: Apache-2.0
"""`select_entries` and `merge_entries`: exact cases, budgets, awkward tensors, refusals; neither model ever changes."""

import pytest
import torch
from torch import Tensor

from eigenprune.calibrate import EntryStatistics
from eigenprune.entries import EMBEDDINGS, RULES, merge_entries, select_entries
from eigenprune.errors import BudgetError, CalibrationError, ConfigError, WeightError
from tests.helpers.compare import tensor_hash

SHAPES = {
    "embed.weight": (7, 5),
    "a.weight": (6, 8),
    "a.bias": (6,),
    "conv.weight": (3, 4, 5),
    "scale": (),
    "b.weight": (1, 9),
}
FIELDS = ("gradient", "squared_gradient")


def pair(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    tuned = {name: (w + torch.randn(w.shape, generator=generator) / 8).to(dtype) for name, w in base.items()}
    counter = {"position_ids": torch.arange(4)}
    return {**base, **counter}, {**tuned, "position_ids": counter["position_ids"] + 1}


def statistics() -> EntryStatistics:
    generator = torch.Generator().manual_seed(1)
    gradient = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    inputs = torch.randn(30, 8, generator=generator)
    gram = inputs.t() @ inputs / 30
    squared = {name: tensor.square() + 0.1 for name, tensor in gradient.items()}
    return EntryStatistics(
        gradient, squared, {"a.weight": gram.diagonal().clone()}, {"a.weight": gram}, frozenset(), 30
    )


def select(rule: str, keep: float, **settings: object):
    base, tuned = pair()
    return select_entries(base, tuned, rule, keep, statistics=statistics(), general=statistics(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES)
def test_all_kept_is_the_tuned_model_and_none_kept_the_base(rule: str) -> None:
    base, tuned = pair()
    for keep, other in ((1.0, tuned), (0.0, base)):
        merged = dict(merge_entries(base, tuned, select(rule, keep)))
        expected = {**other, "position_ids": tuned["position_ids"]}  # an integer is nobody's entry
        assert {n: tensor_hash(t) for n, t in merged.items()} == {n: tensor_hash(t) for n, t in expected.items()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.73])
def test_the_budget_is_met_exactly_and_values_come_from_the_two_models(rule: str, keep: float) -> None:
    base, tuned = pair()
    masks = select(rule, keep)
    assert list(masks) == list(SHAPES)
    if RULES[rule].scope == "row":
        for name, shape in SHAPES.items():
            rows, width = (1, masks[name].numel()) if len(shape) < 2 else (shape[0], masks[name].numel() // shape[0])
            assert masks[name].reshape(rows, width).sum(1).tolist() == [int(keep * width + 0.5)] * rows
    else:
        total = sum(mask.numel() for mask in masks.values())
        assert sum(int(mask.sum()) for mask in masks.values()) == int(keep * total + 0.5)
    for name, tensor in merge_entries(base, tuned, masks):
        if name in masks:
            assert torch.equal(tensor, torch.where(masks[name], tuned[name], base[name]))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_no_dtype_is_refused_and_neither_model_changes(rule: str, dtype: torch.dtype) -> None:
    base, tuned = pair(dtype)
    before = [{name: tensor_hash(tensor) for name, tensor in model.items()} for model in (base, tuned)]
    masks = select_entries(base, tuned, rule, 0.5, statistics=statistics(), general=statistics())
    for name, tensor in merge_entries(base, tuned, masks):
        assert tensor.dtype == tuned[name].dtype
        tensor.zero_()  # a new tensor, or this would reach into a model
    assert before == [{name: tensor_hash(tensor) for name, tensor in model.items()} for model in (base, tuned)]


def test_equal_scores_keep_the_lower_index_in_every_scope() -> None:
    base = {"a": torch.zeros(2, 4), "b": torch.zeros(4)}
    tuned = {"a": torch.ones(2, 4), "b": torch.ones(4)}
    rows = select_entries(base, tuned, "delta", 0.5, scope="row")
    assert rows["a"].tolist() == [[True, True, False, False]] * 2
    layer = select_entries(base, tuned, "delta", 0.5, scope="layer")
    assert layer["a"].tolist() == [[True] * 4, [False] * 4]
    everywhere = select_entries(base, tuned, "delta", 0.75, scope="global")
    assert everywhere["a"].all()
    assert everywhere["b"].tolist() == [True, False, False, False]


def test_a_count_larger_than_a_row_keeps_all_of_it() -> None:
    masks = select("ken", 1.0, row_entries=6)
    assert masks["a.bias"].all()
    assert masks["embed.weight"].all()
    assert masks["a.weight"].sum(1).tolist() == [6] * 6
    assert masks["b.weight"].sum() == 6


def test_a_least_share_is_kept_of_every_tensor() -> None:
    base = {"small": torch.zeros(10, 10), "large": torch.zeros(10, 10)}
    tuned = {"small": torch.full((10, 10), 0.01), "large": torch.arange(100.0).reshape(10, 10) + 1}
    assert not select_entries(base, tuned, "delta", 0.5)["small"].any()
    masks = select_entries(base, tuned, "delta", 0.5, least=0.2)
    assert (int(masks["small"].sum()), int(masks["large"].sum())) == (20, 80)
    assert not masks["large"].flatten()[:20].any()
    assert masks["large"].flatten()[20:].all()


def test_lists_of_tensors_to_keep_whole_and_to_choose_among() -> None:
    masks = select("delta", 0.1, scope="row", keep_whole=EMBEDDINGS)
    assert masks["embed.weight"].all()
    assert masks["a.weight"].sum() == 6
    masks = select("delta", 0.1, scope="row", only=[r"^a\."])
    assert all(masks[name].all() == (not name.startswith("a.")) for name in masks)


def test_a_tensor_that_the_base_lacks_is_kept_whole() -> None:
    base, tuned = pair()
    del base["a.bias"]
    assert select_entries(base, tuned, "random", 0.2)["a.bias"].all()


def test_tied_weights_are_decided_on_once() -> None:
    base = {"in": torch.zeros(6, 6), "other": torch.zeros(6, 6)}
    shared = torch.arange(36.0).reshape(6, 6) + 1
    tuned = {"in": shared, "other": torch.full((6, 6), 0.5), "out": shared}
    for tied_base in (base, {**base, "out": base["in"]}):  # a file holds it under one name only
        masks = select_entries(tied_base, tuned, "delta", 0.5)
        assert torch.equal(masks["in"], masks["out"])
        assert int(masks["in"].sum() + masks["other"].sum()) == 36, "a tied tensor counts once"
        merged = dict(merge_entries(tied_base, tuned, masks))
        assert torch.equal(merged["in"], merged["out"])
    with pytest.raises(WeightError, match="out is tied"):
        select_entries({**base, "out": torch.ones(6, 6)}, tuned, "delta", 0.5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_no_number_is_named_with_its_place(rule: str, value: float) -> None:
    for which, whose in ((1, "fine-tuned"), (0, "base")):
        models = pair()
        models[which]["conv.weight"][2, 1, 3] = value
        with pytest.raises(WeightError, match=rf"conv.weight: {value} at index \(2, 1, 3\) of the {whose} model"):
            select_entries(*models, rule, 0.5, statistics=statistics(), general=statistics())


def test_models_that_do_not_belong_together_are_refused() -> None:
    base, tuned = pair()
    base["a.weight"] = torch.zeros(6, 9)
    with pytest.raises(WeightError, match=r"a.weight: \(6, 8\) in the fine-tuned model, \(6, 9\) in the base"):
        select_entries(base, tuned, "delta", 0.5)
    assert select_entries(base, tuned, "delta", 0.5, keep_whole=[r"a\.weight"])["a.weight"].all()
    base["a.weight"] = torch.zeros(6, 8, dtype=torch.int64)
    with pytest.raises(WeightError, match=r"a.weight: torch.float32 .* torch.int64"):
        select_entries(base, tuned, "delta", 0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": 1.5}, "must be in"),
        ({"rule": "kan"}, "unknown; there are: ken"),
        ({"scope": "model"}, "scope 'model' is unknown"),
        ({"rule": "ken", "scope": "global"}, "not open to rule 'ken', only: row"),
        ({"rule": "sap", "scope": "row"}, "only: global"),
        ({"reset": "one"}, "reset 'one' is unknown"),
        ({"row_entries": 3}, "needs scope='row'"),
        ({"least": 0.6}, "least=0.6"),
        ({"keep_whole": ["no such"]}, "matches no tensor"),
        ({"only": ["("]}, "no regular expression"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        select_entries(*pair(), **{"rule": "delta", "keep": 0.5, **settings})


def test_a_least_share_beyond_the_budget_and_missing_statistics_are_refused() -> None:
    tiny = {name: torch.ones(1) for name in "abc"}  # half an entry of each rounds to a whole one
    with pytest.raises(BudgetError, match="lower it"):
        select_entries(tiny, tiny, "delta", 0.5, least=0.5)
    for rule in RULES.values():
        if rule.needs:
            with pytest.raises(CalibrationError, match=rf"'{rule.name}' needs statistics"):
                select_entries(*pair(), rule.name, 0.5)
    without = EntryStatistics({}, {"a.weight": torch.ones(6, 8)}, {}, {}, frozenset(), 1)
    with pytest.raises(CalibrationError, match=r"no squared gradient of embed.weight"):
        select_entries(*pair(), "delta-fisher", 0.5, statistics=without)


def test_entries_set_to_zero_need_no_base() -> None:
    _, tuned = pair()
    masks = select_entries({}, tuned, "magnitude", 0.5, reset="zero")
    for name, tensor in merge_entries(None, tuned, masks):
        if name in masks:
            assert torch.equal(tensor, tuned[name] * masks[name])


def test_a_mask_of_another_shape_and_a_missing_base_value_are_refused_on_merging() -> None:
    base, tuned = pair()
    with pytest.raises(WeightError, match="a mask of"):
        dict(merge_entries(base, tuned, {"a.bias": torch.ones(5, dtype=torch.bool)}))
    with pytest.raises(WeightError, match=r"a\.bias: the base model has no value"):
        dict(merge_entries({}, tuned, {"a.bias": torch.zeros(6, dtype=torch.bool)}))
