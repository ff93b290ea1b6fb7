# SPDX-License-Identifier: Apache-2.0
"""Load a sparse delta as the model that it makes of its base: for `from_pretrained`, and with a base that is named.

transformers reads a model from files, and knows well how: types, devices, renamed and fused tensors, tied weights. So
the delta and its base become one temporary file, and transformers reads that one. On systems that let a mapped file be
removed it has no name any more once the model is there; its space is given back with the model.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from eigenprune.errors import CheckpointError
from eigenprune.hub.checkpoint import check_places
from eigenprune.hub.delta_base import find_base
from eigenprune.hub.delta_decode import DeltaFile
from eigenprune.hub.delta_folder import DELTA_NAME, apply_delta, check_header_agrees, check_space, open_delta
from eigenprune.hub.model_class import model_class
from eigenprune.hub.weight_source import WeightSource


class MergedFile:
    """The whole model in a temporary file, in the place of the delta's own among the files that are loaded.

    Args:
        header: the delta's, from the config.
        files: the list of files that transformers is about to read; its one entry is exchanged.

    Raises:
        CheckpointError: the base is not found or another, the delta is damaged, or the disk is full.
    """

    def __init__(self, header: Mapping[str, Any], files: list[str] | None) -> None:
        if files is None or len(files) != 1 or Path(files[0]).name != DELTA_NAME:
            raise CheckpointError(
                f"a sparse delta is one file, {DELTA_NAME}: make a whole model of it first, with: "
                "eigenprune delta apply BASE DIR --out MODEL"
            )
        folder = Path(files[0]).parent
        check_places(files, folder)
        base = find_base(header, folder)
        self._scratch = tempfile.TemporaryDirectory(prefix="eigenprune-delta-", ignore_cleanup_errors=True)
        scratch = Path(self._scratch.name)
        try:
            # transformers builds models under the meta device; real data is worked on here.
            with torch.device("cpu"), DeltaFile(files[0]) as delta, WeightSource(base) as weights:
                check_header_agrees(delta.manifest, header, folder.name)
                check_space(delta.manifest, scratch)
                delta.write_merged(scratch / DELTA_NAME, weights)
        except OSError as error:
            self._scratch.cleanup()
            raise CheckpointError(
                f"the whole model cannot be written to {scratch.parent}: {error}; set TMPDIR to a larger disk"
            ) from error
        except BaseException:
            self._scratch.cleanup()
            raise
        files[0] = str(scratch / DELTA_NAME)

    def finish(self, model: Any) -> None:
        """Remove the file, of which a loaded `model` needs no more than the mapped pages.

        Raises:
            CheckpointError: part of the model was left on disk, in that file.
        """
        self._scratch.cleanup()
        if "disk" in map(str, (getattr(model, "hf_device_map", None) or {}).values()):
            raise CheckpointError(
                "a sparse delta cannot be offloaded to disk: make a whole model of it first, with: "
                "eigenprune delta apply BASE DIR --out MODEL"
            )


def load_delta(base: str | Path, folder: str | Path, **options: Any) -> Any:
    """The fine-tuned model of the delta in `folder` over the base model in the folder `base`, in its own class.

    The same as `from_pretrained(folder, **options)`, for a base that `from_pretrained` would not find.

    Args:
        base: folder of the base model.
        folder: of the delta.
        options: for `from_pretrained`, such as dtype and device_map (but no part of it on disk).

    Raises:
        CheckpointError: a wrong base, or a damaged delta.
    """
    import transformers

    if not Path(base).is_dir():
        raise CheckpointError(f"there is no folder {base}: give that of the base model")
    open_delta(folder).close()  # before anything is written
    with tempfile.TemporaryDirectory(prefix="eigenprune-delta-", ignore_cleanup_errors=True) as scratch:
        whole = apply_delta(base, folder, Path(scratch) / "model")
        config = transformers.AutoConfig.from_pretrained(whole)
        loader = model_class(config) or transformers.AutoModel
        model = loader.from_pretrained(whole, **options)
    if "disk" in map(str, (getattr(model, "hf_device_map", None) or {}).values()):
        raise CheckpointError("a sparse delta cannot be offloaded to disk: use eigenprune delta apply, and load that")
    model.config.name_or_path = model.name_or_path = str(folder)
    return model
