"""bfloat16 products where the processor has units for them: three times the speed of float32 on such a machine.

What is measured or fitted on text with them is off by less than the text itself leaves open (docs/decisions/008).
What is compared with a tolerance, evaluated or written into a model never goes through them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@cache
def has_bfloat16_units() -> bool:
    """Whether this processor multiplies matrices of bfloat16 in units of their own (AMX, or AVX-512 with BF16)."""
    import torch

    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("amx_bf16") or known.get("avx512_bf16"))


def product_type(device: str) -> torch.dtype:
    """What factors of a product are rounded to: bfloat16 on a processor that has units for it, else float32."""
    import torch

    return torch.bfloat16 if device == "cpu" and has_bfloat16_units() else torch.float32


def bfloat16_layers(device: str) -> AbstractContextManager[Any]:
    """Within it matrix products of a model's layers take bfloat16 and give it; all else of a layer stays float32."""
    import torch

    if product_type(device) == torch.bfloat16:
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return nullcontext()


@contextmanager
def bfloat16_products(device: str) -> Iterator[None]:
    """Within it products of float32 matrices round their factors to bfloat16; sums and results are float32."""
    import torch

    before = torch.get_float32_matmul_precision()
    if device == "cpu" and has_bfloat16_units():
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
