"""A matplotlib figure as an inline SVG: its own ids, the page's font, and colours that follow the page's scheme.

Plots are drawn in marked colours (:data:`INK` ...), each of which becomes a CSS variable of the page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, LINE, DENSE, EXPERT, GIVEN, PAPER = (f"#0{n}0{n}0{n}" for n in range(1, 8))
VARIABLES = {
    INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", DENSE: "var(--dense)",
    EXPERT: "var(--expert)", GIVEN: "var(--given)", PAPER: "var(--paper)",
}  # fmt: skip
WIDTH = 4.4  # inches of 72 units: a phone shows them at about their size

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
DEFS = f"{{{SVG}}}defs"
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: smaller, and in the reader's font
    "svg.hashsalt": "cusprun",  # the same figure gives the same bytes
    "text.parse_math": False,  # a name with two dollar signs is a name
    "font.size": 11,
    "axes.labelsize": 11,
    "axes.titlesize": 11,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextmanager
def canvas(height: float) -> Iterator[Figure]:
    """An empty figure of the page's width and ``height`` inches, under the page's settings."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield Figure(figsize=(WIDTH, height), layout="constrained")


def as_svg(figure: Figure, key: str, title: str, description: str) -> Markup:
    """The figure as an <svg role="img"> named by ``title`` and ``description``; ``key`` is unique on the page.

    To be called inside :func:`canvas`. The same figure gives the same text.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's font has it
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style") or (child.tag == DEFS and not len(child)):
                parent.remove(child)
    _own_ids(root, key)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{key}-title {key}-desc"}
    for index, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{key}-{tag}"})
        element.text = text
        root.insert(index, element)
    text = ElementTree.tostring(root, encoding="unicode")
    text = re.sub(r"\n\s*", "\n", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return Markup(text)


def _own_ids(root: ElementTree.Element, key: str) -> None:
    """Puts ``key`` in front of ids that something refers to and drops the others; leaves the font to the page."""
    referred = set(re.findall(r"#([\w-]+)", ElementTree.tostring(root, encoding="unicode")))
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in referred:
            element.set("id", f"{key}-{name}")
        link = element.attrib.pop(f"{{{XLINK}}}href", None)
        if link is not None:
            element.set("href", f"#{key}-{link.removeprefix('#')}")
        for attribute in ("clip-path", "style"):
            if attribute in element.attrib:
                value = re.sub(r"url\(#([\w-]+)\)", rf"url(#{key}-\1)", element.attrib[attribute])
                value = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value)
                element.set(attribute, re.sub(r"font-family: [^;]*;? ?", "", value))
