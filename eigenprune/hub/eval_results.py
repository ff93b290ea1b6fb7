# SPDX-License-Identifier: Apache-2.0
"""Results on data sets of the Hub, in the files by which it fills its model pages and leaderboards.

Format: https://huggingface.co/docs/hub/eval-results. Written from what `eigenprune eval --json` measured with
`--dataset` and `--task-id`, and from nothing else. The card's own table and `model-index` hold results on any text.
"""

import json
from collections.abc import Iterable

from eigenprune.errors import CheckpointError
from eigenprune.hub.measured import Measured

FOLDER = ".eval_results"
# A JSON string is a YAML string that nothing in it can end.
ENTRY = """\
- dataset:
    id: {dataset}
    task_id: {task}
  value: {value}
  notes: {notes}
"""


def eval_result_files(measured: Iterable[Measured]) -> dict[str, bytes]:
    """{file name: content}, one for each result on a data set of the Hub; empty where there is none.

    Raises:
        CheckpointError: two results are of one task of one data set.
    """
    found: dict[str, bytes] = {}
    for entry in measured:
        if entry.dataset is None:
            continue
        dataset, task = entry.dataset
        path = f"{FOLDER}/eigenprune-{dataset.replace('/', '_')}-{task}.yaml"
        if path in found:
            raise CheckpointError(f"two results are of {task} of {dataset}: give one of them")
        notes = f"perplexity, {entry.tokens} tokens predicted in windows of {entry.window}"
        found[path] = ENTRY.format(
            dataset=json.dumps(dataset), task=json.dumps(task), value=f"{entry.pruned:.4f}", notes=json.dumps(notes)
        ).encode()
    return found
