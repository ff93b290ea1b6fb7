# SPDX-License-Identifier: Apache-2.0
"""The model card: front matter for the Hub, and a body that lets a stranger load, judge and rebuild the model."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from eigenprune.errors import CheckpointError, HubError
from eigenprune.hub.delta_folder import is_delta_folder
from eigenprune.hub.escape import code, plain
from eigenprune.hub.facts import CheckpointFacts, read_facts
from eigenprune.hub.measured import Measured, read_measured
from eigenprune.hub.measured_tasks import MeasuredTask, read_measured_tasks
from eigenprune.hub.names import HUB_ID, MODELING_NAME, check_repo, check_revision
from eigenprune.hub.picture import rank_picture
from eigenprune.hub.rebuild import (
    DTYPES,
    base_revision,
    calibration_facts,
    rebuild_command,
    rebuild_needs,
    recovery_facts,
)
from eigenprune.report import CARRIED

CARD_NAME = "README.md"
TEMPLATE = "card.md.jinja"
TAGS = ["eigenprune", "low-rank", "svd", "pruned"]
# Ending of the class name -> (automatic class, task of the Hub)
TASKS = (
    ("ForCausalLM", "AutoModelForCausalLM", "text-generation"),
    ("LMHeadModel", "AutoModelForCausalLM", "text-generation"),
    ("ForMaskedLM", "AutoModelForMaskedLM", "fill-mask"),
    ("ForSequenceClassification", "AutoModelForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "AutoModelForTokenClassification", "token-classification"),
    ("ForQuestionAnswering", "AutoModelForQuestionAnswering", "question-answering"),
    ("ForImageClassification", "AutoModelForImageClassification", "image-classification"),
    ("ForConditionalGeneration", "AutoModelForSeq2SeqLM", None),
)


def build_card(
    folder: Path,
    repo: str,
    *,
    results: Iterable[Path] = (),
    base_model: str | None = None,
    revision: str | None = None,
) -> str:
    """The card of the pruned model in `folder`, as text; the same folder gives the same text.

    Args:
        folder: as `save_model` or `save_pretrained` wrote it.
        repo: the `owner/name` that it will be loaded by.
        results: files that `eigenprune eval --json` wrote, of this checkpoint and of its base.
        base_model: the base's id on the Hub; None takes what the checkpoint says, if that is an id.
        revision: the branch it goes to, if not the main one.

    Raises:
        CheckpointError: the folder holds no whole pruned model, or a result is of another one.
        HubError: a name is not one that the Hub knows.
    """
    check_repo(repo)
    check_revision(revision)
    if base_model is not None:
        check_repo(base_model)
    if is_delta_folder(folder):
        from eigenprune.hub.delta_card import build_delta_card  # which has parts of this module

        if tuple(results):
            raise HubError(
                "results of `eigenprune eval` are for the card of a pruned model; a delta's has no place yet"
            )
        return build_delta_card(folder, repo, base_model=base_model, revision=revision)
    facts = read_facts(folder)
    results = tuple(results)
    measured, tasks = read_measured(results, facts), read_measured_tasks(results, facts)
    pruned_from = str(facts.config.provenance.get("base_model") or "")
    base = base_model or pruned_from
    name = repo.partition("/")[2]
    automatic, task = automatic_class(facts.architecture)
    card = ModelCard.from_template(
        _front_matter(facts, measured, base, name, task),
        template_str=files("eigenprune.hub").joinpath(TEMPLATE).read_text(encoding="utf-8"),
        name=name.replace("_", "\\_"),
        repo=repo,
        base=f"[{base}](https://huggingface.co/{base})" if HUB_ID.fullmatch(base) else code(base or "a model"),
        removed=f"{1 - _keep(facts):.1%}",
        factored=len(facts.layers),
        architecture=_identifier(facts.architecture),
        auto_class=automatic,
        quantised=bool(facts.config.quantized),
        remote_code=(folder / MODELING_NAME).is_file(),
        revision_argument=f', revision="{revision}"' if revision else "",
        table=_table(facts, measured) + [_task_row(entry) for entry in tasks],
        measured=[_protocol(entry) for entry in measured],
        tasks=[_task_protocol(entry) for entry in tasks],
        picture=rank_picture(facts.layers),
        making=_making(facts, pruned_from if pruned_from != base else ""),
        command=rebuild_command(facts, pruned_from),
        needs=rebuild_needs(facts, pruned_from),
        recovered=bool(recovery_facts(facts)),
        hashes="\n".join(f"{value}  {file}" for file, value in sorted(facts.files.items())),
        calibration_limit=_calibration_limit(facts),
    )
    return str(card.content).rstrip() + "\n"


def automatic_class(architecture: str) -> tuple[str, str | None]:
    """By which automatic class a model class is loaded, and for which task of the Hub."""
    return next(((a, task) for end, a, task in TASKS if architecture.endswith(end)), ("AutoModel", None))


def check_card(text: str) -> None:
    """Check the front matter of a card that somebody may have edited.

    Raises:
        HubError: there is none, or it is no YAML mapping.
    """
    try:
        found = ModelCard(text).data.to_dict() if text.startswith("---\n") else {}  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001 - YAML and the card classes raise errors of many kinds
        place = getattr(error, "problem_mark", None)
        line = f" (line {place.line + 2})" if place is not None else ""
        raise HubError(f"the metadata on top of {CARD_NAME} is not valid{line}: {plain(error)}") from None
    if not found:
        raise HubError(
            f"{CARD_NAME} has no metadata between two lines of --- on top: write it anew with eigenprune card"
        )


def write_card(folder: Path, repo: str, **options: Any) -> Path:
    """Write `build_card` into `folder`; a card that is there is replaced."""
    path = folder / CARD_NAME
    path.write_text(build_card(folder, repo, **options), encoding="utf-8", newline="\n")
    return path


def _front_matter(
    facts: CheckpointFacts, measured: Sequence[Measured], base: str, name: str, task: str | None
) -> ModelCardData:
    carried = carried_fields(facts)
    is_id = HUB_ID.fullmatch(base) is not None
    # Results on any text. The Hub's newer `.eval_results` files are for data sets that it lists as benchmarks.
    results = [
        EvalResult(
            task_type=task or "text-generation",
            dataset_type="text",
            dataset_name=plain(", ".join(entry.texts)),
            dataset_revision=entry.token_hash[:16],  # results whose data sets do not differ by it become one
            dataset_args={"window": entry.window, "tokens": entry.tokens},
            metric_type="perplexity",
            metric_value=round(entry.pruned, 4),
        )
        for entry in measured
    ]
    return ModelCardData(
        base_model=base if is_id else None,
        base_model_relation="quantized" if is_id else None,
        library_name="transformers",
        license=carried.get("license"),
        license_name=carried.get("license_name"),
        license_link=carried.get("license_link"),
        language=carried.get("language"),
        pipeline_tag=task or carried.get("pipeline_tag"),
        tags=list(TAGS),
        model_name=name if results else None,
        eval_results=results or None,
    )


def carried_fields(facts: CheckpointFacts) -> dict[str, Any]:
    """Licence and language of the base, checked again: the config may have been edited."""
    card = facts.config.provenance.get("base_card")
    found: dict[str, Any] = {}
    for key, value in card.items() if isinstance(card, dict) else ():
        values = value if isinstance(value, list) else [value]
        if key in CARRIED and values and all(isinstance(v, str) and CARRIED[key].fullmatch(v) for v in values):
            found[key] = value
    return found


def _keep(facts: CheckpointFacts) -> float:
    keep = facts.config.provenance.get("keep", facts.config.keep)
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise CheckpointError(f"config.json says that {keep!r:.80} of the parameters were kept; it must be in (0, 1]")
    return float(keep)


def _table(facts: CheckpointFacts, measured: Sequence[Measured]) -> list[list[str]]:
    rows = []
    for title, (dense, pruned) in (("parameters", facts.parameters), ("bytes of weights", facts.weight_bytes)):
        rows.append([title, f"{dense:,}", f"{pruned:,}", f"{pruned / max(dense, 1):.3f}"])
    for entry in measured:
        dense_text = "not measured" if entry.dense is None else f"{entry.dense:.3f}"
        ratio = "" if entry.dense is None else f"{entry.pruned / entry.dense:.3f}"
        rows.append([f"perplexity, {code(', '.join(entry.texts))}", dense_text, f"{entry.pruned:.3f}", ratio])
    return rows


def _protocol(entry: Measured) -> str:
    return (
        f"{code(', '.join(entry.texts))}: {entry.tokens:,} tokens predicted in windows of {entry.window}, "
        f"token hash {code(entry.token_hash[:16])}"
    )


def _task_row(entry: MeasuredTask) -> list[str]:
    dense_text = "not measured" if entry.dense is None else f"{entry.dense:.3f}"
    change = "" if entry.dense is None else f"{100 * (entry.pruned - entry.dense):+.1f} points"
    return [f"{code(entry.task)}, {code(entry.metric)}", dense_text, f"{entry.pruned:.3f}", change]


def _task_protocol(entry: MeasuredTask) -> str:
    between = "" if entry.interval is None else f", 95 % from {entry.interval[0]:.3f} to {entry.interval[1]:.3f}"
    return (
        f"{code(entry.task)}, {code(entry.metric)}: {entry.items:,} items, {entry.shots}-shot, "
        f"version {code(entry.version)} of lm-eval{between}, hash of the items {code(entry.items_hash[:16])}"
    )


def _making(facts: CheckpointFacts, pruned_from: str) -> list[list[str]]:
    config, keep, calibration = facts.config, _keep(facts), calibration_facts(facts)
    ranks = f"{code(config.allocation or 'default')} ranks in multiples of {config.rank_multiple}"
    budget = f"keep {config.keep:g} of the parameters of the linear layers: kept {keep:.4f}, removed {1 - keep:.4f}"
    rows = [
        ["pruned from the local copy", code(pruned_from) if pruned_from else ""],
        ["revision of the base", code(base_revision(facts)) if base_revision(facts) else ""],
        ["method", f"{code(config.method)}, {ranks}"],
        ["stored as", f"{code(config.layout)} factors, {DTYPES.get(facts.dtype, 'mixed types')}"],
        ["hidden channels", _channels(config.shapes)],
        ["quantised", _quantised(config.quantized)],
        ["budget", budget],
        ["layers left dense on request", ", ".join(code(pattern) for pattern in config.skip)],
        ["calibration", _calibration(calibration)],
        ["hash of its tokens", code(calibration["texts_hash"]) if "texts_hash" in calibration else ""],
        ["recovery after pruning", _recovery(recovery_facts(facts))],
        ["seed", str(config.seed)],
        ["versions", version_list(config.provenance.get("versions"))],
    ]
    return [row for row in rows if row[1]]


def _channels(shapes: Mapping[str, list[int]]) -> str:
    """How many of them are left in the layers that write them; nothing where all are."""
    narrowed = [(out, before) for out, _, before, _ in shapes.values() if out < before]
    kept, all_of_them = (sum(sides) for sides in zip(*narrowed, strict=True)) if narrowed else (0, 0)
    return f"{kept:,} of {all_of_them:,} kept in the {len(narrowed)} layers that lost some" if narrowed else ""


def _quantised(entries: Mapping[str, list[int]]) -> str:
    """How many weights have how many bits; nothing where none is quantised."""
    counts = Counter(bits for bits, _ in entries.values())
    parts = [f"{count} weights (factors counted one by one) in int{bits}" for bits, count in sorted(counts.items())]
    return f"{' and '.join(parts)}, by torchao, weight-only" if parts else ""


def _calibration(calibration: dict[str, Any]) -> str:
    if not calibration:
        return "none, data-free"
    windows, window = (plain(calibration.get(name)) for name in ("windows", "window"))
    size = f"{windows} windows of {window} tokens" if windows.isdecimal() and window.isdecimal() else "of unknown size"
    return f"{code(calibration.get('source'))}, {size}{_sampling(calibration.get('sampling'))}"


def _sampling(sampling: object) -> str:
    """How sampled text was sampled; nothing where the value is not what it should be."""
    numbers = [sampling.get(name) for name in ("temperature", "document")] if isinstance(sampling, dict) else []
    if len(numbers) != 2 or not all(type(number) in (int, float) for number in numbers):
        return ""
    return f", written by the base itself: temperature {numbers[0]:g}, documents of {numbers[1]:g} tokens"


def _recovery(found: dict[str, Any]) -> str:
    """What was done, as far as the values are what they should be."""
    if not found:
        return ""
    tokens, steps, before, after = (found.get(name) for name in ("tokens", "steps", "before", "after"))
    whole = all(type(number) is int for number in (tokens, steps))
    if not whole or not all(type(number) is float for number in (before, after)):
        return code(found.get("method"))
    return (
        f"{code(found.get('method'))} on {tokens:,} tokens, {steps:,} steps: "
        f"divergence from the base on held-out text {before:.4f}, then {after:.4f}"
    )


def version_list(versions: object) -> str:
    """What `provenance` says of the versions, on one line; what does not look like a version is left out."""
    found = versions.items() if isinstance(versions, dict) else ()
    return ", ".join(f"{name} {number}" for name, number in found if _is_version(name, number))


def _is_version(name: object, value: object) -> bool:
    return bool(re.fullmatch(r"[\w.-]+", str(name), re.ASCII) and re.fullmatch(r"[\w.+ -]+", str(value), re.ASCII))


def _calibration_limit(facts: CheckpointFacts) -> str:
    if calibration_facts(facts):
        return "Ranks follow the calibration text; on text unlike it, the loss is larger."
    return "The method looked at no data: on language models that costs far more quality than a calibrated one."


def _identifier(name: str) -> str:
    return name if re.fullmatch(r"\w+", name, re.ASCII) else "unknown"
