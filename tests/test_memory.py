"""Layers are streamed: a model larger than the memory that its pruning takes, and the same bytes as from memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cusprun.allocation import plan_ratio
from cusprun.anatomy import describe
from cusprun.checkpoint import Weights, load_model
from cusprun.compact import compact, unit_indices
from cusprun.methods import score_layers
from cusprun.moments import LayerStatistics, Moments, UnitMoments
from cusprun.statistics import load_statistics, save_statistics, stream, walk
from tests import pico
from tests.large import save_large

IDS = np.random.default_rng(4).integers(3, 400, size=(6, 32))
GB = 1e9

# The command line in a process of its own; ru_maxrss would count what the parent held when it forked.
CHILD = """
import sys
from cusprun import layerwise
from cusprun.cli import main
layerwise.HELD_BYTES = 0  # as in a larger model: no layer stays
try:
    main()
except SystemExit as end:
    if end.code:
        raise
for line in open("/proc/self/status"):
    if line.startswith("VmHWM:"):
        print("peak", int(line.split()[1]) * 1024)
"""


def all_at_once(folder: Path, batch: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """What every layer of the model, whole in memory, reads and gives for one batch of windows after the other."""
    model = load_model(folder)
    seen: list[dict[str, torch.Tensor]] = [{} for _ in model.model.layers]
    for index, layer in enumerate(model.model.layers):
        for name, module in (("channels", layer.mlp.down_proj), ("heads", layer.self_attn.o_proj)):
            module.register_forward_hook(
                lambda m, i, o, found=seen[index], name=name: found.__setitem__(name, i[0].flatten(0, 1))
            )
        layer.register_forward_hook(lambda m, i, o, found=seen[index]: found.__setitem__("out", o.flatten(0, 1)))
    with torch.no_grad():
        for start in range(0, len(IDS), batch):
            model.model(torch.from_numpy(IDS[start : start + batch]), use_cache=False)
            yield [dict(layer) for layer in seen]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_equals_in_memory_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    folder = pico.save_model(tmp_path / "dense")
    load_model(folder, dtype).save_pretrained(folder)
    anatomy = describe(folder)
    assert Weights(folder).dtype(anatomy.family.embedding) == {"float32": "F32", "bfloat16": "BF16"}[dtype]
    batches = list(all_at_once(folder, 2))
    for index, found in walk(folder, anatomy, {"text": IDS}, label="", batch_tokens=64):
        for batch, whole in zip(found, batches, strict=True):
            for name, tensor in whole[index].items():
                assert torch.equal(getattr(batch, name), tensor), (index, name)

    def moments(layer: dict[str, torch.Tensor]) -> LayerStatistics:
        scale = layer["out"].norm(dim=1, keepdim=True)
        channels, heads = layer["channels"] / scale, layer["heads"] / scale
        return LayerStatistics(UnitMoments(Moments.of(channels, channels.shape[1]), Moments.of(heads, 2)))

    summed = [moments(layer) for layer in batches[0]]
    for batch in batches[1:]:
        summed = [before + moments(layer) for before, layer in zip(summed, batch, strict=True)]
    held = {name: Weights(folder)[name] for name in Weights(folder)}
    from_memory = plan_ratio(
        anatomy,
        score_layers(held, anatomy, [{"text": layer} for layer in summed], "cus-prun", "intersection"),  # type: ignore[arg-type]
        0.25, align=8, layout="per-layer",
    )  # fmt: skip
    save_statistics(stream(folder, anatomy, {"text": IDS}, batch_tokens=64), tmp_path / "statistics")
    stored = load_statistics(tmp_path / "statistics")
    plan = plan_ratio(
        anatomy, score_layers(Weights(folder), anatomy, stored, "cus-prun", "intersection"), 0.25,
        align=8, layout="per-layer",
    )  # fmt: skip
    assert plan == from_memory
    compact(folder, plan, tmp_path / "expert")
    expert = Weights(tmp_path / "expert")
    for index, kept in enumerate(plan.layers):
        for coupling in anatomy.family.couplings:
            name = anatomy.prefix(index) + coupling.tensor
            if name in held:
                held[name] = held[name].index_select(coupling.axis, unit_indices(kept, coupling.unit, 2, 16))
    assert set(expert) == set(held)
    for name, tensor in held.items():
        assert torch.equal(expert[name], tensor), name
        assert expert[name].dtype == tensor.dtype


def prune(folder: Path, text: Path, out: Path, *method: str) -> float:
    """Bytes of memory that `cusprun-edge prune` took at most for 25 % of the model in ``folder``."""
    command = [sys.executable, "-c", CHILD, "prune", folder, "--corpus", text, "--out", out, "--ratio", "0.25"]
    command += ["--tokens", "1024", "--window", "256", "--vocab", "keep", "--method", *method]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = describe(folder), describe(out / "model")
    assert 1 - after.parameters / before.parameters == pytest.approx(0.25, abs=0.01)
    return float(done.stdout.split()[-1])


@pytest.mark.parametrize("method", ["refit", "cus-prun"])
def test_layers_that_leave_memory_give_the_same_bytes(tmp_path: Path, own_text: Path, method: str) -> None:
    """Each layer read when its turn comes and dropped after it, or all of them held."""
    folder = pico.save_model(tmp_path / "dense")
    found = []
    for name, child in (("held", CHILD.replace("layerwise.HELD_BYTES = 0", "pass")), ("read again", CHILD)):
        out = tmp_path / name
        command = [sys.executable, "-c", child, "prune", folder, "--corpus", own_text, "--out", out, "--tokens", 2048]
        command += ["--window", 64, "--vocab", "keep", "--method", *method.split()]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(Weights(out / "model"))
    one, other = found
    assert set(one) == set(other)
    assert all(torch.equal(one[key], other[key]) for key in one)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(folder).free < 12e9:
        pytest.skip("needs 12 GB of disk")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_less_than_the_weights_and_does_not_grow_with_depth(scratch: Path, own_text: Path) -> None:
    peaks = []
    for layers, parameters in ((22, 1.1e9), (44, 2.07e9)):
        folder = save_large(scratch / str(layers), layers)
        assert describe(folder).parameters == pytest.approx(parameters, rel=0.01)
        peaks.append(prune(folder, own_text, scratch / f"{layers}-pruned", "cus-prun"))
        print(f"{layers} layers, {size(folder) / GB:.2f} GB: peak {peaks[-1] / GB:.2f} GB")
        if layers == 22:
            assert peaks[0] <= 2.0 * GB < size(folder)
        shutil.rmtree(folder)
        shutil.rmtree(scratch / f"{layers}-pruned")
    assert peaks[1] <= 1.1 * peaks[0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc")
def test_what_is_freed_goes_back_to_the_system() -> None:
    """Blocks of 16 MiB freed between blocks that stay: what is left in memory is what stays."""
    code = """
