# SPDX-License-Identifier: Apache-2.0
"""What goes where: one JSON object or tables on standard output, everything else on standard error."""

import json
import math
import sys
from typing import Any, NoReturn

from rich.console import Console, RenderableType

NO_TERMINAL_WIDTH = 120  # of tables that go to a file or a pipe
errors = Console(stderr=True, soft_wrap=True, highlight=False)


def show(tables: list[RenderableType], result: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
    """Print `result` as one JSON object, or `tables` for people, or nothing."""
    if as_json:
        sys.stdout.write(json.dumps(_finite(result), indent=2) + "\n")
    elif not quiet:
        console = Console() if sys.stdout.isatty() else Console(width=NO_TERMINAL_WIDTH)
        for table in tables:
            console.print(table)


def fail(message: str, code: int = 1) -> NoReturn:
    """Say what went wrong, and leave."""
    errors.print(
        f"[bold red]error:[/] {message}" if errors.is_terminal else f"error: {message}", markup=errors.is_terminal
    )
    sys.exit(code)


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as strings: JSON has no word for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
