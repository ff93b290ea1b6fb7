# SPDX-License-Identifier: Apache-2.0
"""Calibration text that a causal language model writes itself: no download, and of its own domain.

After "Self-calibration for language model quantization and pruning" (arXiv 2410.17170) and LLM-QAT (arXiv 2305.17888),
which found text sampled from the model as good for calibration as real text. Here it comes in many short documents:
more subjects a token, and a key-value cache that is short enough to keep a large batch.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eigenprune.calibrate.cache import SampleFile, cache_key
from eigenprune.calibrate.collect import has_fast_bfloat16
from eigenprune.calibrate.objective import is_causal
from eigenprune.errors import CalibrationError, EigenpruneError, WeightError
from eigenprune.memory import release_unused

SAMPLED = "sampled"
DOCUMENT = 256
MOST_AT_ONCE = 64  # documents in a batch: a batch is what an interrupted run loses
CACHE_MATRICES = 4  # the key-value cache may take as much memory as this many of the largest parameter
ROWS = 8  # documents whose probabilities are worked on at a time: 8 x 50,000 float64 stay in a last-level cache


@dataclass(frozen=True)
class Sampling:
    """All that a sample depends on, beside the model and its tokenizer.

    Attributes:
        seed: of the generator that draws.
        windows: how many windows.
        window: tokens in a window.
        document: tokens in a document; a window is whole documents, and a last one that is cut.
        temperature: of the softmax that tokens are drawn from.
    """

    seed: int = 0
    windows: int = 40
    window: int = 1024
    document: int = DOCUMENT
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.windows < 1 or self.window < 2 or self.document < 1:
            raise CalibrationError(
                f"{self.windows} windows of {self.window} tokens in documents of {self.document}: "
                "at least 1 window of 2 tokens in documents of 1 is needed"
            )
        if not 0 < self.temperature < float("inf"):
            raise CalibrationError(f"temperature {self.temperature!r} must be a positive number; 1 is the model's own")

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def can_sample(model: nn.Module) -> bool:
    """Whether `model` writes text token by token: a causal language model with a key-value cache."""
    decoder_only = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return is_causal(model) and decoder_only and "past_key_values" in signature(model.forward).parameters


def sample_windows(
    model: nn.Module, tokenizer: Any, sampling: Sampling, *, cache_dir: Path | None = None, progress: bool = True
) -> Tensor:
    """Windows of text that `model` wrote: documents of `sampling.document` tokens side by side.

    Each document starts after the tokenizer's mark for the start of a text, with a word drawn evenly from the
    vocabulary, so that documents differ; the model draws all further tokens. Special tokens are not drawn.

    The same model, tokenizer, sampling, machine and versions give the same tokens: batches are fixed by sizes, not by
    free memory, and each has a generator of its own. On another kind of processor sums are rounded otherwise, and
    after some tokens the text is another one.

    Memory: a key-value cache of at most 4 times the largest parameter (or that of one document), and half the model
    where it is float32 and the machine multiplies bfloat16 in hardware; all given back.

    Args:
        model: a causal language model; weights, mode and random state are as before afterwards.
        tokenizer: its tokenizer, for the special tokens and words.
        sampling: seed, sizes and temperature.
        cache_dir: where finished windows and finished batches are kept, named after a hash of model and sampling; a
            killed run goes on after the last finished batch, with the same result. None keeps nothing.
        progress: show a bar on standard error.

    Returns:
        [windows, window] int64.

    Raises:
        CalibrationError: the model does not write text, or documents are longer than its positions.
        WeightError: its logits are not finite.
    """
    if not can_sample(model):
        raise CalibrationError(
            f"{type(model).__name__} does not write text token by token, so none can be sampled from it: "
            "pass texts, or calibration='python-docs'"
        )
    a_window = -(-sampling.window // sampling.document)
    documents = sampling.windows * a_window
    words = _words(tokenizer, model)
    marks = [] if _start_mark(tokenizer) is None else [_start_mark(tokenizer)]
    with _writing(model, tokenizer) as writer:
        batches = list(_batches(documents, _at_once(model, writer.dtype, sampling.document + len(marks))))
        saved = None
        if cache_dir is not None:
            settings = [repr(sampling), repr(writer.dtype), repr(marks), repr(words.tolist()), repr(batches)]
            saved = SampleFile(cache_dir, cache_key(model, SAMPLED, settings))
        done = [] if saved is None else saved.resume(batches, sampling.document)
        bar = tqdm(
            total=documents * sampling.document,
            initial=sum(len(batch) for batch in done) * sampling.document,
            desc="sampling text",
            unit="token",
            disable=not progress,
            leave=False,
        )
        with bar:
            for number in range(len(done), len(batches)):
                generator = torch.Generator().manual_seed(sampling.seed * 1_000_003 + number)
                first = words[torch.randint(len(words), (batches[number],), generator=generator)]
                done.append(_documents(writer, marks, first, sampling, generator, bar))
                if saved is not None:
                    saved.save(done)
        del writer
    release_unused()
    rows = torch.cat(done).view(sampling.windows, a_window * sampling.document)
    return rows[:, : sampling.window].contiguous()


@dataclass(frozen=True)
class _Writer:
    """A model that is ready to write, and the ids that it may."""

    model: nn.Module
    dtype: torch.dtype
    forbidden: Tensor  # [vocabulary] bool


def _documents(
    writer: _Writer, marks: list[Any], first: Tensor, sampling: Sampling, generator: torch.Generator, bar: Any
) -> Tensor:
    """One batch: [len(first), document] int64, each row beginning with its token of `first`."""
    device = next(writer.model.parameters()).device
    tokens = torch.empty(len(first), sampling.document, dtype=torch.int64)
    tokens[:, 0] = first
    ids = torch.tensor([marks]).expand(len(first), -1)
    ids, cache = torch.cat([ids.long(), first.unsqueeze(1)], 1), None
    bar.update(len(first))
    for position in range(1, sampling.document):
        output = writer.model(input_ids=ids.to(device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        uniforms = torch.rand(len(first), generator=generator, dtype=torch.float64)
        drawn = draw(output.logits[:, -1], uniforms, sampling.temperature, writer.forbidden)
        tokens[:, position] = drawn.cpu()
        ids = drawn.unsqueeze(1)
        bar.update(len(first))
    return tokens


def draw(logits: Tensor, uniforms: Tensor, temperature: float, forbidden: Tensor) -> Tensor:
    """Tokens [batch] int64 drawn from softmax(logits / temperature), none of them forbidden.

    Inverts the cumulative distribution in float64: token k is drawn where `uniforms` lies between the masses of the
    tokens below k and of those up to k.

    Args:
        logits: [batch, vocabulary], any floating dtype.
        uniforms: [batch] float64 in [0, 1).
        temperature: positive.
        forbidden: [vocabulary] bool.

    Raises:
        WeightError: logits that are not finite.
    """
    device = "cpu" if logits.device.type == "mps" else logits.device  # mps has no float64
    found = []
    for rows, points in zip(logits.split(ROWS), uniforms.split(ROWS), strict=True):
        rows = rows.to(device, torch.float32).masked_fill(forbidden.to(device), -torch.inf) / temperature
        masses = rows.softmax(-1).double().cumsum(-1)
        total = masses[:, -1]
        if not torch.isfinite(total).all():
            raise WeightError(
                "the model's logits are NaN or infinite while it writes calibration text; check the weights, or load "
                "the model in float32 or bfloat16"
            )
        points = torch.minimum(points.to(device) * total, torch.nextafter(total, torch.zeros_like(total)))
        found.append(torch.searchsorted(masses, points.unsqueeze(1), right=True).squeeze(1))
    return torch.cat(found)


@contextmanager
def _writing(model: nn.Module, tokenizer: Any) -> Iterator[_Writer]:
    """`model`, or a bfloat16 copy where that is faster, in evaluation mode and without gradients."""
    training = {module: module.training for module in model.modules()}
    parameter = next(model.parameters())
    forbidden = torch.ones(_vocabulary(model), dtype=torch.bool)
    forbidden[: len(tokenizer)] = False
    forbidden[[i for i in tokenizer.all_special_ids if i < len(forbidden)]] = True
    try:
        model.eval()
        writer = model
        if _copies(model):
            dtype = torch.bfloat16
            # deepcopy takes what the memo holds for the copy of a parameter; shared ones stay shared.
            halves: dict[int, Any] = {
                id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in model.parameters()
            }
            writer = copy.deepcopy(model, halves)
            del halves
        else:
            dtype = parameter.dtype
        with torch.no_grad(), _quick_attention(writer, dtype):
            yield _Writer(writer, dtype, forbidden.to(parameter.device))
    except EigenpruneError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise CalibrationError(
            f"{type(model).__name__} cannot write calibration text ({error}): pass texts, or calibration='python-docs'"
        ) from error
    finally:
        for module, flag in training.items():
            module.training = flag


@contextmanager
def _quick_attention(writer: Any, dtype: torch.dtype) -> Iterator[None]:
    """Plain products for attention, where half precision on a CPU meets torch's fused one: with one query a head, as
    writing has, that takes ten times as long."""
    usual = getattr(writer.config, "_attn_implementation", None)
    slow = usual == "sdpa" and dtype.itemsize == 2 and next(writer.parameters()).device.type == "cpu"
    if slow:
        writer.set_attn_implementation("eager")
    try:
        yield
    finally:
        if slow:
            writer.set_attn_implementation(usual)


def _copies(model: nn.Module) -> bool:
    """Whether a bfloat16 copy writes: on the CPU only, where weights of half the size are most of the speed."""
    parameters = list(model.parameters())
    plain = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in parameters)
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    keeps = getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None)
    return plain and not hooked and not keeps and has_fast_bfloat16(torch.device("cpu"))


def _at_once(model: nn.Module, dtype: torch.dtype, length: int) -> int:
    """How many documents of `length` tokens are written at a time, by the sizes of model and key-value cache only."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    width = int(getattr(config, "head_dim", None) or getattr(config, "hidden_size", 1) // heads)
    width *= int(getattr(config, "num_key_value_heads", None) or heads)
    document = 2 * width * int(getattr(config, "num_hidden_layers", 1)) * length * dtype.itemsize
    largest = max(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return max(1, min(MOST_AT_ONCE, CACHE_MATRICES * largest // document))


def _batches(documents: int, most: int) -> Iterator[int]:
    """`documents` in as few batches of at most `most` as can be, of equal size give or take one."""
    count = -(-documents // most)
    for number in range(count):
        yield documents * (number + 1) // count - documents * number // count


def _vocabulary(model: nn.Module) -> int:
    """How many logits there are: some models have more than their tokenizer has tokens."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    config: Any = model.config
    return int(config.get_text_config().vocab_size if head is None else head.weight.shape[0])


def _start_mark(tokenizer: Any) -> int | None:
    """The token that a text starts with: the tokenizer's own, or, as GPT-2 was trained, the one that ends the last."""
    mark: int | None = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return mark


def _words(tokenizer: Any, model: nn.Module) -> Tensor:
    """The ids that can start a document, [words] int64: whole words or the beginnings of words, where there are any."""
    known = range(min(len(tokenizer), _vocabulary(model)))
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[i] for i in known])
    words = [i for i, text in zip(known, texts, strict=True) if i not in special and _is_word(text)]
    plain = [i for i in known if i not in special]
    return torch.tensor(words or plain)


def _is_word(text: str) -> bool:
    """Two letters or more after a space or with a capital; where a script has no capitals, any two letters."""
    letters = text.strip()
    return len(letters) > 1 and letters.isalpha() and not text[0].islower()
