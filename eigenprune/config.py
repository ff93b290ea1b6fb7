# SPDX-License-Identifier: Apache-2.0
"""`EigenpruneConfig`: what to prune and how, and, in a saved model, what was pruned."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from os import PathLike, fspath
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from eigenprune.calibrate import CHOICES, SOURCES
from eigenprune.entries.delta_header import check_delta_header
from eigenprune.errors import ConfigError
from eigenprune.layers import BITS, LAYOUTS
from eigenprune.spectral import ALLOCATIONS, BUDGETS, find_method

QUANT_METHOD = "eigenprune"
AUTO = "auto"
FORMAT_VERSION = 3  # the newest that is read; what holds nothing new is still written as the oldest
QUANTISED_FORMAT = 2
CHANNELS_FORMAT = 3
MODULE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
UNSET = float("nan")  # told by identity: the method decides then
LARGEST_SIDE = 1 << 24  # a rank beyond this is a lie, told before anything is allocated


@dataclass
class EigenpruneConfig(QuantizationConfigMixin):
    """How to prune a model; given to `from_pretrained(..., quantization_config=...)`, or to `prune_`.

    Args:
        keep: kept fraction of the parameters (see `budget`) of the pruned linear layers, in (0, 1]. Embeddings, heads
            and norms do not count. Where it is left out: 0.8, or 1 for a method that removes what stands in a task's
            way.
        budget: what `keep` is a fraction of: `parameters` (default), `bytes`, `flops` (multiplications and additions a
            token), or `latency`, the time of the layers on one token, measured on this machine.
        min_keep: no layer keeps a smaller fraction of its parameters than this; 0 sets no limit.
        faster_at: numbers of tokens in one call, such as (1, 512): a rank at which a factored layer is slower than the
            dense one at any of them, measured on this machine in the dtype of the weights, is not chosen. The budget
            is met by other ranks and layers, and a layer without any rank left stays dense. () does not look.
        method: a row of the method table: `kfac` (default), and the published ones. All but the baselines `svd` and
            `random` measure the model on text; these are no usable methods for language models.
        layout: `pivot` (default) or `pair`, see `LowRankLinear`.
        allocation: how ranks are shared out: `global` (the least estimated loss, exact), `uniform`, or a published
            way; None takes the method's own.
        rank_multiple: ranks are multiples of this; hardware likes 8 and more.
        skip: regular expressions; layers whose name has a match stay dense.
        texts: calibration text files (plain, `.jsonl` with a field `text` or conversations under `messages`, either
            `.gz`), best of the model's use; None takes `calibration`. Never saved.
        prior: part of the input statistics, in [0, 1], that those of random tokens make up: steadies them where the
            text is short (distill-rank takes 0.5).
        calibration: the text where `texts` is None: `sampled`, written by the model itself, `python-docs`, which
            ships with Python and costs quality, or `random-tokens`, which is no text at all. None takes `sampled` for
            causal language models with a key-value cache, and `python-docs` for all others.
        windows: how many windows of calibration text.
        choose_windows: which of four times as many: `first` (default: no more are read), `random`, `el2n`, `grand`,
            `prototypes` or `coverage`, see `eigenprune.calibrate.choice`; for causal language models.
        window: tokens in a window.
        seed: of sampled text, and of methods that draw labels.
        task: the name of the task to be better at, for methods such as `eigenprune`; see `eigenprune task --list`.
        remove: at most this fraction of all components is removed for the task, in (0, 1]; None takes 0.01.
        bits: quantise the pruned layers when all else is done: 8 or 4, weight-only, by torchao (`pip install
            eigenprune[quantize]`), also those that the allocation leaves dense; with `budget="bytes"`, what rounding
            costs is measured, and ranks are chosen with it. `auto`: floating point, 8 or 4 for each layer, chosen
            together with its rank (needs `budget="bytes"`). 4 is for layout `pair`, or `budget="bytes"`. None does not.
        biases: of a pruned model: the layers that had no bias and were given one. Filled in by `prune_`.
        modules: of a pruned model: {layer name: [layout, rank]}. Filled in when a model is saved.
        shapes: of a pruned model: {layer that lost hidden channels: [out, in, and what these were before]}. Filled in
            when a model is saved.
        quantized: of a pruned model: {Linear, which may be a factor: [bits, numbers that share a scale]}. Filled in
            when a model is saved.
        provenance: of a pruned model: how it was made. Filled in by `prune_`.
        delta: of a sparse delta: its base, and how its entries were chosen. Filled in by `eigenprune delta make`.
        format_version: of the saved form; a newer one than this package knows is refused.

    Raises:
        ConfigError: a value is of the wrong type, out of range, unknown, or the version is newer.
    """

    quant_method: str = field(default=QUANT_METHOD, init=False)  # type: ignore[assignment]
    keep: float = UNSET
    method: str = "kfac"
    layout: str = "pivot"
    allocation: str | None = None
    rank_multiple: int = 8
    budget: str = "parameters"
    min_keep: float = 0.0
    faster_at: Sequence[int] = ()
    skip: Sequence[str] = ()
    texts: Sequence[str | PathLike[str]] | None = None
    prior: float = 0.0
    calibration: str | None = None
    windows: int = 40
    choose_windows: str = "first"
    window: int = 1024
    seed: int = 0
    task: str | None = None
    remove: float | None = None
    bits: int | str | None = None
    biases: Sequence[str] = ()
    modules: dict[str, list[Any]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    quantized: dict[str, list[int]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    delta: dict[str, Any] = field(default_factory=dict)
    format_version: int = 1

    def __post_init__(self) -> None:
        if not _is_int(self.format_version) or self.format_version < 1:
            raise ConfigError(f"format_version {self.format_version!r} is no positive integer")
        if self.format_version > FORMAT_VERSION:
            raise ConfigError(
                f"this checkpoint has format {self.format_version}, and this eigenprune knows up to {FORMAT_VERSION}: "
                "update it (pip install -U eigenprune)"
            )
        removes = find_method(self.method).removal is not None
        if self.keep is UNSET:
            self.keep = 1.0 if removes else 0.8
        if not _is_fraction(self.keep):
            raise ConfigError(f"keep={self.keep!r} must be in (0, 1]: the fraction of parameters that stays")
        self._check_task(removes)
        _one_of("layout", self.layout, LAYOUTS)
        if self.allocation is not None:
            _one_of("allocation", self.allocation, tuple(ALLOCATIONS))
        _one_of("budget", self.budget, BUDGETS)
        if isinstance(self.min_keep, bool) or not isinstance(self.min_keep, int | float) or not 0 <= self.min_keep <= 1:
            raise ConfigError(f"min_keep={self.min_keep!r} must be in [0, 1]: the least fraction that a layer keeps")
        if isinstance(self.prior, bool) or not isinstance(self.prior, int | float) or not 0 <= self.prior <= 1:
            raise ConfigError(f"prior={self.prior!r} must be in [0, 1]: the part that random tokens make up")
        self.faster_at = _token_counts(self.faster_at)
        for name in ("rank_multiple", "windows", "window"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a positive integer")
        if not _is_int(self.seed) or self.seed < 0:
            raise ConfigError(f"seed={self.seed!r} must be an integer from 0 on")
        _one_of("choose_windows", self.choose_windows, tuple(CHOICES))
        if "damage" in CHOICES[self.choose_windows].needs:
            raise ConfigError(
                f"choose_windows={self.choose_windows!r} looks at a pruned model, and there is none yet: choose with "
                "eigenprune.calibrate.choose_indices(...), and pass windows=... to prune_"
            )
        self.skip = _strings("skip", self.skip)
        if self.texts is not None:
            self.texts = _strings("texts", [self.texts] if isinstance(self.texts, str | PathLike) else self.texts)
        if self.calibration is not None:
            _one_of("calibration", self.calibration, SOURCES)
            if self.texts is not None:
                raise ConfigError(f"calibration={self.calibration!r} and texts are two sources: give one of them")
        self._check_bits()
        self._check_channels()
        _check_modules(self.modules)
        _check_shapes(self.shapes)
        _check_quantized(self.quantized)
        if self.delta != {}:
            check_delta_header(self.delta)
            if self.modules or self.quantized or self.shapes:
                raise ConfigError("modules and delta exclude each other: a delta is over a plain model")
        self.biases = _strings("biases", self.biases)
        for name in self.biases:
            _check_layer_name("biases", name)
        if not isinstance(self.provenance, Mapping):
            raise ConfigError(f"provenance must be a mapping, not {type(self.provenance).__name__}")

    def _check_bits(self) -> None:
        if self.bits is None:
            return
        if isinstance(self.bits, bool) or self.bits not in (*BITS, AUTO):
            raise ConfigError(f"bits {self.bits!r} is unknown; there are: {', '.join(map(str, BITS))}, {AUTO}")
        if self.bits == AUTO and self.budget != "bytes":
            raise ConfigError(f"bits='auto' shares bytes out: it needs budget='bytes', not {self.budget!r}")
        method = find_method(self.method)
        if method.removal is not None:
            raise ConfigError(f"method {self.method!r} takes no bits: call eigenprune.quantize.quantize_ afterwards")
        if self.bits == 4 and self.layout == "pivot" and self.budget != "bytes":
            raise ConfigError(
                "bits=4 breaks pivot factors: each row is a sum of many others, and so are their rounding errors. Use "
                "layout='pair', or budget='bytes', which measures what rounding does and chooses by it"
            )
        if self.budget == "bytes" and ((self.allocation or method.allocation) != "global" or method.probe):
            raise ConfigError(
                f"bits={self.bits!r} with budget='bytes' needs allocation='global' and a method that probes nothing: "
                "count parameters, or leave the bits to quantize_"
            )

    def _check_channels(self) -> None:
        method = find_method(self.method)
        if not method.channels:
            return
        if (self.allocation or method.allocation) != "global":
            raise ConfigError(
                f"method {self.method!r} weighs channels against ranks: it needs allocation='global', not "
                f"{self.allocation!r}"
            )
        if self.budget == "latency" or (self.bits is not None and self.budget == "bytes"):
            raise ConfigError(
                f"method {self.method!r} counts parameters, bytes or flops of floating-point layers: leave out "
                f"budget={self.budget!r}, or use method='kfac'"
            )

    def _check_task(self, removes: bool) -> None:
        if not removes and (self.task is not None or self.remove is not None):
            raise ConfigError(f"method {self.method!r} removes nothing for a task: use method='eigenprune', or no task")
        if self.task is not None and (not isinstance(self.task, str) or not self.task):
            raise ConfigError(f"task={self.task!r} must be the name of a task")
        if self.remove is not None and not _is_fraction(self.remove):
            raise ConfigError(f"remove={self.remove!r} must be in (0, 1]: the fraction of components that may go")

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config of a saved form; the signature is that of transformers.

        Raises:
            ConfigError: an unknown field, or any value that the constructor refuses.
        """
        if not isinstance(config_dict, Mapping):
            raise ConfigError(f"the eigenprune config must be an object, not {type(config_dict).__name__}")
        values = dict(config_dict)
        method = values.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ConfigError(f"quant_method {method!r} is not {QUANT_METHOD!r}")
        # The version first: fields that a newer format added are no mistake of the file.
        cls(format_version=values.get("format_version", FORMAT_VERSION))
        unknown = set(values) - {f.name for f in fields(cls) if f.init}
        if unknown:
            raise ConfigError(f"unknown fields {sorted(map(str, unknown))} in the eigenprune config")
        config = cls(**values)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The saved form: plain JSON values, no local path; of a delta only what is its own."""
        if self.delta:
            own = {"delta": dict(self.delta), "provenance": dict(self.provenance)}
            return {"quant_method": self.quant_method, **own, "format_version": self.format_version}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name not in ("texts", "delta")}
        values["skip"] = list(self.skip)
        values["faster_at"] = list(self.faster_at)
        if not self.faster_at:
            del values["faster_at"]  # so that a package from before it reads the config
        values["biases"] = list(self.biases)
        values["modules"] = {name: list(entry) for name, entry in self.modules.items()}
        values["shapes"] = {name: list(entry) for name, entry in self.shapes.items()}
        values["quantized"] = {name: list(entry) for name, entry in self.quantized.items()}
        values["provenance"] = dict(self.provenance)
        if self.bits is None and not self.quantized:
            del values["bits"], values["quantized"]  # a package that knows format 1 only reads it
        else:
            values["format_version"] = max(self.format_version, QUANTISED_FORMAT)
        if not self.shapes:
            del values["shapes"]
        else:
            values["format_version"] = max(self.format_version, CHANNELS_FORMAT)
        return {"quant_method": self.quant_method, **values}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} {value!r} is unknown; there are: {', '.join(allowed)}")


def _strings(name: str, values: object) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ConfigError(f"{name} must be a list of strings, not {values!r}")
    if not all(isinstance(value, str | PathLike) for value in values):
        raise ConfigError(f"{name} must hold strings only: {values!r}")
    return tuple(str(fspath(value)) for value in values)


def _token_counts(values: object) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(_is_int(v) and v > 0 for v in values):
        raise ConfigError(
            f"faster_at={values!r} must be a list of positive integers: tokens in one call, as in [1, 512]"
        )
    return tuple(values)


def _check_layer_name(where: str, name: object) -> None:
    if not isinstance(name, str) or len(name) > 512 or not MODULE_NAME.fullmatch(name):
        raise ConfigError(f"{where}: {name!r:.80} is no layer name")


def _check_quantized(quantized: object) -> None:
    if not isinstance(quantized, Mapping):
        raise ConfigError(f"quantized must map layer names to [bits, group], not be {type(quantized).__name__}")
    for name, entry in quantized.items():
        _check_layer_name("quantized", name)
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise ConfigError(f"quantized: {name} must have [bits, group], not {entry!r:.80}")
        bits, group = entry
        if not _is_int(bits) or bits not in BITS or not _is_int(group) or not 1 <= group <= LARGEST_SIDE:
            raise ConfigError(f"quantized: {entry!r:.80} of {name} are no possible bits and group")


def _check_modules(modules: object) -> None:
    if not isinstance(modules, Mapping):
        raise ConfigError(f"modules must map layer names to [layout, rank], not be {type(modules).__name__}")
    for name, entry in modules.items():
        _check_layer_name("modules", name)
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise ConfigError(f"modules: {name} must have [layout, rank], not {entry!r:.80}")
        layout, rank = entry
        _one_of(f"modules: layout of {name}", layout, LAYOUTS)
        if not _is_int(rank) or not 1 <= rank <= LARGEST_SIDE:
            raise ConfigError(f"modules: rank {rank!r:.80} of {name} is no possible rank")


def _check_shapes(shapes: object) -> None:
    if not isinstance(shapes, Mapping):
        raise ConfigError(f"shapes must map layer names to four sides, not be {type(shapes).__name__}")
    for name, entry in shapes.items():
        _check_layer_name("shapes", name)
        if not isinstance(entry, list | tuple) or len(entry) != 4 or not all(map(_is_int, entry)):
            raise ConfigError(f"shapes: {name} must have [out, in, out before, in before], not {entry!r:.80}")
        out, inside, out_before, in_before = entry
        if not (1 <= out <= out_before <= LARGEST_SIDE and 1 <= inside <= in_before <= LARGEST_SIDE):
            raise ConfigError(f"shapes: {entry!r:.80} of {name} are no possible sides")
