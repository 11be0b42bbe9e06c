"""Why a model that is of none of the supported families is refused: what its config.json says it is."""

from __future__ import annotations

from typing import Any

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
OTHER_INPUTS = ("vision_config", "audio_config", "speech_config", "image_token_id", "audio_token_id")
MULTIMODAL = ("llava", "paligemma", "mllama", "idefics", "pixtral", "internvl", "smolvlm", "gemma3n")
ENCODERS = ("bert", "electra", "deberta", "xlnet", "longformer", "nomic", "mpnet")
ENCODER_DECODERS = ("t5", "bart", "pegasus", "marian", "whisper", "prophetnet")
RECURRENT = ("mamba", "rwkv", "recurrent_gemma", "xlstm", "jamba", "zamba", "bamba")


def why_not(config: dict[str, Any]) -> str:
    """What kind of model a config.json describes, and why that kind is not pruned.

    ``config`` is of no supported family; mind that a model may be of several kinds, of which the first is told.
    """
    kind = str(config.get("model_type") or "").lower().replace("-", "_")
    words = kind.split("_")
    if "model_type" not in config:
        return "config.json has no model_type"
    if any(key in config for key in OTHER_INPUTS) or kind.startswith(MULTIMODAL) or {"vl", "vision"} & set(words):
        return "it is a multimodal model, and only models of text alone are pruned" + _text_part(config)
    if any(_more_than_one(config.get(key)) for key in EXPERTS) or "moe" in kind or kind in ("mixtral", "dbrx"):
        return "it is a mixture of experts: which channels a token meets depends on a router, which is not modelled"
    if config.get("is_encoder_decoder") or any(word.endswith(ENCODER_DECODERS) for word in words):
        return "it is an encoder-decoder model; decoders that continue a text are pruned"
    if any(name in kind for name in ENCODERS):
        return "it is an encoder, which does not generate; decoders that continue a text are pruned"
    if kind.startswith(RECURRENT):
        return "it has recurrent layers in place of attention, and their state is not modelled"
    return "nobody has described where its heads and channels are"


def _more_than_one(value: Any) -> bool:
    """Dense models of a mixture's family say 0 or 1; some list a number a layer."""
    return max(value, default=0) > 1 if isinstance(value, list) else isinstance(value, int) and value > 1


def _text_part(config: dict[str, Any]) -> str:
    inner = config.get("text_config")
    kind = inner.get("model_type") if isinstance(inner, dict) else None
    return f" (its text part, of type {kind}, would have to be saved as a model of its own)" if kind else ""
