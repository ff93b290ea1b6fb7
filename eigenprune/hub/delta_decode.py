# SPDX-License-Identifier: Apache-2.0
"""Read a sparse delta, and put its entries into its base; a wrong base and a damaged file are refused."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from eigenprune.entries.packing import unpack_mask, unpack_positions
from eigenprune.errors import CheckpointError
from eigenprune.hub.delta_manifest import LARGEST, MANIFEST, DeltaManifest
from eigenprune.hub.limits import MIB
from eigenprune.hub.weight_source import DTYPES, WeightSource, joint_digest, tensor_digests
from eigenprune.hub.write_tensors import file_order, write_tensors
from eigenprune.memory import release_unused

SHOWN = 3
LARGE = 1 << 18  # entries


class DeltaFile:
    """A sparse delta on disk; every claim of it is checked against the file before any of it is believed.

    Attributes:
        manifest: what it says about itself.

    Raises:
        CheckpointError: the file is missing, cut short or damaged, or holds something else than it lists.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._place = self.path.parent.name
        self._tensors = WeightSource(self.path)
        try:
            dtype, shape = self._tensors.specs.get(MANIFEST, ("", ()))
            if dtype != "U8" or len(shape) != 1:
                raise CheckpointError(f"{self.path.name} in {self._place} is no sparse delta of eigenprune")
            if shape[0] > LARGEST:
                raise CheckpointError(f"{MANIFEST} in {self._place} is larger than {LARGEST // MIB} MiB")
            raw = self._tensors[MANIFEST].numpy().tobytes()
            self.manifest = DeltaManifest.from_bytes(raw, self._place)
            expected = self.manifest.file_specs(len(raw), self.manifest.sentinel())
            for name in sorted(expected.keys() | self._tensors.specs.keys()):
                if expected.get(name) != self._tensors.specs.get(name):
                    raise CheckpointError(
                        f"{name!r:.120} in {self._place} is {self._tensors.specs.get(name, 'missing')}, and "
                        f"{expected.get(name, 'not there')} by the delta's own list: get the file again"
                    )
        except BaseException:
            self._tensors.close()
            raise

    def stored_numbers(self, name: str) -> Tensor:
        """int64 [stored], the row-major numbers of the stored entries of a tensor, rising.

        Raises:
            CheckpointError: they contradict the manifest.
        """
        tensor = self.manifest.tensors[name]
        if tensor.form == "base":
            return torch.empty(0, dtype=torch.int64)
        if tensor.form == "whole":
            return torch.arange(tensor.entries)
        if tensor.form == "mask":
            return self._mask(name).nonzero().view(-1)
        counts, positions = self._tensors[f"{name}.delta_counts"], self._tensors[f"{name}.delta_positions"]
        return unpack_positions(counts, positions, tensor.entries)

    def _mask(self, name: str) -> Tensor:
        tensor = self.manifest.tensors[name]
        mask = unpack_mask(self._tensors[f"{name}.delta_mask"], tensor.entries)
        if int(mask.sum()) != tensor.stored:
            raise CheckpointError(f"the mask of {name} in {self._place} does not hold {tensor.stored:,} entries")
        return mask

    def values(self, name: str) -> Tensor:
        """[stored], the values of the stored entries in the same order, in the type of the tensor that comes out."""
        tensor = self.manifest.tensors[name]
        if tensor.form == "base":
            return torch.empty(0, dtype=DTYPES[tensor.dtype])
        return self._tensors[f"{name}.delta_values"].reshape(-1).to(DTYPES[tensor.dtype])

    def merged(self, name: str, base: Tensor | None) -> Tensor:
        """The tensor of the fine-tuned model: the base's, with the stored entries in it. `base` is not changed.

        Raises:
            CheckpointError: the base has no such tensor, or another shape, or the file contradicts itself.
        """
        tensor = self.manifest.tensors[name]
        if tensor.form == "whole":
            return self.values(name).view(tensor.shape).clone()
        if base is None or tuple(base.shape) != tensor.shape:
            found = "missing" if base is None else f"of shape {tuple(base.shape)}"
            raise CheckpointError(f"{name} is {found} in this base, and of shape {tensor.shape} in the delta's base")
        merged = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype]).copy_(base)
        if tensor.form == "mask":  # the numbers of many entries would take twice what the tensor takes
            merged.view(-1).masked_scatter_(self._mask(name), self.values(name))
        else:
            merged.view(-1)[self.stored_numbers(name)] = self.values(name)
        return merged

    def check_base(self, base: Mapping[str, Tensor], progress: Callable[[str], object] | None = None) -> None:
        """Check that `base` is the one that the delta was made from, to the bit; all of it is read.

        Raises:
            CheckpointError: it is not; the tensors that differ are named.
        """
        found, wanted = tensor_digests(base, progress), self.manifest.base_tensors
        if joint_digest(found) == self.manifest.base_sha256:
            return
        other = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
        other += [f"{name} is not in the right one" for name in sorted(found.keys() - wanted.keys())]
        other += [f"{name} differs" for name in sorted(found.keys() & wanted.keys()) if found[name] != wanted[name]]
        other = other or ["the delta contradicts itself"]
        more = f", and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
        revision = f" at revision {self.manifest.base_revision}" if self.manifest.base_revision else ""
        raise CheckpointError(
            f"this is not the base of the delta in {self._place}: {'; '.join(other[:SHOWN])}{more}. It was made from "
            f"{self.manifest.base_model}{revision}, weights SHA-256 {self.manifest.base_sha256[:16]}..."
        )

    def merged_tensors(self, base: Mapping[str, Tensor], names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor of the fine-tuned model) for `names`, made one by one; errors as `merged`."""
        for name in names:
            yield name, self.merged(name, base.get(name))

    def write_merged(
        self, path: Path, base: Mapping[str, Tensor], progress: Callable[[str], object] | None = None
    ) -> None:
        """Write the whole fine-tuned model to one safetensors file; `base` is checked first.

        A few tensors are in memory at a time. `progress` is called for every tensor of both models.

        Raises:
            CheckpointError: a wrong base, or a damaged delta.
            OSError: the disk refuses.
        """
        self.check_base(base, progress)
        specs = {name: (tensor.dtype, tensor.shape) for name, tensor in self.manifest.tensors.items()}

        def told() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self.merged_tensors(base, file_order(specs)):
                yield name, tensor
                if tensor.numel() >= LARGE:
                    release_unused()
                if progress is not None:
                    progress(name)

        write_tensors(path, specs, told())

    def close(self) -> None:
        """Close the file."""
        self._tensors.close()

    def __enter__(self) -> "DeltaFile":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
