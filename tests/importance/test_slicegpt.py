"""SliceGPT: unsliced it is the dense model; sliced it is what an independent computation in numpy gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from cusprun.anatomy import Anatomy, SlicedAnatomy, describe, describe_sliced
from cusprun.checkpoint import Weights, load_model
from cusprun.errors import Failed, InvalidRequest
from cusprun.importance.slicegpt import principal_directions, slice_model, slicegpt, solve_width
from tests import pico

WINDOWS = {
    "language": np.random.default_rng(0).integers(3, 400, size=(4, 32)),
    "task": np.random.default_rng(1).integers(3, 400, size=(3, 24)),
}
IDS = torch.from_numpy(np.random.default_rng(2).integers(3, 400, size=(2, 40)))
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama", {}),
    "untied-biases": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"tie_word_embeddings": False, "sliding_window": 64, "head_dim": 32}),
}


@pytest.fixture(scope="module", params=KINDS)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, settings = KINDS[request.param]
    return pico.save_model(tmp_path_factory.mktemp("slicegpt") / request.param, family, **settings)


@torch.no_grad()
def logits(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    found: torch.Tensor = load_model(folder)(ids).logits
    return found


def test_with_nothing_sliced_it_is_the_dense_model(tmp_path: Path, dense: Path) -> None:
    anatomy = describe(dense)
    slice_model(dense, SlicedAnatomy(anatomy, 64, 64), WINDOWS, tmp_path / "whole")
    torch.testing.assert_close(logits(tmp_path / "whole"), logits(dense), atol=1e-4, rtol=0)
    shortcut = Weights(tmp_path / "whole")["model.layers.1.attention_shortcut.weight"]
    torch.testing.assert_close(shortcut @ shortcut.T, torch.eye(64), atol=1e-5, rtol=0)
    assert (shortcut - torch.eye(64)).abs().max() > 0.1  # it is a rotation, and not the identity


class Numpy:
    """SliceGPT of a pico model in float64 numpy, window by window, straight from the paper's equations."""

    def __init__(self, folder: Path, anatomy: Anatomy) -> None:
        self.tensors = {
            name: tensor.astype(np.float64) for name, tensor in load_file(folder / "model.safetensors").items()
        }
        self.config = json.loads((folder / "config.json").read_text())
        self.anatomy = anatomy

    def get(self, layer: int, name: str, kind: str = "weight") -> np.ndarray:
        found: np.ndarray = self.tensors.get(f"model.layers.{layer}.{name}.{kind}", np.zeros(1))
        return found

    def rms(self, x: np.ndarray) -> np.ndarray:
        scaled: np.ndarray = x / np.sqrt((x**2).sum(-1, keepdims=True) / 64 + self.config["rms_norm_eps"])
        return scaled

    def attention(self, layer: int, x: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        """What o_proj reads for one window x (tokens, width); ``rotation`` (hidden, width) is in the matrices."""
        widths, dim = self.anatomy.layers[layer], self.anatomy.head_dim
        normed = self.rms(x)

        def read(name: str, heads: int) -> np.ndarray:
            matrix = self.get(layer, f"self_attn.{name}") @ np.diag(self.get(layer, "input_layernorm")) @ rotation
            rows = normed @ matrix.T + self.get(layer, f"self_attn.{name}", "bias")
            return rows.reshape(len(x), heads, dim).transpose(1, 0, 2)

        def rotate(heads: np.ndarray) -> np.ndarray:
            theta = self.config["rope_parameters"]["rope_theta"]
            angles = np.outer(np.arange(len(x)), theta ** (-np.arange(0, dim, 2) / dim))
            first, second = heads[..., : dim // 2], heads[..., dim // 2 :]
            cos, sin = np.cos(angles), np.sin(angles)
            return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

        q, k = rotate(read("q_proj", widths.heads)), rotate(read("k_proj", widths.kv_heads))
        v = read("v_proj", widths.kv_heads)
        k, v = (np.repeat(part, widths.heads // widths.kv_heads, axis=0) for part in (k, v))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(dim)
        scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        joined: np.ndarray = (weights @ v).transpose(1, 0, 2).reshape(len(x), -1)
        return joined

    def ffn(self, layer: int, x: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        normed, scale = self.rms(x), np.diag(self.get(layer, "post_attention_layernorm"))
        gate, up = (
            normed @ (self.get(layer, f"mlp.{name}") @ scale @ rotation).T + self.get(layer, f"mlp.{name}", "bias")
            for name in ("gate_proj", "up_proj")
        )
        found: np.ndarray = gate / (1 + np.exp(-gate)) * up
        return found

    def slice(self, windows: list[np.ndarray], width: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per layer the rotations (hidden, width) in front of attention and of the FFN; then the head's, twice."""

        def pca(signals: list[np.ndarray]) -> np.ndarray:
            _, _, directions = np.linalg.svd(np.concatenate(signals))  # Σ x xᵀ = V S² Vᵀ
            found: np.ndarray = directions.T
            return found

        signals = [self.tensors["model.embed_tokens.weight"][ids] for ids in windows]
        rotation, found = pca(signals)[:, :width], []
        for layer in range(len(self.anatomy.layers)):
            entering, middle = rotation, []
            for x in signals:
                heads = self.attention(layer, x @ entering, entering)
                out = heads @ self.get(layer, "self_attn.o_proj").T + self.get(layer, "self_attn.o_proj", "bias")
                middle.append(x @ entering @ entering.T + out)
            between = pca(middle)[:, :width]
            signals = []
            for y in middle:
                channels = self.ffn(layer, y @ between, between)
                out = channels @ self.get(layer, "mlp.down_proj").T + self.get(layer, "mlp.down_proj", "bias")
                signals.append(y @ between @ between.T + out)
            rotation = pca(signals)[:, :width]
            found.append((entering, between))
        self.signals = signals
        return [*found, (rotation, rotation)]

    def logits(self, ids: np.ndarray, rotations: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """One window through the sliced model: the stream is x Q everywhere, with shortcuts QᵀQ'."""
        x = self.tensors["model.embed_tokens.weight"][ids] @ rotations[0][0]
        for layer, (entering, between) in enumerate(rotations[:-1]):
            after = rotations[layer + 1][0]
            o, down = self.get(layer, "self_attn.o_proj"), self.get(layer, "mlp.down_proj")
            change = self.attention(layer, x, entering) @ o.T + self.get(layer, "self_attn.o_proj", "bias")
            y = x @ (entering.T @ between) + change @ between
            change = self.ffn(layer, y, between) @ down.T + self.get(layer, "mlp.down_proj", "bias")
            x = y @ (between.T @ after) + change @ after
        head = self.tensors.get("lm_head.weight", self.tensors["model.embed_tokens.weight"])
        found: np.ndarray = self.rms(x) @ (head @ np.diag(self.tensors["model.norm.weight"]) @ rotations[-1][0]).T
        return found


@pytest.mark.parametrize("width", [40, 24])
def test_sliced_it_is_what_numpy_gives(tmp_path: Path, dense: Path, width: int) -> None:
    anatomy = describe(dense)
    slice_model(dense, SlicedAnatomy(anatomy, width, width), WINDOWS, tmp_path / "sliced")
    other = Numpy(dense, anatomy)
    rotations = other.slice([ids for part in WINDOWS.values() for ids in part], width)
    # directions are unique up to their sign, so products that hold each of them twice are compared
    embedding = Weights(tmp_path / "sliced")["model.embed_tokens.weight"].double().numpy()
    wanted = other.tensors["model.embed_tokens.weight"] @ rotations[0][0]
    np.testing.assert_allclose(embedding @ embedding.T, wanted @ wanted.T, atol=1e-3)
    got = logits(tmp_path / "sliced").double().numpy()
    for row, ids in enumerate(IDS.numpy()):
        np.testing.assert_allclose(got[row], other.logits(ids, rotations), atol=2e-3)
    assert np.abs(got - logits(dense).numpy()).max() > 0.1  # the slice is no empty one


def test_principal_directions_are_those_of_numpy() -> None:
    x = np.random.default_rng(3).normal(size=(500, 12)) * np.arange(12, 0, -1)
    found = principal_directions(torch.from_numpy(x.T @ x)).numpy()
    _, _, wanted = np.linalg.svd(x)
    np.testing.assert_allclose(np.abs(found), np.abs(wanted.T), atol=1e-8)


@pytest.mark.parametrize("slice_head", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.125, 0.25, 0.5])
def test_the_ratio_counts_shortcuts_and_the_untied_head(dense: Path, ratio: float, slice_head: bool) -> None:
    anatomy = describe(dense)
    if ratio == 0.5 and anatomy.tied and not slice_head:
        ratio = 0.3  # the head alone, kept whole, is a fifth of this model
    sizes = solve_width(anatomy, ratio, slice_head=slice_head)
    one = SlicedAnatomy(anatomy, sizes.width + 1, sizes.width + 1 if slice_head else 64).parameters - sizes.parameters
    assert abs(sizes.parameters - (1 - ratio) * anatomy.parameters) <= one / 2
    assert sizes.head_width == (sizes.width if slice_head else 64)


def test_the_folder_holds_what_is_counted(tmp_path: Path, dense: Path) -> None:
    anatomy = describe(dense)
    slicegpt(dense, anatomy, WINDOWS, 0.25, tmp_path / "sliced", "cpu", note={"method": "slicegpt"})
    sizes = describe_sliced(tmp_path / "sliced")
    weights = Weights(tmp_path / "sliced")
    model = load_model(tmp_path / "sliced")
    assert sum(p.numel() for p in model.parameters()) == sizes.parameters
    assert 1 - sizes.parameters / anatomy.parameters == pytest.approx(0.25, abs=0.02)
    assert {name: weights.shape(name) for name in weights} == dict(sizes.tensor_shapes())
    assert weights.shape("model.layers.2.mlp_shortcut.weight") == (64, sizes.width)  # the head stays whole
    assert json.loads((tmp_path / "sliced" / "config.json").read_text())["cusprun"]["method"] == "slicegpt"


def test_the_cost_of_a_folder_counts_them_too(tmp_path: Path, dense: Path) -> None:
    from cusprun.benchmarks.cost import cost

    slicegpt(dense, describe(dense), WINDOWS, 0.25, tmp_path / "sliced")
    sizes, found = describe_sliced(tmp_path / "sliced"), cost(tmp_path / "sliced")
    assert (found.parameters, found.macs_per_token) == (sizes.parameters, sizes.macs_per_token)


def test_it_loads_generates_and_saves(tmp_path: Path, dense: Path) -> None:
    slicegpt(dense, describe(dense), WINDOWS, 0.25, tmp_path / "sliced")
    model = load_model(tmp_path / "sliced")
    prompt = IDS[:, :10]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    cached = model.generate(prompt, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "sliced"))
    code = (
        "import cusprun; from transformers import AutoModelForCausalLM as A; "
        f"print(type(A.from_pretrained({str(tmp_path / 'sliced')!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "CusprunSlicedForCausalLM"


def test_the_runtime_runs_it(tmp_path: Path, dense: Path) -> None:
    from cusprun.runtimes.torch_runtime import TorchRuntime

    slicegpt(dense, describe(dense), WINDOWS, 0.25, tmp_path / "sliced")
    runtime = TorchRuntime(tmp_path / "sliced", threads=1)
    np.testing.assert_allclose(runtime.logits(IDS[0].tolist()), logits(tmp_path / "sliced")[0], atol=1e-4)


def test_gguf_refuses_it_and_says_why(tmp_path: Path, dense: Path) -> None:
    from cusprun.exporters.gguf import export_gguf

    slicegpt(dense, describe(dense), WINDOWS, 0.25, tmp_path / "sliced")
    with pytest.raises(InvalidRequest, match="a matrix on every residual connection"):
        export_gguf(tmp_path / "sliced", tmp_path / "x.gguf", "f32")
    assert not (tmp_path / "x.gguf").exists()


def test_requests_that_make_no_sense(tmp_path: Path, dense: Path) -> None:
    anatomy = describe(dense)
    with pytest.raises(InvalidRequest, match="more than slicegpt can slice"):
        solve_width(anatomy, 0.95)
    with pytest.raises(InvalidRequest, match="needs calibration text"):
        slicegpt(dense, anatomy, {}, 0.25, tmp_path / "x")
    with pytest.raises(InvalidRequest, match="--window 4096"):
        slicegpt(dense, anatomy, {"text": np.zeros((1, 4096), dtype=np.int64)}, 0.25, tmp_path / "x")
    uneven = anatomy.with_layers((*anatomy.layers[:2], type(anatomy.layers[0])(64, 4, 2)))
    with pytest.raises(InvalidRequest, match="layers are alike"):
        slicegpt(dense, uneven, WINDOWS, 0.25, tmp_path / "x")
    assert not any(tmp_path.iterdir())


def test_sizes_that_cannot_be(tmp_path: Path, dense: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    change = {"model_type": "cusprun_slicegpt", "sliced_size": 65, "head_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InvalidRequest, match="sliced_size and head_size must be from 1 to 64"):
        describe_sliced(tmp_path)


def test_values_that_are_not_finite(tmp_path: Path, dense: Path) -> None:
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    tensors = load(dense / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e38
    tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e38
    (tmp_path / "wild").mkdir()
    (tmp_path / "wild" / "config.json").write_bytes((dense / "config.json").read_bytes())
    save(tensors, tmp_path / "wild" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Failed, match="not finite behind layer 1"):
        slicegpt(tmp_path / "wild", describe(dense), WINDOWS, 0.25, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["wild"]
