# SPDX-License-Identifier: Apache-2.0
"""How the weights of a model are cut into slices for eigenpruning: one for each head, or one for each matrix.

A query, key or value matrix has a slice of output rows for each of its heads, the output matrix of attention a slice
of input columns for each; with grouped queries there is one key slice for each key head, and so one decision. Fused
matrices are cut where their parts and heads meet. All others are one slice.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from eigenprune.errors import ConfigError
from eigenprune.layers import dense_weight, select_layers

KINDS = ("q", "k", "v", "o", "gate", "up", "down", "other")
VIEWS = ("head", "matrix")
# (pattern of the last two name parts, the kinds that the matrix holds, one after the other)
_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(q_proj|query|q_lin|q_attn|wq|q)", ("q",)),
    (r"(k_proj|key|k_lin|wk|k)", ("k",)),
    (r"(v_proj|value|v_lin|wv|v)", ("v",)),
    (r"(c_attn|qkv_proj|Wqkv|qkv)", ("q", "k", "v")),
    (r"(o_proj|wo|o)", ("o",)),
    (r".*att.*\.(out_proj|c_proj|dense|out_lin|out)", ("o",)),
    (r"gate_up_proj", ("gate", "up")),
    (r"gate_proj", ("gate",)),
    (r"(up_proj|c_fc|fc1|fc_in|dense_h_to_4h)", ("up",)),
    (r"(down_proj|fc2|fc_out|dense_4h_to_h)", ("down",)),
    (r"mlp\.c_proj", ("down",)),
)
_INTERLEAVED = re.compile(r"query_key_value")  # GPT-NeoX, BLOOM: q, k and v of one head, then those of the next
_INTERLEAVED_TYPES = ("gpt_neox", "gpt_neox_japanese", "bloom")
_NOT_IN_ORDER_TYPES = ("codegen",)  # a qkv_proj that no cut between rows takes apart


@dataclass(frozen=True)
class Slice:
    """Rows or columns `start` to `stop` of a weight: of which kind, and the number of the head among those."""

    kind: str
    head: int
    start: int
    stop: int


@dataclass(frozen=True)
class LayerView:
    """A dense layer's weight [out, in], cut into slices.

    Attributes:
        name: of the layer.
        kind: what it holds, such as `q`, `down` or, fused, `q+k+v`.
        view: `head` or `matrix`.
        axis: 0 where slices are rows (outputs), 1 where they are columns (inputs).
        shape: (out, in).
        slices: in order; together they are the whole weight.
    """

    name: str
    kind: str
    view: str
    axis: int
    shape: tuple[int, int]
    slices: tuple[Slice, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """How many components each slice has."""
        other = self.shape[1 - self.axis]
        return tuple(min(part.stop - part.start, other) for part in self.slices)


def layer_views(
    model: nn.Module, view: str = "head", kinds: Sequence[str] | None = None, skip: Sequence[str] = ()
) -> dict[str, LayerView]:
    """The layers of `model` that hold a kind of `kinds` (None: any), by name in model order.

    Args:
        view: `head` or `matrix`; a matrix without heads is one slice in both.
        skip: as for `select_layers`.

    Raises:
        ConfigError: an unknown view or kind, no layer of these kinds, or heads that do not divide a matrix.
    """
    wanted = check_kinds(kinds)
    found = {}
    for name, module in select_layers(model, skip).chosen.items():
        shape = dense_weight(module).shape
        one = layer_view(model, name, (shape[0], shape[1]), view)
        if any(part.kind in wanted for part in one.slices):
            found[name] = one
    if not found:
        raise ConfigError(f"no layer of kind {', '.join(wanted)} can be pruned in this {type(model).__name__}")
    return found


def check_kinds(kinds: Sequence[str] | None) -> tuple[str, ...]:
    """`kinds`, or all of them for None.

    Raises:
        ConfigError: one is unknown, or there are none.
    """
    chosen = KINDS if kinds is None else tuple(kinds)
    unknown = [kind for kind in chosen if kind not in KINDS]
    if unknown or not chosen or isinstance(kinds, str):
        raise ConfigError(f"kinds {kinds!r}: a list of {', '.join(KINDS)} is needed")
    return chosen


def layer_view(model: nn.Module, name: str, shape: tuple[int, int], view: str) -> LayerView:
    """The view of one layer with a weight of `shape` (out, in).

    Raises:
        ConfigError: an unknown view, or heads that do not divide the matrix.
    """
    if view not in VIEWS:
        raise ConfigError(f"view {view!r} is unknown; there are: {', '.join(VIEWS)}")
    config = _text_config(model)
    kinds = _kinds(name, str(config.get("model_type", "")))
    interleaved = kinds == ("q", "k", "v") and _INTERLEAVED.search(name.rpartition(".")[2]) is not None
    axis = 1 if kinds == ("o",) else 0
    heads = len(kinds) > 1 or kinds[0] in ("q", "k", "v", "o")
    if kinds == ("gate", "up"):
        parts = [("gate", shape[0] // 2), ("up", shape[0] // 2)]
        slices = _cut(parts, {})
    elif interleaved or (view == "head" and heads):
        slices = _head_slices(name, kinds, shape[axis], config, interleaved)
    elif len(kinds) > 1:
        slices = _joined(_head_slices(name, kinds, shape[axis], config, interleaved))
    else:
        slices = (Slice(kinds[0], 0, 0, shape[axis]),)
    return LayerView(name, "+".join(kinds), view, axis, shape, slices)


def is_rotary(model: nn.Module) -> bool:
    """Whether positions turn keys, or a norm follows them: then a constant added to all keys changes the output."""
    names = {type(module).__name__.lower() for module in model.modules()}
    config = _text_config(model)
    if any("rotary" in name for name in names) or config.get("rotary_dim") or config.get("rope_parameters"):
        return True
    return any(name.endswith(("k_norm", "key_norm", "k_layernorm")) for name, _ in model.named_modules())


def _kinds(name: str, model_type: str) -> tuple[str, ...]:
    last = name.rpartition(".")[2]
    tail = ".".join(name.split(".")[-2:])
    if _INTERLEAVED.fullmatch(last):
        return ("q", "k", "v") if model_type in _INTERLEAVED_TYPES else ("other",)
    if model_type in _NOT_IN_ORDER_TYPES and last == "qkv_proj":
        return ("other",)
    for pattern, kinds in _NAMES:
        if re.fullmatch(pattern, tail if r"\." in pattern else last):
            return kinds
    return ("other",)


def _text_config(model: nn.Module) -> Mapping[str, Any]:
    config: Any = getattr(model, "config", None)
    if config is None:
        return {}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = dict(text.to_dict())
    values["num_attention_heads"] = getattr(text, "num_attention_heads", None)  # GPT-2 and others rename it
    values["hidden_size"] = getattr(text, "hidden_size", None)
    return values


def _head_slices(
    name: str, kinds: tuple[str, ...], size: int, config: Mapping[str, Any], interleaved: bool
) -> tuple[Slice, ...]:
    """One slice for each head, of `size` rows or columns in all."""
    queries, width = config.get("num_attention_heads"), config.get("head_dim")
    if not width and queries and config.get("hidden_size"):
        width = config["hidden_size"] // queries
    if not width or not queries or size % width:
        raise ConfigError(
            f"{name}: {size} rows or columns are no whole heads of {width}; use view='matrix', or skip it"
        )
    if len(kinds) == 1:
        return _cut([(kinds[0], width)] * (size // width), {})
    keys = (size // width - queries) // 2
    if keys < 1 or (queries + 2 * keys) * width != size or (interleaved and keys != queries):
        raise ConfigError(f"{name}: {size} rows are no queries, keys and values of {queries} heads of {width}; skip it")
    if interleaved:
        return _cut([(kind, width) for _ in range(queries) for kind in kinds], {})
    return _cut([(kind, width) for kind in kinds for _ in range(queries if kind == "q" else keys)], {})


def _cut(parts: list[tuple[str, int]], heads: dict[str, int]) -> tuple[Slice, ...]:
    """Slices of these kinds and sizes one after the other, heads counted by kind."""
    slices, start = [], 0
    for kind, size in parts:
        slices.append(Slice(kind, heads.get(kind, 0), start, start + size))
        heads[kind] = heads.get(kind, 0) + 1
        start += size
    return tuple(slices)


def _joined(slices: tuple[Slice, ...]) -> tuple[Slice, ...]:
    """Neighbours of one kind as one slice."""
    joined: list[Slice] = []
    for part in slices:
        if joined and joined[-1].kind == part.kind:
            joined[-1] = Slice(part.kind, 0, joined[-1].start, part.stop)
        else:
            joined.append(Slice(part.kind, 0, part.start, part.stop))
    return tuple(joined)
