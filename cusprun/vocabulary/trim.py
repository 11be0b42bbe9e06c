"""A model folder with fewer tokens: sliced embedding and output rows, the tokenizer, and every id that goes with it.

Kept tokens stay in their order; their new ids are their places in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cusprun.anatomy import describe, read_config
from cusprun.checkpoint import Weights, load_tokenizer, write_weights
from cusprun.errors import Failed, InvalidRequest
from cusprun.files import folder_written_whole, write_json
from cusprun.progress import track
from cusprun.vocabulary.merges import close
from cusprun.vocabulary.pieces import GENERATION, Pieces, read_pieces, renumbered

if TYPE_CHECKING:
    import torch

COPIED = ("chat_template.jinja", "chat_template.json", "special_tokens_map.json")
ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# The tokenizer's class is the plain one, which takes tokenizer.json as it stands; others build it anew from files that
# are no longer here. What those classes add by themselves is in tokenizer.json by now.
CLASS = "PreTrainedTokenizerFast"
SETTLED = ("added_tokens_decoder", "add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "backend")


def trim_model(dense: Path, kept: Sequence[int], out: Path) -> np.ndarray:
    """Writes the model folder ``out`` with only the token ids ``kept``, whole or not at all.

    Returns each old id's new one, (rows,) int64, -1 where it went. The weights are streamed tensor by tensor. Raises
    InvalidRequest where ``kept`` lacks what has to stay (bytes, special tokens, what the merges of a kept token need)
    or the tokenizer is of a kind that cannot be trimmed.
    """
    kept = sorted(set(kept))
    whole, weights = describe(dense), Weights(dense)
    weights.check(whole)
    trimmed = replace(whole, vocab_size=len(kept))
    shapes = dict(trimmed.tensor_shapes())
    sizes = {name: prod(shape) * ELEMENT_BYTES[weights.dtype(name)] for name, shape in shapes.items()}
    rows = (whole.family.embedding, whole.family.output)
    with folder_written_whole(out) as part:
        trim_companions(dense, kept, part)
        stream = _sliced(weights, shapes, rows, kept)
        write_weights(part, track(stream, "trimming the vocabulary", total=len(shapes)), sizes)
    found = np.full(whole.vocab_size, -1, dtype=np.int64)
    found[kept] = np.arange(len(kept))
    return found


def trim_companions(dense: Path, kept: Sequence[int], out: Path) -> None:
    """Writes all of a trimmed model's folder but the weights: config.json, generation settings, the tokenizer.

    ``kept`` ascends. Raises what :func:`trim_model` raises.
    """
    pieces, config = read_pieces(dense), read_config(dense)
    _check(pieces, kept)
    new = {old: number for number, old in enumerate(kept)}
    noted = {key: value for key, value in (config.get("cusprun") or {}).items() if not key.startswith("source_")}
    config = renumbered({**config, "vocab_size": len(kept)}, new)
    config["cusprun"] = {**noted, "vocabulary": {"kept": len(kept), "of": pieces.rows}}
    write_json(out / "config.json", config)
    if (dense / GENERATION).is_file():
        write_json(out / GENERATION, renumbered(_read(dense / GENERATION), new))
    _write_tokenizer(pieces, kept, out)


def _check(pieces: Pieces, kept: Sequence[int]) -> None:
    if not kept or kept[0] < 0 or kept[-1] >= pieces.rows:
        raise InvalidRequest(f"token ids to keep must lie between 0 and {pieces.rows - 1}")
    lacking = sorted(close(pieces, kept) - set(kept))
    if lacking:
        raise InvalidRequest(
            f"tokens that have to stay are not among the kept ones: {len(lacking)}, the first is "
            f"{pieces.texts[lacking[0]]!r} ({lacking[0]}); take what cusprun.vocabulary's close() or rows_for() gives"
        )


def _sliced(
    weights: Weights, shapes: dict[str, tuple[int, ...]], rows: tuple[str, ...], kept: Sequence[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    index = torch.tensor(kept)
    for name, shape in shapes.items():
        tensor = weights[name].index_select(0, index) if name in rows else weights[name]
        if tuple(tensor.shape) != shape:
            raise Failed(f"{name}: trimmed to {list(tensor.shape)}, wanted {list(shape)}")
        yield name, tensor


def _write_tokenizer(pieces: Pieces, kept: Sequence[int], out: Path) -> None:
    tokenizer = load_tokenizer(pieces.folder)
    config = _read(pieces.folder / "tokenizer_config.json")
    config = {key: value for key, value in config.items() if key not in SETTLED}
    for name, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str):
            config.setdefault(name, token)
    config["tokenizer_class"] = CLASS
    write_json(out / "tokenizer_config.json", config)
    pieces.tokenizer(kept).save(str(out / "tokenizer.json"), pretty=False)
    for name in COPIED:
        if (pieces.folder / name).is_file():
            shutil.copyfile(pieces.folder / name, out / name)


def _read(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidRequest(f"{path} must hold one JSON object")
    return found
