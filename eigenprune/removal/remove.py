# SPDX-License-Identifier: Apache-2.0
"""`remove_`: take from a model the components that stand in a task's way."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from eigenprune.calibrate import PassageGradients, passage_gradients
from eigenprune.calibrate.objective import is_causal
from eigenprune.errors import CalibrationError, ConfigError
from eigenprune.evaluate.token_example import TokenExample
from eigenprune.removal.compat import compat_scores, pooled_masks
from eigenprune.removal.examples import Judges, judges_of
from eigenprune.removal.frozen import FrozenPieces
from eigenprune.removal.objective import check_objective
from eigenprune.removal.one_shot import FRACTIONS, State, laser_cuts, lowest, one_shot
from eigenprune.removal.removal import RemovalReport, RemovalRound, removed_pieces
from eigenprune.removal.search import Search, SearchSettings, best_round
from eigenprune.removal.worth import component_count, eligible, sigmas, task_worth
from eigenprune.spectral import WORTHS, check_kinds, layer_views


def remove_(
    model: nn.Module,
    examples: Sequence[TokenExample],
    *,
    retention: Sequence[TokenExample] | Tensor,
    worth: str = "exact",
    kinds: Sequence[str] | None = None,
    view: str = "head",
    remove: float = 0.01,
    held_out: Sequence[TokenExample] | None = None,
    retention_bound: float = 0.05,
    retention_weight: float = 1.0,
    objective: str = "margin",
    checks: int = 300,
    pooled: bool = True,
    autocast: bool = False,
    skip: Sequence[str] = (),
    batch: int = 16,
    seed: int = 0,
    progress: bool = True,
    keep_on_interrupt: bool = False,
) -> RemovalReport:
    """Freeze components of `model`, in place, so that it gets better at a task and keeps what `retention` asks for.

    With worth `exact`: a search in rounds, see `removal.search`; every group of components stays only if real forward
    passes gain, and the model is left at the round with the lowest objective on held-out examples. With any other rule:
    the lowest fractions `remove` / 8, / 4, / 2 and `remove` in one shot each, and the best of them or nothing by the
    same. In both the retention loss may not rise by more than `retention_bound`, nor may fewer held-out examples be
    answered rightly. Nothing is trained, and a failed or interrupted call leaves the model as it was.

    Args:
        examples: of the task, to measure worth on; without `held_out` a quarter of them, drawn by `seed`, is set aside.
        retention: what the model must not lose: examples, or [windows, window] int64 token ids of plain text.
        worth: `exact`, `paper`, `compat`, `random`, `smallest-sigma` or `laser`.
        kinds: of `spectral.KINDS`, which slices may lose components; None for all (for `compat`, as released: keys).
        view: `head` or `matrix`.
        remove: at most this fraction of their components, in (0, 1].
        held_out: examples that decide when to stop.
        retention_bound: by how much the retention loss may rise, in nats a token.
        retention_weight: what the retention's objective counts in the search, where the task's counts 1.
        objective: what is lowered, see `removal.objective`: `margin`, the shortfall of right answers (of choices, the
            right one's against the others), or `loss`, theirs. Plain text is retained by its loss.
        checks: at most this many forward checks are made in the search.
        pooled: whether the search's groups are judged on search and held-out examples together, or on held-out ones
            alone (faster).
        autocast: let the search's checks and slopes use bfloat16 where this machine multiplies it in hardware. Gains
            smaller than its rounding may then be noise; what the report says, and which round stays, is measured as
            the model is.
        skip: as for `select_layers`.
        batch: examples in one run.
        seed: of the split, and of `random`.
        progress: show a bar on standard error.
        keep_on_interrupt: let Ctrl-C in the search of `exact` end it, and keep what was found by then; the settings of
            the report then have `interrupted`.

    Raises:
        ConfigError: a setting is unknown or out of range, or the model has no layer of these kinds.
        CalibrationError: too few examples, none to retain, or the model is no causal language model.
        WeightError: a weight or a loss is not finite.
    """
    _check(model, worth, remove, retention_bound, retention_weight, checks)
    check_objective(objective)
    wanted = check_kinds(("k",) if worth == "compat" and kinds is None else kinds)
    started = time.perf_counter()
    judges = judges_of(examples, held_out, retention, batch, seed, objective)
    frozen = FrozenPieces(model, layer_views(model, view, wanted, skip))
    with _evaluation_mode(model), _undone_on_error(frozen):
        gradients = _gradients(model, frozen, judges, batch, worth == "paper")
        layers = list(gradients.weight)
        if not layers:
            raise ConfigError("no layer of these kinds sees every token: there is nothing whose worth can be measured")
        components = component_count(frozen, layers, wanted)
        compat = compat_scores(frozen, judges.search.passages) if worth == "compat" else None
        before = task_worth(worth, frozen, gradients, seed) if compat is None else compat.worth
        sigma = {name: sigmas(frozen, name).float() for name in layers}
        allowed = eligible(frozen, layers, wanted)
        measured = time.perf_counter()
        limit, means = int(remove * components), gradients.input_mean
        path: Iterable[tuple[RemovalRound, State]]
        search = None
        if worth == "exact":
            how = (limit, retention_bound, retention_weight, checks, pooled, autocast, progress, keep_on_interrupt)
            search = Search(frozen, judges, means, allowed, SearchSettings(*how))
            path = search.run()
        elif compat is not None:
            attempts = [pooled_masks(frozen, before, wanted, fraction * remove) for fraction in FRACTIONS]
            path = one_shot(frozen, judges, compat.inputs, attempts)
        else:
            path = _one_shot_path(worth, frozen, judges, means, allowed, before, limit)
        path = list(path)
        rounds = [entry for entry, _ in path]
        chosen = best_round(rounds, retention_bound, lambda entry: entry.held_out_objective)
        frozen.restore_(path[chosen][1])
        removal = frozen.removal()
    names = {name: [(part.kind, part.head) for part in view.slices] for name, view in frozen.views.items()}
    return RemovalReport(
        rounds=tuple(rounds),
        chosen=chosen,
        pieces=tuple(removed_pieces(removal, names)),
        components=components,
        settings={
            "worth": worth,
            "kinds": list(wanted),
            "view": view,
            "remove": remove,
            "retention_bound": retention_bound,
            "retention_weight": retention_weight,
            "checks": checks,
            "objective": objective,
            "pooled": pooled,
            "autocast": autocast,
            "seed": seed,
            "examples": [len(judges.search), len(judges.held_out), len(judges.retention)],
            "interrupted": search is not None and search.interrupted,
        },
        removal=removal,
        worth={name: value.float() for name, value in before.items()},
        sigma=sigma,
        seconds={"scoring": measured - started, "search": time.perf_counter() - measured},
    )


def _one_shot_path(
    worth: str,
    frozen: FrozenPieces,
    judges: Judges,
    means: dict[str, Tensor],
    allowed: dict[str, Tensor],
    before: dict[str, Tensor],
    limit: int,
) -> Iterator[tuple[RemovalRound, State]]:
    if worth == "laser":
        return one_shot(frozen, judges, None, laser_cuts(frozen, before, limit))
    return one_shot(frozen, judges, means, lowest(allowed, before, limit))


def _gradients(model: nn.Module, frozen: FrozenPieces, judges: Judges, batch: int, partners: bool) -> PassageGradients:
    layers = {name: model.get_submodule(name) for name in frozen.views}
    return passage_gradients(model, judges.search.passages, layers, batch=batch, partners=partners)


def _check(model: nn.Module, worth: str, remove: float, bound: float, weight: float, checks: int) -> None:
    if not is_causal(model):
        raise CalibrationError(f"{type(model).__name__} is no causal language model: a task cannot be scored on it")
    if worth not in WORTHS:
        raise ConfigError(f"worth {worth!r} is unknown; there are: {', '.join(WORTHS)}")
    if not 0 < remove <= 1:
        raise ConfigError(f"remove={remove!r} must be in (0, 1]: the fraction of components that may go")
    if not bound >= 0 or not weight >= 0:
        raise ConfigError(f"retention_bound={bound!r} and retention_weight={weight!r} must be at least 0")
    if checks < 1:
        raise ConfigError(f"checks={checks!r} must be at least 1")


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """As for evaluation, but with gradients."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _undone_on_error(frozen: FrozenPieces) -> Iterator[None]:
    """Give the model its base weights back if anything fails, an interrupt included."""
    try:
        yield
    except BaseException:
        frozen.undo_all_()
        raise
