"""Spoils a checkpoint: configuration, headers of the weights, index of the shards."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any, Final

from samples.robustness.json_values import WEIRD, shown, spoil, to_text
from samples.robustness.target import SECRET, Target

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_INDEX: Final = "model.safetensors.index.json"


def config(random: Random, target: Target) -> str:
    """Change values of config.json."""
    return _spoil_file(random, target.folder / _CONFIG)


def config_fields(random: Random, target: Target) -> str:
    """Give a field that matters an absurd value."""
    path = target.folder / _CONFIG
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    inner = data.get("text_config", data)
    fields = {
        "model_type": ("llama", "bert", "echoatt", "../llama", "x" * 9999, "gemma3", "t5", "a\nb"),
        "num_hidden_layers": (0, -1, 2, 10**5, 2**40),
        "hidden_size": (0, -32, 33, 2**31, 2**50),
        "num_attention_heads": (0, -1, 3, 10**9, 5),
        "num_key_value_heads": (0, -2, 3, 10**9),
        "head_dim": (0, -1, 7, 2**40),
        "intermediate_size": (0, -1, 2**50),
        "vocab_size": (0, -1, 7, 2**50),
        "max_position_embeddings": (0, -1, 2**62, "many"),
        "hidden_act": ("gone", None, 7, "gelu\n"),
        "rope_parameters": (
            None,
            {},
            {"rope_type": "gone"},
            {"rope_theta": 0},
            {"rope_theta": "x"},
        ),
        "rope_scaling": ({"type": "yarn", "factor": -1}, {"rope_type": "dynamic", "factor": 1e300}),
        "layer_types": ([], ["full_attention"] * 10**5, ["gone"] * 3, [None], "full_attention"),
        "torch_dtype": ("float99", "int8", None, "os.system"),
        "dtype": ("float99", "complex64", 7),
        "architectures": ([], ["Gone"], "LlamaForCausalLM", [7], [None], {"a": 1}),
        "auto_map": ({"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},),
        "quantization_config": ({"quant_method": "bitsandbytes"}, {}, 7, "x\ny"),
        "attn_implementation": ("flash_attention_2", "hub/kernel", 7),
        "tie_word_embeddings": (True, "yes", 7),
        "eos_token_id": (-1, 10**9, [], ["x"], [[1]], 1.5),
        "sources": ([], [0, 0], [0, 5, 9], [0, 1, 1.5], "0,1,1", [2, 1, 0], [0] * 10**5),
        "text_config": ({}, None, {"model_type": "echoatt"}, [], {"model_type": 7}),
    }
    name = random.choice(sorted(fields))
    value = random.choice(fields[name])
    (data if name in ("sources", "text_config", "model_type") else inner)[name] = value
    (target.folder / "evil.py").write_text("raise SystemExit('ran code of the checkpoint')\n")
    path.write_text(to_text(data), encoding="utf-8")
    return f"{name} is {shown(value)}"


def generation_config(random: Random, target: Target) -> str:
    """Change values of generation_config.json."""
    path = target.folder / _GENERATION
    if random.random() < 0.5:
        return _spoil_file(random, path)
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    name = random.choice(("eos_token_id", "bos_token_id", "pad_token_id", "temperature", "cache"))
    data[name] = random.choice(WEIRD)
    path.write_text(to_text(data), encoding="utf-8")
    return f"{name} is {shown(data[name])}"


def header(random: Random, target: Target) -> str:
    """Change the header of a weight file: types, shapes, offsets, names, its length."""
    path = random.choice(sorted(target.folder.glob("*.safetensors")))
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    tensors: dict[str, Any] = json.loads(data[8 : 8 + length])
    name = random.choice([name for name in tensors if name != "__metadata__"])
    tensor = tensors[name]
    how = random.choice(
        ("dtype", "shape", "offsets", "rename", "add", "drop", "length", "metadata", "any", "twice")
    )
    done = f"{name}: {how}"
    if how == "dtype":
        tensor["dtype"] = random.choice(
            ("F64", "I8", "F8_E4M3", "BOOL", "GONE", 7, None, "C64", "F4")
        )
    elif how == "shape":
        tensor["shape"] = random.choice(
            (
                [],
                [0],
                [-1, 4],
                [2**63, 2**63],
                [2**64],
                [1] * 5000,
                tensor["shape"][::-1],
                ["a"],
                None,
            )
        )
    elif how == "offsets":
        begin, end = tensor["data_offsets"]
        tensor["data_offsets"] = random.choice(
            ([end, begin], [0, end], [begin, 2**63], [-4, end], [begin], [begin, end + 4], None)
        )
    elif how == "rename":
        other = random.choice((f"{name}.gone", "", "x" * 100_000, "a\nb", "lm_head.weight"))
        tensors[other] = tensors.pop(name)
    elif how == "add":
        tensors["surplus"] = dict(tensor)
    elif how == "drop":
        del tensors[name]
    elif how == "metadata":
        tensors["__metadata__"] = random.choice(({"format": "tf"}, {}, {"format": 7}, [], None))
    elif how == "any":
        text, done = spoil(random, tensors)
        return _write_header(path, text, data[8 + length :], done)
    elif how == "twice":
        text = json.dumps(tensors)
        return _write_header(path, text[:-1] + ", " + text[1:], data[8 + length :], done)
    text = to_text(tensors)
    if how == "length":
        wrong = random.choice((0, 1, length - 1, length + 1, 10**8, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", wrong) + data[8:])
        return f"{path.name}: header of {wrong} bytes"
    return _write_header(path, text, data[8 + length :], done)


def index(random: Random, target: Target) -> str:
    """Change the index of the shards, or put one beside a single file."""
    path = target.folder / _INDEX
    (target.outside / "secret").write_text(SECRET)
    shard = sorted(target.folder.glob("*.safetensors"))[0]
    (target.outside / "away.safetensors").write_bytes(shard.read_bytes())
    if not path.exists():
        names = _tensor_names(shard)
        shard.rename(target.folder / "all.safetensors")
        path.write_text(json.dumps({"weight_map": dict.fromkeys(names, "all.safetensors")}))
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if random.random() < 0.3:
        return _spoil_file(random, path)
    weight_map = data["weight_map"]
    name = random.choice(sorted(weight_map))
    places = (
        "../outside/away.safetensors",
        str(target.outside / "away.safetensors"),
        "..",
        ".",
        "",
        "gone.safetensors",
        "config.json",
        "a\0b",
        "x" * 5000,
        "link.safetensors",
        _INDEX,
    )
    (target.folder / "link.safetensors").symlink_to(target.folder / "link.safetensors")
    weight_map[name] = random.choice(places)
    path.write_text(to_text(data), encoding="utf-8")
    return f"{name} in {weight_map[name][:30]!r}"


def pickles(random: Random, target: Target) -> str:
    """Put pickled weights there, which nobody may open."""
    evil = b"cposix\nsystem\n(S'touch ran'\ntR."
    for path in target.folder.glob("*.safetensors*"):
        path.unlink()
    name = random.choice(("pytorch_model.bin", "model.pt", "model.safetensors", "a.ckpt"))
    (target.folder / name).write_bytes(evil)
    return name


def _tensor_names(path: Path) -> list[str]:
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        return [name for name in json.loads(file.read(length)) if name != "__metadata__"]


def _write_header(path: Path, text: str, rest: bytes, done: str) -> str:
    raw = text.encode("utf-8", "replace")
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + rest)
    return done


def _spoil_file(random: Random, path: Path) -> str:
    text, done = spoil(random, json.loads(path.read_text(encoding="utf-8")))
    path.write_text(text, encoding="utf-8")
    return f"{path.name}: {done}"
