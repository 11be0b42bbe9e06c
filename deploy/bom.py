"""bom.cdx.json: the expert as a CycloneDX 1.6 bill of materials for machine learning.

The library writes all but the model card, which it does not know yet; the whole is held against CycloneDX's own schema
before it is taken. No date stands in it, and its serial number follows from its content.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any

from cusprun.deploy.expert import Expert
from cusprun.deploy.figures import Figures
from cusprun.deploy.provenance import Provenance, Text, spdx_id
from cusprun.errors import Failed, MissingPackage

BOM = "bom.cdx.json"
MODEL = "model"


def write_bom(
    expert: Expert, hashes: Mapping[str, str], figures: Figures | None, origin: Provenance, target: str
) -> str:
    """The document; ``hashes`` are hex sha256 of the bundle's files by name. Raises Failed where it is not valid."""
    try:
        from cyclonedx.model.bom import Bom, BomMetaData
        from cyclonedx.model.component import Component, ComponentType, Pedigree
        from cyclonedx.output.json import JsonV1Dot6
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    except ModuleNotFoundError as error:
        raise MissingPackage("cyclonedx-python-lib", "ship", "a bill of materials") from error
    base = Component(
        name=origin.base, type=ComponentType.MACHINE_LEARNING_MODEL, bom_ref="base", hashes=_hashes(origin.base_sha256),
        licenses=_licences(origin.licence),
    )  # fmt: skip
    model = Component(
        name=expert.name, type=ComponentType.MACHINE_LEARNING_MODEL, bom_ref=MODEL, licenses=_licences(origin.licence),
        description=f"small expert cut out of {origin.base}, for a {target}", pedigree=Pedigree(ancestors=[base]),
    )  # fmt: skip
    tool = Component(name="cusprun", type=ComponentType.APPLICATION, version=str(expert.card.get("cusprun", "")))
    parts = [
        Component(name=name, type=ComponentType.FILE, bom_ref=f"file:{name}", hashes=_hashes(digest))
        for name, digest in hashes.items()
    ]
    texts = [_text(text) for text in origin.texts]
    bom = Bom(metadata=BomMetaData(component=model, tools=None), components=[*parts, *texts])
    bom.metadata.tools.components.add(tool)
    bom.register_dependency(model, [*parts, *texts])
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    del document["metadata"]["timestamp"], document["serialNumber"]
    document["metadata"]["component"]["modelCard"] = _model_card(expert, figures, origin)
    content = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    document["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_OID, content).urn
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if (problem := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)) is not None:
        raise Failed(f"{BOM} would not be valid CycloneDX 1.6: {problem}")
    return text


def _text(text: Text) -> Any:
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        name=text.name, type=ComponentType.DATA, bom_ref=f"text:{text.name}", hashes=_hashes(text.sha256),
        licenses=_licences(text.licence), copyright=text.attribution,
        properties=[Property(name="cusprun:source", value=text.source)],
    )  # fmt: skip


def _hashes(digest: str | None) -> list[Any]:
    from cyclonedx.model import HashAlgorithm, HashType

    return [HashType(alg=HashAlgorithm.SHA_256, content=digest)] if digest else []


def _licences(licence: str | None) -> list[Any]:
    """An SPDX id where it is one, an expression of several, else a name."""
    from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression

    if licence is None:
        return []
    if (found := spdx_id(licence)) is not None:
        return [DisjunctiveLicense(id=found)]
    if any(f" {word} " in licence for word in ("AND", "OR", "WITH")):
        return [LicenseExpression(licence)]
    return [DisjunctiveLicense(name=licence)]


def _model_card(expert: Expert, figures: Figures | None, origin: Provenance) -> dict[str, Any]:
    config = json.loads((expert.model / "config.json").read_text(encoding="utf-8"))
    rows = figures.rows if figures else ()
    card: dict[str, Any] = {
        "bom-ref": "model-card",
        "modelParameters": {
            "approach": {"type": "self-supervised"},
            "task": "text-generation",
            "architectureFamily": "transformer",
            "modelArchitecture": str((config.get("architectures") or [config.get("model_type")])[0]),
            "datasets": [{"ref": f"text:{text.name}"} for text in origin.texts],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "considerations": {
            "useCases": [" ".join(map(str, (expert.card.get("scenario") or {}).values())) or "text generation"],
            "technicalLimitations": ["what the scenario does not need was removed: expect worse answers elsewhere"],
        },
    }
    if rows:
        card["quantitativeAnalysis"] = {
            "performanceMetrics": [
                {"type": row.key, "value": repr(row.expert), **({"slice": row.text} if row.text else {})}
                for row in rows
            ]
        }
    return card
