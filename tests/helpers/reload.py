# SPDX-License-Identifier: Apache-2.0
"""Reload checkpoints in a new process with only `import eigenprune` before plain `from_pretrained`.

Run as a program: `python -m tests.helpers.reload PLAN.json OUT.json`. The plan has entries
{"folder", "auto", "load", "generate", "resave", "max_shard_size"}; one process does many: its start costs seconds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def reload_in_new_process(plan: list[dict[str, Any]], scratch: Path, *, plugin: bool = True) -> list[dict[str, Any]]:
    """What a new process saw for every entry of `plan`: hashes, or the error's type and text."""
    plan_file, out_file = scratch / "plan.json", scratch / "out.json"
    plan_file.write_text(json.dumps({"plugin": plugin, "entries": plan}))
    command = [sys.executable, "-m", "tests.helpers.reload", str(plan_file), str(out_file)]
    environment = os.environ if plugin else os.environ | {"EIGENPRUNE_AUTOLOAD": "0"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the reloading process failed:\n{done.stderr[-3000:]}")
    results: list[dict[str, Any]] = json.loads(out_file.read_text())
    return results


def _observe(entry: dict[str, Any]) -> dict[str, Any]:
    import transformers

    from tests.helpers.compare import file_hashes, state_hashes, tensor_hash, tied_groups
    from tests.helpers.tiny_models import logits, token_windows

    auto = getattr(transformers, entry["auto"])
    try:
        model, info = auto.from_pretrained(entry["folder"], output_loading_info=True, **entry.get("load", {}))
    except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
        return {"error": type(error).__name__, "message": str(error)}
    model.eval()
    seen = {
        "class": type(model).__name__,
        "logits": tensor_hash(logits(model)),
        "info": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "tied": tied_groups(model),
        "state": state_hashes(model),
        "modules": {name: type(module).__name__ for name, module in model.named_modules()},
    }
    if entry.get("generate"):
        ids = token_windows(1, 6)
        seen["generated"] = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
    if entry.get("resave"):
        model.save_pretrained(entry["resave"], max_shard_size=entry.get("max_shard_size", "5GB"))
        seen["resaved"] = file_hashes(Path(entry["resave"]))
    return seen


def _main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    if plan["plugin"]:
        import eigenprune  # noqa: F401
    results = [_observe(entry) for entry in plan["entries"]]
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    _main()
