# SPDX-License-Identifier: Apache-2.0
"""Perplexity against a literal float64 loop, the two window protocols, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from eigenprune.errors import CalibrationError, WeightError
from eigenprune.evaluate import Perplexity, contiguous_windows, perplexity, spaced_windows

VOCABULARY = 97


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,  # large enough that the predictions are far from uniform
        attention_dropout=0.3,
    )
    return LlamaForCausalLM(config).train()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(VOCABULARY, (700,), generator=torch.Generator().manual_seed(1))


def literal_loss(model: LlamaForCausalLM, windows: list[Tensor]) -> tuple[float, int]:
    """The definition in float64, token by token: mean of -log p(token | those before it in its window)."""
    twin = LlamaForCausalLM(model.config).eval()
    twin.load_state_dict(model.state_dict())
    twin.double()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for window in windows:
            logits = twin(input_ids=window[None]).logits[0]
            for position in range(1, len(window)):
                row = logits[position - 1].tolist()
                top = max(row)
                log_sum = top + math.log(sum(math.exp(value - top) for value in row))
                total += log_sum - row[int(window[position])]
                tokens += 1
    return total / tokens, tokens


# Two windows longer than a chunk of rows (128), so that the seams between chunks are inside.
@pytest.mark.parametrize("window", [300, 129, 17])
def test_perplexity_equals_a_literal_float64_loop(model: LlamaForCausalLM, ids: Tensor, window: int) -> None:
    windows = contiguous_windows(ids, window)
    expected, tokens = literal_loss(model, windows)
    result = perplexity(model, windows, progress=False)
    # One float32 forward of a 2-layer model: a few hundred roundings of 6e-8 each.
    assert result.loss == pytest.approx(expected, rel=2e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert result.tokens == tokens == len(ids) - 1
    assert result.windows == len(windows)
    assert result.seconds > 0
    assert expected > 1.2 * math.log(VOCABULARY)  # the case is no uniform prediction


def test_token_hash_is_sha256_over_little_endian_int64(model: LlamaForCausalLM) -> None:
    windows = [torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor([3, 96])]
    result = perplexity(model, windows, progress=False)
    raw = b"".join(token.to_bytes(8, "little") for token in (1, 2, 3, 3, 96))
    assert result.token_hash == hashlib.sha256(raw).hexdigest()
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    assert list(result.to_dict()) == ["perplexity", "loss", "tokens", "windows", "token_hash", "seconds"]


def test_half_precision_logits_are_summed_in_float32(model: LlamaForCausalLM, ids: Tensor) -> None:
    windows = contiguous_windows(ids[:200], 100)
    exact = perplexity(model, windows, progress=False).loss
    assert perplexity(model.bfloat16(), windows, progress=False).loss == pytest.approx(exact, rel=2**-6)


def test_each_module_gets_its_own_mode_back_and_no_gradient_stays(model: LlamaForCausalLM, ids: Tensor) -> None:
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    first = perplexity(model, [ids[:64]], progress=False)
    assert [module.training for module in model.modules()] == before
    assert perplexity(model, [ids[:64]], progress=False).loss == first.loss  # dropout was off
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_non_finite_logits_name_the_window_and_restore_the_modes(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 0] = float("nan")
    windows = [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])]
    with pytest.raises(WeightError, match=r"window 1 of 2: logits are NaN or infinite"):
        perplexity(model, windows, progress=False)
    assert model.training


def test_infinite_logits_away_from_the_target_are_refused(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        model.lm_head.weight[90] = float("inf")
    with pytest.raises(WeightError, match="window 0 of 1"):
        perplexity(model, [torch.tensor([1, 2, 3])], progress=False)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([], "no window"),
        ([torch.tensor([1, 2]), torch.tensor([3])], "window 1 of 2: the text has 1 tokens, 2 are needed"),
        ([torch.tensor([], dtype=torch.int64)], "the text has 0 tokens"),
        ([torch.tensor([[1, 2, 3]])], "integer vector"),
        ([torch.tensor([1.0, 2.0])], "integer vector"),
        ([torch.tensor([1, VOCABULARY])], "token id 97 is outside the model's vocabulary of 97"),
        ([torch.tensor([-1, 3])], "token id -1 is outside"),
    ],
)
def test_unusable_windows_are_refused(model: LlamaForCausalLM, windows: list[Tensor], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        perplexity(model, windows, progress=False)
    assert model.training


def test_progress_bar_goes_to_standard_error_only(model: LlamaForCausalLM, capsys: pytest.CaptureFixture[str]) -> None:
    perplexity(model, [torch.tensor([1, 2, 3])], progress=True)
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "perplexity" in seen.err
    perplexity(model, [torch.tensor([1, 2, 3])], progress=False)
    assert capsys.readouterr() == ("", "")


def test_overflowing_loss_gives_infinity_and_no_exception(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    result = perplexity(model, [torch.tensor([1, 2, 3])], progress=False)
    assert result.perplexity == math.inf
    assert math.isfinite(result.loss)


def test_logits_are_upcast_in_chunks(model: LlamaForCausalLM, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = torch.nn.functional.cross_entropy

    def spy(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
        rows.append(len(logits))
        return real(logits, target, reduction=reduction)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    perplexity(model, [ids[:300]], progress=False)
    assert rows == [128, 128, 43]


@pytest.mark.parametrize(("length", "window"), [(2, 2), (2, 9), (10, 4), (11, 4), (12, 4), (13, 4), (700, 1024)])
def test_contiguous_windows_predict_every_token_but_the_first_once(length: int, window: int) -> None:
    windows = contiguous_windows(torch.arange(length), window)
    assert torch.cat([piece[1:] for piece in windows]).tolist() == list(range(1, length))
    assert all(len(piece) == window for piece in windows[:-1])
    assert all(left[-1] == right[0] for left, right in pairwise(windows))


@pytest.mark.parametrize(("length", "window", "count"), [(100, 10, 4), (10, 10, 3), (101, 7, 1), (50, 20, 6)])
def test_spaced_windows_reach_from_start_to_end_evenly(length: int, window: int, count: int) -> None:
    windows = spaced_windows(torch.arange(length), window, count)
    starts = [int(piece[0]) for piece in windows]
    assert [piece.tolist() for piece in windows] == [list(range(s, s + window)) for s in starts]
    assert len(starts) == count
    assert starts[0] == 0
    if count > 1:
        assert starts[-1] + window == length
        gaps = [after - before for before, after in pairwise(starts)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("length", "window", "count", "message"),
    [(9, 10, 1, "9 tokens, 10 are needed"), (9, 4, 0, "count is 0"), (9, 1, 1, "window is 1")],
)
def test_spaced_windows_refuse(length: int, window: int, count: int, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        spaced_windows(torch.arange(length), window, count)


@pytest.mark.parametrize(("length", "window", "message"), [(1, 4, "1 tokens, 2 are"), (9, 1, "window is 1")])
def test_contiguous_windows_refuse(length: int, window: int, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        contiguous_windows(torch.arange(length), window)


def test_result_is_frozen() -> None:
    result = Perplexity(1.0, 0.0, 1, 1, "", 0.0)
    with pytest.raises(AttributeError):
        result.loss = 2.0  # type: ignore[misc]
