"""Models of unsupported kinds are refused by name, with the reason and the families there are, before any work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cusprun.cli import app
from cusprun.errors import InvalidRequest
from tests.conftest import write_text

VISION = {"vision_config": {"hidden_size": 8}}
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "mixtral": ({"num_local_experts": 8}, "mixture of experts"),
    "qwen2_moe": ({"num_experts": 60}, "mixture of experts"),
    "qwen3_moe": ({"num_experts": 128}, "mixture of experts"),
    "olmoe": ({"num_experts": 64}, "mixture of experts"),
    "deepseek_v3": ({"n_routed_experts": 256}, "mixture of experts"),
    "gpt_oss": ({"num_local_experts": 32}, "mixture of experts"),
    "gemma3": ({**VISION, "text_config": {"model_type": "gemma3_text"}}, "multimodal.*of type gemma3_text, would have"),
    "llava": ({**VISION, "text_config": {"model_type": "llama"}}, "multimodal.*of type llama, would have"),
    "qwen2_vl": ({}, "multimodal"),
    "qwen2_audio": ({"audio_config": {}}, "multimodal"),
    "bert": ({}, "is an encoder,"),
    "xlm-roberta": ({}, "is an encoder,"),
    "t5": ({"is_encoder_decoder": True}, "encoder-decoder"),
    "umt5": ({}, "encoder-decoder"),
    "mbart": ({"is_encoder_decoder": True}, "encoder-decoder"),
    "mamba2": ({}, "recurrent layers"),
    "gpt2": ({}, "where its heads and channels are"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["inspect {model}", "prune {model} --corpus {text} --out {out}",
                                     "build --model {model} --corpus {text} --out {out}",
                                     "export {model} --out {out}"])  # fmt: skip
def test_refused_by_name(tmp_path: Path, kind: str, command: str) -> None:
    fields, reason = KINDS[kind]
    model = tmp_path / "model"
    model.mkdir()
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
    (model / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": 512, **sizes, **fields}))
    text = write_text(tmp_path / "text.txt", sentences=400, seed=1)
    out = tmp_path / "out"
    given = command.format(model=model, text=text, out=out).split()
    error = CliRunner().invoke(app, given).exception
    assert isinstance(error, InvalidRequest)
    assert error.exit_code == 2
    message = str(error)
    assert f"models of type '{kind}' are not supported" in message
    assert re.search(reason, message)
    assert "supported families: llama, mistral" in message
    assert not out.exists()


def test_a_config_that_names_no_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    error = CliRunner().invoke(app, ["inspect", str(tmp_path)]).exception
    assert isinstance(error, InvalidRequest)
    assert "config.json has no model_type" in str(error)
