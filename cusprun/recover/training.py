"""A model and token windows in, an adapter out: LoRA (Hu et al. 2022) on every linear map of the decoder layers.

The objective is the language-model loss, as LLM-Pruner (Ma et al. 2023) recovers, or the divergence from the dense
model's predictions (Hinton et al. 2015). Which windows a step takes follows from seed and step, and nothing is dropped
out: adapter, moments and the number of steps are the whole state.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from cusprun.arithmetic import has_bfloat16_units
from cusprun.errors import Failed
from cusprun.files import written_whole
from cusprun.recover.request import Course

ALPHA_PER_RANK = 2.0  # LLM-Pruner: rank 8, alpha 16
WARM_UP = 0.1  # of the steps
CLIP = 1.0  # norm of a step's gradient
WINDOWS_AT_ONCE = {"cpu": 1, "cuda": 8}


def rate(course: Course, step: int) -> float:
    """Learning rate of a step: up in a straight line over the warm-up, then down in one."""
    warm = max(1, round(WARM_UP * course.steps))
    if step < warm:
        return course.learning_rate * (step + 1) / warm
    return course.learning_rate * (course.steps - step) / max(1, course.steps - warm)


def precision_of(device: str) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware made for that, else float32.

    The adapter and its moments are float32 either way, and what is shipped is the float32 weights plus the adapter.
    """
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if has_bfloat16_units() else torch.float32


def in_precision(model: Any, precision: torch.dtype) -> Any:
    """The model with its weights in ``precision``; buffers stay: the rotary frequencies need float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(precision)
    return model


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """Asks CUDA for algorithms that give the same bits each time, where it has them; the CPU's do."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(before or device == "cuda", warn_only=warn_only or not before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def adapted_modules(tensors: Iterable[str]) -> list[str]:
    """Names of the linear maps of attention and FFN, those that each decoder layer still has."""
    return [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]


def language_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats of each token after a window's first; logits (n, window, vocab), ids (n, window)."""
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def divergence(logits: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Mean KL(dense || model) in nats at the positions of :func:`language_loss`; both (n, window, vocab)."""
    ours, theirs = (each[:, :-1].float().flatten(0, 1).log_softmax(-1) for each in (logits, dense))
    return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


class Training:
    """An adapter on ``student`` under training; ``student`` and ``teacher`` are frozen and moved to the device."""

    def __init__(
        self,
        student: Any,
        teacher: Any | None,
        tensors: Iterable[str],
        windows: np.ndarray,
        course: Course,
        device: str,
    ) -> None:
        """``windows`` are token ids, (n, window) int64; ``tensors`` are the student's names; with a ``teacher`` its
        predictions are the objective."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=course.rank,
            lora_alpha=round(ALPHA_PER_RANK * course.rank),
            lora_dropout=0.0,
            bias="none",
            target_modules=adapted_modules(tensors),
        )
        self.course, self.device, self.windows = course, device, torch.from_numpy(windows)
        self.precision = precision_of(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(course.seed)
            self.model = get_peft_model(in_precision(student, self.precision), config).to(device)
        self.teacher = in_precision(teacher, self.precision).to(device) if teacher is not None else None
        self.model.eval()  # nothing in it is random
        self.parameters = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=course.learning_rate, weight_decay=0.0)
        self.done = 0  # steps

    def batch(self, step: int) -> torch.Tensor:
        """The windows of a step, (windows per step, window): every window once, in an order of its own, then again."""
        count, size = len(self.windows), self.course.windows_per_step
        numbers = []
        for place in range(step * size, (step + 1) * size):
            order = list(range(count))
            random.Random(f"{self.course.seed}/{place // count}").shuffle(order)
            numbers.append(order[place % count])
        return self.windows[numbers].to(self.device)

    def add_gradients(self, ids: torch.Tensor) -> float:
        """Adds the gradients of the mean loss over some windows; the loss."""
        total = 0.0
        for some in ids.split(WINDOWS_AT_ONCE[self.device]):
            with torch.autocast(self.device, self.precision, enabled=self.precision != torch.float32):
                logits = self.model(some, use_cache=False).logits
                if self.teacher is not None:
                    with torch.no_grad():
                        dense = self.teacher(some, use_cache=False).logits
            loss = language_loss(logits, some) if self.teacher is None else divergence(logits, dense)
            weighted = loss * (len(some) / len(ids))
            weighted.backward()
            total += float(weighted.detach())
        return total

    def step(self) -> float:
        """One step of the optimizer; the loss before it. Raises Failed where that is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.course, self.done)
        with deterministic(self.device):
            loss = self.add_gradients(self.batch(self.done))
        if not np.isfinite(loss):
            raise Failed(f"recovery: the loss is not finite at step {self.done + 1}: lower the learning rate")
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss

    def time_window(self) -> float:
        """Seconds that a window of training takes, timed on the second of two; nothing is learnt from them."""
        ids = self.batch(0)[: WINDOWS_AT_ONCE[self.device]]
        for _ in range(2):
            start = time.monotonic()
            self.add_gradients(ids)
            if self.device == "cuda":
                torch.cuda.synchronize()
            seconds = time.monotonic() - start
        self.optimizer.zero_grad(set_to_none=True)
        return seconds / len(ids)

    def save(self, path: Path, note: Mapping[str, Any]) -> None:
        """Writes adapter and moments to one safetensors file, whole or not at all; ``note`` joins its header."""
        from safetensors.torch import save_file

        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"adapter/{name}"] = parameter.detach().cpu()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}/{name}"] = self.optimizer.state[parameter][moment].cpu()
        with written_whole(path) as part:
            save_file(tensors, part, metadata={"note": json.dumps({**note, "done": self.done})})

    def load(self, path: Path) -> None:
        """Goes on from what :meth:`save` wrote for a course of the same kind, model and rank."""
        from safetensors.torch import load_file

        tensors = load_file(path)
        self.done = read_note(path)["done"]
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"adapter/{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.done)),
                    **{moment: tensors[f"{moment}/{name}"].to(parameter) for moment in ("exp_avg", "exp_avg_sq")},
                }

    @torch.no_grad()
    def change(self, name: str) -> torch.Tensor | None:
        """What the adapter adds to a weight: (alpha / rank) B A, float32, on the CPU; None where it adds nothing."""
        from peft.tuners.lora import Linear

        plain: Any = self.model.get_base_model()
        module = dict(plain.named_modules()).get(name.removesuffix(".weight"))
        return module.get_delta_weight("default").float().cpu() if isinstance(module, Linear) else None


def read_note(path: Path) -> dict[str, Any]:
    """What was noted beside a saved state; empty where there is none or the file is not whole."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {}).get("note", "{}"))
    except (SafetensorError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}
