"""One measurement of one artifact, made for a process of its own: load, warm up, prefill, decode, memory, energy.

pp and tg are llama-bench's: a prompt of random tokens in one go from an empty cache; then single random tokens, one
after the other, from an empty cache or after ``depth`` tokens that are in the cache already.
`python -m cusprun.benchmarks.run_once ARTIFACT` prints one run as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cusprun.benchmarks import page_cache
from cusprun.benchmarks.energy import Meter, first_device, open_meter
from cusprun.errors import Failed
from cusprun.runtimes import Runtime, is_onnx, open_runtime

WARM_UP_STEPS = 8
STATUS = Path("/proc/self/status")


def measure(
    artifact: str,
    *,
    prefill: int = 512,
    decode: int = 128,
    depth: int = 0,
    context: int = 0,
    threads: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    cold: bool = False,
    slowdown: float = 0.0,
) -> dict[str, Any]:
    """Seconds of each phase, ttft_s (prompt read and the likeliest next token found), peak resident bytes.

    ``prefill`` 0 or ``decode`` 0 leaves that phase out; the cache has room for ``context`` tokens, or what they need.
    ``load_s`` is open_runtime's time without the import of the runtime's library, ``ready_s`` the same and the first
    token; the files are in the page cache before, with ``cold`` dropped from it (``cold_note`` says where they were
    not). ``slowdown`` 0.05 lets every call of the runtime in the timed phases take 5 % longer: it is there to prove
    that a bench finds what is there.
    Meant for a fresh process: peak memory is that of the whole process since it began. A prompt or a generation that
    the model's context does not hold is shortened to it. Raises Failed where the cache does not hold what it should.
    """
    path = Path(artifact)
    import_runtime(path)
    files = page_cache.files_of(path)
    note = page_cache.drop(files) if cold else None
    if not cold:
        page_cache.fill(files)
    held = _held_bytes(device)
    resident = peak_rss_bytes()
    start = time.perf_counter()
    runtime = open_runtime(path, context=max(prefill, decode + depth, context, 1), threads=threads, device=device)
    load_s = time.perf_counter() - start
    room = runtime.n_context
    depth = min(depth, room)
    prefill, decode = min(prefill, room), min(decode, room - depth)
    ids = np.random.default_rng(seed).integers(0, runtime.n_vocab, size=prefill + decode + depth + 1).tolist()
    if runtime.bos is not None:
        ids[0] = ids[prefill] = runtime.bos
    prompt, before, following = ids[:prefill], ids[prefill : prefill + depth], ids[prefill + depth :][:decode]
    runtime.prefill(ids[:1])
    found: dict[str, Any] = {
        "runtime": runtime.name,
        "prefill_tokens": prefill,
        "decode_tokens": decode,
        "depth": depth,
        "context": room,
        "load_s": load_s,
        "ready_s": time.perf_counter() - start,
        "cold_note": note,
        "rss_before_load_bytes": resident,
    }
    meter = open_meter(device)
    found["energy_note"] = meter.note
    if prefill:
        found.update(_read_prompt(runtime, prompt, meter, slowdown))
    if decode:
        found.update(_generate(runtime, before, following, meter, slowdown))
        found["cached_tokens"] = runtime.cached
        if runtime.cached != depth + decode:
            raise Failed(f"{path}: the cache holds {runtime.cached} tokens after {depth} and {decode} more")
    now = _held_bytes(device)
    found["device_bytes"] = None if now is None or held is None else now - held
    found["peak_rss_bytes"] = peak_rss_bytes()
    return found


def _read_prompt(runtime: Runtime, prompt: list[int], meter: Meter, slowdown: float) -> dict[str, Any]:
    runtime.prefill(prompt)
    prefill = _slowed(runtime.prefill, slowdown)
    joules, start = meter.read(), time.perf_counter()
    logits = prefill(prompt)
    prefill_s = time.perf_counter() - start
    spent = meter.joules(joules, meter.read())
    int(logits.argmax())
    return {"prefill_s": prefill_s, "ttft_s": time.perf_counter() - start, "prefill_j": spent}


def _generate(
    runtime: Runtime, before: list[int], following: list[int], meter: Meter, slowdown: float
) -> dict[str, Any]:
    """After ``before`` the tokens one by one; the steps of the warm-up are taken back."""
    first = before or following[:1]
    runtime.prefill(first)
    for token in following[: min(WARM_UP_STEPS, runtime.n_context - len(first))]:
        runtime.step(token)
    prefill, step = _slowed(runtime.prefill, slowdown), _slowed(runtime.step, slowdown)
    if before:
        runtime.prefill(before, reuse=True)
    joules, start = meter.read(), time.perf_counter()
    if not before:
        prefill(first)
    for token in following if before else following[1:]:
        step(token)
    decode_s = time.perf_counter() - start
    return {"decode_s": decode_s, "decode_j": meter.joules(joules, meter.read())}


def _slowed(call: Callable[..., np.ndarray], share: float) -> Callable[..., np.ndarray]:
    """``call`` taking ``share`` of its time longer; waits without sleeping, which is exact to the microsecond."""
    if not share:
        return call

    def slowed(*args: Any) -> np.ndarray:
        start = time.perf_counter()
        found = call(*args)
        end = start + (time.perf_counter() - start) * (1 + share)
        while time.perf_counter() < end:
            pass
        return found

    return slowed


def _held_bytes(device: str) -> int | None:
    """Memory of the first CUDA device that somebody holds, whoever it is; None where neither NVML nor torch tells, and
    on the CPU.
    """
    if device != "cuda":
        return None
    if find_spec("pynvml") is not None:
        import pynvml

        try:
            return int(pynvml.nvmlDeviceGetMemoryInfo(first_device()).used)
        except pynvml.NVMLError:
            pass  # no driver that it knows: torch may
    import torch

    if not torch.cuda.is_available():
        return None
    free, whole = torch.cuda.mem_get_info()
    return int(whole - free)


def import_runtime(artifact: Path) -> None:
    """Imports the library that will run ``artifact``, so that loading it is timed without that."""
    if artifact.suffix == ".gguf":
        import cusprun.runtimes.llamacpp
    elif is_onnx(artifact):
        import cusprun.runtimes.onnx_runtime
    else:
        import cusprun.runtimes.torch_runtime  # noqa: F401


def peak_rss_bytes() -> int:
    """The most memory this process had resident.

    Linux carries getrusage's maximum over from the parent through fork and exec; VmHWM starts anew with the program.
    """
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one artifact once, in this process.")
    parser.add_argument("artifact")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cold", action="store_true", help="load from the disk, not from the page cache")
    parser.add_argument("--slowdown", type=float, default=0.0, help="share of its time that every timed call waits")
    arguments = vars(parser.parse_args())
    print(json.dumps(measure(arguments.pop("artifact"), **arguments), indent=2))


if __name__ == "__main__":
    main()
