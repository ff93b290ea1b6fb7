# SPDX-License-Identifier: Apache-2.0
"""The loss whose gradients the output statistics are made of, for models with and without labels."""

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

Objective = Callable[[nn.Module, Tensor, torch.Generator], Tensor]
ROWS = 64  # tokens whose logits are worked on in float32 at a time: 64 x 50,000 stay in a last-level cache


def next_token_loss(model: nn.Module, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Summed loss, in nats, of a causal language model on its own text; ids [batch, window]."""
    logits = model(input_ids=ids, use_cache=False).logits
    labels = torch.cat([ids[:, 1:], ids.new_full((ids.shape[0], 1), -1)], 1)
    return summed_cross_entropy(logits.flatten(0, 1), labels.flatten())


def sampled_label_loss(model: nn.Module, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Summed loss, in nats, on labels drawn from the model's own prediction: the true Fisher needs no labels."""
    logits = model(**model_inputs(model, ids)).logits
    logits = logits.reshape(-1, logits.shape[-1])
    # NaN would stop the draw; with any label, the loss is NaN and the layer that made it is found and named.
    drawn_from = logits.detach().float().nan_to_num().softmax(-1).cpu()
    labels = torch.multinomial(drawn_from, 1, generator=generator).squeeze(1)
    return summed_cross_entropy(logits, labels.to(logits.device))


def hidden_state_loss(model: nn.Module, ids: Tensor, generator: torch.Generator) -> Tensor:
    """The last hidden state times unit noise, summed, for encoders without a head.

    Its gradient at the output is the noise, so second moments of gradients estimate the Gauss-Newton matrix of half
    the squared error of the hidden state.
    """
    hidden = model(**model_inputs(model, ids)).last_hidden_state.float()
    noise = torch.randn(hidden.shape, generator=generator)
    loss: Tensor = (hidden * noise.to(hidden.device)).sum()
    return loss


def objective_for(model: nn.Module) -> tuple[str, Objective]:
    """The objective that suits `model`, with its name."""
    if is_causal(model):
        return "next-token", next_token_loss
    if has_head(model):
        return "sampled-label", sampled_label_loss
    return "hidden-state", hidden_state_loss


def has_head(model: nn.Module) -> bool:
    """Whether `model` gives logits: its head stands on a trunk, or, as in T5, in the one class that has both."""
    return getattr(model, "base_model", model) is not model or model.get_output_embeddings() is not None  # type: ignore[operator]


def is_causal(model: nn.Module) -> bool:
    """Whether `model` is one of transformers' causal language models, told by the names of its classes."""
    return any(cls.__name__.endswith(("ForCausalLM", "LMHeadModel")) for cls in type(model).__mro__)


def model_inputs(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """What the forward of `model` is called with for token `ids` [batch, window]."""
    inputs: dict[str, Any] = {"input_ids": ids}
    if "use_cache" in signature(model.forward).parameters:
        inputs["use_cache"] = False  # a cache would be filled a second time when a block is recomputed
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(logits)[label], in nats, computed in float32; a label of -1 counts nothing.

    `F.cross_entropy` on a float32 copy gives the same, with four passes over a [tokens, vocabulary] float32 matrix;
    here float32 rows come a few at a time, and the gradient is written in the dtype of the logits.
    """
    loss: Tensor = _SummedCrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return loss


def float_rows(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of `logits` [rows, vocabulary] after the other: their place, and a float32 copy that may be changed.

    All copies lie in the same memory: fresh memory for each would be cleared by the system, page by page, first.
    """
    memory = torch.empty(min(ROWS, len(logits)), logits.shape[1], dtype=torch.float32, device=logits.device)
    for start in range(0, len(logits), ROWS):
        part = slice(start, min(start + ROWS, len(logits)))
        yield part, memory[: part.stop - start].copy_(logits[part])


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        normalisers = torch.cat([rows.logsumexp(-1) for _, rows in float_rows(logits)])
        picked = logits.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1).float()
        ctx.save_for_backward(logits, labels, normalisers)
        return ((normalisers - picked) * (labels >= 0)).sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        logits, labels, normalisers = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for part, rows in float_rows(logits):
            rows.sub_(normalisers[part].unsqueeze(1)).exp_()
            rows.scatter_add_(1, labels[part].clamp_min(0).unsqueeze(1), rows.new_full((rows.shape[0], 1), -1.0))
            gradient[part] = rows.mul_((labels[part] >= 0).unsqueeze(1) * outer[0])
        return gradient, None
