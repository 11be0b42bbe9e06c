"""A child process gives its result, its errors as ours, and its crash as a message."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cusprun.errors import Failed, InvalidRequest
from cusprun.runtimes.child import run_in_child
from tests.runtimes import ends


def test_result_travels_as_json() -> None:
    found = run_in_child(ends.echo, 1, "ä\n𝄞", [2.5, None], name={"k": True})
    assert found["args"] == [1, "ä\n𝄞", [2.5, None]]
    assert found["kwargs"] == {"name": {"k": True}}
    assert found["pid"] != os.getpid()


def test_large_argument() -> None:
    text = "long text " * 200_000
    assert run_in_child(ends.echo, text)["args"] == [text]


def test_crash_is_a_message() -> None:
    with pytest.raises(Failed, match=r"(?s)read_null crashed with SIGSEGV.*about to read address 0"):
        run_in_child(ends.read_null)


def test_own_errors_keep_their_kind() -> None:
    with pytest.raises(InvalidRequest, match=r"^write --context 512 instead$"):
        run_in_child(ends.refuse)
    with pytest.raises(Failed, match=r"^the file broke in the middle$"):
        run_in_child(ends.fail)


def test_other_errors_show_their_traceback() -> None:
    with pytest.raises(Failed, match=r"(?s)exit code 1.*ZeroDivisionError"):
        run_in_child(ends.divide)


def test_timeout(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="was ended after 1 s"):
        run_in_child(ends.sleep, 60, str(tmp_path / "pid"), timeout=1)


def test_child_ends_with_its_parent(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    code = (
        "from cusprun.runtimes.child import run_in_child\n"
        "from tests.runtimes import ends\n"
        f"run_in_child(ends.sleep, 60, {str(started)!r})\n"
    )
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, env=found)
    deadline = time.monotonic() + 20
    while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = psutil.Process(int(started.read_text()))
    parent.kill()
    parent.wait()
    child.wait(timeout=10)
    assert not child.is_running()


def test_a_folder_of_the_same_name_does_not_shadow_the_package(tmp_path: Path) -> None:
    """Commands are run from the repository root, where `cusprun` is a source folder without its other rooms."""
    (tmp_path / "cusprun").mkdir()
    (tmp_path / "cusprun" / "__init__.py").write_text("raise SystemExit('shadowed')")
    code = "from cusprun.runtimes.child import run_in_child; import math; print(run_in_child(math.sqrt, 9.0))"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "3.0\n", done.stderr
