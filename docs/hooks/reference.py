"""Pages that are made of the code itself: one for each command, the recipe's fields, the public Python modules.

What a page says of a flag comes from the parser that reads it, what it says of a class from its docstring. Changelog
and rules for contributors are the files at the top of the repository.
"""

from __future__ import annotations

import atexit
import html
import inspect
import re
import shutil
import tempfile
from collections.abc import Iterator
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from cusprun.cli import app
from cusprun.flags import SUBJECTS
from cusprun.manual import SECTIONS, Sectioned, example_of
from cusprun.recipe import Recipe

PROGRAM = "cusprun-edge"
TABLE = "<!-- table -->"
ROOT = Path(__file__).parent.parent.parent
# The modules that a program may rely on, in the order of an expert's way, and the room each is in.
MODULES = {
    "cusprun.recipe": "what is wanted",
    "cusprun.build": "the stages in order",
    "cusprun.importance": "criteria by name",
    "cusprun.importance.criterion": "what a criterion is given and returns",
    "cusprun.plan": "how much of what stays where",
    "cusprun.compact": "the smaller tensors",
    "cusprun.checkpoint": "model folders",
    "cusprun.exporters.request": "GGUF and ONNX files of a model folder",
    "cusprun.exporters.gguf": "one .gguf",
    "cusprun.exporters.onnx": "one ONNX folder",
    "cusprun.runtimes": "torch, llama.cpp and onnxruntime through one interface",
    "cusprun.benchmarks.quality": "perplexity, bits per byte, divergence",
    "cusprun.benchmarks.speed": "speed and memory, as they ship",
    "cusprun.deploy.expert": "an expert's folder, read and checked",
    "cusprun.deploy.targets": "what each kind of device is given",
    "cusprun.deploy.ship": "bundles made",
    "cusprun.deploy.verify": "bundles verified and unpacked",
    "cusprun.deploy.signing": "keys and signatures",
    "cusprun.deploy.serve": "an artifact behind HTTP",
    "cusprun.deploy.chat": "talking in the terminal",
    "cusprun.errors": "the two ways a command ends badly",
}
ROOMS = ("cusprun.exporters", "cusprun.deploy", "cusprun.benchmarks")


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Shows mkdocstrings the sources as the wheel has them, wherever their folders stand (decision 001)."""
    whole = Path(tempfile.mkdtemp(prefix="cusprun-docs-"))
    atexit.register(shutil.rmtree, whole)  # links alone; the sources stay
    (whole / "cusprun").mkdir()
    for path in _source("cusprun").iterdir():
        if path.name != "__pycache__":
            (whole / "cusprun" / path.name).symlink_to(path)
    for room in ROOMS:
        beside = whole / room.replace(".", "/")
        if not beside.exists():
            beside.symlink_to(_source(room))
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(whole)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {
        **{page_of(words): _command_page(words, command, context) for words, command, context in commands()},
        **{f"reference/python/{name}.md": f"# {name}\n\n::: {name}\n" for name in MODULES},
        "changelog.md": _from_the_top("CHANGELOG.md"),
        "contributing.md": _from_the_top("CONTRIBUTING.md"),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Puts the tables into the overviews."""
    tables = {
        "reference/commands/index.md": _commands_table,
        "reference/python/index.md": _modules_table,
        "reference/recipe.md": _recipe_table,
    }
    if page.file.src_uri not in tables:
        return markdown
    head, found, tail = markdown.partition(TABLE)
    if not found:
        raise PluginError(f"{page.file.src_uri} lacks the line {TABLE}")
    return head + "\n".join(tables[page.file.src_uri]()) + tail


def on_page_content(content: str, **_: Any) -> str:
    """Docstrings name functions by Sphinx's roles, of which a page keeps the name."""
    return re.sub(r":(?:func|class|meth|mod):<code>", "<code>", content)


def commands() -> Iterator[tuple[str, Any, Any]]:
    """Every command as the parser has it: its words, the command, the context that it is parsed in."""
    root = typer.main.get_command(app)
    yield from _leaves(root, root.context_class(root, info_name=PROGRAM), "")


