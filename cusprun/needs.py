"""What a build takes before it is begun, roughly: disk, memory, minutes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cusprun.dense import Sizes
from cusprun.formats import bits_of, rounding_of
from cusprun.memory import HELD_BYTES
from cusprun.recipe import ROUNDING_STRIDE, Recipe

if TYPE_CHECKING:
    import torch

# For the rough time alone: what whole-model passes reach of one matrix product's speed, and what is measured.
EFFICIENCY = 0.6
TEXTS = 3
QUESTION_TOKENS = 300
CUTS = 5  # of a layer, whose losses are measured
PROFILE_RUNS, PROFILE_TOKENS, PROFILE_START = 40, 600, 2.0  # of each type on a new device; seconds of a start
JOINT_PASSES = 8  # of the tokens of a step of gate and up: conjugate gradients over most of the FFNs
JOINT_MATRICES = 18  # of a whole FFN matrix's size, that the step holds
ROUNDED_SECONDS = 0.6e-6  # of a weight in compensated rounding, beside the passes over its text


def minutes(recipe: Recipe, sizes: Sizes, artifacts: bool) -> tuple[float, float]:
    """Rough time from to: the multiplications of all passes over the speed of one matrix product here.

    ``artifacts`` says whether files for runtimes are written, and measured where the recipe says so.
    """
    import torch

    from cusprun.arithmetic import product_type
    from cusprun.joint import STEP_TOKENS
    from cusprun.sensitivity import TOKENS, WINDOWS
    from cusprun.vocabulary.splits import SAMPLE

    plain, fast = _gflops(torch.float32), _gflops(product_type(recipe.device))
    # Forward passes of the whole build, in tokens; refit's moments cost about as much as its pass.
    refit = recipe.method == "refit"
    passes = 0 if refit else recipe.tokens
    quick = 2 * recipe.tokens if refit else 0  # those whose products may be rounded
    if refit and recipe.form == "joint":
        quick += JOINT_PASSES * min(recipe.tokens, 3 * STEP_TOKENS // 2)
    if refit and recipe.cuts_by == "measured":
        quick += WINDOWS * TOKENS * CUTS * len(sizes.anatomy.layers) // 2  # from its layer on: half of all
    if recipe.vocab != "keep":
        quick += SAMPLE
    if recipe.recover is not None:  # forwards, and backwards twice as much; the teacher's answers
        quick += recipe.recover_tokens * (4 if recipe.recover == "distill" else 3)
    if artifacts and recipe.measure:
        measured = 2 * _written(recipe)  # dense and expert
        passes += measured * (TEXTS * recipe.eval_tokens + QUESTION_TOKENS * recipe.questions)
    compensated = _compensated(recipe) * (2 if recipe.measure else 1) if artifacts else 0
    passes += compensated * recipe.tokens // ROUNDING_STRIDE * 2
    seconds = 2 * sizes.parameters * (passes / plain + quick / fast) / (EFFICIENCY * 1e9) + (60 if artifacts else 10)
    seconds += compensated * sizes.parameters * ROUNDED_SECONDS
    if recipe.budget.timed and recipe.device_profile is None:
        seconds += (
            len(recipe.quant) * PROFILE_RUNS * (PROFILE_START + 2 * sizes.parameters * PROFILE_TOKENS / (plain * 1e9))
        )
    return seconds / 60 * 0.7, seconds / 60 * 1.5


def _gflops(kind: torch.dtype) -> float:
    """Speed of one matrix product in a type here."""
    import torch

    a, b = (torch.ones(*shape, dtype=kind) for shape in ((512, 1024), (1024, 1024)))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 512 * 1024 * 1024 / min(times) / 1e9


def needs(recipe: Recipe, sizes: Sizes, artifacts: bool) -> tuple[int, int]:
    """Bytes of disk in the output folder and of memory that the build takes at most."""
    kept = 1 - (recipe.removed_share or 0.0)
    anatomy = sizes.anatomy
    model = sizes.parameters * kept * sizes.element_bytes
    hidden = recipe.tokens * anatomy.hidden_size * 4
    statistics = len(anatomy.layers) * 8 * anatomy.head_dim**2 * anatomy.layers[0].heads ** 2
    disk = model + statistics * 3 / anatomy.layers[0].kv_heads
    joint = recipe.method == "refit" and recipe.form == "joint"
    if recipe.method == "refit":  # the new matrices, float32, until the build ends
        rows = sum(each.heads * anatomy.head_dim + each.ffn * (3 if joint else 1) for each in anatomy.layers)
        disk += kept * rows * anatomy.hidden_size * 4
    layer = anatomy.layer_parameters(anatomy.layers[0]) * 4
    embedding = anatomy.vocab_size * anatomy.hidden_size * 4
    memory: float = 2 * hidden + embedding + 3 * layer
    if recipe.method == "refit":
        memory += _if_held(sum(map(anatomy.layer_parameters, anatomy.layers)) * 4)
        widest = max(max(widths.ffn, widths.heads * anatomy.head_dim) for widths in anatomy.layers)
        memory += _if_held(recipe.tokens * widest * 4) + 6 * widest**2 * 8
    if joint:  # what the FFN gives and is to give; the step
        memory += hidden * (2 if anatomy.family.ffn_norm_behind else 1)
        memory += JOINT_MATRICES * max(each.ffn for each in anatomy.layers) * anatomy.hidden_size * 4
    parameters = 4 * sizes.parameters
    here = recipe.device == "cpu"  # else what is worked on lies on the device
    if recipe.method.startswith("llm-pruner"):  # the whole model, two sums over the samples and one sample's gradient
        memory = max(memory, (4.0 if here else 1.0) * parameters)
    if recipe.recover is not None:  # student and teacher, and what a window leaves for the way back
        models = kept + (recipe.recover == "distill")
        memory = max(memory, models * parameters + here * 6 * recipe.window * anatomy.vocab_size * 4)
    if artifacts:
        bits = sorted((bits_of(quant) for quant in recipe.quant), reverse=True)[: _written(recipe)]
        files = sum(sizes.parameters * kept * one / 8 for one in bits)
        disk += files + sizes.parameters * kept * 4  # the float32 file that is quantized
        disk += _compensated(recipe) * sizes.parameters * 1.25  # codes and scales, until the build ends
        memory = max(memory, sizes.parameters * kept * 8)  # torch and the widest .gguf side by side
    return int(disk * 1.1), int(memory + 2**30)


def _written(recipe: Recipe) -> int:
    """How many types are written."""
    return 1 if recipe.budget else len(recipe.quant)


def _compensated(recipe: Recipe) -> int:
    """How many types are rounded with compensation."""
    kinds = [rounding_of(quant, recipe.rounding, zero_points=recipe.zero_points) for quant in recipe.quant]
    return min(kinds.count("gptq"), _written(recipe))


def _if_held(size: int) -> int:
    """What stays in memory where it is small, and is made again each time where it is not."""
    return size if size <= HELD_BYTES else 0
