"""README.md of a bundle: what the receiver needs to know, in the order of need."""

from __future__ import annotations

from cusprun.deploy.expert import Expert
from cusprun.deploy.manifest import MANIFEST, SIGNATURE
from cusprun.deploy.model_card import ATTRIBUTION, CARD, LICENCES
from cusprun.deploy.provenance import Provenance, spdx_id
from cusprun.deploy.targets import Notes


def write_readme(expert: Expert, target: str, notes: Notes, origin: Provenance, signer: str | None) -> str:
    """The text; ``signer`` is the fingerprint of the key that the bundle is signed by."""
    purpose = expert.purpose
    parts = [
        f"# {expert.name}\n",
        f"A small language model{f' for {purpose}' if purpose else ''}, cut out of {origin.base}, for a {target}. "
        f"{'' if target == 'server' else 'It runs on the device, and no text leaves it. '}What it is for, what it "
        f"costs in quality and speed: `{CARD}`.\n",
        "## Start\n",
        notes.start.strip() + "\n",
    ]
    if notes.needs:
        parts += ["## What opens it\n", *(f"- {line}" for line in notes.needs), ""]
    if notes.unproven:
        parts += ["## Not proven\n", *(f"- {line}" for line in notes.unproven), ""]
    parts += ["## Is it what was shipped?\n"]
    if signer is None:
        parts.append(
            f"    cusprun-edge verify .\n\nholds every file against `{MANIFEST}`. That finds accidents. This bundle is "
            "not signed, so a change on purpose cannot be told.\n"
        )
    else:
        parts.append(
            f"    cusprun-edge verify . --key MAKER.pub\n\nholds every file against `{MANIFEST}`, and that against the "
            f"signature in `{SIGNATURE}` by the key with the fingerprint\n\n    {signer}\n\nTake the public key from "
            "its owner, not from where this bundle came from.\n"
        )
    licence = spdx_id(origin.licence) or origin.licence
    parts.append("## Licence\n")
    parts.append(
        f"{licence or 'Not known'}, as {origin.base}. `{ATTRIBUTION}` names model and texts, `{LICENCES}` holds the "
        "licences, `bom.cdx.json` says the same for machines.\n"
    )
    return "\n".join(parts)
