"""Builds that are solved for a device: the wish is met, the prediction kept, and what cannot be met is refused."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cusprun.additive import Table, variants
from cusprun.anatomy import describe
from cusprun.benchmarks.profile import Profile, TypeProfile, shape_of
from cusprun.budget import parse_bytes
from cusprun.exporters.gguf import export_gguf
from tests.benchmarks.test_frontier import ROUNDED
from tests.test_build import QUICK as QUICK_IN_F32
from tests.test_build import command, run

QUICK = [word for word in QUICK_IN_F32 if word not in ("--quant", "f32")]
MEASURED = [*QUICK[:-1], "--eval-tokens", "1024", "--repetitions", "2"]


@pytest.fixture(scope="module")
def dense_bytes(pico_model: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    out = tmp_path_factory.mktemp("dense") / "dense.gguf"
    return export_gguf(pico_model, out, "q8_0").bytes


@pytest.fixture
def profile(pico_model: Path, tmp_path: Path) -> Path:
    """A device that takes a nanosecond and two bytes for each parameter."""
    anatomy = describe(pico_model)
    shapes = variants(anatomy, align=32, attention_goes=True, rows=300)
    seconds, memory = (
        Table.of(shapes, {name: factor * sizes.parameters for name, sizes in shapes.items()}) for factor in (1e-9, 2.0)
    )
    path = tmp_path / "device.json"
    Profile(shape_of(anatomy), {}, {"q8_0": TypeProfile(seconds, memory, {})}).save(path)
    return path


def build(pico_model: Path, text: Path, out: Path, *wish: object) -> dict[str, Any]:
    done = run("build", "--model", pico_model, "--corpus", text, "--out", out, *wish, *QUICK, "--json")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refused(pico_model: Path, text: Path, out: Path, *wish: object) -> str:
    words = command("build", "--model", pico_model, "--corpus", text, "--out", out, *wish, *QUICK)
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    return done.stderr.partition("cusprun-edge:")[2]


def test_the_file_is_as_large_as_was_wished_and_no_larger(
    tmp_path: Path, pico_model: Path, own_text: Path, dense_bytes: int
) -> None:
    wish = int(0.9 * dense_bytes)
    expert = build(pico_model, own_text, tmp_path / "e", "--size", wish, "--quant", "q8_0")
    (artifact,) = expert["artifacts"]
    assert 0.93 * wish <= artifact["bytes"] <= wish  # a step of this tiny model is 4 %
    assert artifact["bytes"] == (tmp_path / "e" / artifact["path"]).stat().st_size
    assert expert["method"]["solved"]["file_bytes"] == pytest.approx(artifact["bytes"], rel=0.002)
    assert expert["method"]["budget"] == {"size": wish}
    assert expert["method"]["ratio"] is None


def test_the_type_is_chosen_too(tmp_path: Path, pico_model: Path, own_text: Path, dense_bytes: int) -> None:
    """A file of two thirds: no cut of eight bits loses as little as four bits of nearly everything."""
    expert = build(pico_model, own_text, tmp_path / "e", "--size", int(0.68 * dense_bytes))
    (artifact,) = expert["artifacts"]
    assert artifact["quant"] == expert["method"]["solved"]["quant"]
    assert artifact["quant"] != "q8_0"
    assert artifact["bytes"] <= 0.68 * dense_bytes


def test_the_report_holds_predictions_against_what_was_measured(
    tmp_path: Path, pico_model: Path, own_text: Path, profile: Path
) -> None:
    """And a finished expert is compared with the dense model in every type without being built again."""
    out, wish = tmp_path / "e", ("--device-profile", profile, "--quant", "q8_0", "--speedup", "1.1", "--align", "32")
    words = ("build", "--model", pico_model, "--corpus", own_text, "--out", out, *wish, *MEASURED)
    first = run(*words)
    assert "Solved for the device" in first.stdout
    lines = first.stderr.splitlines()
    (expected,) = (place for place, line in enumerate(lines) if line.startswith("solved: q8_0, "))
    assert expected < next(place for place, line in enumerate(lines) if line.startswith("refit: "))
    report = json.loads((out / "report" / "report.json").read_text())
    rows = {row["figure"]: row for row in report["solved"]}
    assert rows["file_bytes"]["error"] == pytest.approx(0, abs=0.002)
    assert rows["speedup"]["wish"] == 1.1
    assert rows["speedup"]["measured"] == report["speed"]["ratios"]["decode_tps"]["median_of_pairs"]
    assert rows["decode_tps"]["error"] == rows["decode_tps"]["predicted"] / rows["decode_tps"]["measured"] - 1
    assert "Solved for the device" in (out / "report" / "report.html").read_text()
    again = run(*words, "--against-quantization")
    assert "refit: done before, kept" in again.stderr
    assert lines[expected] in again.stderr.splitlines()
    frontier = json.loads((out / "report" / "report.json").read_text())["frontier"]
    assert frontier["rows"][0]["kind"] == "expert"
    assert {row["name"].split()[-1] for row in frontier["rows"][1:] if row["kind"] == "dense"} == ROUNDED
    assert all(row["decode_tps"]["n"] == 2 for row in frontier["rows"])
    assert frontier["verdicts"]
    assert "Artifacts of the frontier" in (out / "report" / "report.html").read_text()


def test_what_cannot_be_met_is_offered_as_it_can(tmp_path: Path, pico_model: Path, own_text: Path) -> None:
    said = refused(pico_model, own_text, tmp_path / "e", "--size", "20KB", "--quant", "q8_0")
    assert "no expert of this model meets --size 20KB; the nearest is --size" in said
    offered = re.search(r"nearest is --size ([0-9.]+[KM]B)", said)
    assert offered is not None
    expert = build(pico_model, own_text, tmp_path / "e", "--size", offered[1], "--quant", "q8_0")
    assert expert["artifacts"][0]["bytes"] <= parse_bytes(offered[1])


def test_speed_and_memory_are_solved_for_another_device(
    tmp_path: Path, pico_model: Path, own_text: Path, profile: Path
) -> None:
    parameters = describe(pico_model).parameters
    wish = ("--device-profile", profile, "--quant", "q8_0", "--align", "8")
    faster = build(pico_model, own_text, tmp_path / "e", *wish, "--speedup", "1.2")
    assert 1.2 <= faster["method"]["solved"]["speedup"] <= 1.25
    assert faster["expert"]["parameters"] == pytest.approx(parameters / 1.2, rel=0.04)
    assert faster["method"]["solved"]["peak_rss_bytes"] == pytest.approx(2 * faster["expert"]["parameters"], rel=0.02)
    said = refused(pico_model, own_text, tmp_path / "f", *wish, "--ram", "10KB", "--tps", "9000000")
    assert re.search(r"nearest is --ram [0-9.]+KB --tps [0-9.]+ in q8_0; by itself each reaches --ram .* --tps", said)


def test_wishes_that_make_no_sense(tmp_path: Path, pico_model: Path, own_text: Path, profile: Path) -> None:
    out = tmp_path / "e"
    cases: dict[tuple[object, ...], str] = {
        ("--size", "60 parsecs"): "'60 parsecs' is no size: write a number with KB, MB",
        ("--size", "60MB", "--ratio", "0.3"): "size and ratio are two ways to say how much goes: give one",
        ("--tps", "0"): "tps: 0.0 cannot be",
        ("--speedup", "1.5", "--method", "flap"): "speedup is solved by measured losses",
        ("--size", "1MB", "--widths", "even"): "size is solved by measured losses",
        ("--device-profile", profile): "device_profile says how fast and large models run: give tps, speedup or ram",
        ("--tps", "9", "--device-profile", tmp_path / "none"): "none cannot be read",
        ("--tps", "9", "--device-profile", own_text): "is no profile",
        ("--tps", "9", "--quant", "q4_0", "--device-profile", profile): "has q8_0 and not q4_0",
        ("--size", "1MB", "--quant", "iq2_m"): "quant iq2_m cannot be solved for",
    }
    for wish, message in cases.items():
        assert message in refused(pico_model, own_text, out, *wish)
        assert not out.exists()
