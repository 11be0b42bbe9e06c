"""The types that a .gguf is written in, as llama.cpp names them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cusprun.errors import InvalidRequest


@dataclass(frozen=True)
class QuantType:
    """One type of file."""

    file_type: str  # its name in gguf.LlamaFileType
    bits: float  # of a weight, block scales included
    plain: bool = False  # written as it is, without llama.cpp's quantizer
    needs_imatrix: bool = False
    block: int = 32  # row length that most of its matrices need


TYPES: dict[str, QuantType] = {
    "f32": QuantType("ALL_F32", 32, plain=True),
    "f16": QuantType("MOSTLY_F16", 16, plain=True),
    "bf16": QuantType("MOSTLY_BF16", 16, plain=True),
    "q8_0": QuantType("MOSTLY_Q8_0", 8.5),
    "q6_k": QuantType("MOSTLY_Q6_K", 6.6, block=256),
    "q5_k_m": QuantType("MOSTLY_Q5_K_M", 5.7, block=256),
    "q5_0": QuantType("MOSTLY_Q5_0", 5.5),
    "q4_k_m": QuantType("MOSTLY_Q4_K_M", 5, block=256),
    "q4_1": QuantType("MOSTLY_Q4_1", 5),
    "q4_0": QuantType("MOSTLY_Q4_0", 4.5),
    "iq4_nl": QuantType("MOSTLY_IQ4_NL", 4.5),
    "iq4_xs": QuantType("MOSTLY_IQ4_XS", 4.3, block=256),
    "iq3_m": QuantType("MOSTLY_IQ3_M", 3.7, block=256),
    "iq2_m": QuantType("MOSTLY_IQ2_M", 2.7, needs_imatrix=True, block=256),
    "auto": QuantType("MOSTLY_Q4_K_M", 5, block=256),  # see auto_type; as IQ4_NL where most of it is
}
NAMES = " ".join(TYPES)
# What a single tensor may be.
OF_TENSORS = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "iq3_s",
    "q3_k", "q2_k",
)  # fmt: skip


def auto_type(matrix: str, columns: int) -> str:
    """The type of a matrix, by its name in a .gguf and the length of its rows, in a file of type ``auto``.

    Four bits of the best kind that the rows divide into: q4_k by 256, iq4_nl by 32, both 4.5 bits a weight. The
    embedding and the output, which rounding hurts most, get q6_k by 256 and q8_0 by 32. Rows that nothing divides stay
    f16. So nothing ever falls back.
    """
    outer = matrix in ("token_embd.weight", "output.weight")
    if columns % 256 == 0:
        return "q6_k" if outer else "q4_k"
    if columns % 32 == 0:
        return "q8_0" if outer else "iq4_nl"
    return "f16"


def parse_override(value: str) -> tuple[str, str]:
    """``REGEX=TYPE`` as --tensor-type takes it. Raises InvalidRequest where it is not that."""
    pattern, equals, kind = value.rpartition("=")
    if not equals or not pattern:
        raise InvalidRequest(f"--tensor-type {value}: write REGEX=TYPE, such as ffn_down=q8_0")
    try:
        re.compile(pattern)
    except re.error as error:
        raise InvalidRequest(f"--tensor-type {value}: {pattern!r} is no regular expression: {error}") from error
    if kind.lower() not in OF_TENSORS:
        raise InvalidRequest(
            f"--tensor-type {value}: {kind!r} is no type of a tensor; write one of {', '.join(OF_TENSORS)}"
        )
    return pattern, kind.lower()


def is_weighed(quant: str) -> bool:
    """Whether an importance matrix changes how the type rounds."""
    return not TYPES[quant].plain and quant != "q8_0"
