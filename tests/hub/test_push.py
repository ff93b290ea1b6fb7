# SPDX-License-Identifier: Apache-2.0
"""Push and pull through the real client of the Hub against a server on loopback (row G16)."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from eigenprune.hub.facts import file_hash
from tests.helpers.compare import state_hashes
from tests.hub.client import Client
from tests.hub.server import TOKEN, Blob, Commit, Hub, Request
from tests.hub.shared import pruned_folder

REPO = "me/tiny"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("push")


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub
        hub.shutdown()


@pytest.fixture
def hub(server: Hub) -> Hub:
    """The server, empty."""
    server.repos, server.large, server.requests, server.fault, server.echo = {}, {}, [], None, False
    server.xet = None
    return server


@pytest.fixture(scope="module")
def client(server: Hub, scratch: Path) -> Iterator[Client]:
    with Client(server.url, scratch, HF_TOKEN=TOKEN) as started:
        yield started


@pytest.fixture(scope="module")
def small(scratch: Path) -> Path:
    """In four shards."""
    return pruned_folder(scratch, "small", keep=0.7, max_shard_size="60KB")[0]


@pytest.fixture(scope="module")
def smaller(scratch: Path, small: Path) -> Path:
    """In one file."""
    return pruned_folder(scratch, "smaller", keep=0.5)[0]


def done(answer: dict[str, Any]) -> Any:
    assert "value" in answer, answer.get("traceback")
    return answer["value"]


def test_pushed_model_comes_back_bit_for_bit_and_generates(hub: Hub, client: Client, small: Path) -> None:
    commit = done(client("push", folder=str(small), repo=REPO))
    repo = hub.repos[REPO]
    assert repo.branches == {"main": commit}
    assert repo.commits[commit].parent is not None
    assert len(repo.commits) == 2  # the initial one and ours
    files = hub.files(REPO)
    assert set(files) == {path.name for path in small.iterdir()} | {"README.md", ".gitattributes"}
    assert sum(name.endswith(".safetensors") for name in files) > 1
    assert f'from_pretrained("{REPO}")' in files["README.md"].decode()
    pulled = done(client("pull", repo=REPO))
    local = AutoModelForCausalLM.from_pretrained(small)
    assert pulled["state"] == state_hashes(local)
    assert len(pulled["generated"][0]) > len("the quick")


def test_model_in_memory_is_pushed_with_card_and_tokenizer(hub: Hub, client: Client, small: Path) -> None:
    done(client("push model", folder=str(small), repo=REPO, private=True))
    assert hub.repos[REPO].private
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files(REPO))
    assert done(client("pull", repo=REPO))["state"] == state_hashes(AutoModelForCausalLM.from_pretrained(small))


def test_unchanged_push_sends_nothing_and_makes_no_commit(hub: Hub, client: Client, small: Path) -> None:
    first = done(client("push", folder=str(small), repo=REPO))
    before, hub.requests = hub.state(), []
    assert done(client("push", folder=str(small), repo=REPO)) == first
    assert hub.state() == before
    assert not [r for r in hub.requests if r.method == "PUT" or "/commit/" in r.path]


def test_new_version_leaves_no_weights_of_the_old_one(hub: Hub, client: Client, small: Path, smaller: Path) -> None:
    first = done(client("push", folder=str(small), repo=REPO))
    second = done(client("push", folder=str(smaller), repo=REPO))
    weights = {name for name in hub.files(REPO) if "safetensors" in name}
    assert weights == {"model.safetensors"}
    assert hub.repos[REPO].commits[second].parent == first
    expected = state_hashes(AutoModelForCausalLM.from_pretrained(smaller))
    assert done(client("pull", repo=REPO))["state"] == expected
    old = state_hashes(AutoModelForCausalLM.from_pretrained(small))
    assert done(client("pull", repo=REPO, revision=first))["state"] == old


def test_results_on_a_data_set_of_the_hub_go_along_and_leave_with_the_weights(
    hub: Hub, client: Client, small: Path, smaller: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("the quick brown fox. " * 40)
    words = ["eval", str(small), "--texts", str(tmp_path / "texts.txt"), "--window", "32", "--json", "--quiet"]
    said = done(client("command", words=[*words, "--dataset", "me/texts", "--task-id", "all"]))
    (tmp_path / "result.json").write_text(said["stdout"][said["stdout"].index("{") :])
    done(client("push", folder=str(small), repo=REPO, results=[str(tmp_path / "result.json")]))
    name = ".eval_results/eigenprune-me_texts-all.yaml"
    assert (
        f"value: {json.loads((tmp_path / 'result.json').read_text())['perplexity']:.4f}"
        in hub.files(REPO)[name].decode()
    )
    done(client("push", folder=str(smaller), repo=REPO))
    assert name not in hub.files(REPO)


def test_files_of_others_in_the_repository_stay(hub: Hub, client: Client, small: Path) -> None:
    hub.make(REPO, files={"notes.md": b"mine", "README.md": b"old"})
    done(client("push", folder=str(small), repo=REPO))
    assert hub.files(REPO)["notes.md"] == b"mine"


def test_branch_is_made_and_main_stays(hub: Hub, client: Client, small: Path, smaller: Path) -> None:
    main = done(client("push", folder=str(small), repo=REPO))
    commit = done(client("push", folder=str(smaller), repo=REPO, revision="keep50"))
    assert hub.repos[REPO].branches == {"main": main, "keep50": commit}
    assert 'revision="keep50")' in hub.files(REPO, "keep50")["README.md"].decode()
    expected = state_hashes(AutoModelForCausalLM.from_pretrained(smaller))
    assert done(client("pull", repo=REPO, revision="keep50"))["state"] == expected


def test_pull_request_leaves_the_branch(hub: Hub, client: Client, small: Path, smaller: Path) -> None:
    refused = client("push", folder=str(small), repo=REPO, create_pr=True)
    assert "no pull request" in refused["message"]
    main = done(client("push", folder=str(small), repo=REPO))
    commit = done(client("push", folder=str(smaller), repo=REPO, create_pr=True))
    assert hub.repos[REPO].branches == {"main": main, "refs/pr/1": commit}


def test_private_is_refused_where_a_public_one_is(hub: Hub, client: Client, small: Path) -> None:
    hub.make(REPO)
    before = hub.state()
    answer = client("push", folder=str(small), repo=REPO, private=True)
    assert answer["error"] == "HubError"
    assert "public" in answer["message"]
    assert hub.state() == before
    assert not [r for r in hub.requests if r.method != "GET"]


OLD = {"model.safetensors": b"old", "model-00001-of-00002.safetensors": b"old", "README.md": b"old"}
CASES: dict[str, dict[str, Any]] = {"new": {}, "branch": {"revision": "other"}, "pull request": {"create_pr": True}}


def _reset(hub: Hub, case: str) -> dict[str, Any]:
    hub.repos, hub.large, hub.requests, hub.fault = {}, {}, [], None
    if case != "new":
        hub.make(REPO, files=OLD)
    return hub.state()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fault", [400, 500, "cut", "cut after"])
def test_failure_at_each_call_leaves_the_remote_as_it_was(
    fault: int | str, case: str, hub: Hub, client: Client, smaller: Path
) -> None:
    """Each call in turn is refused, fails, or is cut off before or after it took effect."""
    _reset(hub, case)
    done(client("push", folder=str(smaller), repo=REPO, **CASES[case]))
    whole, calls = hub.state(), [f"{request.method} {request.path}" for request in hub.requests]
    assert len(calls) >= 7
    failed = 0
    for k, call in enumerate(calls):
        before = _reset(hub, case)
        hub.fault = lambda _request, k=k: fault if len(hub.requests) == k + 1 else None
        answer = client("push", folder=str(smaller), repo=REPO, **CASES[case])
        if "value" in answer:  # the client asked again
            assert hub.state() == whole, call
            continue
        failed += 1
        assert answer["error"] == "HubError", answer["traceback"]
        assert TOKEN not in json.dumps(answer), call
        if fault == "cut after" and hub.state() != before:
            # It took effect, and only the answer was lost: nobody can tell, and the error says that.
            assert "/commit/" in call or "create" in call or "/branch/" in call, call
            assert "may have" in answer["message"], answer["message"]
        else:
            assert hub.state() == before, (call, answer["message"])
        if "may have" not in answer["message"]:
            assert "the remote is as it was" in answer["message"]
            assert hub.state() == before
    assert failed >= (1 if fault == 500 else 3), failed


@pytest.mark.parametrize("case", CASES)
def test_hub_that_goes_away_at_any_call_leaves_at_most_something_empty(
    case: str, hub: Hub, client: Client, smaller: Path
) -> None:
    _reset(hub, case)
    done(client("push", folder=str(smaller), repo=REPO, **CASES[case]))
    for k in range(len(hub.requests)):
        before = _reset(hub, case)
        hub.fault = lambda _request, k=k: "cut" if len(hub.requests) > k else None
        answer = client("push", folder=str(smaller), repo=REPO, **CASES[case])
        assert answer["error"] == "HubError", answer["traceback"]
        for name, (_, branches) in hub.state().items():
            old = before.get(name, [False, {}])[1]
            assert {b: head for b, head in branches.items() if b in old} == old
            for branch in branches.keys() - old.keys():
                assert not {"config.json", "tokenizer.json"} & set(hub.files(name, branch))
                assert "may have been left there" in answer["message"]


def test_hub_that_fails_for_a_moment_is_asked_again(hub: Hub, client: Client, small: Path) -> None:
    failures = {"/large/": 2, "/preupload/": 1, "objects/batch": 1}

    def fail(request: Request) -> int | None:
        place = next((place for place in failures if place in request.path), None)
        if place is None or failures[place] == 0:
            return None
        failures[place] -= 1
        return 503

    hub.fault = fail
    commit = done(client("push", folder=str(small), repo=REPO))
    assert set(failures.values()) == {0}
    assert hub.repos[REPO].branches["main"] == commit


def test_pull_goes_on_after_a_cut_connection(hub: Hub, client: Client, small: Path) -> None:
    done(client("push", folder=str(small), repo="me/cut"))
    left = [2]

    def fail(request: Request) -> str | None:
        if request.method == "GET" and ".safetensors" in request.path and left[0]:
            left[0] -= 1
            return "cut"
        return None

    hub.fault = fail
    pulled = client("pull", repo="me/cut")
    if "error" in pulled:
        pulled = client("pull", repo="me/cut")
    assert left == [0]
    assert done(pulled)["state"] == state_hashes(AutoModelForCausalLM.from_pretrained(small))


@pytest.mark.parametrize("made_before", [True, False])
def test_somebody_elses_commit_in_between_is_neither_overwritten_nor_removed(
    made_before: bool, hub: Hub, client: Client, small: Path
) -> None:
    if made_before:
        hub.make(REPO)
    theirs: list[str] = []

    def commit_first(request: Request) -> None:
        if "/commit/" in request.path and not theirs:
            repo = hub.repos[REPO]
            head = repo.commits[repo.branches["main"]]
            theirs.append(repo.add("main", Commit({**head.files, "theirs.txt": Blob(b"x", False)}, "theirs", head.oid)))

    hub.fault = commit_first
    answer = client("push", folder=str(small), repo=REPO)
    assert answer["error"] == "HubError"
    assert "somebody else's" in answer["message"]
    assert hub.repos[REPO].branches == {"main": theirs[0]}


def test_repository_that_the_token_may_not_see_is_never_removed(hub: Hub, client: Client, small: Path) -> None:
    """The Hub says "not found" of it, and then that it cannot be made, since it is there."""
    hub.make(REPO, files=OLD)
    before = hub.state()
    hub.fault = lambda request: 404 if request.path.startswith("/api/models/") else None
    answer = client("push", folder=str(small), repo=REPO)
    assert answer["error"] == "HubError"
    assert hub.state() == before
    assert not [request for request in hub.requests if request.method == "DELETE"]


def test_wrong_token_is_refused_with_advice_and_makes_nothing(hub: Hub, client: Client, small: Path) -> None:
    wrong = "hf_" + "wrong" * 7
    answer = client("push", folder=str(small), repo=REPO, token=wrong)
    assert answer["error"] == "HubError"
    assert "hf auth login" in answer["message"]
    assert wrong not in json.dumps(answer)
    assert hub.state() == {}


def test_edited_card_is_sent_as_it_is_unless_its_metadata_is_bad(
    hub: Hub, client: Client, small: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(small, tmp_path / "edited")
    good = "---\nlicense: apache-2.0\n---\n# Mine\n"
    for card, says in (
        ("no metadata", "no metadata"),
        ("---\na: [\n---\n", "not valid"),
        ("---\n- a\n---\n", "not valid"),
        ("---\nlicense: not a licence\n---\n# x\n", '"license" must be one of'),  # found by the Hub
    ):
        (folder / "README.md").write_text(card)
        answer = client("push", folder=str(folder), repo=REPO)
        assert says in answer["message"], card
        assert hub.state() == {}, card
    (folder / "README.md").write_text(good)
    done(client("push", folder=str(folder), repo=REPO))
    assert hub.files(REPO)["README.md"].decode() == good


@pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer_config.json"])
def test_secret_in_the_folder_stops_the_push_before_the_hub_hears_of_it(
    name: str, hub: Hub, client: Client, small: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(small, tmp_path / "planted")
    (folder / "SHA256SUMS").unlink()  # or the change itself would be what stops it
    secret = "hf_" + "planted" * 6
    if name == "README.md":
        (folder / name).write_text(f"---\nlicense: mit\n---\n{secret}\n")
    else:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | {"note": secret}))
    answer = client("push", folder=str(folder), repo=REPO)
    assert f"a Hugging Face token in {name}" in answer["message"]
    assert secret not in json.dumps(answer)
    assert hub.requests == []


def test_push_of_the_model_itself_still_works(hub: Hub, client: Client, small: Path) -> None:
    done(client("own push", folder=str(small), repo=REPO))
    assert {"config.json", "model.safetensors"} <= set(hub.files(REPO))


def test_command_pushes_and_says_the_commit(hub: Hub, client: Client, small: Path) -> None:
    result = done(client("command", words=["push", str(small), REPO, "--branch", "b", "--json", "--quiet"]))
    assert result["code"] == 0, result["output"]
    assert json.loads(result["stdout"]) == {"repo": REPO, "commit": hub.repos[REPO].branches["b"]}
    for words, says in (
        (["push", str(small), "no-owner"], "no repository id"),
        (["push", str(small / "nowhere"), REPO], "no folder"),
        (["push", str(small), REPO, "--token-from-env", "NOT_SET"], "NOT_SET is not set"),
        (["push", str(small), REPO, "--token-from-env", TOKEN], "that is none"),
    ):
        result = done(client("command", words=words))
        assert result["code"] == 1
        assert says in " ".join(result["output"].split()), result["output"]
        assert TOKEN not in result["output"]


def test_server_that_repeats_the_token_does_not_bring_it_into_the_error(hub: Hub, client: Client, small: Path) -> None:
    hub.echo, hub.fault = True, lambda request: 403 if "/commit/" in request.path else None
    answer = client("push", folder=str(small), repo=REPO)
    assert "injected Bearer [token]" in answer["message"]
    assert TOKEN not in json.dumps(answer)


def test_push_by_xet_stores_every_weight_in_one_commit(hub: Hub, small: Path, tmp_path: Path) -> None:
    """The hub library's usual way for large files, with its real client; what it stores is looked up by size."""
    hub.xet = tmp_path / "xet"
    hub.xet.mkdir()
    with Client(hub.url, tmp_path, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="0") as client:
        commit = done(client("push", folder=str(small), repo=REPO))
        assert TOKEN not in client.said()
    assert hub.repos[REPO].branches == {"main": commit}
    assert not [request for request in hub.requests if request.method == "PUT"]
    weights = {path.name: path for path in small.glob("*.safetensors")}
    pushed = hub.files(REPO)
    assert {name: pushed[name].decode() for name in weights} == {n: file_hash(path) for n, path in weights.items()}
    stored = sum(path.stat().st_size for path in hub.xet.rglob("*") if path.is_file())
    assert stored > 0.5 * sum(path.stat().st_size for path in weights.values())
