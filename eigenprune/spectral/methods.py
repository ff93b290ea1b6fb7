# SPDX-License-Identifier: Apache-2.0
"""The table of named methods. Adding a published method is adding a row."""

from dataclasses import dataclass

from eigenprune.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """A named preset: how a truncation is measured, and how ranks are shared out.

    Attributes:
        input_metric: `none`, `abs-mean` (ASVD's diagonal) or `gram`.
        output_metric: `none` or `gram`.
        allocation: the default: `uniform`, or `global`, which is sound only where the loss has one unit in all
        matrices. shrink_input, shrink_output: fixed shrinkage of the Grams; None follows the token count.
        source: the paper, or where the formula stands.
        shift: beta of `shifted_target`: layers are factored one after another, each on the inputs that the factored
            ones before it give. `retained` chooses it for every layer, see `retained_beta`. None: all are factored on
            the inputs of the dense model.
        mend_residual: with a `shift`, layers that write to the residual stream also make up for what it has lost.
        probe: whether the estimated losses are scaled by what the model itself says, see `probed_scales`.
    """

    input_metric: str
    output_metric: str
    allocation: str
    source: str
    shrink_input: float | None = None
    shrink_output: float | None = None
    shift: float | str | None = None
    mend_residual: bool = False
    probe: bool = False

    @property
    def statistics(self) -> tuple[str, ...]:
        """The kinds of statistics this method is made of."""
        wanted = []
        if self.input_metric != "none":
            wanted.append("input_gram")
        if self.output_metric != "none":
            wanted.append("output_gram")
        return tuple(wanted)

    @property
    def needs_windows(self) -> bool:
        """Whether the model is run on the calibration text once more, after the statistics."""
        return self.shift is not None or self.probe


METHODS: dict[str, Method] = {
    "kfac": Method("gram", "gram", "global", "the metric of KFAC-SVD (LEMS, 2026), with one global choice of ranks"),
    "kfac-seq": Method(
        "gram",
        "gram",
        "global",
        "kfac, factored block by block as AA-SVD (arXiv 2604.02119) does, and mending the residual stream",
        shift=1.0,
        mend_residual=True,
    ),
    "kfac-probe": Method(
        "gram", "gram", "global", "kfac, its losses scaled by measured ones, an idea of LEMS (2026)", probe=True
    ),
    "best": Method(
        "gram",
        "gram",
        "global",
        "kfac-probe and kfac-seq together; slower than kfac",
        shift=1.0,
        mend_residual=True,
        probe=True,
    ),
    "svd-llm": Method("gram", "none", "uniform", "SVD-LLM, arXiv 2403.07378", shrink_input=0.0),
    "aa-svd": Method("gram", "none", "uniform", "AA-SVD, arXiv 2604.02119, without its block refinement", shift=1.0),
    "saes": Method("gram", "none", "uniform", "SAES-SVD, arXiv 2602.03051, by its formula alone", shift="retained"),
    "dobi-closed": Method("gram", "none", "uniform", "Dobi-SVD, arXiv 2502.02723: its closed form alone", shift=0.0),
    "asvd": Method("abs-mean", "none", "uniform", "ASVD, arXiv 2312.05821, alpha 0.5, without its rank search"),
    "svd": Method("none", "none", "uniform", "plain truncated SVD; data-free, a baseline"),
}


def find_method(name: str) -> Method:
    """The row of the table.

    Raises:
        ConfigError: there is none of this name.
    """
    try:
        return METHODS[name]
    except (KeyError, TypeError):
        raise ConfigError(f"method {name!r} is unknown; there are: {', '.join(METHODS)}") from None
