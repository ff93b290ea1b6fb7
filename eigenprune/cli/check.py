# SPDX-License-Identifier: Apache-2.0
"""`eigenprune card DIR --check`: prune the base again as the checkpoint says, and compare."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eigenprune.errors import CheckpointError


def check_rebuild(folder: Path, base: str | None, texts: Sequence[Path], *, quiet: bool) -> dict[str, Any]:
    """Rebuild the checkpoint in `folder` in a temporary folder, and say how the two compare.

    Args:
        folder: the pruned model.
        base: folder or id of its base; None takes the id and revision that it names.
        texts: its calibration files, in its order; none where there were none.
        quiet: no progress.

    Raises:
        CheckpointError: it does not say how it was made, or the base or the texts are missing, or are others.
    """
    from eigenprune.calibrate import SAMPLED
    from eigenprune.cli.loading import load_model, load_tokenizer
    from eigenprune.hub import rebuild_command, save_model
    from eigenprune.hub.facts import read_facts
    from eigenprune.hub.rebuild import DTYPES, base_revision, calibration_facts, text_names
    from eigenprune.prune import prune_
    from eigenprune.report import versions

    facts = read_facts(folder)
    recorded = facts.config.provenance
    name = base or str(recorded.get("base_model") or "")
    if not rebuild_command(facts, name):
        raise CheckpointError(f"{folder} was made from texts or windows that no file names; it cannot be rebuilt")
    if [path.name for path in texts] != text_names(facts):
        raise CheckpointError(f"give its calibration files with --texts, in this order: {text_names(facts) or 'none'}")
    revision = None if base else base_revision(facts) or None
    dense = load_model(name, DTYPES.get(facts.dtype, "auto"), revision=revision, quiet=quiet)
    source = calibration_facts(facts).get("source") if not texts else None
    config = replace(
        facts.config, texts=[str(path) for path in texts] or None, calibration=source, modules={}, provenance={}
    )
    tokenizer = load_tokenizer(name, revision=revision) if calibration_facts(facts) else None
    report = prune_(dense, config, tokenizer=tokenizer, progress=not quiet)
    if report.calibration.get("texts_hash") != calibration_facts(facts).get("texts_hash"):
        raise CheckpointError(
            "the calibration texts, or the tokenizer, are not those that it was made with"
            if source != SAMPLED
            else "the base writes another calibration text here than where it was made: other versions, processor or "
            "number of threads round otherwise"
        )
    with tempfile.TemporaryDirectory(prefix="eigenprune-check-") as scratch:
        rebuilt = save_model(dense, Path(scratch) / "rebuilt")
        differing = differing_tensors(folder, rebuilt)
    now, then = versions(), recorded.get("versions")
    then = then if isinstance(then, dict) else {}
    return {
        "same": not differing,
        "differing_tensors": differing[:20],
        "differing": len(differing),
        "changed_versions": {key: [then.get(key), now[key]] for key in now if then.get(key) != now[key]},
    }


def differing_tensors(one: Path, other: Path) -> list[str]:
    """Names of the tensors that are not the same to the bit, or only in one of two checkpoints."""
    import torch

    from eigenprune.calibrate.statistics import SafetensorsFolder
    from eigenprune.hub.facts import weight_files

    left, right = SafetensorsFolder(weight_files(one)), SafetensorsFolder(weight_files(other))
    differing = list(left.keys() ^ right.keys())
    for name in left.keys() & right.keys():
        a, b = left[name], right[name]
        same = a.dtype == b.dtype and a.shape == b.shape
        if not (same and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))):
            differing.append(name)
    return sorted(differing)
