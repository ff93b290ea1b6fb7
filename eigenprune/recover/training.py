# SPDX-License-Identifier: Apache-2.0
"""Short, resumable training of some parameters of a model, in float32, a few windows at a time.

Matrices are trained by Muon (Jordan et al., 2024), vectors by AdamW. A step of AdamW moves every entry by about the
rate, noise or not; one of Muon moves every singular direction of a matrix alike. benchmarks/recovery.py has rows of
both.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from eigenprune.calibrate.cache import save_tensors
from eigenprune.errors import ConfigError, WeightError

BETAS = (0.9, 0.95)  # of AdamW
MOMENTUM = 0.9  # of Muon
LONGEST_GRADIENT = 1.0
WARMUP = 0.05  # of the whole run
SECONDS_BETWEEN_SAVES = 180.0  # parameters and moments: some seconds for each GB

LossOf = Callable[[int], Tensor]  # index of a window -> its mean loss


@dataclass(frozen=True)
class Course:
    """How long and how fast to train.

    Attributes:
        rate: the highest learning rate, in AdamW's units for matrices too: Muon's steps are scaled to the size of its.
        passes: how often each window is read.
        batch: windows in a step.
        minutes: training ends after so many minutes, interruptions not counted; None for no bound. The learning rate
            then falls with the part of the time, or of the steps, that has gone, whichever is more; so the outcome
            depends on the speed of the machine.
        seed: of the order of the windows.

    Raises:
        ConfigError: a value is out of range.
    """

    rate: float
    passes: int = 1
    batch: int = 1
    minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise ConfigError(f"rate={self.rate!r} must be a positive learning rate")
        if self.passes < 0 or self.batch < 1:
            raise ConfigError(f"passes={self.passes!r}, batch={self.batch!r}: at least 0 passes in steps of 1 window")
        if self.minutes is not None and not 0 <= self.minutes < math.inf:
            raise ConfigError(f"minutes={self.minutes!r} must be a length of time from 0 on")

    def order(self, windows: int) -> Tensor:
        """Indices of the windows in the order they are read, [passes x windows]."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = [torch.randperm(windows, generator=generator) for _ in range(self.passes)]
        return torch.cat([torch.empty(0, dtype=torch.int64), *drawn])

    def rate_at(self, progress: float) -> float:
        """After the part `progress` of the run: a linear rise, then half a cosine down to 0."""
        if progress < WARMUP:
            return self.rate * progress / WARMUP
        return self.rate * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP)))) / 2


@dataclass(frozen=True)
class Trained:
    """What was done: optimizer steps, tokens' windows read, seconds in all runs together, and the mean loss by step."""

    steps: int
    windows: int
    seconds: float
    losses: tuple[float, ...]


def train_(
    parameters: Mapping[str, nn.Parameter],
    loss_of: LossOf,
    windows: Sequence[int],
    course: Course,
    *,
    saved: "TrainingFile | None" = None,
    progress: bool = True,
) -> Trained:
    """Lower the mean loss over `windows` by training `parameters`, in place.

    A run that was killed or interrupted goes on from where it was last saved, and ends (without a bound in minutes)
    with the bits of an unbroken one: nothing is drawn but the order of the windows.

    Args:
        parameters: by name; float32 leaves that require gradients.
        loss_of: the mean loss of a window, given its index; backward runs through it.
        windows: the indices that there are.
        course: how long and how fast.
        saved: where parameters and moments are kept on the way.
        progress: show a bar on standard error.

    Raises:
        WeightError: the loss is not finite.
    """
    order = [batch for batch in torch.tensor(windows)[course.order(len(windows))].split(course.batch) if len(batch)]
    run = _Run(parameters)
    if saved is not None:
        saved.resume(run)
    bar = tqdm(total=len(order), initial=run.step, desc="recovering", unit="step", disable=not progress, leave=False)
    started, limit = time.perf_counter() - run.seconds, math.inf if course.minutes is None else 60 * course.minutes
    try:
        with bar:
            while run.step < len(order) and run.seconds < limit:
                done = max((run.step + 0.5) / len(order), run.seconds / limit)
                loss = _step(run, order[run.step].tolist(), loss_of, course.rate_at(done))
                run.seconds = time.perf_counter() - started
                bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
                bar.update()
                if saved is not None and run.step < len(order):
                    saved.save_now_and_then(run)
    finally:  # an interrupt included: at most the step at work is lost
        if saved is not None:
            saved.save(run)
    return Trained(run.step, sum(map(len, order[: run.step])), run.seconds, tuple(run.losses))


