"""A model one decoder layer at a time: built without weights, each layer is given its own only while it works."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cusprun.anatomy import Anatomy
from cusprun.anatomy.gemma2 import KINDS
from cusprun.arithmetic import bfloat16_layers
from cusprun.checkpoint import Weights
from cusprun.errors import InvalidRequest
from cusprun.memory import HELD_BYTES, release_freed, return_large_blocks

Kind = Literal["attention", "ffn"]
BATCH_TOKENS = 2048


def check_window(config: Any, window: int) -> None:
    """Raises InvalidRequest where ``window`` tokens are more than the model of ``config`` reads at once."""
    limits = {"max_position_embeddings": config.max_position_embeddings}
    if sliding := getattr(config, "sliding_window", None):
        limits["sliding_window"] = sliding
    for name, limit in limits.items():
        if window > limit:
            raise InvalidRequest(f"--window {window} is longer than the model's {name}, {limit}")


class LayerwiseModel:
    """The model of a folder in float32, of which one layer's weights are in memory; all of them where they are few.

    ``fast`` layers take their matrix products in bfloat16 where the processor has units for them.
    """

    def __init__(self, folder: Path, anatomy: Anatomy, device: str = "cpu", *, fast: bool = False) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.anatomy = anatomy
        self.device, self.fast = device, fast
        self.weights = Weights(folder)
        self.config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # torch's fused attention caps no scores; what stands in for it needs the causal mask spelled out
        self._masked = anatomy.attention_softcap is not None
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(
                self.config, dtype=torch.float32, attn_implementation="eager" if self._masked else "sdpa"
            ).eval()
        self.layers = skeleton.model.layers
        self._stay = 4 * sum(parameter.numel() for parameter in self.layers.parameters()) <= HELD_BYTES
        if not self._stay:
            return_large_blocks()
        self._loaded: set[int] = set()
        self._output: torch.Tensor | None = None
        self._norm = skeleton.model.norm
        self._rotary = type(skeleton.model.rotary_emb)(self.config).to(device)
        self._positions: dict[tuple[int, bool | None], tuple[torch.Tensor, torch.Tensor]] = {}
        own = any(attention.theta is not None for attention in anatomy.attention)  # sliding layers rotate otherwise
        self._local = {
            layer: attention.theta is not None if own else None
            for layer, attention in zip(self.layers, anatomy.attention, strict=True)
        }

    def embed(self, ids: np.ndarray) -> torch.Tensor:
        """Embeddings of token ids: (n, window) -> (n, window, hidden) float32 on the CPU."""
        table = self.weights[self.anatomy.family.embedding]
        if ids.size and int(ids.max()) >= table.shape[0]:
            raise InvalidRequest(
                f"the tokenizer gives id {int(ids.max())} and the model has {table.shape[0]} embeddings: "
                "they do not belong together"
            )
        states = torch.nn.functional.embedding(torch.from_numpy(ids), table).float()
        return states * self.anatomy.hidden_size**0.5 if self.anatomy.family.scales_embedding else states

    def embed_texts(self, windows: Mapping[str, np.ndarray]) -> list[torch.Tensor]:
        """:meth:`embed` of every text's windows, in batches of about BATCH_TOKENS.

        Raises InvalidRequest where there is no text or a window is longer than the model reads.
        """
        if not any(ids.size for ids in windows.values()):
            raise InvalidRequest("there is no calibration text: every text is empty")
        check_window(self.config, max(ids.shape[1] for ids in windows.values()))
        return [
            part
            for ids in windows.values()
            for part in self.embed(ids).split(max(1, BATCH_TOKENS // ids.shape[1]))
            if len(part)
        ]

    def attend(self, layer: Any, length: int) -> dict[str, Any]:
        """What a layer's attention is told beside the hidden states of ``length`` tokens: positions and mask."""
        local = self._local[layer]
        if (length, local) not in self._positions:
            ids = torch.arange(length, device=self.device).unsqueeze(0)
            kinds = {} if local is None else {"layer_type": KINDS[local]}
            self._positions[length, local] = self._rotary(torch.zeros(1, device=self.device), ids, **kinds)
        mask = None
        if self._masked:
            mask = torch.full((length, length), -torch.inf, device=self.device).triu(1)[None, None]
        return {"position_embeddings": self._positions[length, local], "attention_mask": mask}

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """The decoder layer with its weights inside; a bare skeleton again after, where not all may stay.

        Asked for again inside it is the same.
        """
        if index in self._loaded:
            yield self.layers[index]
            return
        prefix = self.anatomy.prefix(index)
        layer = self.layers[index].to_empty(device=self.device)
        try:
            with torch.no_grad():
                for name, parameter in layer.state_dict().items():  # one after the other: no second copy of the layer
                    parameter.copy_(self.weights[prefix + name])
            self._loaded.add(index)
            yield layer
        finally:
            if not self._stay:
                self._loaded.discard(index)
                layer.to("meta")
                release_freed()

    def forward(self, layer: Any, states: torch.Tensor) -> torch.Tensor:
        """``states``, (n, window, hidden), through one loaded layer."""
        with self.products():
            out: torch.Tensor = layer(states, **self.attend(layer, states.shape[1]))
        return out

    def attention(self, layer: Any, states: torch.Tensor) -> torch.Tensor:
        """What a loaded layer's o_proj gives for ``states``, (n, window, hidden); no norm behind it yet."""
        found: torch.Tensor
        with self.products():
            found, *_ = layer.self_attn(layer.input_layernorm(states), **self.attend(layer, states.shape[1]))
        return found

    def ffn(self, layer: Any, states: torch.Tensor) -> torch.Tensor:
        """What a loaded layer's down_proj gives for ``states``, (…, hidden); no norm behind it yet."""
        found: torch.Tensor
        with self.products():
            found = layer.mlp(layer.get_submodule(self.anatomy.family.ffn_norm)(states))
        return found

    def behind(self, layer: Any, kind: Kind, given: torch.Tensor) -> torch.Tensor:
        """What goes into the residual stream where o_proj or down_proj gives ``given``: that, or that normed."""
        family = self.anatomy.family
        norm = family.attention_norm_behind if kind == "attention" else family.ffn_norm_behind
        added: torch.Tensor = given if norm is None else layer.get_submodule(norm)(given)
        return added

    def products(self) -> AbstractContextManager[Any]:
        """What a layer, or a part of one, works within."""
        return bfloat16_layers(self.device) if self.fast else nullcontext()

    @contextmanager
    def final_norm(self) -> Iterator[Any]:
        """The norm behind the last layer, with its weights inside."""
        norm = self._norm.to_empty(device=self.device)
        with torch.no_grad():
            norm.weight.copy_(self.weights[self.anatomy.family.final_norm])
        yield norm
        norm.to("meta")

    @contextmanager
    def head(self) -> Iterator[Any]:
        """The final norm and the output matrix as one function: hidden states (…, hidden) to logits (…, vocabulary)."""
        family = self.anatomy.family
        name = family.embedding if self.anatomy.tied else family.output
        matrix = self._output if self._output is not None else self.weights[name].float().to(self.device)
        if self._stay:
            self._output = matrix
        with self.final_norm() as norm:
            cap = self.anatomy.output_softcap
            if cap is None:
                yield lambda states: norm(states) @ matrix.T
            else:
                yield lambda states: cap * torch.tanh(norm(states) @ matrix.T / cap)
        release_freed()
