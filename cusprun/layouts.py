"""What each export can hold of each family: a table that is read before a plan is made.

A row of :data:`GGUF` is a family, a column a layout, a cell the architecture of llama.cpp that computes exactly what
the family computes, with what it lacks. No plan may make a shape that its cell does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from cusprun.anatomy import Anatomy
from cusprun.errors import InvalidRequest

Layout = Literal["uniform", "per-layer"]


def always(layer: int) -> bool:
    """In every layer."""
    return True


@dataclass(frozen=True)
class Host:
    """An architecture of llama.cpp, and what it holds of a family beside the widths of its layers."""

    arch: str
    biases: bool = True
    untied: bool = True  # an output matrix of its own
    without_attention: bool = False  # layers whose attention block is gone
    rope_divisors: bool = True  # Llama 3's, one for each frequency
    rotary_pairs: bool = True  # neighbouring rows of q and k rotate together; else those half a head apart
    fused_qkv: bool = False  # q, k and v are one matrix
    rotates: Callable[[int], bool] = always  # which layers rotate q and k, by number


LLAMA = Host("llama")
DECI = Host("deci", without_attention=True)
QWEN3 = Host("qwen3", biases=False, rope_divisors=False, rotary_pairs=False)
OPENELM = Host("openelm", biases=False, untied=False, rope_divisors=False, rotary_pairs=False, fused_qkv=True)
SMOLLM3 = Host("smollm3", biases=False, rope_divisors=False, rotates=lambda layer: (layer + 1) % 4 != 0)

GGUF: dict[str, dict[Layout, Host]] = {
    "llama": {"uniform": LLAMA, "per-layer": DECI},
    "mistral": {"uniform": LLAMA, "per-layer": DECI},
    "qwen3": {"uniform": QWEN3, "per-layer": OPENELM},
    "smollm3": {"uniform": SMOLLM3},
}


def layout_of(anatomy: Anatomy) -> Layout:
    """How the widths of a model's layers are laid out."""
    return "uniform" if anatomy.uniform else "per-layer"


def find_host(anatomy: Anatomy) -> Host:
    """llama.cpp's architecture for a model. Raises InvalidRequest with what no architecture of its family holds."""
    layout = layout_of(anatomy)
    host = GGUF[anatomy.family.name].get(layout)
    family = anatomy.family.name
    if host is None:
        raise InvalidRequest(
            f"no architecture of llama.cpp holds {family} with widths of its own in every layer: prune it with "
            "--layout uniform"
        )
    problems = list(_lacking(anatomy, host))
    if problems:
        raise InvalidRequest(f"llama.cpp's {host.arch} holds no {family} {'; nor one '.join(problems)}")
    return host


def _lacking(anatomy: Anatomy, host: Host) -> Iterator[str]:
    """What a model has that its architecture does not hold, with what to do about it."""
    if not (anatomy.tied or host.untied):
        yield "of unequal layers with an output matrix of its own: prune it with --layout uniform"
    if (anatomy.attention_bias or anatomy.mlp_bias) and not host.biases:
        yield "with biases: choose a method that adds none"
    if not host.without_attention and any(layer.heads == 0 for layer in anatomy.layers):
        yield "with layers whose attention is gone: prune it with --layout uniform"
    if any(layer.rotates != host.rotates(index) for index, layer in enumerate(anatomy.attention)):
        yield "whose layers without rotation are others than every fourth: keep every layer, or run it with torch"
