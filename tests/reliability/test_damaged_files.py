# SPDX-License-Identifier: Apache-2.0
"""Valid files with a few bytes changed, configs of any JSON: our error or a result, nothing else (rows G5, G6, G7)."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eigenprune import EigenpruneConfig, prune_
from eigenprune.cli.loading import load_model
from eigenprune.errors import EigenpruneError
from eigenprune.hub.card import build_card
from eigenprune.hub.checkpoint import check_factor_files
from eigenprune.hub.limits import check_folder
from tests.helpers.tiny_models import tiny_model, token_windows
from tests.hub.test_checkpoint import CONFIG_LIES, TENSOR_LIES
from tests.reliability.tiny_checkpoint import LAYER, ROUNDS, layer, write

MUTATIONS = 500 * ROUNDS


def _flip(raw: bytearray, random_: random.Random) -> None:
    raw[random_.randrange(len(raw))] ^= 1 << random_.randrange(8)


def _insert(raw: bytearray, random_: random.Random) -> None:
    place = random_.randrange(len(raw) + 1)
    raw[place:place] = random_.randbytes(random_.randint(1, 9))


def _delete(raw: bytearray, random_: random.Random) -> None:
    place = random_.randrange(len(raw))
    del raw[place : place + random_.randint(1, 9)]


def _splice(raw: bytearray, random_: random.Random) -> None:
    """A piece of the file over another place of it."""
    source, target, length = random_.randrange(len(raw)), random_.randrange(len(raw)), random_.randint(1, 40)
    piece = raw[source : source + length]
    raw[target : target + len(piece)] = piece


def _digit(raw: bytearray, random_: random.Random) -> None:
    """Another number for one in the text."""
    places = [i for i, byte in enumerate(raw[:600]) if chr(byte).isdigit()]
    if places:
        raw[random_.choice(places)] = ord(random_.choice("0123456789-.e"))


def _in_header(change: Callable[[dict[str, Any], random.Random], str]) -> Callable[[bytearray, random.Random], None]:
    """A change of the parsed header, whose length is then right again."""

    def apply(raw: bytearray, random_: random.Random) -> None:
        length = int.from_bytes(raw[:8], "little")
        text = change(json.loads(raw[8 : 8 + length]), random_).encode()
        raw[: 8 + length] = len(text).to_bytes(8, "little") + text

    return apply


def _two(header: dict[str, Any], random_: random.Random) -> list[Any]:
    return random_.sample([entry for name, entry in header.items() if name != "__metadata__"], 2)


def _swap_offsets(header: dict[str, Any], random_: random.Random) -> str:
    one, other = _two(header, random_)
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    return json.dumps(header)


def _overlap(header: dict[str, Any], random_: random.Random) -> str:
    one, other = _two(header, random_)
    other["data_offsets"] = one["data_offsets"]
    return json.dumps(header)


def _hole(header: dict[str, Any], random_: random.Random) -> str:
    entry = _two(header, random_)[0]
    shift = random_.randint(1, 64)
    entry["data_offsets"] = [place + shift for place in entry["data_offsets"]]
    return json.dumps(header)


def _same_name_twice(header: dict[str, Any], random_: random.Random) -> str:
    name = random_.choice([name for name in header if name != "__metadata__"])
    return json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"


def _other_value(header: dict[str, Any], random_: random.Random) -> str:
    entry = _two(header, random_)[0]
    values: list[Any] = [None, -1, 2**63, 2**64, 1.5, "x", [], {}, [-1], [2**62, 4], True, "F8_E4M3", "I32"]
    entry[random_.choice(["dtype", "shape", "data_offsets"])] = random_.choice(values)
    return json.dumps(header)


ANYWHERE = (_flip, _insert, _delete, _splice, _digit)
HEADER = tuple(map(_in_header, (_swap_offsets, _overlap, _hole, _same_name_twice, _other_value)))


def _damaged(raw: bytes, random_: random.Random, ways: tuple[Callable[..., None], ...]) -> bytes:
    changed = bytearray(raw)
    way = random_.choice(ways)
    for _ in range(1 if way in HEADER else random_.randint(1, 3)):  # the header can be parsed once
        if changed:
            way(changed, random_)
    return bytes(changed)


def _examples(folder: Path, seed: int) -> Iterator[str]:
    """Damage one file of `folder` after the other, and put it back; says what was damaged."""
    random_ = random.Random(seed)
    names = ("model-00001-of-00001.safetensors", "config.json", "model.safetensors.index.json")
    whole = {name: (folder / name).read_bytes() for name in names}
    for number in range(MUTATIONS):
        name = names[0] if number % 2 else random_.choice(names)
        ways = ANYWHERE + HEADER if name.endswith("safetensors") else ANYWHERE
        (folder / name).write_bytes(_damaged(whole[name], random_, ways))
        yield f"example {number}, {name}"
        (folder / name).write_bytes(whole[name])


def test_g5_damaged_file_gives_our_error_or_a_result_and_nothing_else(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", index=True)
    made, refused = layer(), 0
    doors: tuple[Callable[[], object], ...] = (
        lambda: build_card(folder, "me/x"),
        lambda: check_factor_files(sorted(folder.glob("*.safetensors")), {LAYER: made}),
        lambda: check_folder(folder),
    )
    for example in _examples(folder, seed=0):
        for door in doors:
            try:
                door()
            except EigenpruneError:
                refused += 1
            except Exception as error:
                raise AssertionError(f"{example}: a foreign error") from error
    assert refused > 0.2 * MUTATIONS * len(doors)  # else the damage was none
    build_card(folder, "me/x")  # and the whole files are taken


def test_g6_there_are_enough_lies() -> None:
    """They are told in tests/hub/test_checkpoint.py."""
    assert len(CONFIG_LIES) >= 30
    assert len(CONFIG_LIES) + len(TENSOR_LIES) >= 45


def test_g5_damaged_weights_of_a_whole_model_load_or_give_our_error(tmp_path: Path) -> None:
    model = tiny_model("llama")
    prune_(model, EigenpruneConfig(keep=0.5), windows=token_windows(), progress=False)
    model.save_pretrained(tmp_path / "whole")
    folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / "model"))
    path, random_ = folder / "model.safetensors", random.Random(1)
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for number in range(60 * ROUNDS):
        path.write_bytes(_damaged(whole[:head], random_, ANYWHERE + HEADER) + whole[head:])
        try:
            load_model(str(folder))
        except EigenpruneError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"example {number}: a foreign error") from error
    assert refused > 20 * ROUNDS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = sorted(EigenpruneConfig().to_dict())
NAMES = st.from_regex(r"[A-Za-z0-9_]{1,8}(\.[A-Za-z0-9_]{1,8}){0,3}", fullmatch=True)
EVERY_TIME = settings(
    max_examples=200 * ROUNDS, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@EVERY_TIME
@given(JSON | st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5))
def test_g7_any_json_is_a_config_or_our_error(value: Any) -> None:
    try:
        config = EigenpruneConfig.from_dict(value)
    except EigenpruneError:
        return
    json.dumps(config.to_dict())


@EVERY_TIME
@given(
    keep=st.floats(0, 1, exclude_min=True),
    method=st.sampled_from(["kfac", "svd", "asvd", "svd-llm"]),
    layout=st.sampled_from(["pair", "pivot"]),
    allocation=st.sampled_from([None, "global", "uniform"]),
    numbers=st.tuples(*[st.integers(1, 1 << 30)] * 3),
    skip=st.lists(st.text(max_size=8), max_size=3),
    modules=st.dictionaries(
        NAMES, st.tuples(st.sampled_from(["pair", "pivot"]), st.integers(1, 1 << 24)).map(list), max_size=4
    ),
    provenance=st.dictionaries(st.text(max_size=8), JSON, max_size=3),
)
def test_g7_valid_config_comes_back_from_json_as_it_was(numbers: tuple[int, int, int], **values: Any) -> None:
    multiple, windows, window = numbers
    config = EigenpruneConfig(**values, rank_multiple=multiple, windows=windows, window=window)
    saved = json.dumps(config.to_dict())
    again = EigenpruneConfig.from_dict(json.loads(saved))
    assert json.dumps(again.to_dict()) == saved
    assert again.format_version == 1  # without quantised weights: what older versions read too
