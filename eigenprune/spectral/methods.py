# SPDX-License-Identifier: Apache-2.0
"""The table of named methods. Adding a published method is adding a row."""

from dataclasses import dataclass

from eigenprune.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """A named preset: how a truncation is measured, and how ranks are shared out.

    Attributes:
        input_metric: `none`, `abs-mean` (ASVD's diagonal), `fisher` (FWSVD's diagonal) or `gram`.
        output_metric: `none` or `gram`.
        allocation: the default, a row of `ALLOCATIONS`. `global` is sound only where the loss has one unit in all
            matrices.
        source: the paper, or where the formula stands.
        shrink_input, shrink_output: fixed shrinkage of the Grams; None follows the token count.
        worth: which components go first: `energy` the weakest, `importance` those of least importance in given
            statistics, `random` any.
        objective: what the gradients of the output Gram are of, see `collect_statistics`; None: the model's own loss.
        removal: where components are first removed for a task, how those that stand in its way are told: a row of
            `WORTHS`. None: nothing is removed.
        shift: beta of `shifted_target`: layers are factored one after another, each on the inputs that the factored
            ones before it give. `retained` chooses it for every layer, see `retained_beta`. None: all are factored on
            the inputs of the dense model.
        mend_residual: with a `shift`, layers that write to the residual stream also make up for what it has lost.
        probe: whether the estimated losses are scaled by what the model itself says, see `probed_scales`.
        channels: whether whole hidden channels may go besides, see `remove_channels`.
    """

    input_metric: str
    output_metric: str
    allocation: str
    source: str
    shrink_input: float | None = None
    shrink_output: float | None = None
    worth: str = "energy"
    objective: str | None = None
    removal: str | None = None
    shift: float | str | None = None
    mend_residual: bool = False
    probe: bool = False
    channels: bool = False

    @property
    def statistics(self) -> tuple[str, ...]:
        """The kinds of statistics this method is made of."""
        wanted = []
        if self.input_metric in ("gram", "abs-mean"):
            wanted.append("input_gram")
        if self.input_metric == "fisher":
            wanted.append("weight_gradient_square")
        if self.output_metric != "none":
            wanted.append("output_gram")
        if self.worth == "importance":
            wanted.append("component_importance")
        return tuple(wanted)

    @property
    def needs_windows(self) -> bool:
        """Whether the model is run on the calibration text once more, after the statistics."""
        return self.shift is not None or self.probe


# How the components that stand in a task's way are told; see `eigenprune.removal`.
WORTHS = ("exact", "paper", "compat", "random", "smallest-sigma", "laser")

METHODS: dict[str, Method] = {
    "kfac": Method("gram", "gram", "global", "the metric of KFAC-SVD (LEMS, 2026), with one global choice of ranks"),
    "kfac-channels": Method(
        "gram",
        "gram",
        "global",
        "kfac, which also removes whole hidden channels of MLPs wherever that loses less than a lower rank",
        channels=True,
    ),
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
    "kfac-probe-seq": Method(
        "gram",
        "gram",
        "global",
        "kfac-probe and kfac-seq together; slower than kfac",
        shift=1.0,
        mend_residual=True,
        probe=True,
    ),
    "io": Method(
        "gram",
        "gram",
        "least-change",
        "IO-SVD, arXiv 2605.15626: curvature of the KL divergence over the likeliest next tokens",
        objective="top-tokens-kl",
    ),
    "zs": Method("gram", "none", "zero-sum", "ZS-SVD, arXiv 2602.02848, one stage", shrink_input=0.0),
    "svd-llm": Method("gram", "none", "uniform", "SVD-LLM, arXiv 2403.07378", shrink_input=0.0),
    "svd-llm-v2": Method("gram", "none", "svd-llm-v2", "SVD-LLM v2, arXiv 2503.12340", shrink_input=0.0),
    "swift": Method("gram", "none", "swift", "Swift-SVD, arXiv 2604.01609, alpha 0.5", shrink_input=0.0),
    "fwsvd": Method("fisher", "none", "uniform", "FWSVD, arXiv 2207.00112"),
    "lora-prune": Method(
        "none",
        "none",
        "global",
        "LoRAPrune, arXiv 2305.18403: importance from the gradients of a LoRA, here of components",
        worth="importance",
    ),
    "aa-svd": Method("gram", "none", "uniform", "AA-SVD, arXiv 2604.02119, without its block refinement", shift=1.0),
    "saes": Method("gram", "none", "uniform", "SAES-SVD, arXiv 2602.03051, by its formula alone", shift="retained"),
    "dobi-closed": Method("gram", "none", "uniform", "Dobi-SVD, arXiv 2502.02723: its closed form alone", shift=0.0),
    "asvd": Method("abs-mean", "none", "uniform", "ASVD, arXiv 2312.05821, alpha 0.5, without its rank search"),
    "svd": Method("none", "none", "uniform", "plain truncated SVD; data-free, a baseline"),
    "random": Method("none", "none", "uniform", "singular components chosen at random; a baseline", worth="random"),
    # For a task: these remove components first, and then compress what is left as `kfac` does, if keep is below 1.
    "eigenprune": Method("gram", "gram", "global", "Eigenpruning, arXiv 2404.03147, signed worth", removal="exact"),
    "eigenprune-paper": Method("gram", "gram", "global", "arXiv 2404.03147, its formula on pairs", removal="paper"),
    "eigenprune-compat": Method("gram", "gram", "global", "arXiv 2404.03147, its released code", removal="compat"),
    "task-random": Method("gram", "gram", "global", "removes at random: a baseline", removal="random"),
    "task-smallest": Method("gram", "gram", "global", "removes the smallest: a baseline", removal="smallest-sigma"),
    "laser": Method("gram", "gram", "global", "LASER, arXiv 2312.13558: cuts one matrix", removal="laser"),
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
