"""Where the text comes from: a catalog of licensed text, the user's own, split once and sampled by dimension."""

from cusprun.corpora.document import (
    Document,
    OwnText,
    Question,
    Scenario,
    WeightedDocument,
    fingerprint,
)

__all__ = ["Document", "OwnText", "Question", "Scenario", "WeightedDocument", "fingerprint"]
