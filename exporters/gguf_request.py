"""What `cusprun-edge export` asks for: everything is checked first, then the importance matrix taken, then the file
written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cusprun.as_llama import as_llama
from cusprun.budget import parse_bytes
from cusprun.errors import InvalidRequest
from cusprun.exporters.compensation import Compensated
from cusprun.exporters.gguf import GgufExport, GgufReport
from cusprun.exporters.gguf_card import read_card
from cusprun.exporters.gguf_config import check_layers
from cusprun.exporters.gguf_prediction import Prediction
from cusprun.exporters.gguf_split import existing_parts
from cusprun.exporters.grids import Grid
from cusprun.exporters.imatrix import imatrix_of_text
from cusprun.quants import parse_override


class GgufRequest:
    """One file of the model folder ``model`` as ``quant``, at ``out``, a .gguf or a folder for one.

    ``name`` defaults to the folder's, of an expert's model/ to the expert's. The importance matrix is ``imatrix`` or
    taken of about ``tokens`` tokens of ``corpus`` and written beside the file. ``tensor_types`` are REGEX=TYPE. A file
    larger than ``split_max_size``, such as 2G, is written in parts. Raises InvalidRequest before any work where
    something makes no sense or is in the way.
    """

    def __init__(
        self,
        model: Path,
        out: Path,
        quant: str,
        *,
        name: str | None = None,
        imatrix: Path | None = None,
        corpus: Path | None = None,
        tokens: int = 16384,
        tensor_types: Sequence[str] = (),
        split_max_size: str | None = None,
    ) -> None:
        name = name or name_of(model)
        self.target = out if out.suffix == ".gguf" else out / f"{name}-{quant}.gguf"
        if imatrix is not None and corpus is not None:
            raise InvalidRequest("--imatrix and --corpus are two ways to the same: give one")
        taken = self.target.with_suffix(".imatrix") if corpus is not None else None
        try:
            self._split_max = None if split_max_size is None else parse_bytes(split_max_size)
        except ValueError as error:
            raise InvalidRequest(f"--split-max-size: {error}") from error
        for path in (self.target, taken, *existing_parts(self.target)):
            if path is not None and path.exists():
                raise InvalidRequest(f"--out {self.target}: {path} exists; choose another name or remove it")
        check_layers(model)
        self.folder = as_llama(model)
        self._imatrix, self._corpus, self._tokens = imatrix, corpus, tokens
        self._export = GgufExport(
            self.folder,
            quant,
            name=name,
            metadata=read_card(model),
            overrides=[parse_override(value) for value in tensor_types],
            weighed=imatrix is not None or corpus is not None,
        )
        if imatrix is not None:
            self._export.check_imatrix(imatrix)

    @property
    def prediction(self) -> Prediction:
        """What the file will be, before it is split."""
        return self._export.prediction

    @property
    def grids(self) -> dict[str, Grid]:
        """What of it can be rounded with compensation."""
        return self._export.grids

    def write(
        self,
        target: Path | None = None,
        *,
        imatrix: Path | None = None,
        threads: int | None = None,
        compensated: Compensated | None = None,
    ) -> GgufReport:
        """Writes the file, to ``target`` where that is given.

        ``imatrix`` was taken of the corpus before; ``compensated`` are matrices on the grids of :attr:`grids`.
        """
        target, imatrix = target or self.target, imatrix or self._imatrix
        if imatrix is not None or self._corpus is None:
            return self._export.write(target, imatrix, threads, self._split_max, compensated)
        taken = imatrix_of_text(self.folder, self._corpus, target.with_suffix(".imatrix"), self._tokens)
        try:
            return self._export.write(target, taken, threads, self._split_max, compensated)
        except BaseException:
            taken.unlink(missing_ok=True)
            raise


def name_of(model: Path) -> str:
    """What a model folder is called in its exports: the folder's name, of an expert's model/ the expert's."""
    return model.resolve().parent.name if model.name == "model" else model.resolve().name


def export_folder(
    model: Path, out: Path, quant: str, *, threads: int | None = None, dry_run: bool = False, **settings: Any
) -> GgufReport | Prediction:
    """Writes one file, see :class:`GgufRequest`; with ``dry_run`` nothing is written and what would be is returned."""
    request = GgufRequest(model, out, quant, **settings)
    return request.prediction if dry_run else request.write(threads=threads)
