# SPDX-License-Identifier: Apache-2.0
"""The methods that go through a model block by block, resumable after each block."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from eigenprune.calibrate.cache import save_tensors
from eigenprune.recover.block import refine_block_
from eigenprune.recover.blocks import BlockPair, walk_blocks_
from eigenprune.recover.closed import refit_block_
from eigenprune.recover.training import SECONDS_BETWEEN_SAVES, Course, Trained


def recover_blocks_(
    dense: nn.Module,
    copied: nn.Module,
    parameters: dict[str, nn.Parameter],
    windows: Tensor,
    course: Course | None,
    *,
    path: Path | None = None,
    progress: bool = True,
) -> Trained:
    """Bring each block of `copied`, in place, nearer to that of `dense`: in closed form, or trained as `course` says.

    Args:
        dense, copied: the models; of `copied` the parameters that change are float32.
        parameters: of `copied`, by name, that are trained.
        windows: [windows, window] int64 token ids.
        course: of each block; None for the closed form.
        path: where finished blocks are kept on the way.
        progress: show a bar on standard error.

    Raises:
        ConfigError: the model cannot be gone through block by block.
        WeightError: a loss is not finite.
    """
    saved = _BlockFile(path, copied)
    finished, before, losses = saved.resume()
    started = time.perf_counter() - before
    done = finished

    def visit(pair: BlockPair, theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> None:
        nonlocal done
        losses.extend(_visited(pair, theirs, ours, parameters, course))
        done += 1
        saved.save_now_and_then(done, time.perf_counter() - started, losses)

    blocks = walk_blocks_(dense, copied, windows, visit, finished=finished, progress=progress)
    seconds = time.perf_counter() - started
    saved.save(blocks, seconds, losses)
    read = len(windows) * (1 if course is None else course.passes)
    return Trained(len(losses) or blocks, read, seconds, tuple(losses))


def _visited(
    pair: BlockPair,
    theirs: Sequence[Tensor],
    ours: Sequence[Tensor],
    parameters: dict[str, nn.Parameter],
    course: Course | None,
) -> tuple[float, ...]:
    """Change one block; the losses of its steps, if there are any."""
    if course is None:
        refit_block_(pair, theirs, ours)
        return ()
    own = {name: p for name, p in parameters.items() if name.startswith(f"{pair.name}.")}
    return refine_block_(pair, theirs, ours, parameters=own, course=course)


class _BlockFile:
    """A model with its first blocks finished, on disk; written between blocks only."""

    def __init__(self, path: Path | None, model: nn.Module) -> None:
        self.path, self.model = path, model
        self._saved_at = time.monotonic()

    def resume(self) -> tuple[int, float, list[float]]:
        """Finished blocks, seconds and losses so far; nothing where there is no usable file."""
        state = self._state()
        try:
            if self.path is None:
                return 0, 0.0, []
            with safe_open(self.path, framework="pt") as opened:
                facts = json.loads(opened.metadata()["progress"])
                tensors = {name: opened.get_tensor(name) for name in state}
            found = int(facts["blocks"]), float(facts["seconds"]), list(map(float, facts["losses"]))
        except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
            return 0, 0.0, []
        if any(tensor.shape != state[name].shape for name, tensor in tensors.items()):
            return 0, 0.0, []
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
        return found

    def save_now_and_then(self, blocks: int, seconds: float, losses: list[float]) -> None:
        """Save, if the last time is some time ago."""
        if time.monotonic() - self._saved_at >= SECONDS_BETWEEN_SAVES:
            self.save(blocks, seconds, losses)

    def save(self, blocks: int, seconds: float, losses: list[float]) -> None:
        """Save; `blocks` are finished."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"blocks": blocks, "seconds": seconds, "losses": losses}
        save_tensors(self._state(), self.path, {"progress": json.dumps(facts)})
        self._saved_at = time.monotonic()

    def _state(self) -> dict[str, Tensor]:
        """Everything that may change: parameters that are trained, and pivots."""
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return trained | {name: b for name, b in self.model.named_buffers() if name.endswith(".pivots")}
