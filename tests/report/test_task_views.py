# SPDX-License-Identifier: Apache-2.0
"""What a removal looks like: the sums behind the pictures, and the pictures themselves where matplotlib is there."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from eigenprune.errors import ConfigError
from eigenprune.report.task_pictures import check_matplotlib, worth_figure, write_pictures
from eigenprune.report.task_views import Component, PathPoint, Shares, TaskViews, most_changed

PNG = b"\x89PNG\r\n\x1a\n"


def views() -> TaskViews:
    """Two layers of two kinds, by hand."""
    components = (
        Component("model.layers.0.attn.k", "k", 0, 2.0, -0.5, True),
        Component("model.layers.0.attn.k", "k", 1, 1.0, 0.25, False),
        Component("model.layers.0.mlp.down", "down", 0, 3.0, -0.125, False),
        Component("model.layers.7.attn.k", "k", 0, 2.0, math.nan, False),
        Component("model.layers.7.attn.k", "k", 0, 0.5, -1.0, True),
        Component("model.layers.7.attn.k", "k", 0, 0.25, -2.0, True),
    )
    path = (PathPoint(0.0, 0.1, 5.0, 3.0), PathPoint(0.25, 0.5, 2.0, 3.01), PathPoint(0.5, 0.4, 2.5, 3.1))
    shares = (Shares("int-mult", 80, 11 / 80, 78 / 80, (0.079, 0.23), (0.913, 0.993), 1e-9),)
    return TaskViews(components, path, 1, 3.05, shares)


def test_sums_by_layer_and_kind_are_those_of_hand() -> None:
    cells = {(cell["depth"], cell["kind"]): cell for cell in views().by_layer_and_kind()}
    assert cells.keys() == {(0, "k"), (0, "down"), (7, "k")}
    assert cells[0, "k"] == {
        "depth": 0,
        "kind": "k",
        "components": 2,
        "removed": 1,
        "negative": -0.5,
        "positive": 0.25,
    }
    assert (cells[7, "k"]["removed"], cells[7, "k"]["negative"], cells[7, "k"]["components"]) == (2, -3.0, 3)


def test_report_form_names_the_removed_and_the_stop() -> None:
    found = views().to_dict()
    assert [one["sigma"] for one in found["removed"]] == [2.0, 0.5, 0.25]
    assert found["path"][found["chosen"]]["accuracy"] == 0.5
    assert found["shares"][0]["total"] == 80


def test_most_changed_matrices_come_first_and_stay_in_model_order() -> None:
    assert list(most_changed(views(), 1)) == ["model.layers.7.attn.k"]
    assert list(most_changed(views(), 2)) == ["model.layers.0.attn.k", "model.layers.7.attn.k"]
    untouched = replace(views(), components=tuple(replace(one, removed=False) for one in views().components))
    assert list(most_changed(untouched, 2)) == ["model.layers.0.attn.k", "model.layers.7.attn.k"]  # by lowest worth


def test_missing_matplotlib_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for call in (check_matplotlib, lambda: write_pictures(views(), tmp_path)):
        with pytest.raises(ConfigError, match=r"pip install 'eigenprune\[plots\]'"):
            call()
    assert not list(tmp_path.iterdir())


def test_pictures_are_written_of_full_and_of_empty_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'eigenprune[plots]'")
    written = write_pictures(views(), tmp_path / "new" / "folder", "mult")
    assert [path.name for path in written] == [f"mult-{part}.png" for part in ("worth", "layers", "path", "tests")]
    assert all(path.read_bytes().startswith(PNG) for path in written)
    # Nothing was found, nothing was tested, and there is no guard.
    nothing = replace(views(), path=views().path[:1], chosen=0, retention_bound=None, shares=())
    assert len(write_pictures(nothing, tmp_path)) == 3
    with pytest.raises(ConfigError, match="to draw"):
        write_pictures(TaskViews((), (), 0, None), tmp_path)
    with pytest.raises(ConfigError, match=r"no\.such\.layer"):
        worth_figure(views(), ["no.such.layer"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_pictures(views(), tmp_path / "file" / "inside")


def test_drawn_points_are_the_components_and_removed_ones_stand_out() -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'eigenprune[plots]'")
    figure = worth_figure(views(), ["model.layers.0.attn.k"])
    kept, removed = (cloud.get_offsets().tolist() for cloud in figure.axes[0].collections)
    assert (kept, removed) == ([[1.0, 0.25]], [[2.0, -0.5]])