def _leaves(group: Any, context: Any, words: str) -> Iterator[tuple[str, Any, Any]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command.hidden:
            continue
        inner = command.context_class(command, info_name=name, parent=context)
        full = f"{words} {name}".strip()
        if hasattr(command, "list_commands"):
            yield from _leaves(command, inner, full)
        else:
            yield full, command, inner


def page_of(words: str) -> str:
    """The page of a command, from the root of the site."""
    return f"reference/commands/{words.replace(' ', '-')}.md"


def _command_page(words: str, command: Any, context: Any) -> str:
    text, example = _told(command)
    lines = [f"# {words}", "", *(line for part in text for line in (_linked(part), "")), "```text"]
    lines += [" ".join([context.command_path, *command.collect_usage_pieces(context)]), "```", ""]
    lines += ["## Example", "", "```bash", example, "```", "", *_parameters(command, context, words)]
    return "\n".join(lines) + "\n"


def _told(command: Any) -> tuple[list[str], str]:
    """The paragraphs of a command's help, and the example at its end, in one line."""
    text = inspect.cleandoc(command.help or "").replace("\b", "").replace("\\\n", " ")
    example = example_of(text)
    if not example:
        raise PluginError(f"{command.name}: its docstring has no line `Example: {PROGRAM} ...`")
    before = text.rpartition("Example:")[0]
    return [" ".join(part.split()) for part in before.split("\n\n") if part.strip()], example


def _linked(paragraph: str) -> str:
    """A paragraph of a command's help; the commands after `See also:` lead to their pages."""
    head, found, names = paragraph.partition("See also: ")
    if not found:
        return _escape(paragraph)
    known = sorted((words for words, _command, _context in commands()), key=len, reverse=True)
    pattern = rf"\b({'|'.join(known)})\b"
    return _escape(head) + found + re.sub(pattern, lambda name: f"[{name[0]}]({name[0].replace(' ', '-')}.md)", names)


def _parameters(command: Any, context: Any, words: str) -> Iterator[str]:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    if arguments:
        yield from ["## Arguments", "", "| argument | what it is |", "| --- | --- |"]
        for one in arguments:
            name = one.metavar or one.name.upper()
            yield f"| `{name}`{_often(one)} | {_escape(one.help or '')} |"
        yield ""
    groups: dict[str, list[Any]] = {subject: [] for subject in SUBJECTS}
    subjects = {name: subject for subject, names in SUBJECTS.items() for name in names}
    for one in options:
        grouped = isinstance(command, Sectioned)
        groups.setdefault(subjects.get(one.name, "Options") if grouped else "Options", []).append(one)
    for subject, group in groups.items():
        if group:
            yield from [f"## {subject}", "", "| option | what it does |", "| --- | --- |"]
            for one in group:
                flags = ", ".join(f"`{flag}`" for flag in (*one.opts, *one.secondary_opts))
                told = " ".join(filter(None, [_escape(one.help or ""), _default(one, context, words)]))
                yield f"| {flags}<br>{_value(one)} | {told} |"
            yield ""


def _often(one: Any) -> str:
    return " (one or more)" if one.nargs == -1 and one.required else " (any number)" if one.nargs == -1 else ""


def _value(one: Any) -> str:
    if one.is_flag:
        return ""
    kind = one.type_descriptor.annotation
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return ", ".join(f"`{choice.value}`" for choice in kind)
    bounds = [f"at least {one.min}" if one.min is not None else "", f"at most {one.max}" if one.max is not None else ""]
    return ", ".join(filter(None, [_kind(kind), *bounds, "may be repeated" if one.multiple else ""]))


def _default(one: Any, context: Any, words: str) -> str:
    if one.required:
        return "Required."
    value = one.get_default(context)
    if value is None and words in ("build", "prune") and one.name in Recipe.model_fields:
        value = Recipe.model_fields[one.name].default
    if value is None or value is False or value == ():
        return ""
    return f"Default: `{_word(value)}`."


def _word(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(_word, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(getattr(value, "value", value))


def _commands_table() -> Iterator[str]:
    section_of = {name: section for section, names in SECTIONS.items() for name in names}
    section = ""
    for words, command, _context in commands():
        if section != (section := section_of.get(words.split()[0], "Others")):
            yield from ["", f"## {section}", "", "| command | what it does |", "| --- | --- |"]
        yield f"| [`{words}`]({words.replace(' ', '-')}.md) | {_escape(_told(command)[0][0])} |"


def _modules_table() -> Iterator[str]:
    yield from ["| module | what it is for |", "| --- | --- |"]
    yield from (f"| [`{name}`]({name}.md) | {purpose} |" for name, purpose in MODULES.items())


def _recipe_table() -> Iterator[str]:
    yield from ["| field | values | default | what it is |", "| --- | --- | --- | --- |"]
    for name, field in Recipe.model_fields.items():
        bounds = [
            f"{words} {value:g}"
            for limit in field.metadata
            for attribute, words in (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most"))
            if (value := getattr(limit, attribute, None)) is not None
        ]
        default = "" if field.default in (None, ()) else f"`{_word(field.default)}`"
        values = ", ".join([_kind(field.annotation), *bounds])
        yield f"| `{name}` | {values} | {default} | {_escape(field.description or '')} |"


def _kind(annotation: Any) -> str:
    """A field's type in words; of a choice, the choices."""
    parts = [part for part in get_args(annotation) if part not in (type(None), Ellipsis)]
    if "Literal" in str(getattr(annotation, "__origin__", "")):
        return " ".join(f"`{part}`" for part in parts)
    if getattr(annotation, "__origin__", None) is tuple:
        return f"list of {_kind(parts[0])}"
    if parts:
        return _kind(parts[0])
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "yes or no", "Path": "path"}
    return names[annotation.__name__]


def _from_the_top(name: str) -> str:
    """A page at the top of the repository, whose links into docs/ are links within the site."""
    return (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")


def _source(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed: pip install -e .")
    return Path(spec.submodule_search_locations[0]).resolve()


def _escape(text: str) -> str:
    """Text as Markdown takes it literally, in a cell of a table too; what stands in backticks stays code."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_\[\]|\\])", r"\\\1", html.escape(part, quote=False))
        for part in parts
    )
