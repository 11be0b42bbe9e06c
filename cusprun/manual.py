"""How the command line explains itself: commands in the order of work, options by subject, examples that can be copied.

A command's docstring is its page: what it does, what it writes, `See also: ...`, and at the end `Example: ...`.
"""

from __future__ import annotations

import inspect
import re
import shlex
import textwrap
from functools import partial
from typing import Any

from typer.core import TyperCommand, TyperGroup

from cusprun.completion import keep_option

# Commands that are in no section stand at the end.
SECTIONS = {
    "Look": ("doctor", "corpora", "inspect"),
    "Make": ("build", "prune", "export"),
    "Measure": ("bench", "eval", "compare", "report"),
    "Use": ("chat", "run", "serve"),
    "Ship": ("ship", "verify", "unpack", "keygen"),
}
EXIT_CODES = (
    "Exit codes: 0 done; 1 it failed, and nothing half-written stays; 2 what was asked makes no sense, and the message "
    "says what to write instead; 130 interrupted. Results go to stdout, all else to stderr."
)
EXAMPLE = re.compile(r"\bExample:\s+(cusprun-edge .*)\Z", re.DOTALL)
WIDTH = 76  # of an example's lines


def example_of(text: str) -> str:
    """The command line that a docstring ends with, in one line; empty where there is none."""
    found = EXAMPLE.search(text.strip())
    return " ".join(found[1].split()) if found else ""


def with_example_apart(text: str) -> str:
    """A docstring with its example in lines of its own, which may be copied and are not wrapped anew."""
    example = example_of(text)
    if not example:
        return text
    words = [shlex.quote(word) for word in shlex.split(example)]
    lines = textwrap.wrap(
        " ".join(words), WIDTH - 6, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    before = EXAMPLE.split(text.strip())[0].rstrip()
    return f"{before}\n\n\b\nExample:\n  " + " \\\n  ".join(lines)


class Manual(TyperGroup):
    """A group of commands whose list is in sections, each command with its first sentence in full."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for command in self.commands.values():
            command.format_help_text = partial(_write_page, command)  # type: ignore[method-assign]
            command.epilog = command.epilog or EXIT_CODES
            for parameter in command.params:
                keep_option(parameter)

    def list_commands(self, ctx: Any) -> list[str]:
        order = [name for names in SECTIONS.values() for name in names]
        return sorted(self.commands, key=lambda name: order.index(name) if name in order else len(order))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        section_of = {name: section for section, names in SECTIONS.items() for name in names}
        rows: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            if not self.commands[name].hidden:
                said = self.commands[name].get_short_help_str(limit=1000)
                rows.setdefault(section_of.get(name, "Commands"), []).append((name, said))
        widest = max(map(len, self.commands), default=0)
        for section, commands in rows.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(widest), said) for name, said in commands])


def _write_page(command: Any, ctx: Any, formatter: Any) -> None:
    """What a command's docstring says, in place of the parser's own way to write it."""
    formatter.write_paragraph()
    with formatter.indentation():
        formatter.write_text(with_example_apart(inspect.cleandoc(command.help or "")))


class Sectioned(TyperCommand):
    """A command with so many options that they stand by subject; see cusprun.flags.SUBJECTS."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        from cusprun.flags import SUBJECTS

        subject_of = {name: subject for subject, names in SUBJECTS.items() for name in names}
        rows: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{subject: [] for subject in SUBJECTS}}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                argument = parameter.param_type_name == "argument"
                subject = "Arguments" if argument else subject_of.get(parameter.name or "", "Options")
                rows.setdefault(subject, []).append(record)
        for subject, found in rows.items():
            if found:
                with formatter.section(subject):
                    formatter.write_dl(found)
