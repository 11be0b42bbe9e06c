"""Small real tries, one for each native library and place that cusprun works with; each runs in a child process.

A library that was compiled for another processor crashes at its first instruction, not when it is looked at: so each
computes something whose result is known.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cusprun.errors import Failed, InvalidRequest

Facts = dict[str, Any]  # JSON; "detail" is one line for people


def attempt(name: str, arguments: list[Any]) -> Facts:
    """Runs one try of TRIES. Raises Failed with one line, whatever a broken library raised."""
    try:
        return TRIES[name](*arguments)
    except (InvalidRequest, Failed):
        raise
    except Exception as error:  # a broken installation raises anything
        said = str(error).strip().partition("\n")[0]
        raise Failed(f"{type(error).__name__}: {said}" if said else type(error).__name__) from error


def try_torch() -> Facts:
    """A matrix product on the processor, and on the GPU where torch sees one."""
    import numpy as np
    import torch

    a, b = np.arange(64 * 96, dtype=np.float32).reshape(64, 96) % 7, np.ones((96, 32), dtype=np.float32)

    def product(device: str) -> bool:
        found = torch.from_numpy(a).to(device) @ torch.from_numpy(b).to(device)
        return bool(np.allclose(found.cpu().numpy(), a @ b))

    if not product("cpu"):
        raise Failed(f"torch {torch.__version__} multiplies two matrices otherwise than numpy")
    gpus, trouble = [], None
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append({"name": properties.name, "memory_bytes": properties.total_memory})
        try:
            if not product("cuda"):
                trouble = "its product of two matrices is not numpy's"
        except RuntimeError as error:
            trouble = str(error).partition("\n")[0]
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "detail": f"{torch.__version__}, {capability}, a matrix product as numpy's"
        + (f", {len(gpus)} CUDA device(s)" if gpus else ""),
        "cuda_build": torch.version.cuda,
        "gpus": gpus,
        "gpu_trouble": trouble,
        "mps": torch.backends.mps.is_available(),
    }


def try_transformers() -> Facts:
    """A Llama of one layer, with random weights."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.no_grad():
        logits = transformers.AutoModelForCausalLM.from_config(config)(torch.arange(4)[None]).logits
    if logits.shape != (1, 4, 32) or not torch.isfinite(logits).all():
        raise Failed(f"transformers {transformers.__version__}: a Llama of one layer gives no finite logits")
    return {"detail": f"{transformers.__version__}, a Llama of one layer ran"}


def try_llama_cpp() -> Facts:
    """A Llama of one layer in q4_0 through llama.cpp; what the library was compiled for."""
    import llama_cpp
    import numpy as np

    from cusprun.runtimes.llamacpp import LlamaCppRuntime, quiet

    quiet()
    info = llama_cpp.llama_print_system_info().decode("utf-8", errors="replace")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        _write_tiny_gguf(path)
        runtime = LlamaCppRuntime(path, context=64, threads=1)
        logits = runtime.prefill([1, 2, 3])
        runtime.close()
    if not np.isfinite(logits).all() or np.ptp(logits) == 0:
        raise Failed(f"llama.cpp computes nothing sensible of a tiny model: {info}")
    return {
        "detail": f"llama-cpp-python {llama_cpp.__version__}, a Llama of one layer in q4_0 ran",
        "system_info": info.strip(),
        "gpu_offload": bool(llama_cpp.llama_supports_gpu_offload()),
    }


