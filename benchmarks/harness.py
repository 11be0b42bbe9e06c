"""Tasks of lm-evaluation-harness (Gao et al. 2021), by name or from a YAML file, on an artifact as it ships.

The harness makes the prompts and scores the answers, benchmarks/harness_model.py answers. Its per-item scores give the
intervals and the paired comparison with another artifact; where a task adds items up in another way than by their mean,
its own standard error is given. Tasks that run what a model wrote are refused.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cusprun.benchmarks.answer_metrics import Measure, accuracy, mean_measure
from cusprun.benchmarks.resampling import Difference, Figure, difference, figure
from cusprun.benchmarks.tasks import Z_95
from cusprun.errors import Failed, InvalidRequest, MissingPackage, reason_of

SUFFIXES = (".yaml", ".yml")
UNSAFE = "a task that runs what a model wrote is not run here"


@dataclass(frozen=True)
class TaskMetric:
    """One score of one task; ``constant`` and ``chance`` of multiple choice scored by accuracy."""

    artifact: Figure
    constant: float | None
    chance: float | None
    against: Figure | None
    difference: Difference | None


@dataclass(frozen=True)
class TaskResult:
    """All scores of one task or group of tasks."""

    n: int
    version: str  # of the task
    num_fewshot: int | None
    metrics: Mapping[str, TaskMetric]

    def as_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return asdict(self)


def parse_tasks(value: str) -> list[str]:
    """NAME[,NAME|FILE.yaml] as --tasks takes it; a file's path is made absolute.

    Raises InvalidRequest for a file that is missing or an empty list, MissingPackage without the harness.
    """
    names = [name.strip() for name in value.split(",") if name.strip()]
    if not names:
        raise InvalidRequest(f"--tasks {value!r}: write the name of a task or a .yaml file, more of them with commas")
    missing = [name for name in names if name.endswith(SUFFIXES) and not Path(name).expanduser().is_file()]
    if missing:
        raise InvalidRequest.together(f"--tasks {name}: there is no such file" for name in missing)
    if find_spec("lm_eval") is None:
        raise MissingPackage("lm-eval", "eval", "--tasks")
    return [str(Path(name).expanduser().absolute()) if name.endswith(SUFFIXES) else name for name in names]


def evaluate_tasks(
    artifact: Path,
    names: Sequence[str],
    *,
    against: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    fresh: bool = False,
    threads: int | None = None,
    device: str = "cpu",
) -> dict[str, TaskResult]:
    """Scores by task, groups included, as the harness's ``simple_evaluate`` gives them; ``limit``: the first items.

    Raises InvalidRequest for a task that is unknown, damaged or runs code, Failed where its data cannot be had or an
    artifact does not run.
    """
    if limit is not None and limit < 1:
        raise InvalidRequest(f"--limit {limit}: write 1 or more")
    if num_fewshot is not None and num_fewshot < 0:
        raise InvalidRequest(f"--num-fewshot {num_fewshot}: write 0 or more")
    os.environ["HF_EVALUATE_OFFLINE"] = "1"  # metrics of the hub are programs; those of the package are enough
    os.environ["HF_ALLOW_CODE_EVAL"] = "0"
    from datasets import disable_progress_bars
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from cusprun.benchmarks.harness_model import ArtifactLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    disable_progress_bars()
    manager = TaskManager(include_defaults=any(not name.endswith(SUFFIXES) for name in names))
    _check_names(names, manager)
    found = []
    for path in (artifact,) if against is None else (artifact, against):
        model = ArtifactLM(path, fresh=fresh, threads=threads, device=device)
        with _said_plainly(names), redirect_stdout(sys.stderr):
            found.append(
                simple_evaluate(
                    model,
                    tasks=list(names),
                    num_fewshot=num_fewshot,
                    limit=limit,
                    apply_chat_template=apply_chat_template,
                    bootstrap_iters=1000,
                    task_manager=manager,
                )
            )
    own, other = found[0], found[1] if len(found) > 1 else None
    return {
        name: _task_result(name, own, other)
        for name in own["results"]
        if any(isinstance(value, int | float) for value in own["results"][name].values())
    }


def _check_names(names: Sequence[str], manager: Any) -> None:
    """Raises InvalidRequest for names that the harness does not have, and tasks that run what a model wrote."""
    from lm_eval.tasks._yaml_loader import load_yaml

    problems = []
    for name in names:
        entry = manager.task_index.get(name)
        if entry is None and not name.endswith(SUFFIXES):
            near = get_close_matches(name, manager.all_tasks, n=3)
            hint = f"near it: {', '.join(near)}" if near else "`lm-eval ls tasks` lists them"
            problems.append(f"--tasks {name}: the harness has no such task; {hint}")
            continue
        path = Path(name) if entry is None else entry.yaml_path
        with _said_plainly([name]):
            config = {} if path is None else load_yaml(path, resolve_func=False)
        if config.get("unsafe_code"):
            problems.append(f"--tasks {name}: {UNSAFE}")
    if problems:
        raise InvalidRequest.together(problems)


@contextmanager
def _said_plainly(names: Sequence[str]) -> Iterator[None]:
    """What the harness raises for a task that it cannot load or must not run, as an error of ours."""
    import yaml
    from datasets.exceptions import DatasetsError

    shown = ", ".join(names)
    try:
        yield
    except (InvalidRequest, Failed):
        raise
    except (DatasetsError, OSError) as error:
        raise Failed(f"--tasks {shown}: the data of a task cannot be read: {reason_of(error)}") from error
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AssertionError, AttributeError, ImportError) as error:
        if "unsafe" in str(error):  # a task of a group
            raise InvalidRequest(f"--tasks {shown}: {UNSAFE}") from error
        raise InvalidRequest(f"--tasks {shown}: the harness does not take it: {error!r}") from error


def _task_result(name: str, own: Mapping[str, Any], other: Mapping[str, Any] | None) -> TaskResult:
    """One row of the harness's results; keys there are ``metric,filter`` and ``metric_stderr,filter``."""
    row = own["results"][name]
    samples = own.get("samples", {}).get(name, [])
    chance, constant = _guessing(samples) if own["configs"].get(name, {}).get("output_type") == "multiple_choice" else (
        None, None,
    )  # fmt: skip
    metrics = {}
    for key, value in row.items():
        metric, _, kept = key.partition(",")
        if not kept or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        one = _measure(samples, metric, kept, value)
        n = 0 if one is None else len([sample for sample in samples if sample["filter"] == kept])
        theirs, gap = None, None
        if other is not None:
            other_row, other_samples = other["results"][name], other.get("samples", {}).get(name, [])
            two = _measure(other_samples, metric, kept, other_row[key])
            theirs = figure(two, n) if two is not None else _own_error(other_row, metric, kept)
            gap = difference(one, two, n) if one is not None and two is not None else None
        metrics[metric if kept == "none" else f"{metric} ({kept})"] = TaskMetric(
            artifact=figure(one, n) if one is not None else _own_error(row, metric, kept),
            constant=constant if metric in ("acc", "acc_norm") else None,
            chance=chance if metric in ("acc", "acc_norm") else None,
            against=theirs,
            difference=gap,
        )
    counts = own.get("n-samples", {}).get(name, {})
    n_items = int(counts.get("effective", row.get("sample_len", 0)) or 0)
    shots = own.get("n-shot", {}).get(name)
    return TaskResult(n_items, str(own["versions"].get(name, "")), shots, metrics)


