# SPDX-License-Identifier: Apache-2.0
"""`recover_`: get back what pruning lost, on text without labels, from the dense model's own behaviour."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eigenprune.calibrate.cache import cache_key, model_fingerprint, windows_hash
from eigenprune.errors import ConfigError, WeightError
from eigenprune.layers import low_rank_layers, quantised_linears
from eigenprune.recover.blockwise import recover_blocks_
from eigenprune.recover.compute import computing
from eigenprune.recover.measure import distance_from, divergence_from, split_windows, window_divergence
from eigenprune.recover.targets import Targets, teacher_targets
from eigenprune.recover.trained_parameters import adopt_, factors_and_vectors, round_, trainable_copy, vectors
from eigenprune.recover.training import Course, Trained, TrainingFile, train_, training_key


@dataclass(frozen=True)
class Method:
    """One way to recover.

    Attributes:
        trained: names of the parameters of a model that it changes.
        course: how long and how fast, if nothing else is said; None where nothing is trained.
        blockwise: whether it goes through the dense model block by block, or learns from its predictions.
    """

    trained: Callable[[nn.Module], list[str]]
    course: Course | None
    blockwise: bool


# Measured at keep 0.8 (benchmarks/recovery.py, 180 windows): 4e-5 takes 0.169 nats to 0.123 in one pass; at 1e-4 two
# passes end at 0.131, though with a lower perplexity on other text of the domain. AdamW at its best rate, 2e-5: 0.128.
RECOVERIES = {
    "distil": Method(factors_and_vectors, Course(rate=4e-5), blockwise=False),
    "block": Method(factors_and_vectors, Course(rate=1e-4), blockwise=True),
    "closed": Method(factors_and_vectors, None, blockwise=True),
    "perp": Method(vectors, Course(rate=1e-3), blockwise=False),
}


@dataclass(frozen=True)
class RecoveryReport:
    """What `recover_` did.

    Attributes:
        method: its name.
        before: mean divergence of the pruned model from the dense one on held-out windows, in nats per token; without
            a head, mean squared relative error of the last hidden state.
        after: the same, of what was reached.
        kept: whether that is in the model now; not so where it was no better.
        steps: of the optimizer; for `closed`, the number of blocks.
        tokens: read, each as often as it was.
        held_out_tokens: that `before` and `after` were measured on.
        seconds: in all runs together, the dense model's part not counted.
        settings: rate, passes, batch, minutes and seed.
        losses: of each step.
    """

    method: str
    before: float
    after: float
    kept: bool
    steps: int
    tokens: int
    held_out_tokens: int
    seconds: float
    settings: dict[str, Any]
    losses: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the losses of single steps."""
        return {key: value for key, value in asdict(self).items() if key != "losses"}


