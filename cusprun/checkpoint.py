"""Model folders: the weights tensor by tensor from safetensors, and the classes that hold layers of different widths.

Uniform layouts are stock transformers models. Per-layer ones carry three lists in config.json and load through
``AutoModelForCausalLM`` once cusprun is imported; :func:`register_when_imported` arranges that without importing
transformers.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cusprun.anatomy import (
    FAMILIES,
    SLICED_TYPE,
    Anatomy,
    Family,
    SlicedAnatomy,
    describe,
    describe_sliced,
    read_config,
)
from cusprun.errors import Failed, InvalidRequest
from cusprun.tensor_file import TensorFile, write_tensors

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# What a model folder holds beside config.json and the weights; carried from the dense model to the expert.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a folder's model: those that the index names, or the one there is without.

    Others may lie beside them. Raises InvalidRequest where the index is none.
    """
    index = folder / INDEX
    if not index.is_file():
        return [folder / SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InvalidRequest(f"{index} is not a safetensors index: {error}") from error
    if any(Path(name).name != name for name in names):
        raise InvalidRequest(f"{index} names a file outside its folder")
    return [folder / name for name in names]


class Weights:
    """Lazy access to the tensors of a safetensors folder; a tensor is read when it is asked for and never kept."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers. Raises InvalidRequest where the folder has no safetensors or a file is damaged."""
        paths = weight_files(folder)
        if missing := [path for path in paths if not path.is_file()]:
            pickled = sorted(path.name for path in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
            hint = f" ({', '.join(pickled)} is a pickle and is not read: convert it to safetensors)" if pickled else ""
            raise InvalidRequest(f"{missing[0]} is missing{hint}")
        self._files: dict[str, TensorFile] = {}
        for path in paths:
            file = TensorFile(path)
            self._files.update(dict.fromkeys(file, file))
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].shape(name)

    def dtype(self, name: str) -> str:
        """The safetensors name of the element type: F32, F16, BF16 ..."""
        return self._files[name].dtype(name)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor, in its stored element type. Raises Failed naming it where it is absent or not finite."""
        import torch

        if name not in self._files:
            raise Failed(f"{self.folder} has no tensor {name}")
        tensor = self._files[name][name]
        if tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():  # NaN comes through: no copy
            raise Failed(f"{self.folder}: tensor {name} holds NaN or infinity")
        return tensor

    def check(self, anatomy: Anatomy | SlicedAnatomy) -> None:
        """Raises InvalidRequest naming each tensor that is missing, too much or not of the shape config.json says."""
        problems = []
        expected = dict(anatomy.tensor_shapes())
        for name, shape in expected.items():
            if name not in self:
                problems.append(f"tensor {name} is missing")
            elif self.shape(name) != shape:
                problems.append(f"tensor {name} is {list(self.shape(name))}; config.json says {list(shape)}")
            elif self.dtype(name) not in ("F32", "F16", "BF16", "F64"):
                problems.append(f"tensor {name} has element type {self.dtype(name)}; wanted F32, F16 or BF16")
        ignored = {anatomy.family.output} if anatomy.tied else set()
        for name in self:
            if name not in expected and name not in ignored and not name.endswith("rotary_emb.inv_freq"):
                problems.append(f"tensor {name} is not part of a {anatomy.family.name} model with this config")
        if problems:
            shown = [f"{self.folder}: {problem}" for problem in problems[:8]]
            if len(problems) > 8:
                shown.append(f"{self.folder}: and {len(problems) - 8} more tensors")
            raise InvalidRequest.together(shown)


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], sizes: Mapping[str, int], shard_bytes: int = 2**30
) -> None:
    """Writes tensors one by one into shards of at most ``shard_bytes``, never holding more than a tensor.

    ``sizes`` gives each tensor's bytes in the order in which ``tensors`` yields them, so that the shards' names,
    which count them, are known before the first is written. Raises ValueError where what comes is not what was said.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    stream = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        written, said = write_tensors(folder / file, names, stream), sum(sizes[name] for name in names)
        if written != said:
            raise ValueError(f"{file}: its tensors take {written} bytes, not {said}")
    if (more := next(stream, None)) is not None:
        raise ValueError(f"tensor {more[0]} is one too many")
    if count > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def expert_config(dense: dict[str, Any], anatomy: Anatomy) -> dict[str, Any]:
    """config.json of a compacted model: stock where every layer has the same widths, per-layer otherwise.

    A uniform layout that the stock classes would refuse (Llama wants a head count that divides the hidden size,
    Mistral has no biases) is written in the per-layer form, which holds it.
    """
    config = {key: value for key, value in dense.items() if not key.startswith("layer_")}
    layers, family = anatomy.layers, anatomy.family
    config["num_hidden_layers"] = len(layers)
    config["head_dim"] = anatomy.head_dim
    config["intermediate_size"] = max(layer.ffn for layer in layers)
    config["num_attention_heads"] = max(layer.heads for layer in layers)
    config["num_key_value_heads"] = max(layer.kv_heads for layer in layers)
    for name, there in (("attention_bias", anatomy.attention_bias), ("mlp_bias", anatomy.mlp_bias)):
        if there or name in family.biases:
            config[name] = there
    config.update(family.attention_settings(anatomy.attention))
    if is_stock(anatomy):
        config["model_type"] = family.name
        config["architectures"] = [family.model_class]
    else:
        config["model_type"] = family.per_layer_name
        config["architectures"] = [per_layer_class_name(family)]
        config["layer_intermediate_sizes"] = [layer.ffn for layer in layers]
        config["layer_num_attention_heads"] = [layer.heads for layer in layers]
        config["layer_num_key_value_heads"] = [layer.kv_heads for layer in layers]
    return config


def is_stock(anatomy: Anatomy) -> bool:
    """Whether stock transformers can load the layout without cusprun."""
    family = anatomy.family
    biases = (("attention_bias", anatomy.attention_bias), ("mlp_bias", anatomy.mlp_bias))
    if not anatomy.uniform or any(there and name not in family.biases for name, there in biases):
        return False
    return not family.heads_divide_hidden or anatomy.hidden_size % anatomy.layers[0].heads == 0


def per_layer_class_name(family: Family) -> str:
    return f"Cusprun{family.model_class}"


def load_model(folder: Path, dtype: str = "float32") -> Any:
    """The model of a folder, dense or compacted, through AutoModelForCausalLM, on the CPU, in eval mode.

    Raises InvalidRequest naming tensors that are missing or misshapen (transformers would fill them at random), Failed
    with what transformers could not load.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    sliced = read_config(folder).get("model_type") == SLICED_TYPE
    Weights(folder).check(describe_sliced(folder) if sliced else describe(folder))
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise Failed(f"{folder} does not load as a model folder: {error}") from error
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises Failed with what transformers could not load."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise Failed(f"{folder} has no tokenizer that loads: {error}") from error


def register_when_imported() -> None:
    """Makes the per-layer model types known to transformers, at once or when its auto classes are imported."""
    import wrapt

    auto = "transformers.models.auto"
    # The classes here and what they are built on, by module: these import one another, and any may be the first.
    needed = {f"{auto}.configuration_auto": "AutoConfig", f"{auto}.modeling_auto": "AutoModelForCausalLM"}
    needed |= {
        f"transformers.models.{family.module}.modeling_{family.module}": family.model_class for family in FAMILIES
    }
    needed |= {f"cusprun.anatomy.{family.module}_per_layer": "PerLayerModel" for family in FAMILIES}
    needed |= {"cusprun.anatomy.sliced_model": "CusprunSlicedForCausalLM"}
    registering = False

    def register(_: ModuleType) -> None:
        nonlocal registering
        halfway = [
            name for name, wanted in needed.items() if name in sys.modules and not hasattr(sys.modules[name], wanted)
        ]
        if registering or halfway:
            return  # the call that sees them whole registers
        registering = True
        try:
            from transformers.models.auto.configuration_auto import AutoConfig
            from transformers.models.auto.modeling_auto import AutoModelForCausalLM

            for family in FAMILIES:
                classes = importlib.import_module(f"cusprun.anatomy.{family.module}_per_layer")
                AutoConfig.register(family.per_layer_name, classes.PerLayerConfig, exist_ok=True)
                AutoModelForCausalLM.register(classes.PerLayerConfig, classes.PerLayerModel, exist_ok=True)
            sliced = importlib.import_module("cusprun.anatomy.sliced_model")
            AutoConfig.register(SLICED_TYPE, sliced.SlicedConfig, exist_ok=True)
            AutoModelForCausalLM.register(sliced.SlicedConfig, sliced.CusprunSlicedForCausalLM, exist_ok=True)
        finally:
            registering = False

    for name in needed:
        wrapt.register_post_import_hook(register, name)
