"""report.html: one self-contained page of one or many experts, from what their builds left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cusprun.benchmarks.report_page.html import render_page, verdicts
from cusprun.benchmarks.report_page.reading import Measured, read_experts
from cusprun.errors import InvalidRequest
from cusprun.files import written_whole

__all__ = ["Measured", "read_experts", "render_page", "verdicts", "write_page", "write_pages"]


def write_pages(folder: Path) -> list[Path]:
    """Writes report/report.html of an expert's folder, every type on it, and of each further type a page of its own.

    Returns the paths, that of all types first. Raises InvalidRequest where the folder holds no report.
    """
    experts = read_experts([folder])
    paths = [write_page(experts, folder / "report" / "report.html")]
    for expert in experts[1:]:
        paths.append(
            write_page(
                [expert], expert.path.with_name("report.html"), links=[("All types of this expert", "../report.html")]
            )
        )
    return paths


def write_page(experts: Sequence[Measured], path: Path, links: Sequence[tuple[str, str]] = ()) -> Path:
    """Writes one page of ``experts``, whole or not at all, and returns its path.

    Raises InvalidRequest where ``path`` is no name of an .html file.
    """
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise InvalidRequest(f"--out {path}: name a file that ends in .html, such as {path.with_suffix('.html')}")
    text = render_page(experts, links=links)
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")
    return path
