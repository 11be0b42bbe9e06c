"""What each type of rounding does to the embedded model: the measure that every other export is held against.

    python -m cusprun.benchmarks.peers.limits --out exporters/limits.json

The dense model is exported in every quantized type, to the nearest, and run by the type's runtime beside torch on the
text that `cusprun-edge export` proves its files on. A type that exists only with an importance matrix is left out.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from cusprun.dense import find_dense
from cusprun.errors import Failed, InvalidRequest
from cusprun.exporters.gguf import export_gguf
from cusprun.exporters.onnx import export_onnx
from cusprun.exporters.proof import prove_gguf, prove_onnx
from cusprun.exporters.request import proof_windows
from cusprun.files import write_json
from cusprun.formats import format_of
from cusprun.onnx_types import TYPES as ONNX
from cusprun.progress import say
from cusprun.quants import TYPES as GGUF
from cusprun.recipe import DEFAULT_MODEL


def rounded_types() -> list[str]:
    """The types that lose something and need no text; ``auto`` is a mix of others."""
    gguf = [name for name, kind in GGUF.items() if not (kind.plain or kind.needs_imatrix or name == "auto")]
    return gguf + [name for name, kind in ONNX.items() if kind.weight != "float"]


def measure(model: Path, quant: str, scratch: Path) -> dict[str, float]:
    """Mean KL divergence of one type, in nats, and how often the first choice is torch's."""
    windows = proof_windows(model)
    if format_of(quant) == "gguf":
        report = export_gguf(model, scratch / "dense.gguf", quant)
        proof = prove_gguf(report.path, model, windows, strict=False)
    else:
        export_onnx(model, scratch / "dense", quant)
        proof = prove_onnx(scratch / "dense", model, quant, windows, strict=False)
    return {"kld_mean": round(proof.kld_mean, 6), "top1_agreement": round(proof.top1_agreement, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--out", type=Path, default=Path("exporters/limits.json"))
    options = parser.parse_args()
    found: dict[str, Any] = {"model": options.model, "types": {}}
    try:
        folder = find_dense(options.model).folder
        for quant in rounded_types():
            with tempfile.TemporaryDirectory() as scratch:
                entry = measure(folder, quant, Path(scratch))
            found["types"][quant] = entry
            say(f"{quant}: {entry['kld_mean']:.4g} nats, first choice {entry['top1_agreement']:.1%}")
    except (InvalidRequest, Failed) as error:
        raise SystemExit(f"limits: {error}") from error
    write_json(options.out, found)
    say(f"written: {options.out}")


if __name__ == "__main__":
    main()
