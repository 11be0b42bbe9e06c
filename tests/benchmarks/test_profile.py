"""Profiles of a device: measured once, kept, read back, and refused where they are of something else."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from cusprun.anatomy import Anatomy, describe
from cusprun.benchmarks.profile import (
    STEADY,
    Profile,
    TypeProfile,
    at_present,
    read_profile,
    standing_for,
    take_profile,
)  # fmt: skip
from cusprun.errors import InvalidRequest
from tests.test_build import command, run


@pytest.fixture
def anatomy(pico_model: Path) -> Anatomy:
    return describe(pico_model)


@pytest.fixture(scope="module")
def profile(pico_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUSPRUN_CACHE", str(tmp_path_factory.mktemp("cache")))
        first, again = (
            take_profile(
                pico_model, describe(pico_model), ["q8_0"], align=32, attention_goes=True, threads=1, repetitions=2
            )
            for _ in range(2)
        )
    if first.types["q8_0"].scatter() <= STEADY:  # a busy machine's figures are not kept
        assert again == first  # times are never the same twice: nothing was measured again
    else:
        assert again != first
    return first


def test_every_shape_is_run_every_round(profile: Profile, anatomy: Anatomy) -> None:
    found = profile.types["q8_0"]
    assert {"whole", "layers", "rows", "heads none"} <= found.runs.keys()
    assert all(len(run["decode_s"]) == len(run["peak_rss_bytes"]) == 2 for run in found.runs.values())
    assert 0 < found.seconds.whole < 1
    assert found.memory.whole > 10 * 2**20
    assert profile.device["threads"] == 1
    smaller = anatomy.with_layers([anatomy.layers[0], None, None])
    assert found.seconds.total(anatomy, [smaller.layers[0], None, None], 200) <= found.seconds.whole


def test_an_old_profile_is_brought_to_the_speed_of_today(
    profile: Profile, pico_model: Path, anatomy: Anatomy, capfd: pytest.CaptureFixture[str]
) -> None:
    """As if the machine had been a hundred times as slow on the day of the profile."""
    found = profile.types["q8_0"]
    runs = {name: {**run, "decode_s": [100 * s for s in run["decode_s"]]} for name, run in found.runs.items()}
    slow = replace(profile, types={"q8_0": replace(found, seconds=found.seconds.scaled(100), runs=runs)})
    now = at_present(slow, pico_model, anatomy).types["q8_0"]
    assert now.seconds.whole < slow.types["q8_0"].seconds.whole / 3
    factor = now.seconds.whole / slow.types["q8_0"].seconds.whole
    assert now.seconds.row == pytest.approx(factor * slow.types["q8_0"].seconds.row)
    assert now.seconds.ffn[-1][1] == pytest.approx(factor * slow.types["q8_0"].seconds.ffn[-1][1])
    assert now.memory == found.memory
    assert f"decodes at {1 / factor:.2f} times the speed" in capfd.readouterr().err


def test_it_is_read_back_for_its_own_model_and_types_alone(profile: Profile, anatomy: Anatomy, tmp_path: Path) -> None:
    path = tmp_path / "phone.json"
    profile.save(path)
    assert read_profile(path, anatomy, ["q8_0"]) == profile
    with pytest.raises(InvalidRequest, match="has q8_0 and not q4_0"):
        read_profile(path, anatomy, ["q8_0", "q4_0"])
    path.write_text(path.read_text().replace('"schema_version": 3', '"schema_version": 99'))
    with pytest.raises(InvalidRequest, match="version 99"):
        read_profile(path, anatomy, ["q8_0"])
    profile.save(path)
    with pytest.raises(InvalidRequest, match="a model with other sizes"):
        read_profile(path, anatomy.with_vocabulary(100), ["q8_0"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1, "types": 3}', "not json"])
def test_what_is_no_profile_is_refused(text: str, anatomy: Anatomy, tmp_path: Path) -> None:
    path = tmp_path / "phone.json"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match="is no profile"):
        read_profile(path, anatomy, ["q8_0"])
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_profile(tmp_path / "none.json", anatomy, ["q8_0"])


def test_large_models_are_stood_for_by_fewer_layers(anatomy: Anatomy) -> None:
    import dataclasses

    assert standing_for(anatomy) == anatomy
    wide = tuple(dataclasses.replace(layer, ffn=200_000) for layer in anatomy.layers * 4)
    large = dataclasses.replace(anatomy, layers=wide, attention=anatomy.attention * 4)
    assert len(standing_for(large).layers) == 5


def test_scatter_is_the_half_width_of_the_middle_runs(profile: Profile) -> None:
    steady = profile.types["q8_0"]
    runs = {"whole": {"decode_s": [0.9, 1.0, 1.1]}, "rows": {"decode_s": [1.8, 2.0, 2.2]}}
    assert TypeProfile(steady.seconds, steady.memory, runs).scatter() == pytest.approx(0.1)


def test_bench_writes_a_profile_that_build_reads(pico_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "phone.json"
    done = run("bench", pico_model, "--profile", path, "--quant", "q8_0", "--threads", "1")
    assert "q8_0: " in done.stdout
    assert str(path) in done.stdout
    assert read_profile(path, describe(pico_model), ["q8_0"]).device["threads"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--profile", "p.json", "--quant", "q99"], "quantization 'q99' is unknown"),
        (["--profile", "p.json", "--quant", "iq2_m"], "iq2_m needs an importance matrix"),
        (["--profile", "nowhere/p.json"], "name a file in a folder that is there"),
        (["--profile", "p.json", "--repetitions", "3"], "goes with --quant, --threads N and --device alone"),
        (["--quant", "q8_0"], "write --profile FILE too"),
    ],
)
def test_profiles_that_make_no_sense(pico_model: Path, tmp_path: Path, words: list[str], message: str) -> None:
    done = subprocess.run(command("bench", pico_model, *words), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
