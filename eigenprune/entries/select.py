# SPDX-License-Identifier: Apache-2.0
"""`select_entries`: which single entries of a fine-tuned model are kept; the others go back to the base model."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from eigenprune.calibrate import EntryStatistics
from eigenprune.entries.blocks import Entries
from eigenprune.entries.budget import Threshold, highest_of_all, highest_of_rows, share_of
from eigenprune.entries.groups import HEADS, Plan, plan_tensors
from eigenprune.entries.packed import PackedMasks
from eigenprune.entries.pq_index import pq_index, shares_by_index
from eigenprune.entries.rules import SCOPES, Rule, find_rule
from eigenprune.entries.scores import Context
from eigenprune.errors import CalibrationError, ConfigError

RESETS = ("base", "zero")


def select_entries(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    rule: str,
    keep: float,
    *,
    scope: str | None = None,
    row_entries: int | None = None,
    least: float = 0.0,
    reset: str = "base",
    keep_whole: Sequence[str] = HEADS,
    only: Sequence[str] = (),
    statistics: EntryStatistics | None = None,
    general: EntryStatistics | None = None,
    seed: int = 0,
    progress: bool = False,
) -> PackedMasks:
    """Bool masks, True where the fine-tuned value is kept, for every floating tensor of `tuned`; neither model changes.

    A row is what the first axis counts; a vector is one row. Of n entries (of a row, a tensor, or all that are chosen
    among) `keep * n` are kept, rounded, a half upwards: exactly so many, the lower index where scores are equal. The
    budget is of the tensors chosen among; those kept whole come on top. Tied tensors are decided on once.

    Args:
        base: state dict of the model that `tuned` was fine-tuned from; not looked at with `reset="zero"`. Either may
            also be a lazy mapping that reads a file at each access, for models larger than memory.
        tuned: state dict of the fine-tuned model; any rank and floating dtype. Integer tensors are not chosen among
            and get no mask.
        rule: a row of `eigenprune.entries.RULES`.
        keep: kept share of the entries, in [0, 1].
        scope: what each share is taken of: `row`, `layer` (a tensor) or `global`; None for the rule's own.
        row_entries: a count of entries to keep of every row, in the place of `keep` (KEN's own budget); all of a row
            that has fewer. Scope `row` only.
        least: with scope `global`, the share that every tensor keeps at least, in [0, keep].
        reset: where the entries that are not kept go, which rules that measure a change have to know: `base` or `zero`.
        keep_whole: regular expressions, found anywhere in a name: tensors kept whole (`HEADS`, `EMBEDDINGS`).
        only: if given, tensors that match none are kept whole.
        statistics: of `collect_entry_statistics` on the fine-tuned model, for rules that need them; names are those of
            `tuned`.
        general: of a second set of examples, for `d-pruner`.
        seed: of the rule `random`.
        progress: show a bar on standard error.

    Raises:
        CalibrationError: statistics that the rule needs are missing.
        ConfigError: a setting is out of range or at odds with another, or a pattern matches nothing.
        WeightError: the models do not belong together, or hold NaN or infinity (with the tensor and the index).
        BudgetError: `least` takes more than the budget.
    """
    found = find_rule(rule)
    scope = found.scope if scope is None else scope
    _check(found, keep, scope, row_entries, least, reset)
    context = Context(keep, seed, statistics, general)
    _check_statistics(found, context)
    plan = plan_tensors(None if reset == "zero" else base, tuned, keep_whole, only)
    sideways = statistics.transposed if statistics is not None and "input" in "".join(found.needs) else frozenset()
    entries = partial(_entries, base, tuned, plan.in_base, sideways)
    masks = PackedMasks()
    if found.by_index:
        _select_by_index(plan, found, context, keep, entries, masks)
    elif scope == "global":
        _select_globally(plan, found, context, keep, least, entries, masks)
    else:
        for name in tqdm(plan.chosen, desc=f"selecting by {rule}", unit="tensor", disable=not progress, leave=False):
            tensor = entries(name)
            if scope == "row":
                mask = _select_rows(tensor, found, context, keep, row_entries)
            else:
                mask = _select_of_tensor(tensor, found, context, keep)
            masks.put(name, tensor.shaped(mask))
    return _in_order(tuned, plan, masks)


def _entries(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    in_base: Mapping[str, str],
    sideways: frozenset[str],
    name: str,
) -> Entries:
    other = base[in_base[name]] if name in in_base else None
    if name in sideways:  # stored [in, out]: its rows are the columns
        return Entries(name, tuned[name].t(), None if other is None else other.t(), transposed=True)
    return Entries(name, tuned[name], other)


def _check(rule: Rule, keep: float, scope: str, row_entries: int | None, least: float, reset: str) -> None:
    if not 0 <= keep <= 1:
        raise ConfigError(f"keep={keep!r} must be in [0, 1]: the share of the entries that stays")
    if scope not in SCOPES:
        raise ConfigError(f"scope {scope!r} is unknown; there are: {', '.join(SCOPES)}")
    if reset not in RESETS:
        raise ConfigError(f"reset {reset!r} is unknown; there are: {', '.join(RESETS)}")
    if scope not in rule.scopes:
        raise ConfigError(f"scope {scope!r} is not open to rule {rule.name!r}, only: {', '.join(rule.scopes)}")
    if row_entries is not None and (row_entries < 0 or scope != "row"):
        raise ConfigError(f"row_entries={row_entries!r} must be at least 0, and needs scope='row'")
    if not 0 <= least <= keep or (least and (scope != "global" or rule.by_index)):
        raise ConfigError(f"least={least!r} must be in [0, keep], and needs a rule that ranks all entries globally")


def _check_statistics(rule: Rule, context: Context) -> None:
    found = context.statistics
    there = {
        "general": context.general is not None,
        "gradient": found is not None and bool(found.gradient),
        "squared_gradient": found is not None and bool(found.squared_gradient),
        "input_square": found is not None and bool(found.input_square),
        "input_gram": found is not None and bool(found.input_gram),
    }
    for field in rule.needs:
        if not there[field]:
            raise CalibrationError(
                f"rule {rule.name!r} needs statistics with {', '.join(rule.needs)}: collect them on the fine-tuned "
                "model with eigenprune.calibrate.collect_entry_statistics"
            )


def _select_rows(tensor: Entries, rule: Rule, context: Context, keep: float, row_entries: int | None) -> Tensor:
    count = share_of(keep, tensor.shape[1]) if row_entries is None else row_entries
    mask = torch.zeros(tensor.shape, dtype=torch.bool)
    for block in tensor.blocks():
        if rule.match is not None:
            mask[block.rows] = rule.match(block, count, context)
        elif rule.score is not None:
            mask[block.rows] = highest_of_rows(rule.score(block, context), count)
    return mask


def _select_of_tensor(tensor: Entries, rule: Rule, context: Context, keep: float) -> Tensor:
    kept: dict[str, Tensor] = {}
    size = tensor.tuned.numel()
    highest_of_all({tensor.name: size}, lambda _: _scores(tensor, rule, context), keep, 0.0, kept.__setitem__)
    return kept[tensor.name]


def _select_globally(
    plan: Plan, rule: Rule, context: Context, keep: float, least: float, entries: "partial[Entries]", masks: PackedMasks
) -> None:
    sizes = {name: entries(name).tuned.numel() for name in plan.chosen}

    def put(name: str, mask: Tensor) -> None:
        masks.put(name, entries(name).shaped(mask))

    highest_of_all(sizes, lambda name: _scores(entries(name), rule, context), keep, least, put)


def _select_by_index(
    plan: Plan, rule: Rule, context: Context, keep: float, entries: "partial[Entries]", masks: PackedMasks
) -> None:
    sizes = {name: entries(name).tuned.numel() for name in plan.chosen}
    index = {name: pq_index(block.tuned for block in entries(name).blocks()) for name in plan.chosen}
    for name, count in shares_by_index(sizes, index, keep).items():
        tensor = entries(name)
        mask = Threshold([name], lambda name: _scores(entries(name), rule, context), count).mask(name, sizes[name])
        masks.put(name, tensor.shaped(mask))


def _scores(tensor: Entries, rule: Rule, context: Context) -> Iterator[Tensor]:
    for block in tensor.blocks():
        if rule.score is not None:
            yield rule.score(block, context)


def _in_order(tuned: Mapping[str, Tensor], plan: Plan, masks: PackedMasks) -> PackedMasks:
    """The masks of all floating tensors, in the order of the model."""
    ordered = PackedMasks()
    whole = set(plan.whole)
    for name in [*plan.chosen, *plan.whole]:
        if name in whole:
            masks.put_whole(name, tuned[name].shape)
    for name in tuned:
        source = plan.same.get(name, name)
        if source in masks:
            ordered.share(name, masks, source)
    return ordered
