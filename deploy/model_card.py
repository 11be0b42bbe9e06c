"""MODEL_CARD.md with a front matter as the Hugging Face hub reads it, and ATTRIBUTION.md beside the licences' texts.

Figures are those of the expert's report in the type that is shipped; where there is none, the card says so.
"""

from __future__ import annotations

from collections.abc import Mapping

from cusprun.deploy.expert import Artifact, Expert
from cusprun.deploy.figures import Figures
from cusprun.deploy.files import Files
from cusprun.deploy.provenance import Provenance, as_metadata, licence_text, spdx_id

CARD, ATTRIBUTION, LICENCES = "MODEL_CARD.md", "ATTRIBUTION.md", "LICENSES"
LIBRARIES = {"gguf": "llama.cpp", "onnx": "onnxruntime"}
METRICS = {"bits_per_byte": "Bits per byte", "perplexity": "Perplexity", "accuracy": "Accuracy"}


def write_card(expert: Expert, artifacts: Mapping[str, Artifact], figures: Figures | None, origin: Provenance) -> str:
    """The model card; ``artifacts`` by their names in the bundle, the measured one first."""
    scenario, method = expert.card.get("scenario") or {}, expert.card.get("method") or {}
    sizes, base = expert.card["expert"], expert.card["base"]
    share = 1 - sizes["parameters"] / base["parameters"]
    purpose = " ".join(str(scenario[key]) for key in ("language", "domain", "task") if key in scenario)
    lines = [
        f"---\n{_front_matter(expert, artifacts, figures, origin)}\n---\n",
        f"# {expert.name}\n",
        f"A small expert{f' for {purpose}' if purpose else ''}, cut out of {origin.base}: {share:.1%} of all its "
        f"parameters are gone, {sizes['parameters']:,} stay. Made by cusprun {expert.card.get('cusprun', '')} with the "
        f"method `{method.get('name')}`.\n",
        "## Files\n",
        *(f"- `{name}`: {one.format} {one.quant}, {one.bytes:,} bytes" for name, one in artifacts.items()),
        "\n## Figures\n",
        *_figures(figures, next(iter(artifacts.values()), None)),
        "\n## Intended use and limits\n",
        "Meant for the scenario above. What the scenario does not need was removed on purpose: expect worse answers "
        "elsewhere, and check answers that matter. It has its base model's faults and biases.\n",
        "## Licence\n",
        f"{_licence(origin)} Texts that decided what was removed are listed with their licences in `{ATTRIBUTION}`; "
        "none of them is in this bundle.",
    ]
    return "\n".join(lines) + "\n"


def _front_matter(
    expert: Expert, artifacts: Mapping[str, Artifact], figures: Figures | None, origin: Provenance
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    scenario = expert.card.get("scenario") or {}
    results = [
        EvalResult(
            task_type="text-generation", dataset_type="held-out", dataset_config=row.text,
            dataset_name=f"held-out: {row.text}", metric_type=row.key,
            metric_name=METRICS[row.key], metric_value=row.expert,
        )
        for row in (figures.rows if figures else ())
        if row.key in METRICS
    ]  # fmt: skip
    formats = list(dict.fromkeys(one.format for one in artifacts.values()))
    card = ModelCardData(
        language=scenario.get("language"),
        base_model=origin.hub_id,
        tags=["cusprun", "pruned", *formats, *(str(scenario[key]) for key in ("domain", "task") if key in scenario)],
        pipeline_tag="text-generation",
        library_name=LIBRARIES.get(formats[0]) if formats else None,
        model_name=expert.name if results else None,
        eval_results=results or None,
        **as_metadata(origin),
    )
    return str(card.to_yaml())


def _figures(figures: Figures | None, artifact: Artifact | None) -> list[str]:
    if figures is None or artifact is None:
        return ["Nothing was measured in the type that is shipped here."]
    head = ["| | dense | expert | on |", "| --- | --- | --- | --- |"]
    rows = [
        f"| {row.name}{f', {row.unit}' if row.unit else ''} | {_number(row.dense)} | {_number(row.expert)} | "
        f"{row.text or ''} |"
        for row in figures.rows
    ]
    return [f"Of {artifact.format} {artifact.quant}, the dense model in the same type.\n", *head, *rows, "",
            *(f"{line}\n" for line in figures.how)]  # fmt: skip


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


def _licence(origin: Provenance) -> str:
    if origin.licence is None:
        return (
            f"The licence of {origin.base} is not known to the maker of this bundle: find it out before you use "
            "or pass on this expert."
        )
    found = spdx_id(origin.licence)
    text = f" ([text]({LICENCES}/{found}.txt))" if found and licence_text(found) else ""
    return f"As {origin.base}, from which it was made: {found or origin.licence}{text}."


def add_licences(files: Files, origin: Provenance) -> None:
    """Adds ATTRIBUTION.md and the texts of the licences that are known."""
    without = []
    for licence in origin.licences:
        text = licence_text(licence)
        if text is None:
            without.append(licence)
        else:
            files.add(f"{LICENCES}/{licence}.txt", text)
    lines = [
        "# Attribution\n",
        "## Base model\n",
        f"- {origin.base}: {spdx_id(origin.licence) or origin.licence or 'licence unknown'}"
        + (f", weights with sha256 {origin.base_sha256}" if origin.base_sha256 else ""),
        "\n## Texts\n",
        "They decided which parts of the base model stay. The expert holds none of them.\n",
        *(f"- {text.name} ({text.source}): {text.licence}; {text.attribution}" for text in origin.texts),
    ]
    if origin.own_texts:
        lines.append(f"- {origin.own_texts} of the maker's own, not published")
    if not origin.known:
        lines.append("- not recorded: the expert was built without measuring it, by an earlier version")
    elif not origin.texts and not origin.own_texts:
        lines.append("- none")
    if without:
        lines.append(f"\nNo text is at hand of: {', '.join(without)}.")
    files.add(ATTRIBUTION, "\n".join(lines) + "\n")
