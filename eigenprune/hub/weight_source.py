# SPDX-License-Identifier: Apache-2.0
"""The tensors of a checkpoint on disk, one at a time, and one SHA-256 over all of them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eigenprune.errors import CheckpointError
from eigenprune.hub.facts import weight_files
from eigenprune.hub.limits import check_header

# The names that safetensors has for dtypes, of those that a delta can hold.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class WeightSource(Mapping[str, Tensor]):
    """{tensor name: tensor} of a checkpoint folder, or of one safetensors file; a tensor is read when it is asked for.

    Attributes:
        specs: {tensor name: (dtype name of safetensors, shape)}, read from the headers.
        files: the weight files.

    Raises:
        CheckpointError: a file is missing, cut short, or describes more than any honest one; a name occurs twice.
    """

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder)
        self.files = [path] if path.is_file() else weight_files(path)
        self.specs: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._homes: dict[str, Any] = {}
        self._opened = ExitStack()
        for file in self.files:
            self._open(file)

    def _open(self, file: Path) -> None:
        try:
            check_header(file)
            opened = self._opened.enter_context(safe_open(file, framework="pt"))
            for name in opened.keys():  # noqa: SIM118 - no dict
                if name in self.specs:
                    raise CheckpointError(f"{name!r:.120} is in two weight files of {file.parent.name}")
                part = opened.get_slice(name)
                self.specs[name] = (str(part.get_dtype()), tuple(part.get_shape()))
                self._homes[name] = opened
        except (SafetensorError, OSError) as error:
            self.close()
            raise CheckpointError(
                f"{file.name} is missing, cut short or damaged ({error}): download or save it again"
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._homes[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.specs))

    def __len__(self) -> int:
        return len(self.specs)

    def close(self) -> None:
        """Close the files; tensors that were read stay good."""
        self._opened.close()

    def __enter__(self) -> "WeightSource":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def tensor_digests(weights: Mapping[str, Tensor], progress: Callable[[str], object] | None = None) -> dict[str, str]:
    """{name: SHA-256} of every tensor, over its dtype, shape and row-major bytes; one tensor in memory at a time."""
    digests = {}
    for name in sorted(weights):
        digests[name] = tensor_digest(weights[name])
        if progress is not None:
            progress(name)
    return digests


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 in hex over `dtype shape` as text and the row-major bytes."""
    shape = ",".join(map(str, tensor.shape))
    digest = hashlib.sha256(f"{DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))} [{shape}]\n".encode())
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if raw.numel():
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def joint_digest(digests: Mapping[str, str]) -> str:
    """One SHA-256 over all weights, whatever files they are cut into: over the lines `digest  name`, by name."""
    return hashlib.sha256("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()).hexdigest()
