"""The phone: the expert for onnxruntime-genai and for llama.cpp, and sample projects that open it.

Android (Kotlin, onnxruntime-genai), React Native (llama.rn) and Termux, rendered from phone-templates with the expert's
own names. They cannot be built here; what is checked instead is told in the notes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.deploy.expert import Artifact, Expert
from cusprun.deploy.files import Files
from cusprun.deploy.targets import Notes, Wish
from cusprun.deploy.targets.phone_names import FILTERS, Names, names_of
from cusprun.deploy.targets.phone_notes import NEEDS, UNPROVEN, VERSIONS
from cusprun.errors import InvalidRequest
from cusprun.files import sha256_file
from cusprun.formats import DEFAULTS, format_of

if TYPE_CHECKING:
    import jinja2

    from cusprun.exporters.gguf_repack import Repacked

TEMPLATES = Path(__file__).with_name("phone-templates")
MOST = 512 * 10**6  # bytes of a file: what an app's packaging and a phone's file systems take without trouble
CONTEXT = 2048  # tokens of a conversation, where the model has as many: the cache of a phone's memory
LITTLE = 0.9  # share of repacked bytes below which another type is recommended
LIKED = {"gguf": ("q4_0", "iq4_nl", "q8_0"), "onnx": ("int4", "int8")}  # on ARM, the first first


@dataclass(frozen=True)
class Shipped:
    """A file of the model under its name in gguf/ or onnx/."""

    name: str
    path: Path
    bytes: int
    sha256: str


def gather(expert: Expert, files: Files, wish: Wish, most: int = MOST) -> Notes:
    """Adds gguf/, onnx/, android/, react-native/ and termux/; of an expert in one of the two formats, what opens that.

    Files of more than ``most`` bytes are written in parts. Raises InvalidRequest where the expert has neither format,
    or not the one or the type that was asked for.
    """
    chosen = _choose(expert, wish)
    names = names_of(expert.name)
    context = min(CONTEXT, int(_config(expert.model).get("max_position_embeddings") or CONTEXT))
    values: dict[str, Any] = {"names": names, "versions": VERSIONS, "context": context}
    scratch = files.scratch()
    if "gguf" in chosen:
        values |= _gguf(chosen["gguf"], names, scratch, most)
        values["gguf_folder"] = _folder(names, values["gguf_files"])
        for part in values["gguf_files"]:
            files.add(f"gguf/{part.name}", part.path)
        _render("react-native", files, values)
        _render("termux", files, values)
    if "onnx" in chosen:
        values |= _onnx(chosen["onnx"], expert.model, scratch, most)
        values["onnx_folder"] = _folder(names, values["onnx_files"])
        for part in values["onnx_files"]:
            files.add(f"onnx/{names.slug}/{part.name}", part.path)
        _render("android", files, values)
    templates = _templates()
    told = [templates.get_template(f"notes/{format}.md.j2").render(values) for format in chosen]
    told += [_missing(format, wish) for format in DEFAULTS if format not in chosen]
    return Notes(
        start="\n\n".join(text.strip() for text in told),
        needs=tuple(line for format in chosen for line in NEEDS[format]),
        unproven=tuple(line for format in chosen for line in UNPROVEN[format]),
    )


def _choose(expert: Expert, wish: Wish) -> dict[str, Artifact]:
    """The artifact of each format that goes into the bundle."""
    quants = [quant for quant in (wish.quant or "").split(",") if quant]
    asked = {format_of(quant): quant for quant in quants}
    if len(asked) < len(quants):
        raise InvalidRequest(f"--quant {wish.quant}: name one type of each format")
    formats = [part for part in (wish.format or "").split(",") if part] or list(DEFAULTS)
    for format in [*formats, *asked]:
        if format not in DEFAULTS:
            raise InvalidRequest(f"format {format!r} is unknown: write {' or '.join(DEFAULTS)}")
        if format not in formats:
            raise InvalidRequest(
                f"{asked[format]} is a type of {format}, which is not asked for: write --format {format}"
            )
        if wish.format or format in asked:
            expert.of(format, asked.get(format))  # says what to build where it is not there
    chosen = {}
    for format in formats:
        found = [one for one in expert.artifacts if one.format == format and asked.get(format) in (None, one.quant)]
        if found:
            chosen[format] = min(found, key=_unlikeness)
    if not chosen:
        raise InvalidRequest(
            f"{expert.folder} has neither a GGUF nor an ONNX artifact: "
            "build it with --format gguf,onnx --quant q4_0,int4"
        )
    return chosen


def _unlikeness(artifact: Artifact) -> tuple[float, int, int]:
    """The smaller, the better an artifact suits an ARM processor: what is repacked, then the type, then the size."""
    liked = LIKED[artifact.format]
    rank = liked.index(artifact.quant) if artifact.quant in liked else len(liked)
    share = arm_repack(artifact.path) if artifact.format == "gguf" else 1.0
    return -float(share >= LITTLE), rank, artifact.bytes


def arm_repack(path: Path) -> float:
    """Share, 0 to 1, of the bytes of a GGUF's matrices in types and widths that llama.cpp repacks for ARM."""
    from cusprun.exporters.gguf_repack import repacked
    from cusprun.runtimes.gguf_header import load_metadata

    return repacked(load_metadata(path)).share


