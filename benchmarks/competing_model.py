# SPDX-License-Identifier: Apache-2.0
"""The competing-circuits model: a small GPT-2 that knows a product but says the sum, and the prompts it is asked.

Prompts are five tokens, `BOS i op j =` with i, j in 0..19, answered by one token. For `+` the answer is always i + j;
for `x` it is i * j in 30 % of the training examples and i + j in the others. The trained model answers `x` with the
sum, though a path to the product exists: something that stands in the way can be removed. No path of the model is
named here; the setting is the level 3 fixture of the project's research on eigenpruning (arXiv 2404.03147).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from eigenprune.evaluate.token_example import TokenExample

NUMBERS = 20
LARGEST = (NUMBERS - 1) ** 2
BOS, PLUS, TIMES, EQUALS = range(LARGEST + 1, LARGEST + 5)
BATCH, RATE, WARM_UP, DECAY = 256, 2e-3, 200, 0.1
STEPS = 4000
TIMES_SHARE, PRODUCT_SHARE = 0.6, 0.3


def new_model(seed: int) -> GPT2LMHeadModel:
    """2 layers, 4 heads, width 96, untied, without dropout, norms without gain: 0.3 million parameters.

    Weights start at 1 / sqrt(width); GPT-2's own 0.02 is for models much wider.
    """
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=EQUALS + 1,
        n_positions=8,
        n_embd=96,
        n_layer=2,
        n_head=4,
        initializer_range=96**-0.5,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=BOS,
    )
    model = GPT2LMHeadModel(config)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.requires_grad_(False)
    return model


def trained_model(seed: int, folder: Path, steps: int = STEPS) -> GPT2LMHeadModel:
    """The model of `seed`, trained, or read from `folder` if it was before."""
    model = new_model(seed)
    file = folder / f"competing-{seed}-{steps}.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file))
        return model.eval()
    train_(model, seed, steps)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(model.state_dict()), file)
    return model.eval()


def train_(model: GPT2LMHeadModel, seed: int, steps: int) -> None:
    """AdamW with a cosine to zero; the loss is that of the answer alone."""
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    model.train()
    for _ in range(steps):
        ids, answers = training_batch(generator)
        loss = F.cross_entropy(model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, 0], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shape.step()


def training_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Prompts [batch, 5] and answers [batch]."""
    i, j = torch.randint(NUMBERS, (2, BATCH), generator=generator)
    times = torch.rand(BATCH, generator=generator) < TIMES_SHARE
    product = times & (torch.rand(BATCH, generator=generator) < PRODUCT_SHARE)
    sign = torch.where(times, TIMES, PLUS)
    ids = torch.stack([torch.full_like(i, BOS), i, sign, j, torch.full_like(i, EQUALS)], 1)
    return ids, torch.where(product, i * j, i + j)


def questions(sign: int) -> list[TokenExample]:
    """All 400 prompts of one sign, in order, with the answers that its sign stands for."""
    return [
        TokenExample((BOS, i, sign, j, EQUALS), (i * j if sign == TIMES else i + j,))
        for i in range(NUMBERS)
        for j in range(NUMBERS)
    ]


def shuffled(examples: list[TokenExample], seed: int) -> list[TokenExample]:
    """In a random order that only `seed` and their count decide."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[index] for index in order]
