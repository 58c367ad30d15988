"""What the cases are made from: small whole bundles and checkpoints, and a second one of each."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from echoatt_exporter import export_bundle, load_shared, save_student

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


def make_shared(folder: Path) -> None:
    """Make a teacher, its student, and the student's bundle in fp32."""
    teacher = _checkpoint(folder / "teacher", "llama", hidden_size=32, intermediate_size=40)
    save_student(load_shared(teacher, PLAN), folder / "student", teacher)
    export_bundle(folder / "student", folder / "fp32", verify=False)


def make_unshared(folder: Path) -> None:
    """Make a teacher of another family in shards, and its bundle in int4."""
    shards = _checkpoint(
        folder / "shards", "qwen2", shard="100KB", hidden_size=64, intermediate_size=64
    )
    export_bundle(shards, folder / "int4", dtype="int4", verify=False)


# Each may be made by a process of its own
PARTS: Final = (make_shared, make_unshared)


def _checkpoint(path: Path, family: str, shard: str = "1GB", **fields: Any) -> Path:
    torch.manual_seed(len(family))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_COMMON, **fields))
    model.save_pretrained(path, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, path / name)
    (path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return path
