# SPDX-License-Identifier: Apache-2.0
"""What a measurement leaves behind: nothing. And what it refuses."""

import pytest
import torch
from torch import nn

from eigenprune.calibrate import collect_statistics
from eigenprune.errors import CalibrationError, WeightError
from tests.calibrate import tiny
from tests.calibrate.tiny import linears


def state(model: nn.Module) -> dict[str, object]:
    """All that a measurement touches on its way."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {name: parameter.grad is None for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: [len(getattr(module, h)) for h in hooks] for name, module in model.named_modules()},
        "forward": {name: module.__dict__.get("forward") for name, module in model.named_modules()},
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "autocast": torch.is_autocast_enabled("cpu"),
        "gradient mode": torch.is_grad_enabled(),
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for key, value in before.items():
        if key == "weights":
            assert all(torch.equal(tensor, after[key][name]) for name, tensor in value.items())
        else:
            assert value == after[key], key


def mixed_model() -> nn.Module:
    model = tiny.llama().train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    own = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: own(*args, **kwargs)  # as accelerate's hooks do
    model.model.layers[0].mlp.register_forward_hook(lambda *args: None)
    return model


def test_a_measurement_leaves_the_model_as_it_was() -> None:
    model = mixed_model()
    before = state(model)
    collect_statistics(model, tiny.windows(), linears(model), progress=False)
    assert_same(before, state(model))


@pytest.mark.parametrize("where", ["forward", "backward", "interrupt", "embeddings"])
def test_an_error_inside_leaves_the_model_as_it_was(where: str) -> None:
    model = mixed_model()
    calls = 0

    def fail(*_args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt if where == "interrupt" else ZeroDivisionError

    if where == "backward":
        model.model.layers[0].mlp.down_proj.register_full_backward_hook(fail)
    elif where == "embeddings":
        model.get_input_embeddings = lambda: 1 / 0
    else:
        model.model.layers[1].mlp.down_proj.register_forward_hook(fail)
    before = state(model)
    with pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
        collect_statistics(model, tiny.windows(9), linears(model), progress=False)
    assert_same(before, state(model))


@pytest.mark.parametrize(
    ("make", "window"),
    [(tiny.llama, 3), (tiny.bert, 0), (tiny.gpt2, 0), (lambda: tiny.bert("BertModel"), 3)],
    ids=["llama", "bert-mlm", "gpt2", "bert-trunk"],
)
def test_nan_activations_are_a_weight_error_that_names_a_layer_and_the_window(make, window: int) -> None:
    # Where the head is tied to the embeddings, the NaN is in the logits of every window.
    model, ids = make(), tiny.windows(5)
    ids[ids == 11] = 12
    ids[3, 5] = 11
    with torch.no_grad():
        model.get_input_embeddings().weight[11] = float("nan")
    before = state(model)
    with pytest.raises(WeightError, match=f"at calibration window {window};") as caught:
        collect_statistics(model, ids, linears(model), progress=False)
    assert str(caught.value).split(":")[0] in linears(model)
    after = state(model)
    del before["weights"], after["weights"]  # NaN is not equal to itself
    assert_same(before, after)


def test_an_infinite_weight_inside_names_the_first_layer_that_sees_it() -> None:
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = float("inf")
    with pytest.raises(WeightError, match=r"^model\.layers\.1\.mlp\.down_proj: .* input gram at calibration window 0"):
        collect_statistics(model, tiny.windows(), linears(model), kinds=("input_gram",), progress=False)


@pytest.mark.parametrize(("identity", "text"), [(tiny.VOCABULARY, "97"), (10**6, "1000000"), (-1, "-1")])
def test_token_ids_outside_the_vocabulary_are_a_calibration_error(identity: int, text: str) -> None:
    ids = tiny.windows()
    ids[2, 3] = identity
    with pytest.raises(CalibrationError, match=f"token id {text} is outside .* vocabulary of 97"):
        collect_statistics(tiny.llama(), ids, linears(tiny.llama()), progress=False)


def test_windows_longer_than_the_positions_are_a_calibration_error() -> None:
    model = tiny.gpt2()
    with pytest.raises(CalibrationError, match="does not run on 80 token ids alone"):
        collect_statistics(model, tiny.windows(1, 80), linears(model), progress=False)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (8,)])
def test_windows_of_no_tokens_or_another_shape_are_a_calibration_error(shape: tuple[int, ...]) -> None:
    model = tiny.llama()
    with pytest.raises(CalibrationError, match="calibration windows of shape"):
        collect_statistics(model, torch.zeros(shape, dtype=torch.long), linears(model), progress=False)


def test_unknown_kinds_no_layers_and_meta_models_are_refused() -> None:
    model, ids = tiny.llama(), tiny.windows()
    with pytest.raises(CalibrationError, match="unknown statistics \\['hessian'\\]"):
        collect_statistics(model, ids, linears(model), kinds=("hessian",), progress=False)
    with pytest.raises(CalibrationError, match="no layer"):
        collect_statistics(model, ids, {}, progress=False)
    with pytest.raises(WeightError, match="meta device"):
        collect_statistics(tiny.llama().to("meta"), ids, linears(model), progress=False)


def test_asking_for_what_was_not_measured_is_a_calibration_error() -> None:
    model = tiny.llama()
    got = collect_statistics(model, tiny.windows(1), linears(model), kinds=("input_gram",), progress=False)
    with pytest.raises(CalibrationError, match="hold no output_gram"):
        got.output_gram("model.layers.0.mlp.up_proj")
    with pytest.raises(CalibrationError, match="know no layer 'lm_head'"):
        got.input_gram("lm_head")
