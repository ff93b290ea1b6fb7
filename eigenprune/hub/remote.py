# SPDX-License-Identifier: Apache-2.0
"""The repository on the Hub: what it is like before a push, and back to that if the push fails."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from eigenprune.errors import HubError

TOKEN_SHAPES = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}|(?i:(?<=bearer )\S+)")


class Remote:
    """One branch of one model repository.

    Attributes:
        head: id of its newest commit, once prepared.
        files: their names at that commit.
    """

    def __init__(self, api: HfApi, repo: str, revision: str | None, *, create_pr: bool) -> None:
        self.api = api
        self.repo = repo
        self.revision = revision
        self.create_pr = create_pr
        self.head: str | None = None
        self.files: list[str] = []
        self._undo: list[Callable[[], object]] = []
        self._making = ""  # what is being made, until the Hub says that it is there

    def prepare(self, private: bool | None) -> None:
        """Make the repository and the branch where they are missing, and look at the branch.

        Raises:
            HubError: it is public and should be private, or there is nothing to open a pull request on.
        """
        try:
            info = self.api.model_info(self.repo)
        except RepositoryNotFoundError:
            if self.create_pr:
                raise HubError(f"{self.repo} is not there, or this token may not see it: no pull request") from None
            self._making = "repository"
            self.api.create_repo(self.repo, private=private)  # fails if it is there: never is another's removed
            self._making = ""
            self._undo.append(lambda: self.api.delete_repo(self.repo))
        else:
            if private and not info.private:
                raise HubError(f"{self.repo} is there and public: make it private first, or choose another name")
        try:
            self._look()
        except RevisionNotFoundError:
            if self.revision is None or self.create_pr:
                raise
            self._making = "branch"
            self.api.create_branch(self.repo, branch=self.revision)
            self._making = ""
            if not self._undo:
                branch = self.revision
                self._undo.append(lambda: self.api.delete_branch(self.repo, branch=branch))
            self._look()

    def commit(self, operations: list[CommitOperationAdd | CommitOperationDelete], message: str) -> str:
        """Make one commit on top of the head that was looked at, and no other; its id."""
        self._making = "pull request" if self.create_pr else ""
        done = self.api.create_commit(
            self.repo,
            operations,
            commit_message=message,
            revision=self.revision,
            create_pr=self.create_pr,
            parent_commit=self.head,
        )
        return str(done.oid)

    def restore(self, error: BaseException) -> str:
        """Remove what `prepare` made, unless somebody committed to it since, and say how the remote is now."""
        try:
            if self.head is not None and self.api.model_info(self.repo, revision=self.revision).sha != self.head:
                return "the branch has a new commit: this push may have arrived after all, or it is somebody else's"
            while self._undo:
                self._undo[-1]()
                self._undo.pop()
        except Exception as second:  # noqa: BLE001 - the first error is the one to be told
            made = "; what was made for this push may have been left there" if self._undo else ""
            return f"the Hub could not be asked whether anything changed ({type(second).__name__}){made}"
        if self._making and not isinstance(error, HfHubHTTPError):
            return f"a {self._making} may have been made all the same: the answer to that did not arrive"
        return "the remote is as it was"

    def _look(self) -> None:
        info = self.api.model_info(self.repo, revision=self.revision)
        self.head = info.sha
        self.files = [sibling.rfilename for sibling in info.siblings or ()]


@contextmanager
def explained(remote: Remote, token: str | None) -> Iterator[None]:
    """Put the remote back when anything fails inside, and tell it as one error that holds no token.

    Raises:
        HubError: instead of any error of the hub library or the network.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the network raises errors of many kinds; all are told
        state = remote.restore(error)
        # `from None`: the text of the first error is not ours, and may repeat what was sent.
        raise HubError(f"{remote.repo} was not pushed; {state}. {without_tokens(_reason(error), token)}") from None
    except BaseException as error:  # Ctrl-C
        remote.restore(error)
        raise


def without_tokens(text: str, token: str | None) -> str:
    """`text` without the token in use, or anything that looks like one."""
    return TOKEN_SHAPES.sub("[token]", text.replace(token, "[token]") if token else text)


def _reason(error: Exception) -> str:
    if isinstance(error, HubError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines)[:600] or type(error).__name__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
    if status in (401, 403):
        text += " Log in with `hf auth login`, or give a token that may write there."
    return f"{type(error).__name__}: {text}"
