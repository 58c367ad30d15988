"""An oracle: a Llama decoder with shared attention probabilities, written out in NumPy.

It reads nothing but a config and the raw tensors, computes in float64, one sequence and one head
at a time, and shares no code with the project, torch or transformers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class LlamaOracle:
    """A Llama decoder in which each layer uses the probabilities of `sources[layer]`.

    Args:
        config: The fields of a Llama `config.json`.
        tensors: By name as in a Llama checkpoint. Queries and keys of layers that are not their
            own source are not looked at.
        sources: For each layer the layer whose probabilities it uses; None: each its own.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, NDArray[Any]],
        sources: Sequence[int] | None = None,
    ) -> None:
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", "default") != "default" or config["hidden_act"] != "silu":
            raise ValueError("the oracle knows plain rotary embeddings and SiLU only")
        self.config = config
        self.tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
        self.sources = list(sources or range(config["num_hidden_layers"]))
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.theta = float(rope.get("rope_theta") or config["rope_theta"])

    @classmethod
    def from_directory(cls, path: Path, sources: Sequence[int] | None = None) -> LlamaOracle:
        """The oracle of a Llama checkpoint or of its student; `sources` overrides the plan."""
        config = json.loads((path / "config.json").read_text())
        tensors = read_safetensors(path / "model.safetensors")
        tensors = {name.removeprefix("decoder."): tensor for name, tensor in tensors.items()}
        return cls(config.get("text_config", config), tensors, sources or config.get("sources"))

    def logits(self, token_ids: Sequence[int]) -> Array:
        """The logits [tokens, vocabulary] of one sequence."""
        probabilities: dict[int, Array] = {}
        hidden = self.tensors["model.embed_tokens.weight"][list(token_ids)]
        for layer, source in enumerate(self.sources):
            name = f"model.layers.{layer}"
            normed = self._norm(hidden, f"{name}.input_layernorm")
            if source == layer:
                probabilities[layer] = self._probabilities(normed, f"{name}.self_attn")
            values = self._split(self._linear(normed, f"{name}.self_attn.v_proj"))
            group = self.heads // self.kv_heads
            heads = [probabilities[source][h] @ values[h // group] for h in range(self.heads)]
            joined = np.concatenate(heads, axis=-1)
            hidden = hidden + self._linear(joined, f"{name}.self_attn.o_proj")
            normed = self._norm(hidden, f"{name}.post_attention_layernorm")
            gate = self._linear(normed, f"{name}.mlp.gate_proj")
            up = self._linear(normed, f"{name}.mlp.up_proj")
            hidden = hidden + self._linear(gate / (1 + np.exp(-gate)) * up, f"{name}.mlp.down_proj")
        hidden = self._norm(hidden, "model.norm")
        tied = self.config.get("tie_word_embeddings", False)
        return hidden @ self.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"].T

    def greedy(self, token_ids: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that greedy decoding adds, each from a pass over everything."""
        tokens = list(token_ids)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(token_ids) :]

    def _probabilities(self, normed: Array, name: str) -> Array:
        """Causal attention probabilities [heads, tokens, tokens]."""
        queries = self._rotate(self._split(self._linear(normed, f"{name}.q_proj")))
        keys = self._rotate(self._split(self._linear(normed, f"{name}.k_proj")))
        count = len(normed)
        result = np.zeros((self.heads, count, count))
        for head in range(self.heads):
            key = keys[head * self.kv_heads // self.heads]
            for t in range(count):
                scores = key[: t + 1] @ queries[head, t] / np.sqrt(self.head_dim)
                weights = np.exp(scores - scores.max())
                result[head, t, : t + 1] = weights / weights.sum()
        return result

    def _rotate(self, states: Array) -> Array:
        """Rotary embedding of [heads, tokens, head size]: element i turns with i + half."""
        half = self.head_dim // 2
        angles = np.outer(np.arange(states.shape[1]), self.theta ** (-np.arange(half) / half))
        pairs = (states[..., :half] + 1j * states[..., half:]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    def _split(self, projected: Array) -> Array:
        return projected.reshape(len(projected), -1, self.head_dim).swapaxes(0, 1)

    def _linear(self, states: Array, name: str) -> Array:
        result: Array = states @ self.tensors[f"{name}.weight"].T
        bias = self.tensors.get(f"{name}.bias")
        return result if bias is None else result + bias

    def _norm(self, states: Array, name: str) -> Array:
        power = (states**2).mean(axis=-1, keepdims=True)
        scaled: Array = states / np.sqrt(power + self.config["rms_norm_eps"])
        return scaled * self.tensors[f"{name}.weight"]


def read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file; bfloat16 is widened to float32."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    body = memoryview(raw)[8 + size :]
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    tensors: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        tensor = np.frombuffer(body[start:end], dtype=kinds[entry["dtype"]])
        if entry["dtype"] == "BF16":
            tensor = (tensor.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = tensor.reshape(entry["shape"])
    return tensors
