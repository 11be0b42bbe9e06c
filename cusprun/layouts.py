"""What each export can hold of each family: a table that is read before a plan is made.

A row of :data:`GGUF` is a family, a column a layout, a cell the architecture of llama.cpp that computes exactly what
the family computes, with what it lacks. :func:`choose_limits` turns it into what a plan may do to a model, so that no
plan makes a shape that its target cannot load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isclose
from typing import Literal

from cusprun.anatomy import Anatomy, Family
from cusprun.anatomy.sliced import check_sliceable
from cusprun.errors import InvalidRequest
from cusprun.formats import format_of
from cusprun.importance import find_criterion
from cusprun.recipe import WHOLE_MODEL, Recipe

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
    slides: Callable[[int], bool] | None = None  # which layers see a window alone; None where none can
    output_softcap: bool = False  # always or never
    unscaled: int | None = None  # count of layers at which the scores' scale is taken for another model's


LLAMA = Host("llama")
DECI = Host("deci", without_attention=True)
QWEN3 = Host("qwen3", biases=False, rope_divisors=False, rotary_pairs=False)
OPENELM = Host("openelm", biases=False, untied=False, rope_divisors=False, rotary_pairs=False, fused_qkv=True)
SMOLLM3 = Host("smollm3", biases=False, rope_divisors=False, rotates=lambda layer: (layer + 1) % 4 != 0)
GEMMA2 = Host(
    "gemma2", biases=False, untied=False, rope_divisors=False, rotary_pairs=False,
    slides=lambda layer: layer % 2 == 0, output_softcap=True, unscaled=46,
)  # fmt: skip
GEMMA3 = Host(
    "gemma3", biases=False, untied=False, rope_divisors=False, rotary_pairs=False,
    slides=lambda layer: (layer + 1) % 6 != 0, unscaled=62,
)  # fmt: skip

GGUF: dict[str, dict[Layout, Host]] = {
    "llama": {"uniform": LLAMA, "per-layer": DECI},
    "mistral": {"uniform": LLAMA, "per-layer": DECI},
    "qwen3": {"uniform": QWEN3, "per-layer": OPENELM},
    "smollm3": {"uniform": SMOLLM3},
    "gemma2": {"uniform": GEMMA2},
    "gemma3_text": {"uniform": GEMMA3},
}

# family -> the layouts that the ONNX export writes: one graph of every layer's own widths does for all
ONNX: dict[str, tuple[Layout, ...]] = dict.fromkeys(GGUF, ("uniform", "per-layer"))


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
        return _limits(anatomy.family, "uniform", held.get("uniform"), note)
    if "per-layer" not in held and export:
        advice = "write --layout uniform" if anatomy.uniform else "choose a model whose layers are alike"
        raise InvalidRequest(
            f"--layout per-layer: {WITHOUT_PER_LAYER.format(family=_name(anatomy))}: {advice}, or stop at the model "
            "folder with cusprun-edge prune"
        )
    return _limits(anatomy.family, "per-layer", held.get("per-layer"), None)


def limits_of(recipe: Recipe, anatomy: Anatomy, *, export: bool) -> Limits:
    """:func:`choose_limits` for a recipe. Raises InvalidRequest also where no export holds what its method makes."""
    wish = None if recipe.layout == "auto" else recipe.layout
    if export and "gguf" not in map(format_of, recipe.quant):
        return Limits(wish or "per-layer", anatomy.family.attention_goes)
    limits = choose_limits(anatomy, wish, export=export)
    family, prune = anatomy.family.name, "choose another, or stop at the model folder with cusprun-edge prune"
    if recipe.method == "slicegpt":
        check_sliceable(anatomy)
    if not export or recipe.method == "slicegpt":
        return limits
    if recipe.method == "shortgpt" and not limits.layers_go:
        raise InvalidRequest(
            f"--method shortgpt removes whole layers, and llama.cpp tells those of {family} by number: {prune}"
        )
    criterion = None if recipe.method in (*WHOLE_MODEL, "refit") else find_criterion(recipe.method)
    if criterion is not None and criterion.compensates and not limits.biases:
        raise InvalidRequest(f"--method {recipe.method} adds biases, which llama.cpp's {family} has not: {prune}")
    if criterion is not None and criterion.allocation == "middle" and limits.note:
        raise InvalidRequest(f"--method {recipe.method} keeps some layers whole, but {limits.note}: {prune}")
    return limits


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


def _limits(family: Family, layout: Layout, host: Host | None, note: str | None) -> Limits:
    if host is None:
        return Limits(layout, family.attention_goes, note=note)
    return Limits(layout, host.without_attention, host.rotates is always and host.slides is None, host.biases, note)


def _name(anatomy: Anatomy) -> str:
    return f"{'tied' if anatomy.tied else 'untied'} {anatomy.family.name}"


def layout_of(anatomy: Anatomy) -> Layout:
    """How the widths of a model's layers are laid out."""
    return "uniform" if anatomy.uniform else "per-layer"


def slides(family: Family) -> bool:
    """Whether llama.cpp's architectures for the family let layers see a window alone."""
    return any(host.slides is not None for host in GGUF[family.name].values())


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
        advice = "tie it to the embedding" if layout == "uniform" else "prune it with --layout uniform"
        yield f"with an output matrix of its own: {advice}"
    if (anatomy.attention_bias or anatomy.mlp_bias) and not host.biases:
        yield "with biases: choose a method that adds none"
    if not host.without_attention and any(layer.heads == 0 for layer in anatomy.layers):
        yield "with layers whose attention is gone: prune it with --layout uniform"
    if any(layer.rotates != host.rotates(index) for index, layer in enumerate(anatomy.attention)):
        yield "whose layers without rotation are others than every fourth: keep every layer, or run it with torch"
    windows = [layer.window for layer in anatomy.attention]
    if host.slides is not None:
        if any((window is not None) != host.slides(index) for index, window in enumerate(windows)):
            yield "whose sliding layers stand elsewhere than as published: keep every layer, or run it with torch"
        if host.output_softcap != (anatomy.output_softcap is not None):
            yield f"with{'out' if host.output_softcap else ''} a cap of the logits: run it with torch"
        if host.output_softcap and anatomy.attention_softcap is None:
            yield "without a cap of the attention's scores: run it with torch"
        if anatomy.query_scale is not None and not isclose(anatomy.query_scale, anatomy.head_dim**-0.5):
            yield "whose query_pre_attn_scalar is not its head_dim: run it with torch"
        if len(windows) == host.unscaled:
            yield f"of {host.unscaled} layers, whose scores it scales otherwise: run it with torch"
