"""The browser bundle: a static page that runs the expert's .gguf by wllama, llama.cpp as WebAssembly.

The page fetches nothing but its own files and keeps them, checked piece by piece, for use without a network.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files as resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from cusprun.deploy.chat import CONTEXT
from cusprun.deploy.expert import Artifact, Expert
from cusprun.deploy.files import Files
from cusprun.deploy.targets import Notes, Wish
from cusprun.deploy.targets.wllama import LLAMA_CPP, VERSION, fetch_wllama
from cusprun.errors import InvalidRequest
from cusprun.exporters.gguf_split import split_gguf
from cusprun.runtimes.gguf_header import GgufInfo, load_metadata

MOST = 500_000_000  # bytes of a file: browsers fail to hold much larger ones in one piece
PIECE = 4 * 2**20  # bytes that are hashed at once, so that the page checks while it loads
LONGEST = 256  # tokens of an answer, unless the visitor says otherwise
STATIC = ("app.js", "engine.js", "files.js", "icon.svg", "style.css")
LICENCES = ("llama.cpp.txt", "webassembly.txt")
# What the page may do: run its own code and WebAssembly, start workers out of memory, ask its own host.
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:; connect-src 'self' blob:; "
    "style-src 'self'; img-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'"
)
UNROUNDED = ("f16", "f32", "bf16")  # several times slower here than the others, and larger
SIZES = ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"))


@dataclass(frozen=True)
class Large:
    """A file that the page fetches itself, with the hashes of its pieces."""

    path: str  # in the bundle
    bytes: int
    sha256: str
    pieces: tuple[str, ...]  # sha256 of each PIECE bytes

    @property
    def key(self) -> str:
        """Under which the page keeps it."""
        return f"{self.path}?sha256={self.sha256}"

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "bytes": self.bytes, "sha256": self.sha256, "pieces": list(self.pieces)}


def gather(expert: Expert, files: Files, wish: Wish, *, most: int = MOST) -> Notes:
    """Adds the page, wllama and the model, in files of at most ``most`` bytes.

    Raises InvalidRequest where the expert has no .gguf or wllama is not to be had, Failed where fetching it breaks.
    """
    if wish.format not in (None, "gguf"):
        raise InvalidRequest(f"--format {wish.format}: browsers are given a .gguf; leave --format out")
    artifact = choose_artifact(expert, wish.quant)
    info = load_metadata(artifact.path)
    wllama = fetch_wllama()
    model = []
    for path in _parts(artifact.path, info, files, most):
        files.add(f"model/{path.name}", path)
        model.append(_describe(f"model/{path.name}", path))
    for name, content in wllama.items():
        files.add(name, content)
    page = _page()
    for name in LICENCES:
        files.add(f"LICENSES/{name}", (page / "licences" / name).read_bytes())
    files.add("_headers", (page / "headers.txt").read_bytes())

    engine = {
        "default": {"wasm": _describe("wllama/wllama.wasm", wllama["wllama/wllama.wasm"])},
        "compat": {
            "wasm": _describe("wllama/compat.wasm", wllama["wllama/compat.wasm"]),
            "worker": _describe("wllama/compat.js", wllama["wllama/compat.js"]),
        },
    }
    settings = {
        "name": expert.name,
        "context": min(CONTEXT, info.context_length),
        "chat_template": "tokenizer.chat_template" in info.metadata,
        "piece_bytes": PIECE,
        "engine": {build: {part: large.to_json() for part, large in one.items()} for build, one in engine.items()},
        "model": [large.to_json() for large in model],
    }
    shell = {name: (page / name).read_bytes() for name in STATIC}
    shell["wllama/wllama.js"] = wllama["wllama/wllama.js"]
    shell["bundle.json"] = _json(settings)
    shell["manifest.webmanifest"] = _json(_web_manifest(expert.name))
    shell["index.html"] = _render(
        "index.html.j2",
        policy=POLICY,
        name=expert.name,
        scenario=expert.purpose,
        facts=_facts(expert, artifact, info),
        context=settings["context"],
        longest=min(LONGEST, info.context_length // 2),
    ).encode()
    for name, content in shell.items():
        if name not in files:
            files.add(name, content)
    kept = [*model, *(large for build in engine.values() for large in build.values())]
    files.add("sw.js", _service_worker(shell, [large.key for large in kept]))
    return _notes(artifact, model)


def choose_artifact(expert: Expert, quant: str | None) -> Artifact:
    """The .gguf of the type ``quant``, else the first of a rounded type, else the first."""
    if quant is None:
        for artifact in expert.artifacts:
            if artifact.format == "gguf" and artifact.quant not in UNROUNDED:
                return artifact
    return expert.of("gguf", quant)


def _parts(path: Path, info: GgufInfo, files: Files, most: int) -> tuple[Path, ...]:
    """The files of a model; where one is too large, smaller ones that exist for as long as ``files`` does."""
    if max(part.stat().st_size for part in info.parts) <= most:
        return info.parts
    if len(info.parts) > 1:
        raise InvalidRequest(f"{path} has parts of more than {most} bytes: export it in one, or in smaller ones")
    return tuple(split_gguf(path, files.scratch() / path.name, most))


def _describe(name: str, content: Path | bytes) -> Large:
    whole, pieces, size = hashlib.sha256(), [], 0
    if isinstance(content, bytes):
        for start in range(0, len(content), PIECE):
            pieces.append(hashlib.sha256(content[start : start + PIECE]).hexdigest())
        return Large(name, len(content), hashlib.sha256(content).hexdigest(), tuple(pieces))
    with content.open("rb") as file:
        while piece := file.read(PIECE):
            whole.update(piece)
            pieces.append(hashlib.sha256(piece).hexdigest())
            size += len(piece)
    return Large(name, size, whole.hexdigest(), tuple(pieces))


def _service_worker(shell: dict[str, bytes], kept: list[str]) -> bytes:
    """sw.js with the list of files in front; any other bundle has another, and browsers see that."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(shell.items())}
    version = hashlib.sha256(json.dumps([hashes, kept]).encode()).hexdigest()[:16]
    head = "".join(
        f"const {name} = {json.dumps(value, indent=2)};\n"
        for name, value in (("VERSION", version), ("SHELL", hashes), ("KEPT", kept))
    )
    return head.encode() + (_page() / "sw.js").read_bytes()


