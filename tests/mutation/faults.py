# SPDX-License-Identifier: Apache-2.0
"""Faults that the tests must find (row G34): a place in the package, what stands there, and what comes in its stead."""

from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: what is wrong then.
        file: of the package.
        search: text that stands there once.
        replace: what stands there instead.
        tests: arguments for pytest: the few tests that must fail.
    """

    name: str
    file: str
    search: str
    replace: str
    tests: tuple[str, ...]

    def applied(self, source: str) -> str:
        """`source` with the fault.

        Raises:
            LookupError: the text is not there, or more than once: the fault must follow the source.
        """
        if source.count(self.search) != 1:
            raise LookupError(f"fault {self.name!r}: {source.count(self.search)} places in {self.file} match")
        return source.replace(self.search, self.replace)


DECOMPOSE, LAYER, SAVE = "spectral/decompose.py", "layers/low_rank_linear.py", "hub/save.py"
RENAME, CHECKPOINT, CACHE = "hub/rename.py", "hub/checkpoint.py", "calibrate/cache.py"
OF_DECOMPOSE = ("tests/spectral/test_decompose.py",)
OF_ATOMIC = "tests/reliability/test_atomic_save.py"
OF_NAMES = "tests/reliability/test_names.py"
OF_CHECKPOINT = "tests/hub/test_checkpoint.py"

FAULTS = (
    Fault(
        "factors balanced the wrong way round",
        DECOMPOSE,
        "return left * scale, right / scale.unsqueeze(1)",
        "return left / scale, right * scale.unsqueeze(1)",
        OF_DECOMPOSE,
    ),
    Fault(
        "the last components are kept",
        DECOMPOSE,
        "balance(self.left[:, :rank], self.right[:rank])",
        "balance(self.left[:, -rank:], self.right[-rank:])",
        OF_DECOMPOSE,
    ),
    Fault(
        "rank off by one",
        DECOMPOSE,
        "vectors = vectors[:, -rank:].flip(1)",
        "vectors = vectors[:, -rank:].flip(1)[:, : max(1, rank - 1)]",
        OF_DECOMPOSE,
    ),
    Fault(
        "weight of a Conv1D not transposed",
        LAYER,
        "return weight.t() if self.conv1d else weight",
        "return weight",
        ("tests/layers/test_low_rank_linear.py", "-k", "weight_is_the_product"),
    ),
    Fault(
        "mixed rows one position too far",
        "ops/_pivots.py",
        "source = is_rest.cumsum(0) + (rank - 1)",
        "source = (is_rest.cumsum(0) + rank) % out_features",
        ("tests/layers/test_low_rank_linear.py", "-k", "weight_is_the_product or row_positions"),
    ),
    Fault(
        "hooks on a child are bypassed",
        LAYER,
        '    if state["_forward_hooks"] or state["_forward_pre_hooks"]:\n',
        '    if state["_forward_pre_hooks"]:\n',
        ("tests/layers/test_low_rank_linear.py", "-k", "whatever_changes"),
    ),
    Fault(
        "metric of the output not transposed",
        "spectral/metric.py",
        "torch.mm(self.matrix.t(), weight)",
        "torch.mm(self.matrix, weight)",
        ("tests/spectral/test_metric.py",),
    ),
    Fault(
        "cost of the pivot layout is that of the pair layout",
        LAYER,
        "return rank * (out_features + in_features - rank)",
        "return rank * (out_features + in_features)",
        ("tests/spectral/test_worth.py", "tests/reliability/test_odd_weights.py", "-k", "options or g23"),
    ),
    Fault(
        "budget overshot",
        "spectral/allocation/table.py",
        "(more <= left)",
        "(more <= 2 * left + 64)",
        ("tests/spectral/test_allocation.py",),
    ),
    Fault(
        "search of the knapsack gives up too early",
        "spectral/allocation/knapsack.py",
        "alive = (bound < best - slack)",
        "alive = (bound < 0.3 * best - slack)",
        ("tests/spectral/test_knapsack.py", "-k", "thousands"),
    ),
    Fault(
        "zero-sum heap adds rises to rises",
        "spectral/allocation/heap.py",
        "running <= 0)",
        "running >= 0)",
        ("tests/spectral/test_published_allocations.py", "-k", "heaps"),
    ),
    Fault(
        "NaN in a weight not looked for",
        "prune/layers_to_prune.py",
        "    if not finite.all():",
        "    if False:",
        ("tests/reliability/test_odd_weights.py", "-k", "g17"),
    ),
    Fault(
        "NaN in a factor saved",
        SAVE,
        'if weight.device.type != "meta" and not torch.isfinite(plain_values(weight)).all():',
        "if False:",
        ("tests/hub/test_save.py", "-k", "broken_factor"),
    ),
    Fault(
        "changed file passes its sum",
        "hub/digests.py",
        "if found != digest:",
        "if not found:",
        ("tests/reliability/test_digests.py", "-k", "one_bit"),
    ),
    Fault(
        "files copied over the old ones, one by one",
        RENAME,
        "elif exchange(staged, folder):",
        "elif shutil.copytree(staged, folder, dirs_exist_ok=True):",
        (OF_ATOMIC, "-k", "g35_killed and exchange"),
    ),
    Fault(
        "old model removed before the new one is in place",
        RENAME,
        "    elif exchange(staged, folder):\n        shutil.rmtree(staged, ignore_errors=True)",
        "    elif True:\n        shutil.rmtree(folder)\n        os.rename(staged, folder)",
        (OF_ATOMIC, "-k", "g35_killed and exchange"),
    ),
    Fault(
        "nothing forced to disk",
        "hub/whole_folder.py",
        "os.fsync(descriptor)",
        "pass",
        ("tests/hub/test_save.py", "-k", "failed_save and forcing"),
    ),
    Fault(
        "folder of a running save swept up",
        "hub/staging.py",
        "lock = _lock(path, wait=False)",
        "lock = os.open(path, os.O_RDONLY)",
        (OF_ATOMIC, "-k", "sweeps_up_nothing"),
    ),
    Fault(
        "one layer stays pruned after a failure",
        "layers/undo.py",
        "for name, module in dense.items():",
        "for name, module in [*dense.items()][1:]:",
        ("tests/reliability/test_all_or_nothing.py", "-k", "any_layer and swapping"),
    ),
    Fault(
        "model still says that it is pruned after a failure",
        "layers/undo.py",
        "            now.clear()\n            now.update(then)",
        "            now.update(then)",
        ("tests/reliability/test_all_or_nothing.py", "-k", "after_the_last"),
    ),
    Fault(
        "header of any size parsed",
        "hub/limits.py",
        "if length > LARGEST_HEADER:",
        "if False:",
        ("tests/reliability/test_hostile_files.py", "-k", "g3 and header"),
    ),
    Fault(
        "any name taken from an index",
        "hub/facts.py",
        "if not is_weight_name(name):",
        "if not isinstance(name, str):",
        (OF_NAMES, "-k", "index_of_a_checkpoint"),
    ),
    Fault(
        "weights taken from outside the folder",
        CHECKPOINT,
        "        if not inside:",
        "        if False:",
        (OF_NAMES, "-k", "from_elsewhere"),
    ),
    Fault(
        "pivot just out of range taken",
        CHECKPOINT,
        "int(pivots.max()) >= out_features",
        "int(pivots.max()) > out_features",
        (OF_CHECKPOINT, "-k", "lying_tensors"),
    ),
    Fault(
        "missing factor filled with random numbers",
        CHECKPOINT,
        "    if expected:\n        some",
        "    if False:\n        some",
        (OF_CHECKPOINT, "-k", "lying_tensors"),
    ),
    Fault(
        "newer format taken",
        "config.py",
        "if self.format_version > FORMAT_VERSION:",
        "if self.format_version > FORMAT_VERSION + 100:",
        (OF_CHECKPOINT, "-k", "lying_config"),
    ),
    Fault(
        "tied weight pruned",
        "layers/select.py",
        "if shared[_storage(weight)] > 1:",
        "if shared[_storage(weight)] > 2:",
        ("tests/layers/test_select.py", "tests/reliability/test_odd_weights.py", "-k", "select or g22"),
    ),
    Fault(
        "means over one token too many",
        "calibrate/accumulate.py",
        'tensor.div_(max(1, self.counts[name.partition("/")[0]]))',
        'tensor.div_(1 + self.counts[name.partition("/")[0]])',
        ("tests/calibrate/test_collect.py",),
    ),
    Fault(
        "resumed run skips a window",
        CACHE,
        'json.dumps({"windows": windows, ',
        'json.dumps({"windows": windows + 1, ',
        ("tests/reliability/test_resume.py", "-k", "again_and_again or one_pass"),
    ),
    Fault(
        "statistics of another text taken from the cache",
        CACHE,
        "_architecture(model), texts, *settings]",
        "_architecture(model), *settings]",
        ("tests/calibrate/test_cache.py", "-k", "measured_anew"),
    ),
    Fault(
        "tokens predicted from themselves",
        "evaluate/perplexity.py",
        ".logits[0, :-1]",
        ".logits[0, 1:]",
        ("tests/evaluate/test_perplexity.py",),
    ),
    Fault(
        "shorter tokens not seen",
        "hub/scan.py",
        r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
        r"\b(?:hf|api_org)_[A-Za-z0-9]{40,}",
        ("tests/hub/test_scan.py", "-k", "planted_secret"),
    ),
    Fault(
        "token in the commit message",
        "hub/push.py",
        "message = commit_message or _message(facts)",
        "message = str(used) + _message(facts)",
        ("tests/reliability/test_secrets.py", "-k", "sinks and argument"),
    ),
    Fault(
        "tensor without a shape is a foreign error",
        "hub/facts.py",
        "except (KeyError, IndexError):",
        "except ZeroDivisionError:",
        ("tests/reliability/test_damaged_files.py", "-k", "nothing_else"),
    ),
    Fault(
        "labels drawn from another seed each time",
        "calibrate/collect.py",
        "generator.manual_seed(seed * 1_000_003 + index)",
        "generator.seed()",
        ("tests/reliability/test_determinism.py", "-k", "differ and kfac"),
    ),
    Fault(
        "input of one thread taken by another",
        "ops/pivot_linear.py",
        "    return call_without_autograd(_operator, x, right, left, pivots, bias)",
        "    pivot_linear.last = x\n"
        "    __import__('time').sleep(0)\n"
        "    return call_without_autograd(_operator, pivot_linear.last, right, left, pivots, bias)",
        ("tests/reliability/test_threads.py", "-k", "calls_from and pivot"),
    ),
    Fault(
        "rows out of order where there is no eigenprune",
        "hub/modeling.py.jinja",
        "places = places.scatter(0, pivots, torch.arange(len(pivots), device=pivots.device))",
        "places = places.scatter(0, pivots.flip(0), torch.arange(len(pivots), device=pivots.device))",
        ("tests/hub/test_modeling.py", "-k", "without_the_package"),
    ),
    Fault(
        "delta applied to any base",
        "hub/delta_decode.py",
        "        self.check_base(base, progress)\n",
        "",
        ("tests/hub/test_delta_file.py", "-k", "wrong_base"),
    ),
    Fault(
        "zeros of either sign are one in a delta",
        "hub/delta_encode.py",
        "return one.contiguous().view(kind) == other.contiguous().view(kind)",
        "return one == other",
        ("tests/hub/test_delta_file.py", "-k", "round_trip"),
    ),
    Fault(
        "count of a delta's entries believed",
        "hub/delta_decode.py",
        "if int(mask.sum()) != tensor.stored:",
        "if tensor.stored < 0:",
        ("tests/reliability/test_hostile_deltas.py", "-k", "g6 and mask"),
    ),
    Fault(
        "config and delta may differ",
        "hub/delta_folder.py",
        "if manifest.header() != dict(header):",
        "if header is None:",
        ("tests/hub/test_delta_loading.py", "-k", "contradicts"),
    ),
    Fault(
        "switched entries are not kept for the way back",
        "hub/delta_switch.py",
        "    entry.values = old.cpu()\n",
        "",
        ("tests/hub/test_delta_switch.py", "-k", "goes_back_bit_for_bit"),
    ),
    Fault(
        "random mask expected to have no edges",
        "report/entries_view.py",
        "{1: 2, 2: length - 2} if length > 2",
        "{2: length} if length > 2",
        ("tests/report/test_entries_view.py", "-k", "average_over_all_masks"),
    ),
    Fault(
        "int4 halves swapped when packed",
        "quantize/stored.py",
        "halves[:, ::2] | (halves[:, 1::2] << 4)",
        "halves[:, 1::2] | (halves[:, ::2] << 4)",
        ("tests/quantize/test_quantize.py", "-k", "packing_two_numbers"),
    ),
    Fault(
        "layers left dense are not quantised",
        "prune/quantise.py",
        "value and (name in factored or type(run.model.get_submodule(name)) is nn.Linear)",
        "value and name in factored",
        ("tests/quantize/test_options.py", "-k", "one_number_of_bits"),
    ),
    Fault(
        "rounding is no loss",
        "quantize/options.py",
        "losses[rank] + more, rank, bits)",
        "losses[rank], rank, bits)",
        ("tests/quantize/test_options.py", "-k", "estimated_losses"),
    ),
    Fault(
        "integers that the config does not name are passed over",
        CHECKPOINT,
        "for name in numbers}",
        "for name in ()}",
        ("tests/quantize/test_quantize.py", "-k", "lie_are_refused and alone"),
    ),
    Fault(
        "windows chosen for coverage are the nearest ones",
        "calibrate/choice.py",
        "found.append(int(nearest.argmax()))",
        "found.append(int(nearest.nan_to_num(neginf=9.0).argmin()))",
        ("tests/calibrate/test_choice.py", "-k", "coverage_is_greedy"),
    ),
    Fault(
        "clusters of windows have equal parts whatever their damage",
        "calibrate/choice.py",
        "weights = [float(damage[inner].mean()) for inner in members]",
        "weights = [1.0 for inner in members]",
        ("tests/calibrate/test_choice.py", "-k", "damage_shares_out"),
    ),
    Fault(
        "gradient of a window measured by its square",
        "calibrate/window_features.py",
        "return lengths.squares.sqrt() / (ids.shape[1] - 1)",
        "return lengths.squares / (ids.shape[1] - 1)",
        ("tests/calibrate/test_window_features.py", "-k", "whole_gradients and llama"),
    ),
    Fault(
        "standard error of an average as if tasks were one",
        "evaluate/task_scores.py",
        "paired += _variance(change) / len(first) / count**2",
        "paired += _variance(change) / len(first) / count",
        ("tests/evaluate/test_task_scores.py",),
    ),
    Fault(
        "score of the dense model without the same items",
        "hub/measured_tasks.py",
        "key = found.task, found.items_hash, found.metric",
        "key = found.task, found.metric, found.metric",
        ("tests/hub/test_card.py", "-k", "other_items"),
    ),
)
MOST_SURVIVORS = 1
