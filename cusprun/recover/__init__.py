"""Recovery after pruning: a model folder and calibration windows in, the same shapes with better weights out.

``lora`` lowers the language-model loss, ``distill`` the divergence from the dense model; both train a low-rank adapter
(:mod:`cusprun.recover.training`) that is then added to the plain weights. Part of the windows is held out of the
training, and where the training made these worse the weights stay as they were.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cusprun.anatomy import read_config
from cusprun.errors import InvalidRequest
from cusprun.files import folder_written_whole, write_json
from cusprun.progress import say, track
from cusprun.recipe import Recipe
from cusprun.recover.request import Kind, Request, tensor_shapes

if TYPE_CHECKING:
    import torch

    from cusprun.recover.training import Training

RANK, TOKENS, LEARNING_RATE = (  # a build's
    Recipe.model_fields[name].default for name in ("recover_rank", "recover_tokens", "recover_rate")
)
SAVED_EVERY = 8  # steps


@dataclass(frozen=True)
class RecoveryReport:
    """What a recovery did. Losses are nats per token on the held-out windows, in float32, of the folder as written."""

    kind: str
    rank: int
    steps: int
    tokens: int  # trained on, each as often as it was seen
    learning_rate: float
    precision: str
    training_windows: int
    held_out_windows: int
    held_out_shared: int  # of them, those whose text is in a training window too: 0 but for very uniform text
    loss_before: float
    loss_after: float
    loss_change_stderr: float | None  # of loss_after - loss_before, over windows; None of one window
    divergence_before: float | None  # mean KL(dense || model), distill alone
    divergence_after: float | None
    seconds: float  # of the training steps
    tokens_per_second: float
    kept: bool  # False: the training made the held-out windows worse, and the weights are those that came in

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Losses:
    """Of one model on the held-out windows, one value a window."""

    loss: list[float]
    divergence: list[float] | None

    def objective(self) -> float:
        return float(np.mean(self.loss if self.divergence is None else self.divergence))


def recover(
    model: Path,
    windows: Mapping[str, np.ndarray],
    out: Path,
    *,
    kind: Kind,
    teacher: Path | None = None,
    rank: int = RANK,
    steps: int | None = None,
    tokens: int = TOKENS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    device: str = "cpu",
    state: Path,
) -> RecoveryReport:
    """Trains the model of a folder on calibration windows and writes the folder ``out``, whole or not at all.

    ``windows`` maps each dimension to token ids, (n, window) int64; ``tokens`` is what the training sees in all and
    ``steps`` how many updates it is cut into (one window each by default). ``teacher`` is the dense model's folder,
    read by ``distill`` alone. The folder ``state`` holds the progress, saved every few steps: the same call goes on
    from there and ends with the same bytes on the same machine with as many threads. A finished state stays there.

    Raises InvalidRequest with everything that makes no sense, MissingPackage without peft, Failed where the loss is no
    longer finite.
    """
    from cusprun.recover.training import read_note

    request = Request(
        model, windows, kind=kind, teacher=teacher, rank=rank, steps=steps, tokens=tokens,
        learning_rate=learning_rate, seed=seed, device=device,
    )  # fmt: skip
    if out.resolve() in (model.resolve(), teacher.resolve() if teacher else None):
        raise InvalidRequest(f"{out} is read while the recovered model is written: name another folder")
    saved = state / "progress.safetensors"
    key, note = request.key(), read_note(saved)
    if note.get("key") != key:
        note = {"key": key, "seconds": 0.0, "before": asdict(_measure(request, model, "held-out windows, before"))}
    before = Losses(**note["before"])
    training = _training(request)
    if "done" in note:
        training.load(saved)
        say(f"recovery: goes on after step {training.done} of {request.course.steps}")
    _train(training, saved, note)
    with folder_written_whole(out) as part:
        write_recovered(model, part, training.change, {"recovery": request.described()})
        del training.model, training.teacher
        after = _measure(request, part, "held-out windows, after")
        kept = after.objective() < before.objective()
        if not kept:
            say("recovery: the held-out windows became worse; the weights stay as they were")
            shutil.rmtree(part)
            part.mkdir()
            write_recovered(model, part, lambda _: None, {})
    report = _report(request, before, after, note["seconds"], str(training.precision).removeprefix("torch."), kept)
    say(f"recovery: held-out loss {report.loss_before:.3f} -> {report.loss_after:.3f} nats per token")
    return report


def estimate(
    model: Path,
    windows: Mapping[str, np.ndarray],
    *,
    kind: Kind,
    teacher: Path | None = None,
    rank: int = RANK,
    steps: int | None = None,
    tokens: int = TOKENS,
    device: str = "cpu",
) -> float:
    """Seconds that :func:`recover` will take, from one window of training timed on this machine (and one before it).

    The held-out windows are counted with a third of a training window each time they are read. Raises what
    :func:`recover` raises.
    """
    request = Request(
        model, windows, kind=kind, teacher=teacher, rank=rank, steps=steps, tokens=tokens,
        learning_rate=LEARNING_RATE, seed=0, device=device,
    )  # fmt: skip
    windows_read = request.tokens / request.window + 2 * len(request.split.held_out) / 3
    return _training(request).time_window() * windows_read


def _train(training: Training, saved: Path, note: dict[str, Any]) -> None:
    """Runs the steps that are left; ``note`` comes to hold the seconds of all steps, of interrupted runs too."""
    steps, seconds = training.course.steps, float(note["seconds"])
    if training.done == steps:
        return
    left = steps - training.done
    rough = training.time_window() * training.course.windows_per_step * left
    say(f"recovery: {left} steps, about {rough:.0f} s")
    start = time.monotonic()
    for _ in track(range(left), "recovery"):
        training.step()
        if training.done % SAVED_EVERY == 0 or training.done == steps:
            note["seconds"] = seconds + time.monotonic() - start
            training.save(saved, note)


def write_recovered(
    model: Path, folder: Path, change: Callable[[str], torch.Tensor | None], note: dict[str, Any]
) -> None:
    """Writes the model into ``folder`` tensor by tensor, each plus its change, in the element type it came in.

    ``note`` joins what config.json says under ``cusprun``.
    """
    from cusprun.checkpoint import Weights, write_weights
    from cusprun.compact import ELEMENT_BYTES
    from cusprun.dense import copy_companions

    weights = Weights(model)
    shapes = tensor_shapes(model)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in shapes:
            tensor, added = weights[name], change(name)
            yield name, tensor if added is None else (tensor.float() + added).to(tensor.dtype)

    write_weights(
        folder, tensors(), {name: prod(shape) * ELEMENT_BYTES[weights.dtype(name)] for name, shape in shapes.items()}
    )
    copy_companions(model, folder)
    config = read_config(model)
    write_json(folder / "config.json", {**config, "cusprun": {**(config.get("cusprun") or {}), **note}})


def _training(request: Request) -> Training:
    from cusprun.checkpoint import load_model
    from cusprun.recover.training import Training

    teacher = load_model(request.teacher) if request.teacher is not None else None
    student = load_model(request.model)
    return Training(student, teacher, request.tensors, request.split.training, request.course, request.device)


def _measure(request: Request, folder: Path, label: str) -> Losses:
    """Of the model in ``folder``, in float32, on the held-out windows."""
    import torch

    from cusprun.checkpoint import load_model
    from cusprun.recover.training import divergence, language_loss

    model = load_model(folder).to(request.device)
    teacher = load_model(request.teacher).to(request.device) if request.teacher is not None else None
    loss, apart = [], []
    held_out = request.split.held_out
    with torch.no_grad():
        for window in track(held_out, label, total=len(held_out)):
            ids = torch.from_numpy(window).unsqueeze(0).to(request.device)
            logits = model(ids, use_cache=False).logits
            loss.append(float(language_loss(logits, ids)))
            if teacher is not None:
                apart.append(float(divergence(logits, teacher(ids, use_cache=False).logits)))
    return Losses(loss, apart if teacher is not None else None)


def _report(
    request: Request, before: Losses, after: Losses, seconds: float, precision: str, kept: bool
) -> RecoveryReport:
    change = np.array(after.loss) - np.array(before.loss)
    return RecoveryReport(
        kind=request.course.kind,
        rank=request.course.rank,
        steps=request.course.steps,
        tokens=request.tokens,
        learning_rate=request.course.learning_rate,
        precision=precision,
        training_windows=len(request.split.training),
        held_out_windows=len(request.split.held_out),
        held_out_shared=request.split.shared,
        loss_before=float(np.mean(before.loss)),
        loss_after=float(np.mean(after.loss)),
        loss_change_stderr=float(change.std(ddof=1) / math.sqrt(len(change))) if len(change) > 1 else None,
        divergence_before=None if before.divergence is None else float(np.mean(before.divergence)),
        divergence_after=None if after.divergence is None else float(np.mean(after.divergence)),
        seconds=round(seconds, 1),
        tokens_per_second=round(request.tokens / seconds, 1),
        kept=kept,
    )
