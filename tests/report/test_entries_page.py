# SPDX-License-Identifier: Apache-2.0
"""The page and the pictures of kept entries: whole, self-contained, safe against names, and of any shape."""

import base64
import re
import struct
import sys
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from eigenprune.cli.main import app
from eigenprune.errors import ConfigError
from eigenprune.report.entries_page import KeptEntries, entries_page, typical
from eigenprune.report.entries_pictures import draw_layers, draw_matrix, draw_neighbours
from eigenprune.report.png import DIVERGING, RISING, colours, png_bytes
from tests.helpers.delta_folders import base_and_delta

MANY = 13  # KEN_viz wants exactly 12


def decoded(png: bytes) -> Tensor:
    """A literal reader of the PNGs that we write: uint8 [rows, columns, 3]."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    place, data, size = 8, b"", (0, 0)
    while place < len(png):
        length, kind = struct.unpack(">I4s", png[place : place + 8])
        body = png[place + 8 : place + 8 + length]
        assert struct.unpack(">I", png[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + body)
        if kind == b"IHDR":
            size = struct.unpack(">II", body[:8])
            assert body[8:] == bytes([8, 2, 0, 0, 0])
        data += body if kind == b"IDAT" else b""
        place += 12 + length
    columns, rows = size
    lines = torch.frombuffer(bytearray(zlib.decompress(data)), dtype=torch.uint8).view(rows, 1 + 3 * columns)
    assert int(lines[:, 0].sum()) == 0
    return lines[:, 1:].reshape(rows, columns, 3)


def model() -> KeptEntries:
    shapes: dict[str, tuple[int, ...]] = {f"h.{layer}.up.weight": (90, 30) for layer in range(MANY)}
    shapes |= {"embed.weight": (700, 20), "conv.weight": (4, 3, 5), "bias": (30,), "none.weight": (5, 5)}

    def made(name: str, what: Callable[..., Tensor]) -> Tensor:
        return what(shapes[name], generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))

    def mask(name: str) -> Tensor:
        return made(name, torch.rand) < (0.0 if name == "none.weight" else 0.3)

    return KeptEntries(list(shapes), mask, lambda name: made(name, torch.randn), {"base": "<b>&base"})


class Page(HTMLParser):
    """What a browser would fetch or run, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.images: list[bytes] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object")
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value is not None
                head, _, data = value.partition(",")
                if head == "data:image/png;base64":
                    self.images.append(base64.b64decode(data, validate=True))
                else:
                    self.fetched.append(value)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_colours_hit_their_stops_and_blanks_are_white() -> None:
    values = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0, torch.nan]])
    seen = colours(values, -1, 1, DIVERGING)[0].tolist()
    assert seen == [
        [*DIVERGING[0]],
        [*DIVERGING[0]],
        [*DIVERGING[2]],
        [*DIVERGING[-1]],
        [*DIVERGING[-1]],
        [255, 255, 255],
    ]
    pixels = colours(torch.rand(7, 5), 0, 1, RISING)
    assert torch.equal(decoded(png_bytes(pixels)), pixels)


def test_page_is_whole_and_fetches_nothing() -> None:
    kept = model()
    text = entries_page(kept, "A model", ["conv.weight", "none.weight"])
    page = Page(text)
    assert page.open == []
    assert page.fetched == []
    # Values and neighbours of two matrices, and one picture for every matrix; a vector is none.
    assert len(page.images) == 2 * 2 + MANY + 3
    assert all(decoded(image).numel() for image in page.images)
    assert text == entries_page(kept, "A model", ["conv.weight", "none.weight"])
    assert "&lt;b&gt;&amp;base" in text
    assert "h.*.up.weight" in text
    share = float(kept.mask("h.3.up.weight").double().mean())
    assert f">{share:.4f}<" in text


def test_default_is_the_middle_layer_of_the_largest_family() -> None:
    names = [f"a.{layer}" for layer in range(3)] + [f"b.{layer}" for layer in range(5)]
    assert typical(names) == ["b.2"]
    assert typical([]) == []
    assert re.search(r"<h2>One matrix</h2>\s*<h3>h[.]6[.]up[.]weight", entries_page(model(), "x"))


def test_hostile_names_stay_text() -> None:
    name = '"><script>alert(1)</script>.1'
    kept = KeptEntries([name], lambda _n: torch.eye(3).bool(), lambda _n: torch.eye(3), {name: name})
    page = Page(entries_page(kept, name))
    assert page.open == []


def test_unknown_tensor_is_told() -> None:
    with pytest.raises(ConfigError, match=r"no tensor 'x'.*h[.]0"):
        entries_page(model(), "x", ["x"])


@pytest.mark.parametrize("shape", [(1, 1), (30,), (90, 30), (30, 900), (2, 3, 4), (5, 5)])
def test_pictures_of_any_shape_are_drawn_and_alike_twice(shape: tuple[int, ...], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'eigenprune[plots]'")
    tuned, mask = torch.randn(shape), torch.rand(shape) < 0.4
    if shape == (5, 5):
        mask[:] = False
    for turn in "ab" if shape == (90, 30) else "a":
        draw_matrix(tmp_path / f"{turn}.values", "w", tuned, mask)
        draw_neighbours(tmp_path / f"{turn}.neighbours", "w", mask)
        draw_layers(tmp_path / f"{turn}.layers", "all", [(str(i), mask) for i in range(7 if len(shape) == 2 else 1)])
    for kind in ("values", "neighbours", "layers"):
        first = (tmp_path / f"a.{kind}").read_bytes()
        assert first.startswith(b"\x89PNG")
        again = tmp_path / f"b.{kind}"
        assert not again.exists() or again.read_bytes() == first
    with pytest.raises(ConfigError, match="no layer"):
        draw_layers(tmp_path / "x", "none", [])


def test_missing_matplotlib_is_told_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'eigenprune\[plots\]'"):
        draw_neighbours(tmp_path / "x", "w", torch.ones(2, 2, dtype=torch.bool))


def test_view_writes_the_page_of_a_delta_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, delta = base_and_delta(tmp_path)
    words = ["view", str(delta), "--out", str(tmp_path / "page.html"), "--quiet"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert (page.open, page.fetched) == ([], [])
    assert str(tmp_path) not in text
    assert "model.embed_tokens.weight" in text
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, "--overwrite" in done.stderr) == (1, True)
    assert CliRunner().invoke(app, [*words, "--overwrite"]).exit_code == 0
    assert (tmp_path / "page.html").read_text() == text
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = CliRunner().invoke(app, [*words[:3], str(tmp_path / "new.html"), "--png"])
    assert (done.exit_code, "eigenprune[plots]" in done.stderr) == (1, True)
    assert not (tmp_path / "new.html").exists()
