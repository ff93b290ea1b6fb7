# SPDX-License-Identifier: Apache-2.0
"""The optional modelling file: lets a reader load a checkpoint without this package, by `trust_remote_code=True`."""

import json
import re
from importlib.resources import files
from pathlib import Path

import jinja2

from eigenprune.errors import CheckpointError
from eigenprune.hub.limits import read_json
from eigenprune.hub.names import MODELING_NAME

TEMPLATE = "modeling.py.jinja"


def modeling_text(architecture: str) -> str:
    """The file for models of the class `architecture`, the same for all of them.

    Raises:
        CheckpointError: that is no class that transformers has at its top level.
    """
    import transformers

    if not re.fullmatch(r"[A-Z]\w{0,99}", architecture, re.ASCII) or not hasattr(transformers, architecture):
        raise CheckpointError(f"{architecture!r:.80} is no model class of transformers: it gets no modelling file")
    source = files("eigenprune.hub").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return str(jinja2.Template(source, keep_trailing_newline=True).render(architecture=architecture))


def write_modeling(folder: Path, automatic: str) -> None:
    """Write the file into the checkpoint in `folder`, and name it in its config as what `automatic` is to load.

    Raises:
        CheckpointError: the class in the config is none of transformers itself.
    """
    path = folder / "config.json"
    config = read_json(path)
    architecture = str((config.get("architectures") or [""])[0])
    (folder / MODELING_NAME).write_text(modeling_text(architecture), encoding="utf-8", newline="\n")
    config["auto_map"] = {automatic: f"{Path(MODELING_NAME).stem}.Eigenprune{architecture}"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_our_modeling(content: bytes, architecture: str) -> bool:
    """Whether `content` is the file as this version writes it, to the byte."""
    try:
        return content == modeling_text(architecture).encode()
    except CheckpointError:
        return False
