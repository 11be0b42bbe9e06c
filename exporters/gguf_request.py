"""What `cusprun-edge export` asks for: everything is checked first, then the importance matrix taken, then the file
written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cusprun.as_llama import as_llama
from cusprun.errors import InvalidRequest
from cusprun.exporters.gguf import GgufExport, GgufReport
from cusprun.exporters.gguf_card import read_card
from cusprun.exporters.gguf_config import check_layers
from cusprun.exporters.gguf_prediction import Prediction
from cusprun.exporters.gguf_split import existing_parts, parse_size
from cusprun.exporters.imatrix import imatrix_of_text
from cusprun.quants import parse_override


def export_folder(
    model: Path,
    out: Path,
    quant: str,
    *,
    name: str | None = None,
    imatrix: Path | None = None,
    corpus: Path | None = None,
    tokens: int = 16384,
    tensor_types: Sequence[str] = (),
    threads: int | None = None,
    split_max_size: str | None = None,
    dry_run: bool = False,
) -> GgufReport | Prediction:
    """Writes the model folder ``model`` as ``quant`` to ``out``, a .gguf or a folder for one.

    ``name`` defaults to the folder's, of an expert's model/ to the expert's. The importance matrix is ``imatrix`` or
    taken of about ``tokens`` tokens of ``corpus`` and written beside the file. ``tensor_types`` are REGEX=TYPE. A file
    larger than ``split_max_size``, such as 2G, is written in parts. With ``dry_run`` nothing is written and what would
    be, before it is split, is returned. Raises InvalidRequest before any work where something makes no sense or is in
    the way.
    """
    name = name or (model.resolve().parent.name if model.name == "model" else model.resolve().name)
    target = out if out.suffix == ".gguf" else out / f"{name}-{quant}.gguf"
    if imatrix is not None and corpus is not None:
        raise InvalidRequest("--imatrix and --corpus are two ways to the same: give one")
    taken = target.with_suffix(".imatrix") if corpus is not None else None
    split_max = parse_size(split_max_size) if split_max_size is not None else None
    for path in (target, taken, *existing_parts(target)):
        if path is not None and path.exists():
            raise InvalidRequest(f"--out {target}: {path} exists; choose another name or remove it")
    check_layers(model)
    folder = as_llama(model)
    export = GgufExport(
        folder,
        quant,
        name=name,
        metadata=read_card(model),
        overrides=[parse_override(value) for value in tensor_types],
        weighed=imatrix is not None or corpus is not None,
    )
    if imatrix is not None:
        export.check_imatrix(imatrix)
    if dry_run:
        return export.prediction
    if corpus is None or taken is None:
        return export.write(target, imatrix, threads, split_max)
    imatrix_of_text(folder, corpus, taken, tokens)
    try:
        return export.write(target, taken, threads, split_max)
    except BaseException:
        taken.unlink(missing_ok=True)
        raise