def _facts(expert: Expert, artifact: Artifact, info: GgufInfo) -> list[tuple[str, str]]:
    """What the page tells about the model; only what is known."""
    base = expert.card.get("base") or {}
    facts = [
        ("Made from", base.get("id")),
        ("Licence", base.get("licence")),
        ("Scenario", expert.purpose),
        ("Size", f"{_count(info.parameters)} parameters, {info.file_bytes / 1e6:.1f} MB as {artifact.quant}"),
        ("Runs on", f"llama.cpp {LLAMA_CPP} in wllama {VERSION} (MIT), on the processor"),
    ]
    return [(label, str(value)) for label, value in facts if value]


def _count(parameters: int) -> str:
    for size, word in SIZES:
        if parameters >= size:
            return f"{parameters / size:.3g} {word}"
    return str(parameters)


def _web_manifest(name: str) -> dict[str, Any]:
    icon = {"src": "icon.svg", "sizes": "any", "type": "image/svg+xml"}
    return {"name": name, "short_name": name[:30], "start_url": "./", "display": "standalone", "icons": [icon]}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _page() -> Traversable:
    return resources("cusprun.deploy") / "targets" / "browser_page"


def _render(template: str, **values: Any) -> str:
    from jinja2 import Environment

    environment = Environment(autoescape=".html" in template, keep_trailing_newline=True)
    return environment.from_string((_page() / template).read_text(encoding="utf-8")).render(**values)


def _notes(artifact: Artifact, model: list[Large]) -> Notes:
    return Notes(
        start=_render(
            "start.md.j2",
            quant=artifact.quant,
            slow=artifact.quant in UNROUNDED,
            parts=len(model),
            megabytes=round(sum(large.bytes for large in model) / 1e6),
        ),
        needs=(
            "Chrome or Edge 137 and newer, Firefox 134 and newer: wllama's main build",
            "Safari, and older browsers with SIMD and exceptions in WebAssembly: its slower build, also in this bundle",
        ),
        unproven=(
            "Pages of this kind are tested in headless Chromium on Linux, with both builds of wllama, and were tried "
            "once in Firefox ESR 153; Safari and phones have not been tried.",
        ),
    )
