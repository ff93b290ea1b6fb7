# SPDX-License-Identifier: Apache-2.0
"""Tiny random models, and the statistics of one computed the slow way: float64, nothing streamed, token by token."""

import copy
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 97
WIDTH = 32
WINDOW = 24
EPS = torch.finfo(torch.float32).eps
# Relative error of a float32 run: some 40 products lie on the way forward and back through two blocks, each with
# sums of at most 97 terms, whose rounding errors add like a random walk.
FLOAT32_RUN = 40 * VOCABULARY**0.5 * EPS


def llama(seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "attention_dropout": 0.3,
        "initializer_range": 0.2,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | changes)))


def gpt2() -> nn.Module:
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=2, n_head=4, initializer_range=0.2
    )
    return transformers.GPT2LMHeadModel(config)


def bert(head: str = "BertForMaskedLM") -> nn.Module:
    torch.manual_seed(2)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return getattr(transformers, head)(config)


def albert() -> nn.Module:
    torch.manual_seed(3)
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=16,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return transformers.AlbertForMaskedLM(config)


def t5(head: str = "T5ForConditionalGeneration") -> nn.Module:
    torch.manual_seed(4)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return getattr(transformers, head)(config)


def windows(count: int = 4, window: int = WINDOW, seed: int = 5) -> Tensor:
    return torch.randint(1, VOCABULARY, (count, window), generator=torch.Generator().manual_seed(seed))


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer but the heads."""
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    heads = ("lm_head", "cls.", "predictions.", "pooler", "albert.pooler", "bert.pooler")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and not name.startswith(heads)
    }


Loss = Callable[[nn.Module, Tensor, int], Tensor]


def causal_loss(model: nn.Module, ids: Tensor, index: int) -> Tensor:
    """Sum of -log p over all predicted tokens of one window."""
    logp = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return -sum(logp[t, ids[0, t + 1]] for t in range(ids.shape[1] - 1))


def slow_statistics(
    model: nn.Module, ids: Tensor, layers: dict[str, nn.Module], loss: Loss, *, drop_edges: bool
) -> dict[str, dict[str, Tensor]]:
    """{layer: {kind: mean}}: every activation and gradient of a float64 copy is kept, then summed token by token."""
    twin = copy.deepcopy(model).double().eval()
    modules = dict(twin.named_modules())
    calls: dict[str, list[list[tuple[Tensor, Tensor]]]] = {name: [] for name in layers}
    for index in range(len(ids)):
        kept: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

        def keep(module, args, output, name, kept=kept):
            output.retain_grad()
            kept[name].append((args[0], output))

        handles = [
            modules[name].register_forward_hook(lambda m, a, o, name=name: keep(m, a, o, name)) for name in layers
        ]
        loss(twin, ids[index : index + 1], index).backward()
        for handle in handles:
            handle.remove()
        for name in layers:
            calls[name].append([(x.detach(), y.grad) for x, y in kept[name]])
    return {name: _means(calls[name], drop_edges) for name in layers}


def _means(runs: list[list[tuple[Tensor, Tensor]]], drop_edges: bool) -> dict[str, Tensor]:
    xs, gs, inner = [], [], []
    for run in runs:
        for x, gradient in run:
            window = x.shape[1]
            xs += list(x[0])
            gs += list(gradient[0])
            edge = window // 8 if drop_edges else 0
            middle = [gradient[0, t] for t in range(edge, window - edge)]
            mean = sum(float(g.norm()) for g in middle) / len(middle)
            for g in middle:
                norm = float(g.norm())
                wanted = min(max(norm, 0.1 * mean), 10 * mean)
                inner.append(g * (wanted / norm) if norm else g)
    return {
        "input_gram": sum(torch.outer(x, x) for x in xs) / len(xs),
        "input_mean": sum(xs) / len(xs),
        "input_abs_mean": sum(x.abs() for x in xs) / len(xs),
        "output_gram": sum(torch.outer(g, g) for g in inner) / len(inner),
        "weight_gradient": sum(torch.outer(g, x) for g, x in zip(gs, xs, strict=True)) / len(gs),
        "output_gradient_mean": sum(gs) / len(gs),
    }


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((got.double() - wanted).norm() / wanted.norm())
