"""What stands beside the graph in an ONNX folder: genai_config.json, tokenizer, chat template, a runner of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cusprun import runtimes
from cusprun.anatomy import Anatomy
from cusprun.checkpoint import load_tokenizer
from cusprun.exporters.end_tokens import read_end_tokens
from cusprun.files import write_json
from cusprun.runtimes import GENAI_CONFIG

GRAPH, DATA = "model.onnx", "model.onnx.data"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def tokenizer_files(model_dir: Path) -> list[Path]:
    """The files of the model folder ``model_dir`` that an ONNX folder holds as they are."""
    return [model_dir / name for name in TOKENIZER if (model_dir / name).is_file()]


def write_beside(model_dir: Path, folder: Path, anatomy: Anatomy, context: int, name: str, quant: str) -> None:
    """Writes everything of the ONNX ``folder`` but the graph, from the model folder ``model_dir``."""
    for file in tokenizer_files(model_dir):
        shutil.copyfile(file, folder / file.name)
    write_json(folder / GENAI_CONFIG, genai_config(model_dir, anatomy, context))
    write_json(folder / "cusprun.json", {"name": name, "quant": quant})
    shutil.copyfile(Path(__file__).with_name("onnx_runner.py"), folder / "run.py")
    shutil.copyfile(Path(runtimes.__file__).with_name("onnx_session.py"), folder / "onnx_session.py")


def genai_config(model_dir: Path, anatomy: Anatomy, context: int) -> dict[str, Any]:
    """onnxruntime-genai's description of the graph.

    Layers without attention have no cache, so only the others count; kv heads of each are read from the graph.
    """
    config, generation = _read(model_dir / "config.json"), _read(model_dir / "generation_config.json")

    def token(kind: str) -> Any:
        return generation.get(f"{kind}_token_id", config.get(f"{kind}_token_id"))

    ends = read_end_tokens(model_dir, load_tokenizer(model_dir).eos_token_id, anatomy.vocab_size)
    padding = token("pad")
    attention = [layer for layer in anatomy.layers if layer.heads]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH,
        "head_size": anatomy.head_dim,
        "hidden_size": anatomy.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": attention[0].heads,
        "num_hidden_layers": len(attention),
        "num_key_value_heads": attention[0].kv_heads,
    }
    tokens = {
        "bos_token_id": token("bos"),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": next(iter(ends), None) if padding is None else padding,
    }
    return {
        "model": {
            "type": "decoder",
            "context_length": context,
            "vocab_size": anatomy.vocab_size,
            **{key: value for key, value in tokens.items() if value is not None},
            "decoder": decoder,
        },
        "search": {"max_length": context, "do_sample": False, "past_present_share_buffer": True},
    }


def _read(path: Path) -> Mapping[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
