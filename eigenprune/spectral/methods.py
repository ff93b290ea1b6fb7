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
        worth: what a component is judged by before ranks are shared out: `energy`, its squared singular value in the
            metric, or, where components are first removed for a task, a rule of `WORTHS`.
    """

    input_metric: str
    output_metric: str
    allocation: str
    source: str
    shrink_input: float | None = None
    shrink_output: float | None = None
    worth: str = "energy"

    @property
    def removes(self) -> bool:
        """Whether components are first removed for a task."""
        return self.worth != "energy"

    @property
    def statistics(self) -> tuple[str, ...]:
        """The kinds of statistics this method is made of."""
        wanted = []
        if self.input_metric != "none":
            wanted.append("input_gram")
        if self.output_metric != "none":
            wanted.append("output_gram")
        return tuple(wanted)


# How the components that stand in a task's way are told; see `eigenprune.removal`.
WORTHS = ("exact", "paper", "compat", "random", "smallest-sigma", "laser")

METHODS: dict[str, Method] = {
    "kfac": Method("gram", "gram", "global", "the metric of KFAC-SVD (LEMS, 2026), with one global choice of ranks"),
    "svd-llm": Method("gram", "none", "uniform", "SVD-LLM, arXiv 2403.07378", shrink_input=0.0),
    "asvd": Method("abs-mean", "none", "uniform", "ASVD, arXiv 2312.05821, alpha 0.5, without its rank search"),
    "svd": Method("none", "none", "uniform", "plain truncated SVD; data-free, a baseline"),
    # For a task: these remove components first, and then compress what is left as `kfac` does, if keep is below 1.
    "eigenprune": Method("gram", "gram", "global", "Eigenpruning, arXiv 2404.03147, signed worth", worth="exact"),
    "eigenprune-paper": Method("gram", "gram", "global", "arXiv 2404.03147, its formula on pairs", worth="paper"),
    "eigenprune-compat": Method("gram", "gram", "global", "arXiv 2404.03147, its released code", worth="compat"),
    "task-random": Method("gram", "gram", "global", "removes at random: a baseline", worth="random"),
    "task-smallest": Method("gram", "gram", "global", "removes the smallest: a baseline", worth="smallest-sigma"),
    "laser": Method("gram", "gram", "global", "LASER, arXiv 2312.13558: cuts one matrix", worth="laser"),
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
