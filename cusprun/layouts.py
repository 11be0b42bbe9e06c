"""What each export can hold of each family: a table that is read before a plan is made.

A row of :data:`GGUF` is a family, a column a layout, a cell the architecture of llama.cpp that computes exactly what
the family computes, with what it lacks. :func:`choose_limits` turns it into what a plan may do to a model, so that no
plan makes a shape that its target cannot load.
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


WITHOUT_PER_LAYER = "llama.cpp has no architecture for {family} with widths of its own in every layer"


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

ONNX: dict[str, tuple[Layout, ...]] = {}  # family -> the layouts that the ONNX export writes


@dataclass(frozen=True)
class Limits:
    """What a plan may do to a model."""

    layout: Layout
    attention_goes: bool = True  # whole attention blocks
    layers_go: bool = True  # whole layers
    biases: bool = True  # o_proj and down_proj may be given some
    note: str | None = None  # why the layout is not the one that a plan has by itself

    def key(self) -> str:
        """What a plan depends on, for the content hashes of stages."""
        return f"{self.layout}/{self.attention_goes:d}{self.layers_go:d}"


def choose_limits(anatomy: Anatomy, wish: Layout | None, *, export: bool) -> Limits:
    """The layout of an expert of this dense model, and what else its export holds; per-layer wherever that is held.

    Without ``export`` the model folder is all that is wanted: a layout that was wished for is given, since torch
    computes it, and limits hold where a .gguf can be written later. Raises InvalidRequest where no export holds the
    wish, or the dense model itself.
    """
    hosts = GGUF[anatomy.family.name]
    held = {layout: host for layout, host in hosts.items() if not list(_lacking(anatomy, host, layout))}
    if export and "uniform" not in held:
        find_host(anatomy)  # says why
    if wish == "uniform" or (wish is None and "per-layer" not in held and anatomy.uniform):
        note = None if wish else f"{WITHOUT_PER_LAYER.format(family=_name(anatomy))}: one width for all layers"
        return _limits("uniform", held.get("uniform"), note)
    if "per-layer" not in held and export:
        advice = "write --layout uniform" if anatomy.uniform else "choose a model whose layers are alike"
        raise InvalidRequest(
            f"--layout per-layer: {WITHOUT_PER_LAYER.format(family=_name(anatomy))}: {advice}, or stop at the model "
            "folder with cusprun-edge prune"
        )
    return _limits("per-layer", held.get("per-layer"), None)


def describe_exports(anatomy: Anatomy) -> dict[str, dict[str, str | None]]:
    """For each export and layout the architecture that holds experts of this model, None where nothing does."""
    layouts: tuple[Layout, ...] = ("uniform", "per-layer")
    hosts = GGUF[anatomy.family.name]
    gguf: dict[str, str | None] = {
        layout: hosts[layout].arch if layout in hosts and not list(_lacking(anatomy, hosts[layout], layout)) else None
        for layout in layouts
    }
    written = ONNX.get(anatomy.family.name, ())
    return {"gguf": gguf, "onnx": {layout: "decoder" if layout in written else None for layout in layouts}}


def _limits(layout: Layout, host: Host | None, note: str | None) -> Limits:
    if host is None:
        return Limits(layout, note=note)
    return Limits(layout, host.without_attention, host.rotates is always, host.biases, note)


def _name(anatomy: Anatomy) -> str:
    return f"{'tied' if anatomy.tied else 'untied'} {anatomy.family.name}"


def layout_of(anatomy: Anatomy) -> Layout:
    """How the widths of a model's layers are laid out."""
    return "uniform" if anatomy.uniform else "per-layer"


def find_host(anatomy: Anatomy) -> Host:
    """llama.cpp's architecture for a model. Raises InvalidRequest with what no architecture of its family holds."""
    layout = layout_of(anatomy)
    host = GGUF[anatomy.family.name].get(layout)
    if host is None:
        raise InvalidRequest(f"{WITHOUT_PER_LAYER.format(family=_name(anatomy))}: prune it with --layout uniform")
    problems = list(_lacking(anatomy, host, layout))
    if problems:
        raise InvalidRequest(f"llama.cpp's {host.arch} holds no {anatomy.family.name} {'; nor one '.join(problems)}")
    return host


def _lacking(anatomy: Anatomy, host: Host, layout: Layout) -> Iterator[str]:
    """What a model has that its architecture does not hold, with what to do about it."""
    if layout == "uniform" and not anatomy.uniform:
        yield "whose layers have widths of their own: prune it with --layout uniform"
    if not (anatomy.tied or host.untied):
        yield "of unequal layers with an output matrix of its own: prune it with --layout uniform"
    if (anatomy.attention_bias or anatomy.mlp_bias) and not host.biases:
        yield "with biases: choose a method that adds none"
    if not host.without_attention and any(layer.heads == 0 for layer in anatomy.layers):
        yield "with layers whose attention is gone: prune it with --layout uniform"
    if any(layer.rotates != host.rotates(index) for index, layer in enumerate(anatomy.attention)):
        yield "whose layers without rotation are others than every fourth: keep every layer, or run it with torch"
