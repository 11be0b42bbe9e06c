"""What a build takes away of what killed processes left, beside other processes at work."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

from cusprun.files import aside
from cusprun.stages import sweep


def gone_process() -> int:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    return int(done.stdout)


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    left_file = tmp_path / "deep" / f".model.gguf.{gone_process()}.0123abcd.part"
    left_folder = tmp_path / f".model.{gone_process()}.0123abcd.part"
    left_file.write_bytes(b"half")
    left_folder.mkdir()
    (left_folder / "config.json").write_text("{}")
    at_work = aside(tmp_path / "deep" / "other.gguf")
    at_work.write_bytes(b"in progress")
    sweep(tmp_path)
    assert not left_file.exists()
    assert not left_folder.exists()
    assert at_work.exists()


def test_folders_that_go_while_one_sweeps_do_not_end_a_build(tmp_path: Path) -> None:
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            for number in range(20):
                (tmp_path / f"parts-{number}" / "inner").mkdir(parents=True, exist_ok=True)
            for number in range(20):
                shutil.rmtree(tmp_path / f"parts-{number}")

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        for _ in range(300):
            sweep(tmp_path)
    finally:
        stop.set()
        other.join()
