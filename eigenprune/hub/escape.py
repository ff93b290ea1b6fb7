# SPDX-License-Identifier: Apache-2.0
"""Foreign text in a card: it is shown, and never becomes markup, a link, a line break or a change of direction."""

import shlex
import unicodedata

LONGEST = 200
# Control, format (bidirectional marks among them), surrogate, private and unassigned characters, line separators.
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def plain(value: object, longest: int = LONGEST) -> str:
    """`value` on one line, without characters that cannot be seen; cut at `longest`."""
    seen = "".join(" " if unicodedata.category(c) in UNSEEN else c for c in str(value))
    text = " ".join(seen.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def code(value: object) -> str:
    """`value` as a Markdown code span, also inside a table; nothing in it can end the span or the cell."""
    return "`" + (plain(value).replace("`", "'").replace("|", "¦") or "(empty)") + "`"


def shell_word(value: object) -> str:
    """`value` as one word of a POSIX shell command, on one line."""
    return shlex.quote(plain(value))
