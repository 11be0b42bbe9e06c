"""What the shell offers for a value half typed. It is asked at every press of Tab, so nothing heavy is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, get_args

Completer = Callable[[str], list[tuple[str, str]]]  # values with what is said of each; none: the shell offers files
ASKED = "_CUSPRUN_EDGE_COMPLETE"  # set where the shell asks, by the name of the program


def offer(load: Callable[[], Mapping[str, str] | Iterable[str]], *, several: bool = False) -> Completer:
    """Completes to one of the values that ``load`` gives, read when asked for; to ``several`` joined by commas."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        values = load()
        known = values if isinstance(values, Mapping) else dict.fromkeys(values, "")
        before, comma, last = incomplete.rpartition(",") if several else ("", "", incomplete)
        taken = before.split(",")
        return [
            (before + comma + value, said)
            for value, said in known.items()
            if value.startswith(last) and value not in taken
        ]

    return complete


def keep_option(parameter: Any) -> None:
    """Lets a parameter of a command give its values as `--option=value` where zsh or fish complete both as one word."""
    values = parameter.shell_complete

    def shell_complete(context: Any, incomplete: str) -> list[Any]:
        found: list[Any] = values(context, incomplete)
        for item in found:
            item.value = _option_typed() + item.value
        return found

    parameter.shell_complete = shell_complete


def _option_typed() -> str:
    """`--option=` where it is part of the word that is completed; bash has the value alone."""
    line = os.environ.get("_TYPER_COMPLETE_ARGS", "")
    word = "" if line.endswith(" ") or not line else line.split()[-1]
    option, equals, _ = word.partition("=")
    return option + equals if equals and option.startswith("--") else ""


def field(name: str, *, several: bool = False) -> Completer:
    """Completes to what a field of the recipe may be."""

    def load() -> list[str]:
        from cusprun.recipe import Recipe

        return [str(value) for value in _literals(Recipe.model_fields[name].annotation)]

    return offer(load, several=several)


def _literals(annotation: Any) -> list[Any]:
    """The values of every Literal inside a type."""
    inner = get_args(annotation)
    return [
        value for part in inner for value in (_literals(part) if get_args(part) else [part] if _plain(part) else [])
    ]


def _plain(part: Any) -> bool:
    return isinstance(part, (str, int))


def _languages() -> Mapping[str, str]:
    from cusprun.corpora.catalog import LANGUAGES

    return LANGUAGES


def _domains() -> Iterable[str]:
    from cusprun.corpora.catalog import DOMAINS

    return DOMAINS


def _tasks() -> Iterable[str]:
    from cusprun.corpora.catalog import TASKS

    return TASKS


def _entries() -> Mapping[str, str]:
    """Name and title of the catalog's entries; checking the whole catalog would take too long here."""
    text = (Path(__file__).parent / "corpora" / "catalog.yaml").read_text(encoding="utf-8")
    return dict(re.findall(r'^  - name: (\S+)\n    title: "?(.+?)"?$', text, re.MULTILINE))


def _types() -> Mapping[str, str]:
    """The types of both formats with their bits."""
    from cusprun.formats import DEFAULTS, bits_of, types_of

    return {name: f"{format}, {bits_of(name):g} bits" for format in DEFAULTS for name in types_of(format)}


def _gguf_types() -> Mapping[str, str]:
    from cusprun.formats import bits_of, types_of

    return {name: f"{bits_of(name):g} bits" for name in types_of("gguf")}


def _models() -> Mapping[str, str]:
    """The default model and the hub's models that are in its cache here."""
    from cusprun.recipe import DEFAULT_MODEL

    return {DEFAULT_MODEL: "the default model"} | dict.fromkeys(_hub_models(), "in the hub's cache")


def _hub_models() -> list[str]:
    """Ids of the hub's cache, by its own layout: models--OWNER--NAME."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    return sorted(folder.name.removeprefix("models--").replace("--", "/") for folder in cache.glob("models--*--*"))


def _experts() -> list[str]:
    """The folders below experts/ and those beside us that a build has left."""
    return sorted(str(card.parent) for pattern in ("experts/*", "*") for card in Path().glob(f"{pattern}/expert.json"))


def _targets() -> Iterable[str]:
    from cusprun.deploy.targets import NAMES

    return NAMES


languages, domains, tasks = offer(_languages), offer(_domains), offer(_tasks)
entries, models, experts, targets = offer(_entries), offer(_models), offer(_experts), offer(_targets)
types, gguf_types = offer(_types, several=True), offer(_gguf_types, several=True)
types_or_all = offer(lambda: {**_types(), "all": "every one that rounds"}, several=True)
formats, devices = field("format", several=True), field("device")
vocabularies, archives = offer(lambda: ("auto", "keep")), offer(lambda: ("tar.zst", "zip", "none"))


def rejoin_words(environment: MutableMapping[str, str]) -> None:
    """Puts `--option=value` together again, which bash hands over as three words, in what its completion asks with."""
    words = environment.get("COMP_WORDS", "").split("\n")
    if "=" not in words or not environment.get("COMP_CWORD", "").isdigit():
        return
    asked, joined, glue = int(environment["COMP_CWORD"]), list[str](), False
    for index, word in enumerate(words):
        if joined and (word == "=" or glue):
            joined[-1] += word
            glue = word == "="
        else:
            joined.append(word)
        if index == asked:
            environment["COMP_CWORD"] = str(len(joined) - 1)
    environment["COMP_WORDS"] = "\n".join(joined)
