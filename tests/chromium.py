"""Chromium for the tests that open pages."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def open_chromium(*flags: str) -> Iterator[Any]:
    """A headless browser; the test is skipped without one, but fails on Debian, where the setup installs it."""
    from playwright.sync_api import sync_playwright

    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        system = Path("/etc/os-release")
        if system.is_file() and re.search("^ID=debian$", system.read_text(), re.MULTILINE):
            pytest.fail("Chromium is missing: bash .ci/setup dev installs it")
        pytest.skip(f"no Chromium here: none of {', '.join(NAMES)} is in PATH")
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox", *flags])
        yield opened
        opened.close()
