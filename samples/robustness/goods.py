"""What the cases are made from: small whole bundles and checkpoints, and a second one of each."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from echoatt_exporter import export_bundle, load_shared, save_student
from echoatt_runtime.bundle import read_manifest

TOKENIZER: Final = Path(__file__).resolve().parents[1] / "tiny-books"
PLAN: Final = "2:1"
TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
_COMMON: Final[dict[str, Any]] = {
    "vocab_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# Fields that format 2 had by the same names
_KEPT: Final = (
    "family",
    "layer_kinds",
    "sliding_window",
    "vocab_size",
    "context_length",
    "dtype",
    "device",
    "bos_token_id",
    "eos_token_ids",
    "pad_token_id",
)


@dataclass(frozen=True, slots=True)
class Goods:
    """Whole directories, by name.

    Attributes:
        bundles: Exported ones: shared in fp32, and unshared in int4.
        checkpoints: A teacher in one file, one in shards, and a student.
    """

    bundles: dict[str, Path]
    checkpoints: dict[str, Path]


def make_goods(folder: Path) -> Goods:
    """Make them in an empty folder."""
    teacher = _checkpoint(folder / "teacher", "llama", hidden_size=32, intermediate_size=40)
    shards = _checkpoint(
        folder / "shards", "qwen2", shard="100KB", hidden_size=64, intermediate_size=64
    )
    student = folder / "student"
    save_student(load_shared(teacher, PLAN), student, teacher)
    bundles = {"fp32": folder / "fp32", "int4": folder / "int4"}
    export_bundle(student, bundles["fp32"], verify=False)
    export_bundle(shards, bundles["int4"], dtype="int4", verify=False)
    return Goods(bundles, {"teacher": teacher, "shards": shards, "student": student})


def find_goods(folder: Path) -> Goods:
    """What `make_goods` made in a folder."""
    return Goods(
        {name: folder / name for name in ("fp32", "int4")},
        {name: folder / name for name in ("teacher", "shards", "student")},
    )


def format_2(bundle: Path) -> dict[str, Any]:
    """A bundle's manifest as the format before the present one had it."""
    manifest = read_manifest(bundle)
    specification = manifest.specification
    return {
        "format": "echoatt-bundle/2",
        "exporter_version": manifest.exporter_version,
        **{name: getattr(specification, name) for name in _KEPT},
        "sources": specification.plan.sources,
        "num_query_heads": specification.query_heads[0],
        "num_kv_heads": specification.kv_heads[0],
        "head_dim": specification.head_dims[0],
        "source_checkpoint": {
            "name": specification.source_checkpoint.name,
            "sha256": specification.source_checkpoint.sha256,
        },
        "weights_file": manifest.weights.name,
        "weights_bytes": manifest.weights.bytes,
        "verification": None,
    }


def _checkpoint(path: Path, family: str, shard: str = "1GB", **fields: Any) -> Path:
    torch.manual_seed(len(family))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_COMMON, **fields))
    model.save_pretrained(path, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, path / name)
    (path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return path
