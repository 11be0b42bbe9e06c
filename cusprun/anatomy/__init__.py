"""One short file per model family."""
