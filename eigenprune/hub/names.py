# SPDX-License-Identifier: Apache-2.0
"""The names that a push may use: of repositories, branches and files."""

import re

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from eigenprune.errors import HubError

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
# All that is ever published. Code is not among them, and neither is any pickled file.
FILES = (
    r"README\.md|LICENSE(\.md|\.txt)?|NOTICE(\.md|\.txt)?",
    r"config\.json|generation_config\.json|prune_report\.json",
    r"model\.safetensors|model-[0-9]{5}-of-[0-9]{5}\.safetensors|model\.safetensors\.index\.json",
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json",
    r"vocab\.json|vocab\.txt|merges\.txt|tokenizer\.model|spiece\.model|sentencepiece\.bpe\.model",
    r"chat_template\.jinja|additional_chat_templates/[A-Za-z0-9_-]{1,64}\.jinja",
    r"(video_)?preprocessor_config\.json|processor_config\.json",
    r"SHA256SUMS",
)
DIGESTS_NAME = "SHA256SUMS"
MODELING_NAME = "modeling_eigenprune.py"  # the one exception, where it is the file that this package writes
ALLOWED = re.compile("|".join(f"(?:{pattern})" for pattern in FILES), re.ASCII)
WEIGHTS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}\.safetensors", re.ASCII)
DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # what Windows takes for no file
# What an earlier push may have left, and what would be loaded beside, or instead of, the new files.
OURS = re.compile(
    r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors|model\.safetensors\.index\.json|prune_report\.json"
    r"|SHA256SUMS|modeling_eigenprune\.py|\.eval_results/eigenprune-[A-Za-z0-9._-]+\.yaml"
)


def is_weight_name(name: object) -> bool:
    """Whether `name` can be that of a weight file beside its index, on any system."""
    return isinstance(name, str) and bool(WEIGHTS.fullmatch(name)) and not DEVICES.fullmatch(name)


def check_repo(repo: object) -> str:
    """`repo` if it is an `owner/name` that the Hub accepts.

    Raises:
        HubError: it is not.
    """
    try:
        if not isinstance(repo, str) or not HUB_ID.fullmatch(repo):
            raise HubError(f"{repo!r:.120} is no repository id: give owner/name, as in me/model-keep80")
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f"the Hub does not accept the repository id {repo!r:.120} ({error})") from error
    return repo


def check_revision(revision: object) -> None:
    """Check the name of a branch; None is the main one.

    Raises:
        HubError: git or the Hub would not accept it, or would take it for something else.
    """
    if revision is None:
        return
    good = isinstance(revision, str) and len(revision) <= 100 and REVISION.fullmatch(revision)
    if not good or ".." in str(revision) or re.search(r"\.(lock)?(/|$)", str(revision)):
        raise HubError(f"{revision!r:.120} is no branch name: letters, digits, '.', '_', '-' and '/' between them")
    if str(revision).startswith("refs/"):
        raise HubError(f"{revision!r:.120}: name the branch itself, without refs/; for a pull request, ask for one")
