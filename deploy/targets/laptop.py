"""A laptop: the GGUF with a Modelfile for Ollama and a start script of llama.cpp's server, or the ONNX folder."""

from __future__ import annotations

import json
from pathlib import Path

from cusprun.deploy.expert import Artifact, Expert
from cusprun.deploy.files import Files
from cusprun.deploy.ollama import LONGEST_CONTEXT, MODELFILE, Turns, find_turns, read_sampling, write_modelfile
from cusprun.deploy.targets import PER_LAYER, Notes, Wish
from cusprun.runtimes.chat_template import DAY
from cusprun.runtimes.gguf_header import GgufInfo, load_metadata

UNIX = """#!/bin/sh
# Serves the model to this computer alone, on http://127.0.0.1:8080 or the port in PORT.
cd "$(dirname "$0")" || exit 1
if ! command -v llama-server >/dev/null 2>&1; then
  echo "llama-server is missing: install llama.cpp, see README.md" >&2
  exit 1
fi
exec llama-server --model "{gguf}" --host 127.0.0.1 --port "${{PORT:-8080}}" --ctx-size {context} --jinja "$@"
"""
WINDOWS = """@echo off
rem Serves the model to this computer alone, on http://127.0.0.1:8080 or the port in PORT.
cd /d "%~dp0"
if "%PORT%"=="" set PORT=8080
where llama-server >nul 2>nul || (echo llama-server is missing: install llama.cpp, see README.md & exit /b 1)
llama-server --model "{gguf}" --host 127.0.0.1 --port %PORT% --ctx-size {context} --jinja %*
"""
LLAMA_CPP = """With [llama.cpp](https://github.com/ggml-org/llama.cpp) installed, a page to chat on and an
OpenAI-compatible API, for this computer alone:

    ./start.sh

On Windows double-click `start.bat`, or in the terminal:

    llama-cli --model {gguf} --jinja --conversation"""
OLLAMA = """With Ollama:

    ollama create {name} -f Modelfile
    ollama run {name}"""
NOT_OLLAMA = """This file has layers of different widths (architecture `{arch}`), which Ollama is not known to open:
where it fails, use llama.cpp, or ask the maker for a bundle made with `--layout uniform`."""
OLD_DAY = f"""Ollama's templates know no date: there the model is told that it is {DAY}, what its own template falls
back to."""
NO_MODELFILE = """There is no Modelfile for Ollama: the model's chat template is of no kind that is known in Ollama's
form. llama.cpp takes the one inside the file."""
CUSPRUN = """With cusprun:

    cusprun-edge chat .
    cusprun-edge serve ."""


def gather(expert: Expert, files: Files, wish: Wish) -> Notes:
    """Adds the GGUF, or the ONNX folder where the wish is for one, and what starts it."""
    artifact = expert.of(wish.format or "gguf", wish.quant)
    return _onnx(artifact, files) if artifact.format == "onnx" else _gguf(expert, artifact, files)


def _gguf(expert: Expert, artifact: Artifact, files: Files) -> Notes:
    name, info = artifact.path.name, load_metadata(artifact.path)
    context = min(info.context_length or LONGEST_CONTEXT, LONGEST_CONTEXT)
    files.add(name, artifact.path)
    files.add("start.sh", UNIX.format(gguf=name, context=context), executable=True)
    files.add("start.bat", WINDOWS.format(gguf=name, context=context).replace("\n", "\r\n"))
    turns = turns_of(info, expert.model)
    if turns is not None:
        sampling = read_sampling(expert.model)
        ends = [special_token(info, expert.model, kind) for kind in ("eos", "eot")]
        files.add(MODELFILE, write_modelfile(name, turns, context=context, sampling=sampling, ends=ends))
    per_layer = info.architecture in PER_LAYER
    parts = [LLAMA_CPP.format(gguf=name)]
    if turns is None:
        parts.append(NO_MODELFILE)
    else:
        parts.append(OLLAMA.format(name=expert.name.lower()))
        parts += [OLD_DAY] if DAY in turns.system[0] + (turns.default or "") else []
        parts += [NOT_OLLAMA.format(arch=info.architecture)] if per_layer else []
    parts.append(CUSPRUN)
    needs = [f"llama.cpp that knows the architecture `{info.architecture}`" if per_layer else "llama.cpp, or what is "
             "made with it (Ollama, LM Studio, llama-cpp-python)"]  # fmt: skip
    if per_layer:
        needs.append("no program that expects one width for all layers: Ollama is not known to open it")
    return Notes(
        "\n\n".join(parts),
        tuple(needs),
        (
            "llama-server and Ollama were not run where this bundle was made: the GGUF was run by llama.cpp's library, "
            "and the template in the Modelfile was held against the model's own on several conversations",
        ),
    )


def _onnx(artifact: Artifact, files: Files) -> Notes:
    files.add_tree("onnx", artifact.path)
    start = (
        "With plain onnxruntime:\n\n    pip install onnxruntime tokenizers jinja2\n"
        '    python onnx/run.py "Who pays the rent?"\n\n'
        'The folder `onnx` is also what onnxruntime-genai opens: `onnxruntime_genai.Model("onnx")`.\n\n'
        "With cusprun:\n\n    cusprun-edge chat onnx\n    cusprun-edge serve onnx"
    )
    return Notes(start, ("Python with onnxruntime, or onnxruntime-genai in any of its languages",))


def turns_of(info: GgufInfo, model: Path) -> Turns | None:
    """The kind of turns of a GGUF's own chat template; None where it has none, or one that is not known."""
    template = info.metadata.get("tokenizer.chat_template")
    if not isinstance(template, str):
        return None
    bos, eos = (special_token(info, model, kind) for kind in ("bos", "eos"))
    adds_bos = bool(info.metadata.get("tokenizer.ggml.add_bos_token", False))
    return find_turns(template, bos=bos, eos=eos, adds_bos=adds_bos)


def special_token(info: GgufInfo, model: Path, kind: str) -> str:
    """The text of a special token, of which the file has the number and tokenizer.json the text; empty without one."""
    number = info.metadata.get(f"tokenizer.ggml.{kind}_token_id")
    path = model / "tokenizer.json"
    added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens") or [] if path.is_file() else []
    return next((str(token["content"]) for token in added if token["id"] == number), "")
