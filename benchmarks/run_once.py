"""One measurement of one artifact, made for a process of its own: load, warm up, prefill, decode, peak memory.

pp and tg are llama-bench's: a prompt of random tokens in one go from an empty cache; then single random tokens, one
after the other, from an empty cache. `python -m cusprun.benchmarks.run_once ARTIFACT` prints one run as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from cusprun.runtimes import is_onnx, open_runtime

WARM_UP_STEPS = 8
STATUS = Path("/proc/self/status")


def measure(
    artifact: str,
    *,
    prefill: int = 512,
    decode: int = 128,
    threads: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Seconds of each phase, ttft_s (prompt read and the likeliest next token found), peak resident bytes.

    ``load_s`` is open_runtime's time without the import of the runtime's library; the file may be in the page cache.
    Meant for a fresh process: peak memory is that of the whole process since it began.
    """
    path = Path(artifact)
    import_runtime(path)
    resident = peak_rss_bytes()
    start = time.perf_counter()
    runtime = open_runtime(path, context=max(prefill, decode), threads=threads, device=device)
    load_s = time.perf_counter() - start
    if runtime.n_context < max(prefill, decode):
        prefill, decode = min(prefill, runtime.n_context), min(decode, runtime.n_context)
    ids = np.random.default_rng(seed).integers(0, runtime.n_vocab, size=prefill + decode).tolist()
    prompt, following = ids[:prefill], ids[prefill:]
    if runtime.bos is not None:
        prompt[0] = following[0] = runtime.bos

    runtime.prefill(prompt)
    runtime.prefill(following[:1])
    for token in following[1:WARM_UP_STEPS]:
        runtime.step(token)

    start = time.perf_counter()
    logits = runtime.prefill(prompt)
    prefill_s = time.perf_counter() - start
    int(logits.argmax())
    ttft_s = time.perf_counter() - start

    start = time.perf_counter()
    runtime.prefill(following[:1])
    for token in following[1:]:
        runtime.step(token)
    decode_s = time.perf_counter() - start
    return {
        "runtime": runtime.name,
        "prefill_tokens": prefill,
        "decode_tokens": decode,
        "load_s": load_s,
        "prefill_s": prefill_s,
        "ttft_s": ttft_s,
        "decode_s": decode_s,
        "rss_before_load_bytes": resident,
        "peak_rss_bytes": peak_rss_bytes(),
    }


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
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    print(json.dumps(measure(arguments.pop("artifact"), **arguments), indent=2))


if __name__ == "__main__":
    main()
