"""How much each neuron matters on each dimension's text: one file per criterion, and the registry of all of them."""

from __future__ import annotations

from cusprun.errors import InvalidRequest
from cusprun.importance import cus_prun, flap, llm_pruner, magnitude, random, wanda_sp
from cusprun.importance.criterion import Criterion, LayerImportance, LayerMatrices

CRITERIA: tuple[Criterion, ...] = (
    cus_prun.CRITERION,
    flap.CRITERION,
    wanda_sp.CRITERION,
    *llm_pruner.CRITERIA,
    magnitude.CRITERION,
    random.CRITERION,
)

__all__ = ["CRITERIA", "Criterion", "LayerImportance", "LayerMatrices", "find_criterion"]


def find_criterion(name: str) -> Criterion:
    """The criterion called ``name``. Raises InvalidRequest naming those there are."""
    for criterion in CRITERIA:
        if criterion.name == name:
            return criterion
    raise InvalidRequest(f"there is no method {name!r}; methods: {', '.join(c.name for c in CRITERIA)}")