import torch
from cusprun.memory import return_large_blocks
def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
return_large_blocks()
torch.empty(3 * 2**23, dtype=torch.uint8).fill_(1)  # freed: after it glibc would keep blocks of up to its size
before = held()
blocks = [(torch.empty(2**24, dtype=torch.uint8).fill_(1), torch.ones(2**14)) for _ in range(20)]
stay = [small for _, small in blocks]
del blocks
print(held() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**24


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_refit_at_this_width_takes_as_little(scratch: Path, own_text: Path) -> None:
    """Its moments are of one layer at a time, so two layers tell."""
    folder = save_large(scratch / "two", 2)
    peak = prune(folder, own_text, scratch / "two-pruned", "refit")
    print(f"refit: peak {peak / GB:.2f} GB")
    assert peak <= 2.0 * GB


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_refit_takes_no_more_for_twice_the_layers(scratch: Path, own_text: Path) -> None:
    """Half as wide, so that it is done soon; six layers more would weigh 0.14 GB, twice that in float32."""
    narrow = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 2}
    peaks = []
    for layers in (6, 12):
        folder = save_large(scratch / f"{layers}-narrow", layers, **narrow)
        peaks.append(prune(folder, own_text, scratch / f"{layers}-narrow-pruned", "refit"))
        print(f"refit, {layers} layers, {size(folder) / GB:.2f} GB: peak {peaks[-1] / GB:.2f} GB")
    assert peaks[1] <= 1.1 * peaks[0]
