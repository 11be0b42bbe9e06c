"""A wish for recovery, checked at the door: what is trained, on which windows, and what the weights will depend on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cusprun.anatomy import SLICED_TYPE, describe, describe_sliced, read_config
from cusprun.errors import InvalidRequest, MissingPackage
from cusprun.files import sha256_tree
from cusprun.recover.held_out import Split, split_windows

Kind = Literal["lora", "distill"]

VERSION = 1  # raise when the same request gives other weights
WINDOWS_PER_STEP = 1
FEWEST = 4  # windows; fewer leave nothing to train on and to check on


@dataclass(frozen=True)
class Course:
    """What is trained and for how long."""

    kind: Kind
    rank: int
    steps: int
    windows_per_step: int
    learning_rate: float
    seed: int


class Request:
    """A model folder, windows split into training and held-out ones, and the course of the training."""

    def __init__(
        self,
        model: Path,
        windows: Mapping[str, np.ndarray],
        *,
        kind: Kind,
        teacher: Path | None,
        rank: int,
        steps: int | None,
        tokens: int,
        learning_rate: float,
        seed: int,
        device: str,
    ) -> None:
        """Raises InvalidRequest with everything that is wrong, MissingPackage without peft."""
        self.model, self.teacher, self.device = model, teacher if kind == "distill" else None, device
        self.tensors = tensor_shapes(model)
        vocabulary = vocabulary_size(model)
        problems = [*_wrong_settings(kind, teacher, rank, steps, learning_rate, device)]
        problems += _wrong_windows(windows, tokens, steps, model, vocabulary)
        if self.teacher is not None and (theirs := vocabulary_size(self.teacher)) != vocabulary:
            problems.append(
                f"the dense model {self.teacher} has {theirs} tokens and {model} has {vocabulary}: "
                "distill from the dense model with the trimmed vocabulary, or recover with lora"
            )
        if problems:
            raise InvalidRequest.together(problems)
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise MissingPackage("peft", "recover", "recovery") from error
        self.split: Split = split_windows(windows, seed)
        total = tokens // self.window
        size = WINDOWS_PER_STEP if steps is None else total // steps
        self.course = Course(kind, rank, total // size if steps is None else steps, size, learning_rate, seed)

    @property
    def window(self) -> int:
        return int(self.split.training.shape[1])

    @property
    def tokens(self) -> int:
        """Seen by the training in all."""
        return self.course.steps * self.course.windows_per_step * self.window

    def described(self) -> dict[str, Any]:
        """What config.json says of the recovery."""
        return {**asdict(self.course), "tokens": self.tokens}

    def key(self) -> str:
        """Changes with everything that the weights depend on."""
        import torch

        digest = hashlib.sha256(self.split.training.tobytes() + self.split.held_out.tobytes())
        folders = [sha256_tree(folder) for folder in (self.model, self.teacher) if folder is not None]
        digest.update(json.dumps([VERSION, folders, self.described(), self.device, torch.__version__]).encode())
        return digest.hexdigest()


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model folder with its shape, in file order; of models that slicegpt sliced as well."""
    sliced = read_config(folder).get("model_type") == SLICED_TYPE
    return dict((describe_sliced(folder) if sliced else describe(folder)).tensor_shapes())


def vocabulary_size(folder: Path) -> int:
    """Tokens that the model of a folder knows."""
    embedding, *_ = tensor_shapes(folder).values()
    return embedding[0]


def _wrong_settings(
    kind: str, teacher: Path | None, rank: int, steps: int | None, learning_rate: float, device: str
) -> Iterator[str]:
    if kind not in ("lora", "distill"):
        yield f"recovery {kind!r} is unknown: write lora or distill"
    if kind == "distill" and teacher is None:
        yield "distill learns from the dense model: name its folder, or recover with lora"
    if rank < 1:
        yield f"a rank of {rank} adapts nothing: write 1 or more"
    if steps is not None and steps < 1:
        yield f"{steps} steps recover nothing: write 1 or more"
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        yield f"a learning rate of {learning_rate} recovers nothing: write a number above 0"
    if device not in ("cpu", "cuda"):
        yield f"device {device!r} is unknown: write cpu or cuda"
    elif device == "cuda":
        import torch

        if not torch.cuda.is_available():
            yield "device cuda was asked for and torch sees no CUDA device: write cpu"


def _wrong_windows(
    windows: Mapping[str, np.ndarray], tokens: int, steps: int | None, model: Path, vocabulary: int
) -> Iterator[str]:
    shapes = {ids.shape[1:] for ids in windows.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        yield "recovery wants windows of one length, (n, window) for each dimension"
        return
    if (count := sum(len(ids) for ids in windows.values())) < FEWEST:
        yield f"{count} windows are too few to train on and to check on: give {FEWEST} or more"
        return
    ((window,),) = shapes
    longest = read_config(model).get("max_position_embeddings")
    if window < 2 or (isinstance(longest, int) and window > longest):
        yield f"windows of {window} tokens do not fit the model: write 2 to {longest}"
    if (
        min(int(ids.min(initial=0)) for ids in windows.values()) < 0
        or max(int(ids.max(initial=0)) for ids in windows.values()) >= vocabulary
    ):
        yield f"the windows hold token ids outside the vocabulary of {vocabulary}: tokenize them anew"
    if (total := tokens // window) < 1:
        yield f"{tokens} tokens of recovery are less than one window of {window}: give more"
    elif steps is not None and steps > total:
        yield f"{tokens} tokens of recovery are {total} windows of {window}: write at most {total} steps, not {steps}"
