# SPDX-License-Identifier: Apache-2.0
"""The model card of a sparse delta."""

from importlib.resources import files
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from eigenprune.errors import HubError
from eigenprune.hub.card import automatic_class, carried_fields, version_list
from eigenprune.hub.delta_folder import open_delta
from eigenprune.hub.delta_manifest import DeltaManifest
from eigenprune.hub.escape import code, shell_word
from eigenprune.hub.facts import CheckpointFacts, read_facts
from eigenprune.hub.names import HUB_ID
from eigenprune.hub.write_tensors import spec_bytes

TEMPLATE = "delta_card.md.jinja"
TAGS = ["eigenprune", "sparse-delta", "delta"]


def build_delta_card(folder: Path, repo: str, *, base_model: str | None = None, revision: str | None = None) -> str:
    """The card of the delta in `folder`, as text; the same folder gives the same text.

    Args:
        folder: of the delta.
        repo: the `owner/name` that it will be loaded by, checked before.
        base_model: the base's id on the Hub; None takes what the delta says, if that is an id.
        revision: the branch it goes to, checked before.

    Raises:
        CheckpointError: the folder holds no whole delta.
        HubError: `base_model` is another than the id that the delta fetches its base by.
    """
    facts = read_facts(folder)
    with open_delta(folder) as opened:
        manifest = opened.manifest
    fetched = manifest.base_model
    if base_model is not None and HUB_ID.fullmatch(fetched) and base_model != fetched:
        raise HubError(f"this delta fetches its base as {fetched}, not {base_model}: make it again with --base-id")
    base = base_model or fetched
    name = repo.partition("/")[2]
    automatic, task = automatic_class(facts.architecture)
    is_id = HUB_ID.fullmatch(base) is not None
    carried = carried_fields(facts)
    data = ModelCardData(
        base_model=base if is_id else None,
        base_model_relation="finetune" if is_id else None,
        library_name="transformers",
        license=carried.get("license"),
        license_name=carried.get("license_name"),
        license_link=carried.get("license_link"),
        language=carried.get("language"),
        pipeline_tag=task or carried.get("pipeline_tag"),
        tags=list(TAGS),
    )
    whole = sum(spec_bytes((tensor.dtype, tensor.shape)) for tensor in manifest.tensors.values())
    delta = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    card = ModelCard.from_template(
        data,
        template_str=files("eigenprune.hub").joinpath(TEMPLATE).read_text(encoding="utf-8"),
        name=name.replace("_", "\\_"),
        repo=repo,
        base=f"[{base}](https://huggingface.co/{base})" if is_id else code(base),
        base_word=shell_word(base),
        stored=f"{manifest.stored:,}",
        entries=f"{manifest.entries:,}",
        share=f"{manifest.stored / max(manifest.entries, 1):.1%}",
        architecture=facts.architecture if facts.architecture.isidentifier() else "unknown",
        auto_class=automatic,
        revision_argument=f', revision="{revision}"' if revision else "",
        on_hub=HUB_ID.fullmatch(fetched) is not None,
        whole_bytes=f"{whole:,}",
        delta_bytes=f"{delta:,}",
        ratio=f"{delta / max(whole, 1):.3f}",
        making=_making(facts, manifest),
        hashes="\n".join(f"{value}  {file}" for file, value in sorted(facts.files.items())),
    )
    return str(card.content).rstrip() + "\n"


def _making(facts: CheckpointFacts, manifest: DeltaManifest) -> list[list[str]]:
    rows = [
        ["base", code(manifest.base_model)],
        ["revision of the base", code(manifest.base_revision) if manifest.base_revision else ""],
        ["SHA-256 over its weights", code(manifest.base_sha256)],
        ["rule", f"{code(manifest.rule)}, keep {manifest.keep:g}, budget per {code(manifest.scope)}"],
        ["values", "as they were" if manifest.precision == "exact" else f"rounded to {manifest.precision}"],
        ["versions", version_list(facts.config.provenance.get("versions"))],
    ]
    return [row for row in rows if row[1]]
