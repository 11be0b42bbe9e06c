"""An expert's name as each place in the sample projects may hold it: identifiers made of it, and text quoted for it.

Whatever the name holds, an identifier is valid where it stands, two names never share a package, and quoted text reads
back as the same characters.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import unicodedata
from dataclasses import dataclass
from xml.sax.saxutils import escape

GROUP = "org.cusprun"
LONGEST = 48  # characters of an identifier, so that paths stay short


@dataclass(frozen=True)
class Names:
    """One expert's names."""

    label: str  # what a person reads: without control characters, at most 80 characters
    slug: str  # file names, npm's and Expo's name: [a-z0-9-]
    package: str  # Java package and Android application id: org.cusprun.xyz
    bundle_id: str  # the same for iOS, which takes no underscore

    @property
    def package_path(self) -> str:
        """The folder of the package's sources."""
        return self.package.replace(".", "/")


def names_of(name: str) -> Names:
    """All names of an expert called ``name``, which may be any text."""
    label = " ".join("".join(c if unicodedata.category(c)[0] != "C" else " " for c in name).split())[:80].strip()
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = "-".join(re.findall("[a-z0-9]+", plain))
    if name != slug or len(slug) > LONGEST:  # something was lost: keep names apart
        mark = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        slug = f"{slug[: LONGEST - 9].strip('-')}-{mark}".strip("-")
    segment = slug.replace("-", "_")
    if "_" not in segment or segment[0].isdigit():  # no keyword of Java or Kotlin has an underscore, no slug has two
        segment = f"expert__{segment}"
    package = f"{GROUP}.{segment}"
    return Names(label or slug, slug, package, package.replace("_", "-"))


def kotlin(text: str) -> str:
    """A Kotlin string literal."""
    return _literal(text).replace("$", "\\$")


def typescript(text: str) -> str:
    """A TypeScript or JavaScript string literal, which is a JSON one."""
    return json.dumps(text)


def android_string(text: str) -> str:
    """The content of a <string> in an Android resource file."""
    escaped = re.sub(r"""([\\'"@?])""", r"\\\1", text)
    return escape(re.sub(r"\s", lambda found: f"\\u{ord(found[0]):04x}" if found[0] != " " else " ", escaped))


def shell(text: str) -> str:
    """One word of a POSIX shell."""
    return shlex.quote(text)


def _literal(text: str) -> str:
    """JSON's string in ASCII; Kotlin knows all its escapes but \\f."""
    return json.dumps(text).replace("\\f", "\\u000c")


FILTERS = {"kotlin": kotlin, "ts": typescript, "android": android_string, "sh": shell}
