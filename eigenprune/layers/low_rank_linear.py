# SPDX-License-Identifier: Apache-2.0
"""`LowRankLinear`: a linear layer whose weight is kept as two factors."""

from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from eigenprune.errors import ConfigError
from eigenprune.layers.quantised import plain_values, quantised_bits
from eigenprune.ops import has_autocast, low_rank_linear, merge_columns, pivot_linear, source_positions

Layout = Literal["pair", "pivot"]
LAYOUTS: tuple[str, ...] = get_args(Layout)


def factored_parameters(rank: int, out_features: int, in_features: int, layout: str) -> int:
    """How many parameters the factors of a weight [out, in] take at `rank` in `layout`, the bias not counted."""
    if layout == "pivot":
        return rank * (out_features + in_features - rank)
    return rank * (out_features + in_features)


class LowRankLinear(nn.Module):
    """A linear layer with a weight of rank `rank`, made of two plain `nn.Linear` children.

    Layout `pair`: `left [out, rank] @ right [rank, in]`. Layout `pivot` (PIFA, arXiv 2501.19090): `right` holds `rank`
    rows of the weight itself, `pivots [rank]` says which, and `left [out - rank, rank]` mixes them into the others.

    Whatever works on a Linear works on the children. The bias is this module's own parameter, so the checkpoint key
    `X.bias` is the one of the dense layer. The fused operator runs only where nothing watches or replaces a child.

    Args:
        in_features, out_features: as for `nn.Linear`.
        rank: 1 <= rank <= min(in_features, out_features).
        layout: `pair` or `pivot`.
        bias: whether there is a bias.
        conv1d: whether the dense layer is a GPT-2 `Conv1D`; then `weight` reads as [in, out].

    Raises:
        ConfigError: the rank or the layout is not possible.
    """

    right: nn.Linear
    left: nn.Linear
    pivots: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        layout: str = "pair",
        bias: bool = True,
        conv1d: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ConfigError(f"layout {layout!r} is unknown; there are: {', '.join(LAYOUTS)}")
        if not 1 <= rank <= min(in_features, out_features):
            raise ConfigError(
                f"rank {rank} is not in 1..{min(in_features, out_features)}, the smaller side of the weight"
            )
        self.in_features, self.out_features = in_features, out_features
        self.layout, self.conv1d = layout, conv1d
        left_rows = out_features - rank if layout == "pivot" else out_features
        self.right = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, left_rows, bias=False, device=device, dtype=dtype)
        if layout == "pivot":
            self.register_buffer("pivots", torch.arange(rank, dtype=torch.int32, device=device))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def from_factors(
        cls,
        left: Tensor,
        right: Tensor,
        *,
        pivots: Tensor | None = None,
        bias: Tensor | None = None,
        conv1d: bool = False,
    ) -> "LowRankLinear":
        """A layer that holds these factors (not copied where contiguous); with `pivots`, the layout is `pivot`.

        Args:
            left: [out, rank], or [out - rank, rank] with `pivots`.
            right: [rank, in].
            pivots: [rank] int32, the distinct positions of the rows of `right` in the weight.
            bias: [out] or None.
        """
        rank, in_features = right.shape
        out_features = left.shape[0] + (0 if pivots is None else rank)
        module = cls(
            in_features,
            out_features,
            rank,
            layout="pair" if pivots is None else "pivot",
            bias=bias is not None,
            conv1d=conv1d,
            device="meta",
            dtype=right.dtype,
        )
        module.left.weight = nn.Parameter(left.contiguous())
        module.right.weight = nn.Parameter(right.contiguous())
        if pivots is not None:
            module.pivots = pivots
        if bias is not None:
            module.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return module

    @property
    def rank(self) -> int:
        """Of the factors."""
        return self.right.out_features

    @property
    def weight(self) -> Tensor:
        """The dense weight, [out, in] ([in, out] for a `Conv1D`), multiplied out at every access; for reading only.

        Quantised factors are turned into floating point first, so that it is the weight that the layer applies.
        """
        weight = self._positions_to_rows(self._mixed(plain_values(self.right.weight)))
        return weight.t() if self.conv1d else weight

    def _mixed(self, right: Tensor) -> Tensor:
        """All rows of the weight, pivot rows first in layout `pivot`: [out, in]."""
        rows = plain_values(self.left.weight) @ right
        return torch.cat([right, rows]) if self.layout == "pivot" else rows

    def _positions_to_rows(self, rows: Tensor) -> Tensor:
        return rows if self.layout == "pair" else rows.index_select(0, self.row_positions())

    def row_positions(self) -> Tensor:
        """[out] int64: where each output stands in (pivot rows, mixed rows). Layout `pivot` only."""
        return source_positions(self.pivots, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        # The dictionaries, not self.right and so on: nn.Module looks attributes up in Python, a microsecond each.
        right, left = self._modules["right"], self._modules["left"]
        right_weight, left_weight = plain_weight(right, x), plain_weight(left, x)
        if right_weight is not None and left_weight is not None and not has_global_hook() and not has_autocast(x):
            bias = self._parameters["bias"]
            if self.layout == "pair":
                return low_rank_linear(x, right_weight, left_weight, bias)
            return pivot_linear(x, right_weight, left_weight, cast(Tensor, self._buffers["pivots"]), bias)
        inner = self.right(x)
        y: Tensor = self.left(inner)
        if self.layout == "pivot":
            y = merge_columns(inner, y, self.pivots)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Shape, rank, layout and bits, for `print(model)`."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        weight = getattr(self.right, "weight", None)  # not there while a quantised layer is loaded
        bits = 0 if weight is None else quantised_bits(weight)
        return f"{shape}, layout={self.layout}" + (f", bits={bits}" if bits else "")


def plain_weight(child: nn.Module | None, x: Tensor) -> nn.Parameter | None:
    """The weight of `child` if that is a plain Linear that nothing hooks, wraps, offloads or quantises, ready for `x`.

    An offload hook loads the weight only in the child's own forward, and a LoRA wrapper adds to it there: a fused
    operator that reads the weight would return garbage in the first case and drop the adapter in the second.
    """
    state = child.__dict__
    if type(child) is not nn.Linear or "_hf_hook" in state or "forward" in state:
        return None
    if state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return None
    if state["_backward_hooks"] or state["_backward_pre_hooks"]:
        return None
    weight = state["_parameters"].get("weight")
    if type(weight) is not nn.Parameter or state["_parameters"]["bias"] is not None:
        return None
    return weight if weight.dtype is x.dtype and weight.device == x.device else None


def has_global_hook() -> bool:
    """Whether a hook is registered for every module of the process, as debuggers and profilers do."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