def recover_(
    model: nn.Module,
    dense: nn.Module | Targets,
    windows: Tensor | None = None,
    *,
    method: str = "distil",
    course: Course | None = None,
    checkpoint_dir: Path | None = None,
    progress: bool = True,
) -> RecoveryReport:
    """Lower the loss of a pruned `model` in place, by what the `dense` one does on the same text; no labels are used.

    `distil`: the divergence of the model's prediction from the dense model's (Hinton et al., arXiv 1503.02531), over
    all factors, biases and norms. `perp`: the same over biases and norms only (PERP, arXiv 2312.15230). `closed`: least
    squares for the left factors, block by block, from the pruned model's own inputs to the dense model's outputs
    (SVD-LLM, arXiv 2403.07378). `block`: training of each block, one after the other, towards the dense block's output.

    One window in 16 is held out, and measured before and after; where nothing was gained, the model stays as it was. It
    changes at the very end only, so a run that fails or is interrupted leaves it as it was, and goes on from
    `checkpoint_dir` when it is called again.

    Memory, beside `model`: a float32 copy of it, and for what is trained at once gradient and momentum in float32; the
    activations of one window. With `distil` and `perp`: the targets, 384 bytes a token, and no dense model while
    training. With the other two: the hidden states of all windows, of both models.

    Args:
        model: pruned, and in memory; in any floating dtype. For `perp` also one whose single entries were pruned
            (`eigenprune.entries`): what is zero stays zero.
        dense: the model it was pruned from; for `distil` and `perp` also what `teacher_targets` kept of it.
        windows: [windows, window] int64 token ids, two at least; None takes those of the targets.
        method: `distil`, `block`, `closed` or `perp`.
        course: how long and how fast; None takes the method's own. `closed` trains nothing, and
            `block` knows no bound in minutes.
        checkpoint_dir: where a run is kept on the way, and its outcome after it, under a hash of models, windows and
            settings; None keeps nothing.
        progress: show bars on standard error.

    Raises:
        ConfigError: the model has no factored layer (`perp` needs none), a setting is out of range, targets and windows
            are of different text, or the method does not suit the model.
        CalibrationError: fewer than two windows.
        WeightError: a weight is on the meta device, or a loss is not finite.
    """
    chosen = find_recovery(method)
    if chosen.blockwise and course is not None and (method == "closed" or course.minutes is not None):
        raise ConfigError(f"{method!r} takes no {'bound in minutes' if chosen.course else 'course: it trains nothing'}")
    course = course or chosen.course
    _check(model, dense, method)
    targets = None if chosen.blockwise else _targets(dense, windows, checkpoint_dir, progress)
    windows = windows if targets is None else targets.windows
    if windows is None or (chosen.blockwise and isinstance(dense, Targets)):
        raise ConfigError(f"{method!r} needs the dense model itself, and windows of token ids")
    learned, held_out = split_windows(len(windows))
    teacher: Any = dense
    measure = distance_from(teacher, windows[held_out]) if targets is None else divergence_from(targets, held_out)
    before = measure(model)

    copied, parameters = trainable_copy(model, chosen.trained(model))
    saved = None
    if checkpoint_dir is not None:
        of_teacher = model_fingerprint(teacher) if targets is None else targets.key
        key = cache_key(model, windows_hash(windows), [method, of_teacher])
        saved = TrainingFile(checkpoint_dir, training_key(course, [key]))
    if targets is None or course is None:
        path = None if saved is None else saved.path
        trained = recover_blocks_(teacher, copied, parameters, windows[learned], course, path=path, progress=progress)
    else:
        loss = partial(window_divergence, copied, targets)
        with computing(copied):
            trained = train_(parameters, loss, learned, course, saved=saved, progress=progress)

    round_(copied, model)
    after = measure(copied)
    report = _report(method, (before, after), trained, (len(held_out), windows.shape[1]), course)
    if report.kept:
        adopt_(model, copied)
        _note(model, report)
    return report


def find_recovery(name: str) -> Method:
    """The method of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in RECOVERIES:
        raise ConfigError(f"recovery {name!r} is unknown; there are: {', '.join(RECOVERIES)}")
    return RECOVERIES[name]


def _check(model: nn.Module, dense: nn.Module | Targets, method: str) -> None:
    if not low_rank_layers(model) and method != "perp":
        raise ConfigError(
            f"the model has no factored layer, so {method!r} has nothing to train: prune it first, or take 'perp', "
            "which works after pruning of single entries too"
        )
    if quantised_linears(model):
        raise ConfigError("the factors are quantised, and integers are not trained: recover first, then quantise")
    for part in (model, *([] if isinstance(dense, Targets) else [dense])):
        for name, parameter in part.named_parameters():
            if parameter.device.type == "meta":
                raise WeightError(f"{name} has no data on this machine (meta device, or offloaded): load it in memory")
    if not isinstance(dense, Targets) and low_rank_layers(dense):
        raise ConfigError("the teacher is pruned itself: give the dense model")


def _targets(dense: nn.Module | Targets, windows: Tensor | None, folder: Path | None, progress: bool) -> Targets:
    if not isinstance(dense, Targets):
        if windows is None:
            raise ConfigError("windows of token ids are needed beside the dense model")
        return teacher_targets(dense, windows, cache_dir=folder, progress=progress)
    if windows is not None and windows_hash(windows) != windows_hash(dense.windows):
        raise ConfigError("the targets are of other windows than these: make them anew with teacher_targets")
    return dense


def _note(model: nn.Module, report: RecoveryReport) -> None:
    """Say in the config that will be saved how the weights came about."""
    config: Any = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if config is not None:
        config.provenance = dict(config.provenance) | {"recovery": report.to_dict()}


def _report(
    method: str, change: tuple[float, float], trained: Trained, held_out: tuple[int, int], course: Course | None
) -> RecoveryReport:
    return RecoveryReport(
        method=method,
        before=change[0],
        after=change[1],
        kept=change[1] < change[0],
        steps=trained.steps,
        tokens=trained.windows * held_out[1],
        held_out_tokens=held_out[0] * held_out[1],
        seconds=trained.seconds,
        settings={} if course is None else asdict(course),
        losses=trained.losses,
    )
