"""SliceGPT (Ashkboos et al. 2024, arXiv:2401.15024): the hidden size is rotated to principal directions and sliced.

The norms' weights go into the matrices behind them, so that a rotation of the residual stream commutes with the norms.
Then block by block: Q are the eigenvectors of Σ x xᵀ over the block's inputs x on calibration text, as the blocks that
are sliced already give them; the matrices of the block are rotated and cut to the leading directions, and the residual
connection gets Q_lᵀ Q_{l+1}. As in the authors' code, x is taken in front of the norm and not centred.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cusprun.anatomy import SLICED_TYPE, Anatomy, SlicedAnatomy, read_config
from cusprun.anatomy.sliced import SLICED_CLASS, check_sliceable
from cusprun.checkpoint import Weights, write_weights
from cusprun.dense import copy_companions
from cusprun.errors import Failed, InvalidRequest
from cusprun.files import folder_written_whole, write_json
from cusprun.progress import say, track

NAME = "slicegpt"
PAPER = "arXiv:2401.15024"
DAMPING = 0.01  # of the mean diagonal, added to it; moves no eigenvector
BATCH_TOKENS = 2048


def slicegpt(
    dense_folder: Path,
    anatomy: Anatomy,
    windows: Mapping[str, np.ndarray],
    ratio: float,
    out: Path,
    device: str = "cpu",
    *,
    slice_head: bool = False,
    note: dict[str, Any] | None = None,
) -> None:
    """Writes the model folder ``out`` with ``ratio`` of all parameters fewer than ``dense_folder``, shortcuts counted.

    ``windows`` maps each dimension to token ids, (n, window) int64. The output head stays whole unless ``slice_head``
    (the authors' default). ``note`` joins what config.json says under ``cusprun``. Raises InvalidRequest where the
    family is another, layers differ or no width reaches the ratio, Failed where a hidden state is not finite.
    """
    check_sliceable(anatomy)
    sizes = solve_width(anatomy, ratio, slice_head=slice_head)
    reached = f"{1 - sizes.parameters / anatomy.parameters:.1%} of all parameters go (wanted {ratio:.1%})"
    say(f"{NAME}: hidden size {anatomy.hidden_size} -> {sizes.width}, {reached}")
    slice_model(dense_folder, sizes, windows, out, device, note=note)


def solve_width(anatomy: Anatomy, ratio: float, *, slice_head: bool = False) -> SlicedAnatomy:
    """The one width for all blocks whose parameters are nearest to 1 - ``ratio`` of the dense model's.

    Raises InvalidRequest where even one direction is too many.
    """
    hidden, wanted = anatomy.hidden_size, (1 - ratio) * anatomy.parameters
    candidates = [SlicedAnatomy(anatomy, width, width if slice_head else hidden) for width in range(1, hidden + 1)]
    best = min(candidates, key=lambda sizes: abs(sizes.parameters - wanted))
    if best.width == 1 and best.parameters > wanted:
        most = 1 - best.parameters / anatomy.parameters
        raise InvalidRequest(f"--ratio {ratio:g} is more than {NAME} can slice off this model, {most:.3f} at most")
    return best


def principal_directions(moments: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of Σ x xᵀ, (n, n) float64, as columns, those of the largest eigenvalues first."""
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    return torch.linalg.eigh(damped).eigenvectors.flip(1)


def slice_model(
    dense_folder: Path,
    sizes: SlicedAnatomy,
    windows: Mapping[str, np.ndarray],
    out: Path,
    device: str = "cpu",
    *,
    note: dict[str, Any] | None = None,
) -> None:
    """Writes the model folder ``out`` with the sizes given, whole or not at all; see :func:`slicegpt`."""
    anatomy = sizes.dense
    if not anatomy.uniform:
        raise InvalidRequest(
            f"--method {NAME} needs a dense model whose layers are alike: this one's have other widths"
        )
    config = sliced_config(read_config(dense_folder), sizes)
    config["cusprun"] = {
        **{key: value for key, value in (config.get("cusprun") or {}).items() if not key.startswith("source_")},
        **(note or {}),
        "load_with": "import cusprun; AutoModelForCausalLM.from_pretrained(folder)",
    }
    slicer = _Slicer(dense_folder, sizes, config, windows, device)
    bytes_each = slicer.dtype.itemsize
    with folder_written_whole(out) as part:
        shapes = {name: bytes_each * int(np.prod(shape)) for name, shape in sizes.tensor_shapes()}
        write_weights(part, slicer.tensors(), shapes)
        copy_companions(dense_folder, part)
        write_json(part / "config.json", config)


def sliced_config(dense: dict[str, Any], sizes: SlicedAnatomy) -> dict[str, Any]:
    """config.json of a sliced model. A sliding window becomes the longest text: these layers attend to everything."""
    config = {key: value for key, value in dense.items() if not key.startswith("layer_")}
    if window := config.pop("sliding_window", None):
        config["max_position_embeddings"] = min(int(window), int(config.get("max_position_embeddings") or window))
    anatomy, layer = sizes.dense, sizes.dense.layers[0]
    return {
        **config,
        "model_type": SLICED_TYPE,
        "architectures": [SLICED_CLASS],
        "sliced_size": sizes.width,
        "head_size": sizes.head_width,
        "head_dim": anatomy.head_dim,
        "num_key_value_heads": layer.kv_heads,
        "tie_word_embeddings": False,
        "attention_bias": anatomy.attention_bias,
        "mlp_bias": anatomy.mlp_bias,
    }


class _Slicer:
    """One pass down the layers: yields the sliced tensors while the signals go through them."""

    def __init__(
        self, folder: Path, sizes: SlicedAnatomy, config: dict[str, Any], windows: Mapping[str, np.ndarray], device: str
    ) -> None:
        from cusprun.anatomy.sliced_model import SlicedConfig

        self.weights, self.sizes, self.device = Weights(folder), sizes, device
        self.windows = [torch.from_numpy(ids) for ids in windows.values() if len(ids)]
        self.dtype = self.weights[sizes.family.embedding].dtype
        self.config = SlicedConfig.from_dict(dict(config), attn_implementation="sdpa")
        longest = max((ids.shape[1] for ids in self.windows), default=0)
        if not longest:
            raise InvalidRequest(f"--method {NAME} needs calibration text")
        if longest > self.config.max_position_embeddings:
            raise InvalidRequest(
                f"--window {longest} is longer than the model reads, {self.config.max_position_embeddings}"
            )

    def _wide(self, name: str) -> torch.Tensor:
        return self.weights[name].double()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The sliced model's tensors in file order, in the dense element type."""
        with torch.no_grad():
            for name, tensor in self._tensors():
                yield name, tensor.to(self.dtype).contiguous()

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        sizes, family = self.sizes, self.sizes.family
        table = self.weights[family.embedding]
        self.signals = [torch.nn.functional.embedding(ids, table).float() for ids in self.windows]
        rotation = self._directions("the embeddings")[:, : sizes.width]
        yield family.embedding, table.double() @ rotation
        head = self._wide(family.embedding if sizes.dense.tied else family.output)
        last = len(sizes.dense.layers) - 1
        for index in track(range(last + 1), f"{NAME}, layer by layer"):
            rotation = yield from self._layer(index, rotation, sizes.head_width if index == last else sizes.width)
        yield family.output, head * self._wide(family.final_norm) @ rotation

    def _layer(
        self, index: int, rotation: torch.Tensor, out: int
    ) -> Generator[tuple[str, torch.Tensor], None, torch.Tensor]:
        """Slices one layer; ``rotation`` (hidden, width) is its input's. Returns its output's, (hidden, ``out``)."""
        prefix = self.sizes.dense.prefix(index)
        block = _Block(self.config, self.device)

        attention = self._cut(prefix, "self_attn", ("q_proj", "k_proj", "v_proj"), "input_layernorm", rotation)
        wide = self._written(prefix, "self_attn.o_proj")
        block.load("self_attn", attention)
        self._through(block.attend, rotation, wide)  # the residual stream behind attention, in the dense basis
        middle = self._directions(f"attention {index}")[:, : self.sizes.width]
        yield from ((prefix + name, tensor) for name, tensor in attention.items())
        yield from ((f"{prefix}self_attn.o_proj.{kind}", middle.T @ tensor) for kind, tensor in wide.items())
        yield f"{prefix}attention_shortcut.weight", middle.T @ rotation

        ffn = self._cut(prefix, "mlp", ("gate_proj", "up_proj"), "post_attention_layernorm", middle)
        wide = self._written(prefix, "mlp.down_proj")
        block.load("mlp", ffn)
        self._through(block.feed_forward, middle, wide)
        after = self._directions(f"layer {index}")[:, :out]
        yield from ((prefix + name, tensor) for name, tensor in ffn.items())
        yield from ((f"{prefix}mlp.down_proj.{kind}", after.T @ tensor) for kind, tensor in wide.items())
        yield f"{prefix}mlp_shortcut.weight", after.T @ middle
        return after

    def _cut(
        self, prefix: str, part: str, names: tuple[str, ...], norm: str, rotation: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Matrices that read the residual stream, with the norm's weights and the rotation in them; float64."""
        scale, found = self._wide(f"{prefix}{norm}.weight"), {}
        for name in names:
            found[f"{part}.{name}.weight"] = self._wide(f"{prefix}{part}.{name}.weight") * scale @ rotation
            if (bias := f"{part}.{name}.bias") and prefix + bias in self.weights:
                found[bias] = self._wide(prefix + bias)
        return found

    def _written(self, prefix: str, name: str) -> dict[str, torch.Tensor]:
        """A matrix that writes to the residual stream, and its bias where there is one; float64, not rotated."""
        kinds = [kind for kind in ("weight", "bias") if f"{prefix}{name}.{kind}" in self.weights]
        return {kind: self._wide(f"{prefix}{name}.{kind}") for kind in kinds}

    def _through(self, inner: Any, rotation: torch.Tensor, written: dict[str, torch.Tensor]) -> None:
        """Replaces the signals by x Q Qᵀ + inner(x Q) Wᵀ + b, in the dense basis: what the sliced block passes on."""
        rotation = rotation.float().to(self.device)
        matrix = {kind: tensor.float().to(self.device) for kind, tensor in written.items()}
        for states in self.signals:
            step = max(1, BATCH_TOKENS // states.shape[1])
            for start in range(0, len(states), step):
                x = states[start : start + step].to(self.device) @ rotation
                change = torch.nn.functional.linear(inner(x), matrix["weight"], matrix.get("bias"))
                states[start : start + step] = (x @ rotation.T + change).to(states.device)

    def _directions(self, where: str) -> torch.Tensor:
        """All principal directions of the signals, (hidden, hidden)."""
        hidden = self.sizes.dense.hidden_size
        moments = torch.zeros(hidden, hidden, dtype=torch.float64)
        for states in self.signals:
            for window in states.double():
                moments += window.T @ window
        if not torch.isfinite(moments).all():
            raise Failed(f"{self.weights.folder} gives values that are not finite behind {where}")
        return principal_directions(moments)


class _Block:
    """The inside of one sliced layer: what lies between the residual stream and the matrices that write to it."""

    def __init__(self, config: Any, device: str) -> None:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        from cusprun.anatomy.sliced_model import SlicedLayer

        with torch.device("meta"):
            self.layer = SlicedLayer(config, 0).eval()
        for module, name in ((self.layer.self_attn, "o_proj"), (self.layer.mlp, "down_proj")):
            setattr(module, name, torch.nn.Identity())
        self.rotary = LlamaRotaryEmbedding(config).to(device)
        self.device = device

    def load(self, part: str, tensors: dict[str, torch.Tensor]) -> None:
        """Gives the attention or the FFN its matrices, float32."""
        state = {name.removeprefix(f"{part}."): tensor.float().to(self.device) for name, tensor in tensors.items()}
        self.layer.get_submodule(part).load_state_dict(state, assign=True)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """(n, window, width) -> what o_proj reads, (n, window, query heads * head_dim)."""
        positions = self.rotary(x, position_ids=torch.arange(x.shape[1], device=x.device).unsqueeze(0))
        heads: torch.Tensor = self.layer.self_attn(
            hidden_states=self.layer.input_layernorm(x), position_embeddings=positions, attention_mask=None
        )[0]
        return heads

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, window, width) -> what down_proj reads, (n, window, channels)."""
        channels: torch.Tensor = self.layer.mlp(self.layer.post_attention_layernorm(x))
        return channels
