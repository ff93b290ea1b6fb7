# SPDX-License-Identifier: Apache-2.0
"""Text that a model writes for its own calibration: drawn from its distribution, the same for a seed, resumable."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eigenprune.calibrate import Sampling, can_sample, sample_windows, sampled
from eigenprune.calibrate.sampled import draw
from eigenprune.errors import CalibrationError, WeightError
from tests.helpers.compare import state_hashes
from tests.helpers.tiny_models import POSITIONS, VOCABULARY, tiny_model, tiny_tokenizer

SPECIAL = {0, 1, 2}
SMALL = Sampling(seed=3, windows=5, window=24, document=12)


def sample(model: nn.Module, sampling: Sampling = SMALL, cache_dir: Path | None = None) -> Tensor:
    return sample_windows(model, tiny_tokenizer(), sampling, cache_dir=cache_dir, progress=False)


def in_batches_of(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Ten documents of the small sampling, `most` at a time."""
    monkeypatch.setattr(sampled, "MOST_AT_ONCE", most)


class Interrupted:
    """A hook that stops the run at the n-th forward pass of the model."""

    def __init__(self, model: nn.Module, passes: int) -> None:
        self.left = passes
        self.handle = model.register_forward_pre_hook(self)

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def passes_of(model: nn.Module, run: object) -> int:
    """How often `run` calls the model."""
    count = [0]
    handle = model.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    run()
    handle.remove()
    return count[0]


