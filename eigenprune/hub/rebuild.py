# SPDX-License-Identifier: Apache-2.0
"""The command that rebuilds a checkpoint from its base, as its card says it."""

import re
from typing import Any

from eigenprune.calibrate import SOURCES
from eigenprune.hub.escape import shell_word
from eigenprune.hub.facts import CheckpointFacts
from eigenprune.hub.names import HUB_ID

COMMIT = re.compile(r"[0-9a-f]{7,64}")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def rebuild_command(facts: CheckpointFacts, base: str) -> str:
    """The `eigenprune prune` command, one group of options a line; empty where none can rebuild it."""
    config = facts.config
    calibration, texts = calibration_facts(facts), text_names(facts)
    if not base or (calibration and not texts and calibration.get("source") not in SOURCES):
        return ""  # texts or windows that a Python program made
    if recovery_facts(facts):
        return ""  # trained, for as long as a clock allowed or as a Python program said
    if config.quantized and config.bits is None:
        return ""  # by a Python program, which may have chosen the layers
    lines = [f"eigenprune prune {shell_word(base)}"]
    if base_revision(facts):
        lines.append(f"--revision {base_revision(facts)}")
    lines.append(f"--out rebuilt --keep {config.keep!r}")
    allocation = f" --allocation {config.allocation}" if config.allocation else ""
    lines.append(
        f"--method {config.method} --layout {config.layout}{allocation} --rank-multiple {config.rank_multiple}"
    )
    others = {"budget": "parameters", "min_keep": 0.0, "prior": 0.0, "choose_windows": "first", "bits": None}
    changed = {name: vars(config)[name] for name, usual in others.items() if vars(config)[name] != usual}
    if changed:
        lines.append(" ".join(f"--{name.replace('_', '-')} {value}" for name, value in changed.items()))
    lines += [f"--faster-at {tokens}" for tokens in config.faster_at]
    lines += [f"--texts {shell_word(text)}" for text in texts]
    if calibration and not texts:
        lines.append(f"--calibration {calibration['source']}")
    if calibration:
        lines.append(f"--windows {config.windows} --window {config.window}")
    lines += [f"--skip {shell_word(pattern)}" for pattern in config.skip]
    lines.append(f"--seed {config.seed} --dtype {DTYPES.get(facts.dtype, 'auto')}")
    return " \\\n  ".join(lines)


def rebuild_needs(facts: CheckpointFacts, base: str) -> str:
    """What a reader must bring for it, as the end of a sentence."""
    needed = [] if HUB_ID.fullmatch(base) else ["the folder of the base model"]
    needed += ["the calibration texts"] if text_names(facts) else []
    return f", given {' and '.join(needed)}" if needed else ""


def calibration_facts(facts: CheckpointFacts) -> dict[str, Any]:
    """What the checkpoint says about its calibration; empty for a data-free method."""
    found = facts.config.provenance.get("calibration")
    return found if isinstance(found, dict) else {}


def recovery_facts(facts: CheckpointFacts) -> dict[str, Any]:
    """What the checkpoint says about a recovery after pruning; empty where there was none."""
    found = facts.config.provenance.get("recovery")
    return found if isinstance(found, dict) else {}


def text_names(facts: CheckpointFacts) -> list[str]:
    """The names of its calibration files; empty where there were none."""
    found = facts.config.provenance.get("texts")
    return [str(name) for name in found] if isinstance(found, list) else []


def base_revision(facts: CheckpointFacts) -> str:
    """The commit of the base on the Hub, or an empty text."""
    found = facts.config.provenance.get("base_revision")
    return found if isinstance(found, str) and COMMIT.fullmatch(found) else ""
