# SPDX-License-Identifier: Apache-2.0
"""Search outgoing text for what must stay at home: tokens, private keys, home folders, user and machine names.

A finding is told by its kind and place. The found text itself is never repeated, since errors end up in logs.
"""

import getpass
import json
import os
import platform
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from eigenprune.errors import HubError

# Kind -> shape. Each is long or marked enough not to occur in a vocabulary.
SHAPES = {
    "a Hugging Face token": re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})"),
    "a GitLab token": re.compile(r"\bglpat-[A-Za-z0-9_-]{18,}"),
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    "an API key": re.compile(r"\bsk-(?:[a-z]{2,10}-)*[A-Za-z0-9_-]{24,}"),
    "a Google key": re.compile(r"\bAIza[A-Za-z0-9_-]{35}"),
    "a Slack token": re.compile(r"\bxox[abeprs]-[A-Za-z0-9-]{10,}"),
    "a JSON web token": re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ ){0,3}PRIVATE KEY-----"),
    "an authorization header": re.compile(
        r"(?i)\bauthorization[\"'\s:=]{1,8}(?:bearer|basic)\s+[A-Za-z0-9+/._=-]{12,}"
    ),
    "a URL with a password": re.compile(r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@\"'<>]{1,64}:[^\s/@\"'<>]{3,128}@[\w.-]+"),
    "a home folder": re.compile(r"(?:/(?:export/|var/)?home|/Users)/[^\s/\"'<>|:*?$]{1,64}/|/root/\w"),
    "a home folder on Windows": re.compile(r"(?i)\b[a-z]:[\\/]+users[\\/]+[^\s\\/\"'<>|:*?]{1,64}[\\/]"),
}
# Written about this run. All else (vocabularies, chat templates) may hold any word, and code in it any common path.
ABOUT_THIS_RUN = re.compile(r"README\.md|config\.json|generation_config\.json|prune_report\.json|.*\.index\.json")
PATH = re.compile(r"(?<![\w/.:-])(?:/[\w.-]+){2,}")
NO_NAMES = re.compile(r"root|users?|admin|ubuntu|debian|runner|test|guest|home|model|local(host)?|python3?")


def refuse_secrets(
    texts: Mapping[str, bytes], *, tokens: Collection[str] = (), published: Collection[str] = ()
) -> None:
    """Refuse files that hold a secret, or that name this user, this machine or a folder on it.

    Args:
        texts: {file name: content}, all outgoing files but the weights.
        tokens: the very tokens in use, in whatever shape.
        published: names that are public anyway, such as the repository's; their words are no finding.

    Raises:
        HubError: there is at least one; each is named by kind, file and line.
    """
    found = []
    for name, content in sorted(texts.items()):
        text = _as_text(name, content)
        shapes = [*SHAPES.items(), *(("the token in use", re.compile(re.escape(t))) for t in tokens if len(t) >= 4)]
        if ABOUT_THIS_RUN.fullmatch(name):
            shapes += _private_names(published)
        hits = [(kind, match.start()) for kind, shape in shapes if (match := shape.search(text))]
        if ABOUT_THIS_RUN.fullmatch(name) and name.endswith(".json"):
            hits += [("a path on this machine", m.start()) for m in PATH.finditer(text) if os.path.exists(m[0])]
        found += [f"{kind} in {name}, line {text.count(chr(10), 0, place) + 1}" for kind, place in hits]
    if found:
        more = f", and {len(found) - 5} more" if len(found) > 5 else ""
        raise HubError(f"nothing was sent: there is {'; '.join(found[:5])}{more}. Remove it, and push again")


def _as_text(name: str, content: bytes) -> str:
    """The file as text, and after it, of JSON, the text that its escapes stand for."""
    text = content.decode("utf-8", errors="replace")
    if not name.endswith(".json"):
        return text
    try:
        return text + "\n" + json.dumps(json.loads(text), ensure_ascii=False).replace("\\\\", "\\")
    except (ValueError, RecursionError):
        return text


def _private_names(published: Collection[str]) -> Iterator[tuple[str, re.Pattern[str]]]:
    parts = [part for name in published for part in (*re.split(r"[/\s]+", name), *re.split(r"[^\w-]+", name))]
    public = {part.lower() for part in parts}
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user id without a name
        user = ""
    for kind, word in (("this user's name", user), ("this machine's name", platform.node())):
        if len(word) >= 3 and word.lower() not in public and not NO_NAMES.fullmatch(word.lower()):
            yield kind, re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])")
    for kind, folder in (("this user's home folder", Path.home()), ("the working folder", Path.cwd())):
        if len(folder.parts) > 1:
            yield kind, re.compile(rf"(?<![\w/.-]){re.escape(str(folder))}(?=[/\\]\w)")