@pytest.fixture(autouse=True)
def no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model itself writes, whatever the machine: hooks on a model are not on its copy."""
    monkeypatch.setattr(sampled, "has_fast_bfloat16", lambda device: False)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "phi3"])
def test_windows_have_their_shape_and_no_special_token(kind: str) -> None:
    windows = sample(tiny_model(kind))
    assert windows.shape == (SMALL.windows, SMALL.window)
    assert windows.dtype == torch.int64
    assert not SPECIAL & set(windows.unique().tolist())
    assert int(windows.max()) < VOCABULARY


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    model = tiny_model("llama")
    first = sample(model)
    torch.manual_seed(99)  # the global generator is not asked
    assert torch.equal(sample(model), first)
    assert not torch.equal(sample(model, Sampling(seed=4, windows=5, window=24, document=12)), first)


def test_the_global_generator_the_weights_and_the_modes_stay_as_they_were() -> None:
    model = tiny_model("llama").train()
    before, state = state_hashes(model), torch.get_rng_state()
    sample(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert state_hashes(model) == before
    assert all(module.training for module in model.modules())


def test_a_window_is_whole_documents_and_a_last_one_that_is_cut() -> None:
    """Read with the cache and without, the model gives the same distributions: each token is drawn from its prefix."""
    model = tiny_model("llama")
    sampling = Sampling(seed=1, windows=3, window=20, document=8)
    windows = sample(model, sampling)
    whole = sample(model, Sampling(seed=1, windows=3, window=24, document=8))
    assert torch.equal(windows, whole[:, :20])
    # The literal way: one document after another, no cache, the uniforms of the one batch of nine documents.
    documents = whole.view(9, 8)
    generator = torch.Generator().manual_seed(1 * 1_000_003)
    words = torch.tensor([i for i in range(VOCABULARY) if i not in SPECIAL])
    assert torch.equal(documents[:, 0], words[torch.randint(len(words), (9,), generator=generator)])
    for position in range(1, 8):
        uniforms = torch.rand(9, generator=generator, dtype=torch.float64)
        for row in range(9):
            prefix = torch.cat([torch.tensor([1]), documents[row, :position]]).unsqueeze(0)
            with torch.no_grad():
                logits = model(input_ids=prefix, use_cache=False).logits[0, -1].double()
            logits[list(SPECIAL)] = -math.inf
            masses = logits.softmax(0).cumsum(0)
            token = int(documents[row, position])
            # Float32 logits of the two ways differ by rounding; so does the mass below a token, by as much.
            slack = 1e-5
            below = masses[token - 1] if token else 0.0
            assert below - slack <= uniforms[row] <= masses[token] + slack


def test_tokens_come_as_often_as_the_softmax_says() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 3.0])
    forbidden = torch.tensor([False, False, False, False, True])
    draws, temperature = 40_000, 0.7
    uniforms = torch.rand(draws, generator=generator, dtype=torch.float64)
    tokens = draw(logits.expand(draws, -1), uniforms, temperature, forbidden)
    wanted = torch.softmax(logits[:4].double() / temperature, 0)
    found = tokens.bincount(minlength=5).double() / draws
    # Five standard deviations of a share out of that many draws.
    assert (found[:4] - wanted).abs().max() < 5 * (0.25 / draws) ** 0.5
    assert found[4] == 0


def test_the_ends_of_the_distribution_are_tokens_that_may_be_drawn() -> None:
    logits = torch.zeros(2, 6, dtype=torch.bfloat16)
    forbidden = torch.tensor([True, False, True, False, True, True])
    uniforms = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniforms, 1.0, forbidden).tolist() == [1, 3]


def test_lower_temperature_repeats_more() -> None:
    model = tiny_model("llama")
    cold, warm = (
        sample(model, Sampling(windows=4, window=48, document=48, temperature=t)).unique().numel() for t in (0.01, 1.0)
    )
    assert cold < warm


@pytest.mark.parametrize("passes", [0, 5, 12, 40], ids=["at once", "first batch", "second batch", "later batch"])
def test_interrupted_sampling_goes_on_and_ends_bit_identical(
    passes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_batches_of(monkeypatch, 2)  # five batches, of 11 passes each
    model = tiny_model("llama")
    whole = sample(model)
    stop = Interrupted(model, passes)
    with pytest.raises(KeyboardInterrupt):
        sample(model, cache_dir=tmp_path)
    stop.handle.remove()
    done = []
    left = passes_of(model, lambda: done.append(sample(model, cache_dir=tmp_path)))
    assert torch.equal(done[0], whole)
    assert left == 11 * (5 - passes // 11)  # finished batches are not written again
    again = passes_of(model, lambda: done.append(sample(model, cache_dir=tmp_path)))
    assert again == 0
    assert torch.equal(done[1], whole)


def test_another_model_or_setting_does_not_find_the_kept_text(tmp_path: Path) -> None:
    model = tiny_model("llama")
    sample(model, cache_dir=tmp_path)
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    for changed, sampling in ((other, SMALL), (model, Sampling(seed=3, windows=5, window=24, document=8))):
        assert passes_of(changed, lambda m=changed, s=sampling: sample(m, s, tmp_path)) > 0


@pytest.mark.parametrize("damage", [b"", b"\x10\0\0\0\0\0\0\0{}", None], ids=["empty", "cut", "other tensors"])
def test_damaged_kept_text_is_dropped(damage: bytes | None, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = tiny_model("llama")
    whole = sample(model, cache_dir=tmp_path)
    file = next(tmp_path.glob("sampled-*.safetensors"))
    if damage is None:
        save_file({"tokens": torch.zeros(3, 3)}, file)
    else:
        file.write_bytes(damage)
    assert torch.equal(sample(model, cache_dir=tmp_path), whole)


def test_batches_are_as_many_as_the_cache_bound_asks_and_even(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(sampled._batches(160, 64)) == [53, 53, 54]
    model = tiny_model("llama")
    # 2 layers, 4 heads of 16, float32, keys and values: 1024 bytes a token; the embedding, 128 x 64, is the largest.
    assert sampled._at_once(model, torch.float32, 13) == 4 * 128 * 64 * 4 // (1024 * 13)
    assert sampled._at_once(model, torch.float32, 10**9) == 1


@pytest.mark.parametrize("kind", ["bert", "albert", "t5"])
def test_models_that_do_not_write_are_refused(kind: str) -> None:
    model = tiny_model(kind)
    assert not can_sample(model)
    with pytest.raises(CalibrationError, match="does not write text"):
        sample(model)


def test_documents_beyond_the_positions_are_refused() -> None:
    model = tiny_model("gpt2")
    sample(model, Sampling(windows=1, window=POSITIONS, document=POSITIONS))  # the last token is drawn, not read
    with pytest.raises(CalibrationError, match="cannot write"):
        sample(model, Sampling(windows=1, window=POSITIONS + 1, document=POSITIONS + 1))


def test_non_finite_logits_name_the_sampling() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    with pytest.raises(WeightError, match="writes calibration text"):
        sample(model)
    assert not model.training


@pytest.mark.parametrize(
    "settings",
    [{"windows": 0}, {"window": 1}, {"document": 0}, {"temperature": 0.0}, {"temperature": math.nan}],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(CalibrationError):
        Sampling(**settings)


def test_a_bfloat16_copy_writes_what_the_model_in_bfloat16_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled, "has_fast_bfloat16", lambda device: True)
    model = tiny_model("llama")
    before = state_hashes(model)
    eight = Sampling(windows=4, window=24, document=12)  # documents: one batch in either dtype
    copied = sample(model, eight)
    assert state_hashes(model) == before
    assert all(p.dtype == torch.float32 for p in model.parameters())
    half = tiny_model("llama")
    for parameter in half.parameters():
        parameter.data = parameter.data.bfloat16()
    assert torch.equal(copied, sample(half, eight))
    assert half.config._attn_implementation == model.config._attn_implementation == "sdpa"
