"""The formats that a model is exported to, and which types are whose."""

from __future__ import annotations

from collections.abc import Sequence

from cusprun import onnx_types, quants
from cusprun.errors import InvalidRequest

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
