"""Manuals in HTML (DocBook, Sphinx): sections as text, sections with headings, questions with answers, translations."""

from __future__ import annotations

from collections.abc import Iterator

from cusprun.corpora.parsers import Draft, Members, Options, pair
from cusprun.corpora.parsers.markup import Section, read_blocks, read_sections
from cusprun.corpora.text import clean, keep_language, language_of

HEADING_REQUESTS = {
    "en": "Give this section a heading.",
    "de": "Gib diesem Abschnitt eine Überschrift.",
    "fr": "Donne un titre à cette section.",
    "es": "Pon un título a esta sección.",
    "it": "Dai un titolo a questa sezione.",
    "pt": "Dê um título a esta seção.",
}
TRANSLATION_REQUESTS = {
    "en": "Translate into English.",
    "de": "Übersetze ins Deutsche.",
    "fr": "Traduis en français.",
    "es": "Traduce al español.",
    "it": "Traduci in italiano.",
    "pt": "Traduza para o português.",
}


def parse_book(members: Members, options: Options) -> Iterator[Draft]:
    """One draft per section. Options: ``language`` drops paragraphs in another one (untranslated English)."""
    for key, section in _sections(members, options):
        text = clean("\n\n".join(part for part in (section.heading, section.body) if part))
        if len(text) >= 400 and language_of(text) == options["language"]:
            yield Draft(key, text)


def parse_headings(members: Members, options: Options) -> Iterator[Draft]:
    """A section asked, its heading answered: the shortest kind of summary. Options as for a book."""
    for key, section in _sections(members, options):
        body = clean(section.body)
        if len(body) >= 400 and 8 <= len(section.heading) <= 120 and language_of(body) == options["language"]:
            yield pair(key, f"{HEADING_REQUESTS[options['language']]}\n\n{body[:3000]}", section.heading)


def parse_faq(members: Members, options: Options) -> Iterator[Draft]:
    """Sections whose heading is a question. Options as for a book."""
    for key, section in _sections(members, options):
        body = clean(section.body)
        if section.heading.endswith("?") and len(body) >= 80 and language_of(body) == options["language"]:
            yield pair(key, section.heading, body)


def parse_parallel(members: Members, options: Options) -> Iterator[Draft]:
    """Paragraphs beside their translation, where both languages' pages have the same blocks.

    Options: ``source`` and ``target``, each a pair [language, part of the path that names it].
    """
    (language_from, mark_from), (language_to, mark_to) = options["source"], options["target"]
    pages: dict[str, dict[str, bytes]] = {mark_from: {}, mark_to: {}}
    for name, data in members:
        for mark, found in pages.items():
            if mark in name:
                found[name.replace(mark, "*")] = data
    for page in sorted(pages[mark_from].keys() & pages[mark_to].keys()):
        before, after = read_blocks(pages[mark_from][page]), read_blocks(pages[mark_to][page])
        if [block.level for block in before] != [block.level for block in after]:
            continue
        for number, (asked, answered) in enumerate(zip(before, after, strict=True)):
            if language_of(asked.text) != language_from or language_of(answered.text) != language_to:
                continue
            if len(asked.text) >= 120 and asked.level == 0:
                key = f"{page.rsplit('/', 1)[-1]}/{number}"
                yield pair(key, f"{TRANSLATION_REQUESTS[language_to]}\n\n{clean(asked.text)}", clean(answered.text))


def _sections(members: Members, options: Options) -> Iterator[tuple[str, Section]]:
    for name, data in members:
        page = name.rsplit("/", 1)[-1].removesuffix(".html")
        for number, section in enumerate(read_sections(data, options.get("deepest", 3))):
            body = keep_language(section.body, options["language"])
            yield f"{page}/{number}", Section(section.heading, tuple(body.split("\n\n")))
