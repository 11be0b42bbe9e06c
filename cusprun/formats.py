"""The formats that a model is exported to, and which types are whose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from cusprun import onnx_types, quants
from cusprun.errors import InvalidRequest

Rounding = Literal["auto", "nearest", "imatrix", "gptq"]
FOUR_BITS = ("q4_k_m", "q4_1", "q4_0", "iq4_nl", "auto", "int4")  # where rounding auto is gptq
DEFAULTS = {"gguf": "q8_0", "onnx": "int4"}  # what a format is written in where no type of its own is named


def types_of(format: str) -> tuple[str, ...]:
    """The types of one format."""
    return tuple(quants.TYPES if format == "gguf" else onnx_types.TYPES)


def format_of(quant: str) -> str:
    """gguf or onnx. Raises InvalidRequest for a type that neither has."""
    for format in DEFAULTS:
        if quant in types_of(format):
            return format
    raise InvalidRequest(
        f"quantization {quant!r} is unknown: for GGUF write one of {quants.NAMES}; for ONNX one of {onnx_types.NAMES}"
    )


def bits_of(quant: str) -> float:
    """Bits of a weight, block scales included."""
    return quants.TYPES[quant].bits if format_of(quant) == "gguf" else onnx_types.TYPES[quant].bits


def block_of(quant: str) -> int:
    """Row length that most matrices of the type need."""
    return quants.TYPES[quant].block if format_of(quant) == "gguf" else 32


def parse_rounding(value: str | None, *, imatrix: bool, corpus: bool) -> Rounding:
    """A rounding by its name; without one what there is to weigh by decides. Raises InvalidRequest for other names."""
    if value is None:
        return "imatrix" if imatrix else "auto" if corpus else "nearest"
    for known in get_args(Rounding):
        if value == known:
            return known
    raise InvalidRequest(f"--rounding {value!r} is unknown: write {', '.join(get_args(Rounding))}")


def rounding_of(quant: str, wish: Rounding, *, zero_points: bool = False) -> Literal["nearest", "imatrix", "gptq"]:
    """How a type is rounded where ``wish`` is asked for and there is text; some have nothing to weigh.

    ``auto`` is gptq in four bits, where it is worth its time, and imatrix else; ONNX int4 with ``zero_points`` has but
    the nearest.
    """
    if quant == "int4" and zero_points:
        return "nearest"
    if wish == "gptq" or (wish == "auto" and quant in FOUR_BITS):
        return "gptq" if _is_rounded(quant) else "nearest"
    weighed = wish != "nearest" and format_of(quant) == "gguf" and quants.is_weighed(quant)
    return "imatrix" if weighed else "nearest"


def _is_rounded(quant: str) -> bool:
    """Whether weights share scales with others."""
    return not quants.TYPES[quant].plain if format_of(quant) == "gguf" else onnx_types.TYPES[quant].weight == "blocks"


def resolve(formats: Sequence[str], types: Sequence[str]) -> tuple[str, ...]:
    """The types to write: those named, and the default of a format that none of them is of.

    Values may hold several, joined by commas. Raises InvalidRequest for a format or type that does not exist, that is
    named twice, or a type whose format is not among those asked for.
    """
    asked = [part for value in formats for part in value.split(",") if part]
    named = [part for value in types for part in value.split(",") if part]
    for format in asked:
        if format not in DEFAULTS:
            raise InvalidRequest(f"format {format!r} is unknown: write {' or '.join(DEFAULTS)}")
    found = dict.fromkeys(named, "")
    if len(found) < len(named):
        raise InvalidRequest("quant names a type twice")
    for quant in found:
        if (format := format_of(quant)) not in (asked or DEFAULTS):
            raise InvalidRequest(
                f"{quant} is a type of {format}, which is not among the formats asked for: write --format {format}, or "
                f"one of {' '.join(types_of(asked[0]))}"
            )
    missing = [format for format in asked or ["gguf"] if format not in map(format_of, found)]
    if asked or not found:
        found |= dict.fromkeys((DEFAULTS[format] for format in missing), "")
    return tuple(found)
