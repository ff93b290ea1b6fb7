# SPDX-License-Identifier: Apache-2.0
"""Work that is killed half way, for real."""

import os
import signal
from collections.abc import Callable
from typing import Any


def killed_after(calls: int, owner: Any, name: str, body: Callable[[], Any]) -> bool:
    """Run `body` in a forked process, killed at a call of `owner.name`; False where it came to its end before."""
    child = os.fork()
    if child == 0:
        real, left = getattr(owner, name), [calls]

        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        code = 1
        try:
            setattr(owner, name, call)
            body()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0
