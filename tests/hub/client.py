# SPDX-License-Identifier: Apache-2.0
"""A process that talks to the Hub on loopback with the real client, told what to do line by line.

The variables that say where the Hub is are read when its library is imported, so that no test process can change them;
and one process for many calls spares the seconds that the imports take.

    python -m tests.hub.client LOGFILE     reads {"do": ..., ...} per line, writes one JSON answer per line
"""

import json
import logging
import os
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent


class Client:
    """The other end, in the process of the tests."""

    def __init__(self, endpoint: str, scratch: Path, **environment: str) -> None:
        self.log = scratch / "client.log"
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        variables |= {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(scratch / "hf-home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "5",
        }
        self.errors = (scratch / "client.err").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub.client", str(self.log)],
            cwd=REPOSITORY,
            env=variables | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        """What came of it: {"value"} or {"error", "message", "traceback"}, and {"warnings"}."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client process ended:\n{self.said()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def said(self) -> str:
        """All it wrote to standard error, and its log at debug level."""
        self.errors.flush()
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        return Path(self.errors.name).read_text(errors="replace") + log

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def _push(folder: str, repo: str, **options: Any) -> Any:
    from eigenprune import push_to_hub

    return push_to_hub(folder, repo, **options)


def _push_model(folder: str, repo: str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from eigenprune import push_to_hub
    from tests.helpers.tiny_models import tiny_tokenizer

    return push_to_hub(AutoModelForCausalLM.from_pretrained(folder), repo, tokenizer=tiny_tokenizer(), **options)


def _own_push(folder: str, repo: str) -> Any:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).push_to_hub(repo)


def _pull(repo: str, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.helpers.compare import state_hashes

    model = AutoModelForCausalLM.from_pretrained(repo, **options)
    ids = torch.tensor([AutoTokenizer.from_pretrained(repo, **options)("the quick")["input_ids"]])
    text = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()
    return {"state": state_hashes(model), "generated": text, "repr": repr(model.config)}


def _command(*words: str) -> Any:
    from typer.testing import CliRunner

    from eigenprune.cli.main import app

    done = CliRunner().invoke(app, list(words))
    return {"code": done.exit_code, "output": done.output, "stdout": done.stdout}


CALLS = {"push": _push, "push model": _push_model, "own push": _own_push, "pull": _pull, "command": _command}


def _main() -> None:
    """Obey until the input ends."""
    logging.basicConfig(filename=sys.argv[1], level=logging.DEBUG)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # only answers go to standard output
    import huggingface_hub.utils._http as client

    client.time = type("Hurried", (), {**vars(time), "sleep": staticmethod(lambda _seconds: None)})  # type: ignore[attr-defined]
    import eigenprune  # noqa: F401

    for line in sys.stdin:
        wanted = json.loads(line)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                answer = {"value": CALLS[wanted.pop("do")](*wanted.pop("words", ()), **wanted)}
            except Exception as error:  # noqa: BLE001 - the test looks at it
                answer = {
                    "error": type(error).__name__,
                    "message": str(error),
                    "traceback": "".join(traceback.format_exception(error)) + repr(error),
                }
        answer["warnings"] = [str(warning.message) for warning in caught]
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    _main()
