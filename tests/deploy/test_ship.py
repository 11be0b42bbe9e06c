from pathlib import Path
import shutil


def test_x(pico_expert: Path) -> None:
    shutil.rmtree("/tmp/pico-expert", ignore_errors=True)
    shutil.copytree(pico_expert, "/tmp/pico-expert")
