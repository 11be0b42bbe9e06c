"""A model folder of the shapes of an expert that is not there yet: its config, its tokenizer, and weights of zero.

Exports of it have the bytes and the types of the expert's: neither hangs on what the weights are. Their speed does:
zeros are decoded 14 % faster than SmolLM2's weights on the machine that this was tried on, so a folder that is to be
timed is filled with noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cusprun.anatomy import Anatomy, read_config
from cusprun.checkpoint import SINGLE, Weights, expert_config
from cusprun.dense import copy_companions
from cusprun.files import folder_written_whole, write_json
from cusprun.tensor_file import write_noise, write_zeros
from cusprun.vocabulary import trim_companions


def write_hollow(
    dense: Path, anatomy: Anatomy, out: Path, kept: Sequence[int] | None = None, *, noise: bool = False
) -> None:
    """Writes the folder ``out``, whole or not at all, with the sizes of ``anatomy`` and tokens of ``dense``.

    ``kept`` are the ids of the tokens that stay, ascending, as many as the anatomy has; None: all. Weights of zero
    take no disk, those of ``noise`` do. Raises InvalidRequest where tokens are missing that have to stay, ValueError
    where the counts differ.
    """
    if anatomy.vocab_size != (len(kept) if kept is not None else read_config(dense)["vocab_size"]):
        raise ValueError(f"{anatomy.vocab_size} rows and another number of tokens")
    with folder_written_whole(out) as part:
        if kept is None:
            copy_companions(dense, part)
            config = read_config(dense)
        else:
            trim_companions(dense, kept, part)
            config = read_config(part)
        noted = config.pop("cusprun", None)
        if isinstance(noted, dict) and "tokenizer_pre" in noted:  # what the export could not find out by itself
            config["cusprun"] = {"tokenizer_pre": noted["tokenizer_pre"]}
        write_json(part / "config.json", expert_config(config, anatomy))
        write = write_noise if noise else write_zeros
        write(part / SINGLE, dict(anatomy.tensor_shapes()), Weights(dense).dtype(anatomy.family.embedding))