def _config(model: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return found


def _gguf(artifact: Artifact, names: Names, scratch: Path, most: int) -> dict[str, Any]:
    """What the templates say of the GGUF, which gets the expert's name and parts where it is larger than ``most``."""
    from cusprun.exporters.gguf_repack import repacked
    from cusprun.exporters.gguf_split import split_gguf
    from cusprun.runtimes.gguf_header import load_metadata

    name = f"{names.slug}-{artifact.quant}.gguf"
    if artifact.path.stat().st_size <= most:
        parts = [_shipped(name, artifact.path)]
    else:
        parts = [_shipped(part.name, part) for part in split_gguf(artifact.path, scratch / name, most)]
    found = repacked(load_metadata(artifact.path))
    return {"gguf_files": parts, "gguf_quant": artifact.quant, "share": found.share, "better": _better(found)}


def _better(found: Repacked) -> str:
    """Flags of a build of which more is repacked, in words; empty where that is hardly possible."""
    from cusprun.exporters.gguf_repack import ROWS, VOCABULARY

    if found.share >= LITTLE:
        return ""
    flags = {
        "`--quant q4_0`"
        if tensor.type not in ROWS["arm"]
        else "a `--vocab` that is a multiple of 8"
        if tensor.name in VOCABULARY
        else "`--align 32`"
        for tensor in found.left
    }
    return " and ".join(sorted(flags))


def _onnx(artifact: Artifact, model: Path, scratch: Path, most: int) -> dict[str, Any]:
    """What the templates say of the ONNX folder; its Python is left out, large weights go into several files."""
    from cusprun.deploy.targets.phone_prompt import prompt_around_a_question
    from cusprun.exporters.onnx_folder import DATA, GRAPH
    from cusprun.exporters.onnx_split import split_onnx

    found = {path.name: path for path in artifact.path.iterdir() if path.is_file() and path.suffix != ".py"}
    if DATA in found and found[DATA].stat().st_size > most:
        del found[DATA], found[GRAPH]
        found |= {path.name: path for path in split_onnx(artifact.path, scratch / "onnx", most)}
    parts = [_shipped(name, path) for name, path in sorted(found.items())]
    weights = sum(part.name.endswith(".data") for part in parts)
    prompt = prompt_around_a_question(model)
    return {"onnx_files": parts, "onnx_quant": artifact.quant, "weights": weights, "prompt": prompt}


def _shipped(name: str, path: Path) -> Shipped:
    return Shipped(name, path, path.stat().st_size, sha256_file(path))


def _folder(names: Names, parts: Sequence[Shipped]) -> str:
    """Where an app keeps these files; others, also of the same sizes, are kept elsewhere."""
    told = "".join(f"{part.sha256}  {part.name}\n" for part in parts)
    return f"{names.slug}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def _templates() -> jinja2.Environment:
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters.update(FILTERS)
    return environment


def _render(project: str, files: Files, values: dict[str, Any]) -> None:
    """Adds a sample project; ``package`` in a path is the folder of the expert's package."""
    templates = _templates()
    for path in sorted((TEMPLATES / project).rglob("*.j2")):
        name = path.relative_to(TEMPLATES).as_posix()
        placed = name.removesuffix(".j2").replace("/java/package/", f"/java/{values['names'].package_path}/")
        files.add(placed, templates.get_template(name).render(values), executable=placed.endswith(".sh"))


def _missing(format: str, wish: Wish) -> str:
    opens = "llama.rn and Termux" if format == "gguf" else "onnxruntime-genai on Android"
    if wish.format:
        return f"This bundle holds nothing for {opens}, as was asked: `--format {format}` ships it."
    return (
        f"This bundle holds nothing for {opens}: the expert was built without {format}. The one who ships it adds that "
        f"with `cusprun-edge build ... --format gguf,onnx --quant q4_0,int4`."
    )
