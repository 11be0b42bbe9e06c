"""The documentation site builds without a warning, asks nobody for anything, and what it tells to type exists."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cusprun.cli import app
from cusprun.manual import example_of
from cusprun.recipe import Recipe, make_recipe
from tests.chromium import open_chromium

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
# What a browser fetches by itself: the attribute of each tag that names it. A link to click on is none of them.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src",
           "embed": "src", "object": "data", "use": "href", "image": "href", "link": "href"}  # fmt: skip


@lru_cache
def commands() -> dict[str, tuple[Any, Any]]:
    """Every command by its words, with the context it is parsed in, as the parser has it."""
    root = typer.main.get_command(app)
    return dict(_leaves(root, root.context_class(root, info_name="cusprun-edge"), ""))


def _leaves(group: Any, context: Any, words: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        full = f"{words} {name}".strip()
        if hasattr(command, "list_commands"):
            yield from _leaves(command, command.context_class(command, info_name=name, parent=context), full)
        else:
            yield full, (command, context)


class Page(HTMLParser):
    """What a page fetches, what its menu leads to, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.menu: set[Path] = set()
        self.said: list[str] = []
        self._folder, self._depth = path.parent, 0
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join("".join(self.said).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "nav" and ("md-nav--primary" in (values.get("class") or "") or self._depth):
            self._depth += 1
        if self._depth and tag == "a" and (target := values.get("href")):
            self.menu.add((self._folder / target.partition("#")[0]).resolve())
        if tag in FETCHED and (target := values.get(FETCHED[tag])):
            self.fetched.append(target)
        self.fetched += re.findall(r"url\(['\"]?([^'\")]+)", values.get("style") or "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "nav" and self._depth:
            self._depth -= 1

    def handle_data(self, data: str) -> None:
        self.said.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    found = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(found) > 50
    return found


def test_every_command_has_a_page_with_its_example_and_every_flag(site: Path, pages: dict[Path, Page]) -> None:
    assert {"build", "export", "corpora list"} <= set(commands())
    for words, (command, _context) in commands().items():
        page = pages[site / f"reference/commands/{words.replace(' ', '-')}.html"]
        example = example_of(command.help.replace("\\\n", " "))
        assert example.startswith(f"cusprun-edge {words}")
        assert example in page.text
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.hidden:
                assert all(flag in page.text for flag in parameter.opts), f"{words} {parameter.opts}"
                assert " ".join(parameter.help.split()).replace("`", "") in page.text
            else:
                assert (parameter.metavar or parameter.name.upper()) in page.text


def test_every_field_of_the_recipe_stands_in_its_table(site: Path, pages: dict[Path, Page]) -> None:
    text = pages[site / "reference/recipe.html"].text
    for name, field in Recipe.model_fields.items():
        assert name in text
        assert field.description is not None
        assert field.description in text, name


def test_public_modules_stand_with_their_docstrings(site: Path, pages: dict[Path, Page]) -> None:
    folder = site / "reference/python"
    modules = {path.stem: page for path, page in pages.items() if path.parent == folder and path.stem != "index"}
    assert {"cusprun.recipe", "cusprun.build", "cusprun.runtimes", "cusprun.deploy.expert"} <= set(modules)
    for name, page in modules.items():
        module = import_module(name)
        public = [key for key, value in vars(module).items() if not key.startswith("_")
                  and getattr(value, "__module__", "") == name and getattr(value, "__doc__", None)]  # fmt: skip
        assert public, name
        for key in public:
            assert key in page.text, f"{name}.{key}"


def test_the_menu_leads_to_every_page(site: Path, pages: dict[Path, Page]) -> None:
    reached = pages[site / "index.html"].menu
    assert {path.relative_to(site) for path in pages} - {path.relative_to(site) for path in reached} == set()


def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert page.fetched
        for target in page.fetched:
            assert not re.match(r"[a-z]+:|//", target) or target.startswith("data:"), f"{path}: {target}"
    sheets = list(site.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        text = sheet.read_text(encoding="utf-8")
        assert "@import" not in text
        found = re.findall(r"url\(\s*['\"]?((?:[a-z]+:|//)[^)'\"]{0,60})", text)
        assert [target for target in found if not target.startswith("data:")] == []


@pytest.mark.browser
def test_the_site_opens_from_a_disk_and_finds_words(site: Path) -> None:
    with open_chromium() as browser:
        page = browser.new_page()
        asked: list[str] = []
        said: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto((site / "tutorial.html").as_uri())
        box = page.get_by_role("textbox", name="Search")
        box.click()
        box.press_sequentially("isotonic")
        page.locator(".md-search-result__link", has_text="The method").first.wait_for(timeout=15_000)
        assert len(asked) > 5
        assert [url for url in asked if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
        assert said == []


def lines_to_type() -> list[tuple[str, str]]:
    """(page, command line) of every line of code that begins with the program's name."""
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^(?: {4})?\s*(?:\.venv/bin/)?cusprun-edge ([a-z].*)$", text, re.MULTILINE):
            found.append((path.relative_to(ROOT).as_posix(), line))
    assert len(found) > 40
    return found


@pytest.mark.parametrize(("page", "line"), lines_to_type())
def test_what_the_pages_tell_to_type_is_understood(page: str, line: str) -> None:
    words = shlex.split(line.rstrip("& "), comments=True)
    name = " ".join(words[:2]) if " ".join(words[:2]) in commands() else words[0]
    assert name in commands(), f"{page}: cusprun-edge has no {name}"
    command, parent = commands()[name]
    context = command.make_context(name, words[len(name.split()) :], parent=parent)  # raises on what it does not know
    if name in ("build", "prune"):
        given = {
            key: value
            for key, value in context.params.items()
            if value is not None and context.get_parameter_source(key).name != "DEFAULT"
        }
        if "recipe" not in given:
            make_recipe({key: value for key, value in given.items() if key != "json_"})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_named_in_passing_exist(path: Path) -> None:
    for span in re.findall(r"`cusprun-edge ([^`\n]+)`", path.read_text(encoding="utf-8")):
        words = span.split()
        if words[0] == "COMMAND" or words[0].startswith("-"):
            continue
        names = [name for name in commands() if words[: len(name.split())] == name.split()]
        inside = [name for name in commands() if name.startswith(f"{words[0]} ")]
        assert names or inside, f"cusprun-edge has no {span}"
        flags = {flag for name in names or inside for one in commands()[name][0].params for flag in one.opts}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", span)) <= flags, span


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_that_the_pages_show_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cusprun"):
                module = import_module(str(node.module))
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
    for module_name in re.findall(r"python -m (cusprun\.[a-z_.]*[a-z])", text):
        assert importlib.util.find_spec(module_name) is not None, module_name
