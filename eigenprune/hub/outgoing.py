# SPDX-License-Identifier: Apache-2.0
"""What leaves: the files of a folder that are on the closed list, texts in memory, weights by their place."""

import warnings
from dataclasses import dataclass
from pathlib import Path

from eigenprune.errors import HubError
from eigenprune.hub.digests import check_digests
from eigenprune.hub.facts import weight_files
from eigenprune.hub.modeling import is_our_modeling
from eigenprune.hub.names import ALLOWED, MODELING_NAME

LARGEST_TEXT = 64 << 20


@dataclass(frozen=True)
class Outgoing:
    """The files of a push.

    Attributes:
        texts: {name: content}: the very bytes that are searched are sent.
        weights: {name: file}.
    """

    texts: dict[str, bytes]
    weights: dict[str, Path]


def collect(folder: Path, architecture: str = "") -> Outgoing:
    """What of `folder` may be published. Other files are left out with a warning, hidden ones without.

    Args:
        folder: of the checkpoint.
        architecture: its model class; only the modelling file that this package writes for that class may go.

    Raises:
        CheckpointError: weight files are missing, or differ from the sums beside them.
        HubError: a file is a link out of the folder, or too large to be a text.
    """
    weights = {path.name: path for path in weight_files(folder)}
    texts, left_out = {}, []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if hidden or (path.is_dir() and not path.is_symlink()) or name in weights:
            continue
        if name == MODELING_NAME:
            _check_inside(path, folder)
            texts[name] = path.read_bytes()
            if not is_our_modeling(texts[name], architecture):
                raise HubError(f"{name} is not the file that this version writes: save the model again, or remove it")
            continue
        if not ALLOWED.fullmatch(name) or name.endswith(".safetensors"):
            left_out.append(name)
            continue
        _check_inside(path, folder)
        if path.stat().st_size > LARGEST_TEXT:
            raise HubError(f"{name} is larger than {LARGEST_TEXT >> 20} MiB, which is no {path.suffix} file of a model")
        texts[name] = path.read_bytes()
    for name, path in weights.items():
        if not ALLOWED.fullmatch(name):
            raise HubError(f"{name!r:.80} is no name of a weight file: save the model again")
        _check_inside(path, folder)
    check_digests(folder)
    if left_out:
        some = ", ".join(f"{name!r:.80}" for name in left_out[:5])
        warnings.warn(
            f"{len(left_out)} files are not published, since a model needs none of them: {some}", stacklevel=2
        )
    return Outgoing(texts, weights)


def _check_inside(path: Path, folder: Path) -> None:
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        raise HubError(f"{path.name} is a link out of the folder: copy the file itself there")
