# SPDX-License-Identifier: Apache-2.0
"""Find the base of a sparse delta: where the reader says, beside the delta, or on the Hub."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eigenprune.errors import CheckpointError
from eigenprune.hub.names import HUB_ID

VARIABLE = "EIGENPRUNE_BASE"  # a folder; for `from_pretrained`, which has no argument to say it
WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]


def find_base(header: Mapping[str, Any], delta: Path) -> Path:
    """The folder with the weights of the base of the delta in the folder `delta`.

    Looked at in this order: the folder that the environment variable EIGENPRUNE_BASE names; a folder beside the
    delta's that has the base's name; the Hub, at the recorded revision, through its cache. Whether it is the right base
    is checked by whoever reads it, so no place has to be trusted.

    Raises:
        CheckpointError: it is in none of them.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if not Path(named).is_dir():
            raise CheckpointError(f"{VARIABLE} names no folder: it must be that of {header['base_model']}")
        return Path(named)
    name = str(header["base_model"])
    beside = delta.resolve().parent / name.rpartition("/")[2]
    if beside.is_dir() and beside != delta.resolve():
        return beside
    if HUB_ID.fullmatch(name):
        return _from_hub(name, str(header["base_revision"]), delta.name)
    raise CheckpointError(
        f"{delta.name} is a sparse delta over the local model {name}, which is not beside it: set {VARIABLE} to that "
        f"model's folder, or call eigenprune.hub.load_delta(BASE, DIR), or make a whole model of it with: "
        f"eigenprune delta apply BASE {delta.name} --out MODEL"
    )


def _from_hub(name: str, revision: str, delta: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=WEIGHTS))
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{delta} is a sparse delta over {name}, which cannot be had from the Hub ({reason:.200}): get it, and set "
            f"{VARIABLE} to its folder, or: eigenprune delta apply BASE {delta} --out MODEL"
        ) from error
