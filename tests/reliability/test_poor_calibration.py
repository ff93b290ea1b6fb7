# SPDX-License-Identifier: Apache-2.0
"""Calibration that says little: tiny, rank-deficient, of another kind than the model, or none but random tokens."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eigenprune import EigenpruneConfig
from eigenprune.calibrate import collect_statistics, prior_windows
from eigenprune.calibrate.prior import RANK_OFFSET, blended
from eigenprune.errors import ConfigError
from eigenprune.layers import select_layers
from eigenprune.prune import prune_
from eigenprune.spectral import METHODS
from tests.helpers.tiny_models import VOCABULARY, logits, tiny_model, tiny_tokenizer, token_windows

WINDOWS = {
    "tiny": torch.tensor([[5, 9]]),
    "rank-deficient": torch.full((2, 16), 7),  # one token, over and over
    "mismatched": torch.randint(100, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0)),
}


# All but those that need a task, or a LoRA.
OF_TEXT = [name for name, row in METHODS.items() if row.removal is None and row.worth != "importance"]


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("method", OF_TEXT)
def test_no_calibration_text_however_poor_breaks_a_method(method: str, kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    config = EigenpruneConfig(keep=0.7, method=method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = prune_(model, config, windows=WINDOWS[kind], cache_dir=tmp_path, progress=False)
    assert torch.isfinite(logits(model)).all()
    # Some published rules stop at whole steps of a matrix, with no filling after.
    assert 0.6 < report.keep <= 0.7
    if METHODS[method].statistics:
        assert report.calibration["tokens"] == WINDOWS[kind].numel()
    if METHODS[method].input_metric == "gram":
        few = WINDOWS[kind].numel() < 96
        texts = [str(warning.message) for warning in caught]
        assert any("tokens, and model.layers.0.mlp.down_proj has 96 inputs" in text for text in texts) == few


def test_random_tokens_follow_one_over_the_rank_and_leave_special_ones_out() -> None:
    model = tiny_model("llama")
    drawn = prior_windows(model, count=100, window=1000, seed=3).flatten()
    counts = torch.bincount(drawn, minlength=VOCABULARY).double()
    assert (counts[[0, 1, 2]] == 0).all()
    chances = 1 / (torch.arange(VOCABULARY) + RANK_OFFSET).double()
    chances[[0, 1, 2]] = 0
    expected = 100_000 * chances / chances.sum()
    # Poisson counts of some 800: five standard deviations.
    assert ((counts - expected).abs() <= 5 * expected.clamp_min(1).sqrt()).all()
    assert torch.equal(drawn, prior_windows(model, count=100, window=1000, seed=3).flatten())


def gram(statistics, layer: str) -> Tensor:
    return statistics.input_gram(layer).double()


def test_the_prior_is_mixed_in_at_the_trace_of_the_data() -> None:
    model = tiny_model("llama")
    layers = select_layers(model).chosen
    kinds = ("input_gram", "output_gram")
    data = collect_statistics(model, token_windows(1, 8), layers, kinds=kinds, progress=False)
    prior = collect_statistics(model, token_windows(4, 32).flip(0), layers, kinds=kinds, progress=False)
    mixed = blended(data, prior, 0.5)
    for layer in layers:
        c, p = gram(data, layer), gram(prior, layer)
        wanted = 0.5 * p * (c.trace() / p.trace()) + 0.5 * c
        assert float((gram(mixed, layer) - wanted).norm()) <= 8 * torch.finfo(torch.float32).eps * float(wanted.norm())
        assert torch.equal(mixed.output_gram(layer), data.output_gram(layer))
    assert torch.equal(blended(data, prior, 0.0).input_gram(layer), data.input_gram(layer))
    with pytest.raises(ConfigError, match="must be in"):
        blended(data, prior, 1.5)


def test_a_prior_and_random_tokens_as_the_only_text_prune_a_model(tmp_path: Path) -> None:
    tiny = WINDOWS["tiny"]
    results = {}
    for name, settings in {"plain": {}, "prior": {"prior": 0.5}}.items():
        model = tiny_model("llama")
        with pytest.warns(UserWarning, match="prior=0.5"):
            report = prune_(
                model, EigenpruneConfig(keep=0.6, **settings), windows=tiny, cache_dir=tmp_path, progress=False
            )
        assert report.settings["prior"] == settings.get("prior", 0.0)
        results[name] = logits(model)
    assert not torch.equal(results["plain"], results["prior"])
    model = tiny_model("llama")
    config = EigenpruneConfig(keep=0.6, calibration="random-tokens", windows=4, window=32)
    report = prune_(model, config, tokenizer=tiny_tokenizer(), cache_dir=tmp_path, progress=False)
    assert report.calibration["source"] == "random-tokens"
    assert report.calibration["tokens"] == 128
