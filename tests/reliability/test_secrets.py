# SPDX-License-Identifier: Apache-2.0
"""The token is in no place where it could be found later, also if the push fails half way (row G13)."""

import json
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from eigenprune import push_to_hub
from eigenprune.errors import HubError
from tests.hub.client import Client
from tests.hub.server import TOKEN, Hub
from tests.hub.shared import pruned_folder

REPO = "me/tiny"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned_folder(tmp_path_factory.mktemp("secrets"), "small", keep=0.7, max_shard_size="60KB")[0]


@pytest.mark.parametrize("given", ["argument", "environment", "file"])
def test_g13_token_is_in_none_of_twelve_sinks(given: str, hub: Hub, small: Path, tmp_path: Path) -> None:
    environment, options = {}, {}
    if given == "environment":
        environment = {"HF_TOKEN": TOKEN}
    elif given == "file":
        (tmp_path / "token").write_text(TOKEN)
        environment = {"HF_TOKEN_PATH": str(tmp_path / "token")}
    else:
        options = {"token": TOKEN}
    with Client(hub.url, tmp_path, **environment) as client:
        pushed = client("push", folder=str(small), repo=REPO, **options)
        hub.repos, hub.fault = {}, lambda request: 403 if "/commit/" in request.path else None
        failed = client("push", folder=str(small), repo=REPO, **options)
        hub.fault = None
        again = client("push", folder=str(small), repo=REPO, **options)
        pulled = client("pull", repo=REPO)
        client.errors.flush()
        written, log = Path(client.errors.name).read_text(errors="replace"), client.log.read_text(errors="replace")
    assert "value" in pushed
    assert "value" in again
    assert "value" in pulled
    files = hub.files(REPO)
    cache = [path for path in (tmp_path / "hf-home").rglob("*") if path.is_file()]
    sinks = {
        "values": json.dumps([pushed["value"], again["value"]]),
        "warnings": json.dumps([answer["warnings"] for answer in (pushed, failed, again, pulled)]),
        "message of the error": failed["message"],
        "traceback and repr of the error": failed["traceback"],
        "repr of the config": json.dumps(pulled["value"]),
        "standard error": written,
        "log at debug level": log,
        "uploaded config": files["config.json"].decode(),
        "uploaded card": files["README.md"].decode(),
        "uploaded report": files["prune_report.json"].decode(),
        "all other uploads": "".join(content.decode("latin-1") for content in files.values()),
        "paths and bodies of requests": "".join(r.path + r.body.decode("latin-1") for r in hub.requests),
        "cache of the hub library": "".join(path.read_bytes().decode("latin-1") for path in cache),
        "folder on disk": "".join(path.read_bytes().decode("latin-1") for path in small.iterdir()),
    }
    assert len(sinks) >= 12
    assert any(TOKEN in json.dumps(request.headers) for request in hub.requests)  # it was used
    assert "injected" in sinks["message of the error"]
    assert "DEBUG" in sinks["log at debug level"]
    assert len(cache) > 5
    assert [name for name, text in sinks.items() if TOKEN in text] == []


def test_g13_frames_of_the_error_show_no_token_to_a_formatter_without_locals(small: Path) -> None:
    """The Hub cannot be reached here; what is raised and all it was raised from are formatted."""
    with pytest.raises(HubError) as error:
        push_to_hub(small, REPO, token=TOKEN)
    shown = "".join(traceback.format_exception(error.value)) + repr(error.value) + repr(error.value.__context__)
    assert TOKEN not in shown
