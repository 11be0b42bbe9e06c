"""A random 1.1 B-parameter Llama in bfloat16 on disk, written tensor by tensor: it never is in memory as a whole.

python -m tests.large FOLDER [LAYERS]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.anatomy import Anatomy, describe
from cusprun.checkpoint import write_weights
from cusprun.files import write_json
from tests import pico

if TYPE_CHECKING:
    import torch

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}  # the shape of TinyLlama


def save_large(folder: Path, layers: int = 22, **changes: int) -> Path:
    """Writes the model with ``layers`` layers (22: 1.1 B parameters, 2.2 GB) and a small tokenizer.

    ``changes`` of the configuration make it narrower.
    """
    folder.mkdir(parents=True)
    pico.save_tokenizer(folder)
    write_json(folder / "config.json", CONFIG | {"num_hidden_layers": layers} | changes)
    anatomy = describe(folder)
    sizes = {name: 2 * _count(shape) for name, shape in anatomy.tensor_shapes()}
    write_weights(folder, _tensors(anatomy), sizes)
    return folder


def _count(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else shape[0] * shape[1]


def _tensors(anatomy: Anatomy) -> Iterator[tuple[str, torch.Tensor]]:
    """Matrices of standard deviation 1/√(inputs), drawn once a shape and turned a little further each time; norms 1."""
    import torch

    torch.manual_seed(0)
    drawn: dict[tuple[int, ...], torch.Tensor] = {}
    for turn, (name, shape) in enumerate(anatomy.tensor_shapes()):
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.bfloat16)
            continue
        if shape not in drawn:
            drawn[shape] = torch.empty(shape).normal_(0.0, shape[1] ** -0.5).bfloat16()
        yield name, drawn[shape].roll((turn, turn), (0, 1))


if __name__ == "__main__":
    save_large(Path(sys.argv[1]), *map(int, sys.argv[2:]))