class _Run:
    """What changes while training, as tensors and numbers that go to a file and come back."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters, self.optimizers = parameters, _optimizers(parameters.values())
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.whole = True  # not in the middle of an update
        for parameter, state in self._states():
            for key in _moments(parameter):
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if parameter.ndim != 2:
                state["step"] = torch.tensor(0.0, device=parameter.device)  # AdamW's fused kernel wants it there

    def _states(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter, optimizer.state[parameter]

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and moments, by name."""
        states = {id(parameter): state for parameter, state in self._states()}
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            found[name] = parameter.detach()
            for key in _moments(parameter):
                found[f"{name}.{key}"] = states[id(parameter)][key]
        return found

    def restore(self, tensors: Mapping[str, Tensor], step: int, seconds: float, losses: list[float]) -> None:
        """Go on from there."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        for _, state in self._states():
            if "step" in state:
                state["step"].fill_(step)
        self.step, self.seconds, self.losses = step, seconds, losses


def _step(run: _Run, indices: list[int], loss_of: LossOf, rate: float) -> float:
    total = 0.0
    for index in indices:
        loss = loss_of(index) / len(indices)
        total += float(loss.detach())
        if not math.isfinite(total):
            raise WeightError(f"the loss is {total} after {run.step} steps of training: take a lower learning rate")
        loss.backward()
    run.whole = False
    parameters = [parameter for parameter in run.parameters.values() if parameter.grad is not None]
    nn.utils.clip_grad_norm_(parameters, LONGEST_GRADIENT)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.step += 1
    run.losses.append(total)
    run.whole = True
    return total


def _optimizers(parameters: Iterable[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the rest; their rates are set at each step."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for parameter in parameters:
        (matrices if parameter.ndim == 2 else others).append(parameter)
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(torch.optim.Muon(matrices, weight_decay=0.0, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"))
    if others:
        found.append(torch.optim.AdamW(others, betas=BETAS, weight_decay=0.0, fused=True))
    return found


def _moments(parameter: Tensor) -> tuple[str, ...]:
    """What the optimizer of a parameter keeps for each of its entries."""
    return ("momentum_buffer",) if parameter.ndim == 2 else ("exp_avg", "exp_avg_sq")


class TrainingFile:
    """A run on disk, `recovery-KEY.safetensors`: the whole old state or the whole new one."""

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / f"recovery-{key}.safetensors"
        self._saved_at = time.monotonic()

    def resume(self, run: _Run) -> None:
        """Bring `run` to where it was saved; a file that is damaged, or of other parameters, is passed over."""
        wanted = {name: tensor.shape for name, tensor in run.tensors().items()}
        try:
            with safe_open(self.path, framework="pt") as opened:
                facts = json.loads(opened.metadata()["progress"])
                tensors = {name: opened.get_tensor(name) for name in wanted}
            step, seconds, losses = int(facts["step"]), float(facts["seconds"]), list(map(float, facts["losses"]))
        except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
            return
        if wanted == {name: tensor.shape for name, tensor in tensors.items()} and step >= 0 and seconds >= 0:
            with torch.no_grad():
                run.restore(tensors, step, seconds, losses)

    def save_now_and_then(self, run: _Run) -> None:
        """Save, if the last time is some time ago."""
        if time.monotonic() - self._saved_at >= SECONDS_BETWEEN_SAVES:
            self.save(run)

    def save(self, run: _Run) -> None:
        """Save, unless there is nothing yet, or an update was broken off; then the last save stays."""
        if run.step == 0 or not run.whole:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"step": run.step, "seconds": run.seconds, "losses": run.losses}
        save_tensors(run.tensors(), self.path, {"progress": json.dumps(facts)})
        self._saved_at = time.monotonic()


def training_key(course: Course | None, parts: list[str]) -> str:
    """A name for a run: of its course and of whatever else its outcome depends on."""
    return hashlib.sha256(json.dumps([None if course is None else asdict(course), *parts]).encode()).hexdigest()[:32]
