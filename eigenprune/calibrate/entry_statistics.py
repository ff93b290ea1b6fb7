# SPDX-License-Identifier: Apache-2.0
"""Statistics of single entries of weights: mean squared gradients of every parameter, moments of every linear's input.

`collect_statistics` reads token windows without padding and knows linear layers; these come from whatever a model is
called with (padded batches, labels, images), cover embeddings and norms too, and are small: one number an entry.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eigenprune.calibrate.objective import summed_cross_entropy
from eigenprune.errors import CalibrationError, WeightError
from eigenprune.layers import is_dense

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class EntryStatistics:
    """Means over calibration examples, by parameter name.

    Attributes:
        gradient: mean gradient of one example's loss, of the parameter's shape, float32.
        squared_gradient: mean of its square, entry by entry: the diagonal of the Fisher matrix.
        input_square: {name of a linear's weight: mean x^2 over tokens, [in] float32}.
        input_gram: {name of a linear's weight: mean x x^T, [in, in] float32}.
        transposed: the weights among them that are stored [in, out] (GPT-2's `Conv1D`).
        examples: how many were read.
    """

    gradient: Mapping[str, Tensor]
    squared_gradient: Mapping[str, Tensor]
    input_square: Mapping[str, Tensor]
    input_gram: Mapping[str, Tensor]
    transposed: frozenset[str]
    examples: int


def own_label_loss(model: nn.Module, example: Mapping[str, Tensor]) -> Tensor:
    """Summed loss, in nats: of `labels` where the example has them, else of labels that the model's prediction draws.

    With drawn labels (from torch's default generator) squared gradients estimate the Fisher matrix itself. A label of
    -100 counts nothing. The logits of a causal language model are of the next token.
    """
    inputs = {name: tensor for name, tensor in example.items() if name != "labels"}
    logits = model(**inputs).logits
    labels = example.get("labels")
    if labels is not None and logits.ndim == 3 and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits = logits.reshape(-1, logits.shape[-1])
    if labels is None:
        labels = torch.multinomial(logits.detach().float().softmax(-1), 1)
        mask = example.get("attention_mask")
        if mask is not None and mask.numel() == labels.numel():
            labels = labels.masked_fill(mask.reshape(-1, 1) == 0, -100)
    labels = labels.reshape(-1).clamp_min(-1)
    return summed_cross_entropy(logits, labels)


def collect_entry_statistics(
    model: nn.Module,
    examples: Iterable[Mapping[str, Tensor]],
    *,
    gradients: bool = True,
    input_grams: bool = False,
    loss: Loss = own_label_loss,
    seed: int = 0,
) -> EntryStatistics:
    """Run `model`, in evaluation mode, over `examples` one by one, forward and (for gradients) backward.

    Memory: two float32 numbers for each parameter with gradients, and `in x in` more for each linear with input Grams.

    Args:
        model: weights, gradient flags and mode are as before afterwards.
        examples: what the model is called with, by name, each with one item in its batch, on the model's device. Where
            `attention_mask` is 0, tokens do not count among the inputs.
        gradients: collect gradients too; without, only the moments of the inputs.
        input_grams: collect the inputs' whole second moments too.
        loss: of one example, a scalar.
        seed: of drawn labels.

    Raises:
        CalibrationError: there are no examples.
        WeightError: a gradient or an input is NaN or infinite.
    """
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=True) if p.is_floating_point()}
    sums = _Sums(model, names, input_grams)
    count = 0
    with _measuring(model, gradients), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for example in examples:
            count += 1
            with sums.watching(example.get("attention_mask")):
                if gradients:
                    model.zero_grad(set_to_none=True)
                    loss(model, example).backward()
                    sums.add_gradients()
                else:
                    with torch.no_grad():
                        model(**{name: tensor for name, tensor in example.items() if name != "labels"})
        model.zero_grad(set_to_none=True)
    if not count:
        raise CalibrationError("no calibration examples for the statistics of entries")
    return sums.means(count)


class _Sums:
    def __init__(self, model: nn.Module, names: Mapping[int, str], grams: bool) -> None:
        self.model, self.names = model, names
        self.linears = {names[id(m.weight)]: m for m in model.modules() if is_dense(m)}
        self.gradient: dict[str, Tensor] = {}
        self.squared: dict[str, Tensor] = {}
        self.square: dict[str, Tensor] = {}
        self.gram: dict[str, Tensor] = {}
        self.tokens: dict[str, float] = {}
        self.grams = grams

    @contextmanager
    def watching(self, mask: Tensor | None) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self.linears.items():
                stack.callback(module.register_forward_pre_hook(self._hook(name, mask)).remove)
            yield

    def _hook(self, name: str, mask: Tensor | None) -> Callable[..., None]:
        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            with torch.no_grad():
                rows = args[0].detach().flatten(0, -2).float()
                if mask is not None and mask.numel() == rows.shape[0]:
                    rows = rows[mask.reshape(-1) != 0]
                self._add(self.square, name, rows.square().sum(0))
                if self.grams:
                    self._add(self.gram, name, rows.t() @ rows)
                self.tokens[name] = self.tokens.get(name, 0) + rows.shape[0]

        return add

    def add_gradients(self) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                gradient, name = parameter.grad.detach().float(), self.names[id(parameter)]
                self._add(self.squared, name, gradient.square())
                self._add(self.gradient, name, gradient)

    @staticmethod
    def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
        if name in sums:
            sums[name] += value
        else:
            sums[name] = value.clone()

    def means(self, examples: int) -> EntryStatistics:
        for sums in (self.gradient, self.squared, self.square, self.gram):
            for name, total in sums.items():
                total /= max(1.0, self.tokens[name]) if sums is self.square or sums is self.gram else examples
                if not torch.isfinite(total.sum(dtype=torch.float64)):
                    raise WeightError(f"{name}: NaN or infinity in its calibration statistics; check the weights")
        transposed = frozenset(name for name, module in self.linears.items() if not isinstance(module, nn.Linear))
        return EntryStatistics(self.gradient, self.squared, self.square, self.gram, transposed, examples)


@contextmanager
def _measuring(model: nn.Module, gradients: bool) -> Iterator[None]:
    """Evaluation mode with gradients to all floating parameters or none; flags, modes and gradients restored after."""
    training = {module: module.training for module in model.modules()}
    before: dict[nn.Parameter, tuple[bool, Any]] = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    try:
        model.eval()
        for parameter in before:
            parameter.grad = None
            parameter.requires_grad_(gradients and parameter.is_floating_point())
        yield
    finally:
        for parameter, (flag, gradient) in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for module, mode in training.items():
            module.training = mode
