# SPDX-License-Identifier: Apache-2.0
"""Push a pruned model to the Hub: one commit, made from files that were checked on this machine first."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from torch import nn

from eigenprune.errors import CheckpointError, HubError
from eigenprune.hub.card import CARD_NAME, build_card, check_card
from eigenprune.hub.eval_results import eval_result_files
from eigenprune.hub.facts import CheckpointFacts, read_facts
from eigenprune.hub.measured import read_measured
from eigenprune.hub.names import OURS, check_repo, check_revision
from eigenprune.hub.outgoing import Outgoing, collect
from eigenprune.hub.remote import Remote, explained
from eigenprune.hub.save import save_model
from eigenprune.hub.scan import refuse_secrets
from eigenprune.report import PruneReport


def push_to_hub(
    model_or_dir: nn.Module | str | Path,
    repo: str,
    *,
    tokenizer: Any = None,
    report: PruneReport | None = None,
    results: Iterable[str | Path] = (),
    base_model: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    remote_code: bool = False,
) -> str:
    """Publish a pruned model, with its card, in one commit.

    Everything is made and checked on this machine before the Hub hears of it: the weights are whole, only files of a
    closed list go, and none holds a token, a private key, a home folder, or the name of this user or machine. A
    README.md in the folder is sent as it is; otherwise the card is written. If the push fails, the remote is as it was:
    a repository or branch that was made for it is removed again.

    The model's own `push_to_hub` works too, but writes a card of its own that says nothing about pruning.

    Args:
        model_or_dir: a pruned model in memory, or the folder of a saved one.
        repo: `owner/name`; made if it does not exist.
        tokenizer: saved beside a model in memory; a folder has its own.
        report: saved beside a model in memory.
        results: for the card, files that `eigenprune eval --json` wrote; those on a data set of the Hub (`--dataset`)
            also become `.eval_results` files.
        base_model: for the card, the base's id on the Hub, if the model does not know it.
        private: of a new repository; True also refuses one that is there and public.
        revision: branch, made if it does not exist; None is the main one.
        create_pr: open a pull request instead of committing to the branch.
        token: None takes what the hub library finds (`hf auth login`, HF_TOKEN).
        commit_message: the commit's first line.
        remote_code: of a model in memory, see `save_model`; a folder has the modelling file already, or has not.

    Returns:
        The id of the commit; of the newest one, if nothing has changed.

    Raises:
        CheckpointError: there is no whole pruned model.
        HubError: a name or a file is refused, or the Hub refuses or cannot be reached.
    """
    check_repo(repo)
    check_revision(revision)
    if isinstance(model_or_dir, str | Path) and (tokenizer is not None or report is not None or remote_code):
        raise HubError("tokenizer, report and remote_code go with a model in memory; a saved folder has its own")
    with _folder(model_or_dir, tokenizer, report, remote_code) as folder:
        facts = read_facts(folder)
        outgoing = collect(folder, facts.architecture)
        if CARD_NAME not in outgoing.texts:
            files = [Path(result) for result in results]
            card = build_card(folder, repo, results=files, base_model=base_model, revision=revision)
            outgoing.texts[CARD_NAME] = card.encode()
            outgoing.texts.update(eval_result_files(read_measured(files, facts)))
        elif base_model is not None or tuple(results):
            raise HubError(f"the folder has a {CARD_NAME} already: write it anew with eigenprune card, or remove it")
        check_card(outgoing.texts[CARD_NAME].decode("utf-8", errors="replace"))
        used = token or get_token()
        refuse_secrets(outgoing.texts, tokens=[used] if used else [], published=_public_words(facts, repo, base_model))
        message = commit_message or _message(facts)
        remote = Remote(HfApi(token=used), repo, revision, create_pr=create_pr)
        with explained(remote, used):
            remote.prepare(private)
            return remote.commit(_operations(remote, outgoing), message)


def _message(facts: CheckpointFacts) -> str:
    if facts.config.delta:
        return f"Sparse delta by eigenprune, rule {facts.config.delta['rule']}, keep {facts.config.delta['keep']:g}"
    return f"Model pruned by eigenprune, keep {facts.config.keep:g}"


def _operations(remote: Remote, outgoing: Outgoing) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Add all files, and remove weights of an earlier push that would be loaded beside, or instead of, the new ones."""
    new: dict[str, Any] = {**outgoing.texts, **outgoing.weights}
    stale = [name for name in remote.files if OURS.fullmatch(name) and name not in new]
    additions = [CommitOperationAdd(name, content) for name, content in sorted(new.items())]
    return [*additions, *map(CommitOperationDelete, stale)]


@contextmanager
def _folder(
    model_or_dir: nn.Module | str | Path, tokenizer: Any, report: PruneReport | None, remote_code: bool
) -> Iterator[Path]:
    """The folder with the saved model; of a model in memory, a temporary one."""
    if isinstance(model_or_dir, str | Path):
        if not Path(model_or_dir).is_dir():
            raise CheckpointError(f"there is no folder {model_or_dir}")
        yield Path(model_or_dir)
        return
    with tempfile.TemporaryDirectory(prefix="eigenprune-push-") as scratch:
        yield save_model(
            model_or_dir, Path(scratch) / "model", tokenizer=tokenizer, report=report, remote_code=remote_code
        )


def _public_words(facts: CheckpointFacts, repo: str, base_model: str | None) -> list[str]:
    """Names that the repository shows in any case."""
    base = base_model or str((facts.config.delta or facts.config.provenance).get("base_model") or "")
    layers = [layer.name.replace(".", " ").replace("_", " ") for layer in facts.layers[:200]]
    return [repo, base, facts.architecture, *layers]
