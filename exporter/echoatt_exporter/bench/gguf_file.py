"""Writes a Llama checkpoint as a GGUF file for llama.cpp.

Only with the `gguf` package installed; the names and the order of rows are llama.cpp's.
"""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import safe_open

from echoatt_exporter.errors import BenchError, CheckpointError
from echoatt_exporter.share.weight_files import read_json_object, weight_files

# EchoAtt's dtypes and what is nearest to them
TENSOR_TYPES: Final[Mapping[str, str]] = {"int4": "Q4_0", "int8": "Q8_0", "fp32": "F32"}

_NAMES: Final[Mapping[str, str]] = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES: Final[Mapping[str, str]] = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_PREFIX: Final = "model.layers."


def write_gguf(checkpoint: Path, out: Path, dtype: str) -> None:
    """Write a GGUF file without a vocabulary.

    Args:
        checkpoint: A Hugging Face directory of the Llama family without biases.
        out: The file; it appears whole or not at all.
        dtype: Of EchoAtt's, a key of `TENSOR_TYPES`; vectors stay float32.

    Raises:
        BenchError: Another family, tensors that have no place, or the file system refuses.
    """
    gguf = importlib.import_module("gguf")
    config = read_json_object(checkpoint / "config.json")
    if (config.get("model_type"), config.get("hidden_act")) != ("llama", "silu"):
        raise BenchError(f"{checkpoint}: only the Llama family is written as GGUF")
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex}.partial")
    writer = gguf.GGUFWriter(partial, "llama")
    try:
        _write_fields(writer, config)
        kind = gguf.GGMLQuantizationType[TENSOR_TYPES[dtype]]
        for name, values in _tensors(checkpoint, config):
            if values.ndim == 1:
                writer.add_tensor(name, values)
            else:
                writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(out)
    except OSError as error:
        raise BenchError(f"{out}: cannot write the GGUF file ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def gguf_weight_bytes(path: Path) -> int:
    """Bytes of the matrices that a step reads: all but the table of tokens, unless it is the head.

    Args:
        path: A GGUF file.
    """
    reader = importlib.import_module("gguf").GGUFReader(path)
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors if len(tensor.shape) > 1}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())


def _write_fields(writer: Any, config: Mapping[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise BenchError(f"rope_type {rope['rope_type']!r} is not written as GGUF")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("none")


def _tensors(
    checkpoint: Path, config: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    heads = {
        "attn_q.weight": config["num_attention_heads"],
        "attn_k.weight": config["num_key_value_heads"],
    }
    for path in weight_files(checkpoint):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping, for all its looks
                target = _target(name)
                values = file.get_tensor(name).float().numpy()
                if (count := heads.get(target.partition(".")[2].partition(".")[2])) is not None:
                    values = _interleaved(values, count)
                yield target, values


def _target(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    layer, _, rest = name.removeprefix(_PREFIX).partition(".")
    if not name.startswith(_PREFIX) or rest not in _LAYER_NAMES:
        raise CheckpointError(f"{name} has no place in a GGUF file of a Llama")
    return f"blk.{layer}.{_LAYER_NAMES[rest]}"


def _interleaved(
    weight_OI: np.ndarray[Any, np.dtype[np.float32]], heads: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows in the order of llama.cpp, which rotates neighbours where transformers rotates halves.

    Args:
        weight_OI: [heads · head size, hidden].
        heads: Of queries or keys.
    """
    rows, columns = weight_OI.shape
    halves = weight_OI.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)