def _measure(samples: Sequence[Mapping[str, Any]], metric: str, kept: str, value: float) -> Measure | None:
    """The items' scores where the task's score is their mean, else None."""
    scores = [sample.get(metric) for sample in samples if sample["filter"] == kept]
    if not scores or not all(isinstance(score, bool | int | float | np.number) for score in scores):
        return None
    numbers = [float(score) for score in scores if score is not None]
    if not np.isclose(np.mean(numbers), value, rtol=1e-9, atol=1e-12):
        return None
    if set(numbers) <= {0.0, 1.0}:
        return accuracy(metric, [number == 1.0 for number in numbers])
    return mean_measure(metric, numbers)


def _own_error(row: Mapping[str, Any], metric: str, kept: str) -> Figure:
    """The score with the harness's own standard error, where it gives one."""
    value, error = float(row[f"{metric},{kept}"]), row.get(f"{metric}_stderr,{kept}")
    if not isinstance(error, int | float) or not np.isfinite(error):
        return Figure(value, None)
    return Figure(value, (value - Z_95 * float(error), value + Z_95 * float(error)))


def _guessing(samples: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Accuracy of uniform guessing, and of the position that is right most often, over multiple choice."""
    if not samples or not all(isinstance(sample["target"], int) for sample in samples):
        return None, None
    kept = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    options = [len(sample["arguments"]) // (2 if "acc_mutual_info" in sample["metrics"] else 1) for sample in kept]
    often = max(Counter(sample["target"] for sample in kept).values())
    return float(np.mean([1 / count for count in options])), often / len(kept)
