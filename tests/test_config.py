# SPDX-License-Identifier: Apache-2.0
"""What `EigenpruneConfig` refuses, and its saved form."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from eigenprune import EigenpruneConfig
from eigenprune.config import FORMAT_VERSION
from eigenprune.errors import ConfigError


@pytest.mark.parametrize("keep", [0, -0.1, 1.0001, 2, math.nan, math.inf, True, False, "0.8", None, [0.8], 0.8j])
def test_keep_outside_its_range_or_type_is_refused(keep: Any) -> None:
    with pytest.raises(ConfigError, match="keep="):
        EigenpruneConfig(keep=keep)


@pytest.mark.parametrize("keep", [1, 1.0, 0.5, 1e-9])
def test_keep_in_its_range_is_taken(keep: float) -> None:
    assert EigenpruneConfig(keep=keep).keep == keep


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("method", "magic"),
        ("method", None),
        ("method", ["kfac"]),
        ("layout", "dense"),
        ("layout", None),
        ("layout", ["pivot"]),
        ("allocation", "greedy"),
        ("allocation", {}),
        ("rank_multiple", 0),
        ("rank_multiple", 8.0),
        ("rank_multiple", True),
        ("windows", -1),
        ("choose_windows", "best"),
        ("choose_windows", ["first"]),
        ("choose_windows", "damage"),
        ("window", "1024"),
        ("seed", -1),
        ("seed", 0.5),
        ("skip", "lm_head"),
        ("skip", [1]),
        ("skip", 5),
        ("texts", [None]),
        ("texts", 5),
        ("provenance", "me"),
        ("provenance", None),
        ("format_version", 0),
        ("format_version", "1"),
        ("format_version", True),
        ("format_version", None),
    ],
)
def test_unknown_or_ill_typed_setting_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError):
        EigenpruneConfig(**{setting: value})


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"kfac.*svd"):
        EigenpruneConfig(method="magic")
    with pytest.raises(ConfigError, match=r"pair.*pivot"):
        EigenpruneConfig(layout="dense")
    with pytest.raises(ConfigError, match=r"global.*uniform"):
        EigenpruneConfig(allocation="greedy")


def test_newer_version_is_refused_before_its_new_fields_are() -> None:
    saved = EigenpruneConfig().to_dict() | {
        "format_version": FORMAT_VERSION + 1,
        "new_field": 1,
        "method": "new-method",
    }
    with pytest.raises(ConfigError, match="pip install -U eigenprune"):
        EigenpruneConfig.from_dict(saved)


def test_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="ranks"):
        EigenpruneConfig.from_dict(EigenpruneConfig().to_dict() | {"ranks": {}})


def test_another_quantization_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="bitsandbytes"):
        EigenpruneConfig.from_dict({"quant_method": "bitsandbytes"})


@pytest.mark.parametrize("rank", [0, -1, 2**31, 2**63, 2**200, math.nan, 8.0, "8", None, True, [8]])
def test_impossible_rank_of_a_saved_layer_is_refused(rank: Any) -> None:
    with pytest.raises(ConfigError, match="rank"):
        EigenpruneConfig(modules={"a.b": ["pair", rank]})


@pytest.mark.parametrize("entry", [[], ["pair"], ["pair", 8, 8], "pair", 8, None, {"pair": 8}])
def test_saved_layer_of_another_shape_is_refused(entry: Any) -> None:
    with pytest.raises(ConfigError, match=r"a\.b"):
        EigenpruneConfig(modules={"a.b": entry})


@pytest.mark.parametrize("layout", ["dense", "PAIR", None, 0, ["pair"]])
def test_unknown_layout_of_a_saved_layer_is_refused(layout: Any) -> None:
    with pytest.raises(ConfigError, match="layout"):
        EigenpruneConfig(modules={"a.b": [layout, 8]})


@pytest.mark.parametrize("name", ["", ".", "a..b", "a.", ".a", "a/b", "../a", "a b", "a\n", "a.b\n", "ä", "a" * 600, 3])
def test_impossible_layer_name_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError):
        EigenpruneConfig(modules={name: ["pair", 8]})


@pytest.mark.parametrize("modules", [None, [], "a", 5])
def test_modules_that_map_nothing_are_refused(modules: Any) -> None:
    with pytest.raises(ConfigError, match="modules"):
        EigenpruneConfig(modules=modules)


def test_saved_form_is_json_and_comes_back_equal() -> None:
    config = EigenpruneConfig(keep=0.7, method="asvd", layout="pair", skip=["a"], modules={"a.b": ["pair", 8]}, seed=3)
    saved = json.loads(json.dumps(config.to_dict()))
    again = EigenpruneConfig.from_dict(saved)
    assert again.to_dict() == config.to_dict()
    assert saved["quant_method"] == "eigenprune"


def test_saved_form_holds_no_local_path(tmp_path: Path) -> None:
    config = EigenpruneConfig(texts=[tmp_path / "notes.txt"])
    assert config.texts == (str(tmp_path / "notes.txt"),)
    assert str(tmp_path) not in json.dumps(config.to_dict())


def test_one_text_path_is_a_list_of_one(tmp_path: Path) -> None:
    assert EigenpruneConfig(texts=tmp_path / "a.txt").texts == (str(tmp_path / "a.txt"),)


def test_two_configs_share_no_state() -> None:
    one, other = EigenpruneConfig(), EigenpruneConfig()
    one.modules["a"] = ["pair", 8]
    assert other.modules == {}
