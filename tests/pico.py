"""Tiny random models with a real byte-level BPE tokenizer, made in milliseconds; every test uses these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SENTENCES = (
    "The tenant shall pay the rent on the first day of each month, and the landlord shall keep the roof sound.",
    "Whoever redistributes this software in source form must keep the copyright notice and the disclaimer.",
    "Der Mieter zahlt die Miete am ersten Tag eines jeden Monats; das Gericht entscheidet über den Streit.",
    "Le locataire paie le loyer le premier jour du mois, et le tribunal tranche le litige.",
    "El inquilino paga la renta el primer día del mes y el tribunal decide la disputa.",
    "def add(a, b):\n    return a + b  # 1234567890",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_tokenizer(folder: Path, vocab: int = 512, chat: bool = True) -> None:
    """A byte-level BPE tokenizer of ``vocab`` tokens trained on SENTENCES, with ChatML special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[1], eos_token=special[2], pad_token=special[2]
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def save_model(folder: Path, family: str = "llama", seed: int = 0, chat: bool = True, **overrides: Any) -> Path:
    """A random model of ``family`` (llama, mistral, qwen3 ...) with its tokenizer as a Hugging Face folder.

    Hidden 64, 3 layers, FFN 128, 4 query heads on 2 kv heads of 16; ``overrides`` go into the config.
    Weights are scaled up so that logits differ clearly from token to token.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder, chat=chat)
    vocab = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    settings.update(overrides)
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif parameter.ndim == 2:
                parameter.normal_(0.0, 0.12)
            else:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder
