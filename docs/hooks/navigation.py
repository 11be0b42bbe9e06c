"""The order of the site's pages: `folder/*` in mkdocs.yml becomes the pages of that folder that stand nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Runs behind the hook that adds the generated pages."""
    names = sorted(file.src_uri for file in files.documentation_pages())
    named = set(_named(config.nav))
    unnamed = [name for name in names if name not in named]
    config.nav = _expand(config.nav, unnamed, {name: _heading(files, name) for name in unnamed})
    return files


def _named(entry: Any) -> Iterator[str]:
    """The pages that the menu names itself."""
    if isinstance(entry, dict):
        entry = list(entry.values())
    if isinstance(entry, list):
        for inner in entry:
            yield from _named(inner)
    else:
        yield entry


def _expand(entry: Any, names: list[str], headings: dict[str, str]) -> Any:
    if isinstance(entry, dict):
        return {title: _expand(inner, names, headings) for title, inner in entry.items()}
    if not isinstance(entry, list):
        return entry
    found: list[Any] = []
    for inner in entry:
        if not (isinstance(inner, str) and inner.endswith("*")):
            found.append(_expand(inner, names, headings))
            continue
        pages = [name for name in names if name.rpartition("/")[0] == inner.rpartition("/")[0]]
        often = Counter(headings[name] for name in pages)
        for name in pages:
            title = headings[name]
            stem = name.rpartition("/")[2].removesuffix(".md")
            found.append({f"{title} ({stem})" if often[title] > 1 else title: name})
    return found


def _heading(files: Files, name: str) -> str:
    file = files.get_file_from_path(name)
    text = file.content_string if file is not None else ""
    return next((line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")), name)