def _write_tiny_gguf(path: Path) -> None:
    """One layer, 64 hidden, 4 heads of 16, 32 tokens, random weights in q4_0."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants

    hidden, ffn, vocab, heads = 64, 128, 32, 4
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_block_count(1)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_file_type(2)  # mostly q4_0
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{index}" for index in range(vocab)])
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([TokenType.NORMAL] * vocab)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    numbers = np.random.default_rng(0)
    matrices = {"token_embd": (vocab, hidden), "output": (vocab, hidden)}
    matrices |= {f"blk.0.attn_{part}": (hidden, hidden) for part in ("q", "k", "v", "output")}
    matrices |= {"blk.0.ffn_gate": (ffn, hidden), "blk.0.ffn_up": (ffn, hidden), "blk.0.ffn_down": (hidden, ffn)}
    for name, shape in matrices.items():
        values = quants.quantize(numbers.normal(size=shape).astype(np.float32), GGMLQuantizationType.Q4_0)
        writer.add_tensor(f"{name}.weight", values, raw_dtype=GGMLQuantizationType.Q4_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def try_onnxruntime() -> Facts:
    """One product with a matrix of four bits, the kernel that ONNX exports in int4 hang on."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper

    rows, columns, block = 4, 64, 32
    codes = np.full((rows, columns // block, block // 2), 0x99, dtype=np.uint8)  # 9 - 8 = 1 everywhere
    scales = np.repeat(np.arange(1, rows + 1, dtype=np.float32) / 4, columns // block)
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=columns, N=rows, bits=4,
        block_size=block, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, rows])],
        [helper.make_tensor("codes", TensorProto.UINT8, codes.shape, codes.tobytes(), raw=True),
         helper.make_tensor("scales", TensorProto.FLOAT, scales.shape, scales)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.ones((1, columns), dtype=np.float32)})
    if not np.allclose(found, columns * scales[:: columns // block], rtol=0.02):
        raise Failed(f"onnxruntime {onnxruntime.__version__}: a product in four bits gives {found.tolist()}")
    providers = list(onnxruntime.get_available_providers())
    return {"detail": f"{onnxruntime.__version__}, a product with four-bit weights is right", "providers": providers}


def try_cache() -> Facts:
    """A file in the cache is written, read, dropped from memory and removed."""
    from cusprun.benchmarks.page_cache import drop
    from cusprun.corpora.cache import cache_folder, make_folder

    folder = make_folder(cache_folder())
    data = os.urandom(2**20)
    with tempfile.TemporaryDirectory(dir=folder, prefix="doctor-") as own:
        path = Path(own) / "data"
        path.write_bytes(data)
        if path.read_bytes() != data:
            raise Failed(f"what is written to {folder} is not what is read")
        warm = drop([path])
    return {"detail": f"{folder} can be written", "folder": str(folder), "stays_warm": warm}


def try_plan(out: str) -> Facts:
    """Everything that a build of the default expert checks before it begins; nothing is written."""
    from cusprun.needs import minutes
    from cusprun.preflight import prepare
    from cusprun.recipe import make_recipe

    recipe = make_recipe({"lang": "en", "domain": "legal", "task": "qa", "out": Path(out)})
    plan = prepare(recipe)
    low, high = minutes(recipe, plan.sizes, plan.artifacts)
    return {
        "detail": f"{plan.disk_bytes / 1e9:.1f} GB disk, {plan.memory_bytes / 1e9:.1f} GB memory, "
        f"{plan.download_bytes / 1e6:.0f} MB of text to fetch, roughly {low:.0f} to {high:.0f} minutes",
        "disk_bytes": plan.disk_bytes,
        "memory_bytes": plan.memory_bytes,
        "download_bytes": plan.download_bytes,
        "minutes": [low, high],
    }


def try_imports(names: list[str]) -> Facts:
    """Imports modules; what is installed and does not import is of no use."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever its code raises
            said = str(error).strip().partition("\n")[0]
            raise Failed(f"import {name}: {type(error).__name__}: {said}") from error
    return {"detail": f"{', '.join(names)} can be imported"}


def try_hub() -> Facts:
    """Asks the hub for one public model; a network call."""
    from huggingface_hub import HfApi, constants

    from cusprun.dense import PATIENCE_S

    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    HfApi().model_info(model, timeout=PATIENCE_S)
    return {"detail": f"{constants.ENDPOINT} knows {model}"}


TRIES: dict[str, Callable[..., Facts]] = {
    "torch": try_torch,
    "transformers": try_transformers,
    "llama.cpp": try_llama_cpp,
    "onnxruntime": try_onnxruntime,
    "cache": try_cache,
    "default build": try_plan,
    "imports": try_imports,
    "hub": try_hub,
}
