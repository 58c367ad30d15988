"""Weights: every way in which a directory's are refused, and their digest."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.share.checkpoints import QUERIES, WEIGHTS, edit_config, edit_tensors, refused, shard

from echoatt_exporter import load_shared
from echoatt_exporter.errors import CheckpointError, UnsupportedModelError
from echoatt_exporter.share.weight_files import checkpoint_digest


def test_pickled_weights_are_refused_unopened(teacher_dir: Path) -> None:
    (teacher_dir / WEIGHTS).rename(teacher_dir / "pytorch_model.bin")
    refused(CheckpointError, teacher_dir, "pickled (pytorch_model.bin)", "save_pretrained()")


def test_directory_without_weights_is_refused(teacher_dir: Path) -> None:
    (teacher_dir / WEIGHTS).unlink()
    refused(CheckpointError, teacher_dir, f"no weights; expected {WEIGHTS}")


def test_missing_shard_is_refused(teacher_dir: Path) -> None:
    shard(teacher_dir)
    (teacher_dir / "model-00002-of-00002.safetensors").unlink()
    refused(CheckpointError, teacher_dir, "missing: 1 (model-00002-of-00002.safetensors)")


@pytest.mark.parametrize(
    ("weight_map", "part"),
    [
        (None, '"weight_map" must name a file'),
        ({"a": 1}, '"weight_map" must name a file'),
        ({"a": "../other.safetensors"}, "outside its directory: 1 (../other.safetensors)"),
        ({"a": "x" * 5000}, "weight files that are missing: 1 (xxx"),
    ],
)
def test_bad_index_is_refused(weight_map: Any, part: str, teacher_dir: Path) -> None:
    (teacher_dir / WEIGHTS).unlink()
    (teacher_dir / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(CheckpointError, teacher_dir, part)


def test_tensor_in_two_shards_is_refused(teacher_dir: Path) -> None:
    shard(teacher_dir)
    first, second = sorted(teacher_dir.glob("*.safetensors"))
    tensors = load_file(second) | {"lm_head.weight": load_file(first)["lm_head.weight"]}
    save_file(tensors, second, metadata={"format": "pt"})
    refused(CheckpointError, teacher_dir, "holds tensors of another file too: 1 (lm_head.weight)")


@pytest.mark.parametrize("kept", [0, 4, 300, -1], ids=["empty", "length", "header", "one-byte"])
def test_truncated_weights_are_refused(kept: int, teacher_dir: Path) -> None:
    raw = (teacher_dir / WEIGHTS).read_bytes()
    (teacher_dir / WEIGHTS).write_bytes(raw[:kept])
    refused(CheckpointError, teacher_dir, WEIGHTS, "truncated or corrupt", "download it again")


def test_corrupt_header_is_refused(teacher_dir: Path) -> None:
    raw = bytearray((teacher_dir / WEIGHTS).read_bytes())
    (size,) = struct.unpack("<Q", raw[:8])
    raw[size // 2] ^= 0xFF
    (teacher_dir / WEIGHTS).write_bytes(raw)
    refused(CheckpointError, teacher_dir, "truncated or corrupt")


def test_weights_without_tensors_are_refused(teacher_dir: Path) -> None:
    save_file({}, teacher_dir / WEIGHTS)
    refused(CheckpointError, teacher_dir, "hold no tensors")


def test_missing_tensors_are_refused(teacher_dir: Path) -> None:
    edit_tensors(teacher_dir, lambda t: t.pop(QUERIES))
    refused(CheckpointError, teacher_dir, f"missing 1 ({QUERIES})")


def test_missing_head_is_refused_unless_tied(teacher_dir: Path) -> None:
    edit_tensors(teacher_dir, lambda t: t.pop("lm_head.weight"))
    refused(CheckpointError, teacher_dir, "missing 1 (lm_head.weight)")


def test_surplus_tensors_are_refused(teacher_dir: Path) -> None:
    edit_tensors(teacher_dir, lambda t: t.update({"model.layers.2.extra.bias": torch.zeros(3)}))
    refused(CheckpointError, teacher_dir, "surplus 1 (model.layers.2.extra.bias)")


def test_config_for_fewer_layers_is_refused(teacher_dir: Path) -> None:
    edit_config(teacher_dir, num_hidden_layers=4)
    refused(CheckpointError, teacher_dir, "surplus 18 (model.layers.4.input_layernorm.weight, ")


def test_wrongly_shaped_tensors_are_refused(teacher_dir: Path) -> None:
    edit_tensors(teacher_dir, lambda t: t.update({QUERIES: torch.zeros(32, 48)}))
    part = f"wrongly shaped 1 ({QUERIES} is [32, 48], not [48, 32])"
    refused(CheckpointError, teacher_dir, part)


def test_every_misfit_is_named_at_once(teacher_dir: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[QUERIES]
        tensors["surplus.weight"] = torch.zeros(2)
        tensors["model.norm.weight"] = torch.zeros(3)

    edit_tensors(teacher_dir, edit)
    parts = f"missing 1 ({QUERIES}); surplus 1 (surplus.weight); wrongly shaped 1 (model.norm"
    refused(CheckpointError, teacher_dir, parts)


def test_student_with_a_followers_queries_left_or_values_gone_is_refused(student_dir: Path) -> None:
    name = "decoder.model.layers.2.self_attn"
    edit_tensors(student_dir, lambda t: t.update({f"{name}.q_proj.weight": torch.zeros(48, 32)}))
    refused(CheckpointError, student_dir, f"surplus 1 ({name}.q_proj.weight)")
    edit_tensors(
        student_dir, lambda t: (t.pop(f"{name}.q_proj.weight"), t.pop(f"{name}.v_proj.weight"))
    )
    refused(CheckpointError, student_dir, f"missing 1 ({name}.v_proj.weight)")


def test_students_weights_under_a_teachers_config_are_refused(
    teacher_dir: Path, student_dir: Path
) -> None:
    """The one that would make a loader fill in queries and keys at random."""
    tensors = {k.removeprefix("decoder."): v for k, v in load_file(student_dir / WEIGHTS).items()}
    save_file(tensors, teacher_dir / WEIGHTS, metadata={"format": "pt"})
    refused(CheckpointError, teacher_dir, "missing 6 (model.layers.2.self_attn.k_proj.weight, ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_weights_that_are_not_finite_are_refused(
    value: float, dtype: torch.dtype, kind: str, teacher_dir: Path, student_dir: Path
) -> None:
    directory = {"teacher": teacher_dir, "student": student_dir}[kind]
    name = ("decoder." if kind == "student" else "") + "model.layers.3.mlp.up_proj.weight"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({k: v.to(dtype) for k, v in tensors.items()})
        tensors[name][-1, -1] = value

    edit_tensors(directory, edit)
    refused(CheckpointError, directory, f"{name} holds NaN or infinite values", "damaged")


def test_weights_that_overflow_the_wanted_dtype_are_refused(teacher_dir: Path) -> None:
    edit_tensors(teacher_dir, lambda t: t["model.norm.weight"].fill_(1e5))
    load_shared(teacher_dir, None)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .* as float16; try another"):
        load_shared(teacher_dir, None, dtype=torch.float16)


@pytest.mark.parametrize("everything", [True, False])
def test_weights_stored_as_integers_are_refused(everything: bool, teacher_dir: Path) -> None:
    chosen = QUERIES if not everything else "weight"
    edit_tensors(
        teacher_dir,
        lambda t: t.update({k: v.to(torch.int8) for k, v in t.items() if chosen in k}),
    )
    part = "quantised (I8)" if everything else f"quantised weights: 1 ({QUERIES} is I8)"
    refused(UnsupportedModelError, teacher_dir, part, "dense checkpoint")


def test_digest_covers_config_and_every_shard(teacher_dir: Path) -> None:
    digest = checkpoint_digest(teacher_dir)
    assert len(bytes.fromhex(digest)) == 32
    (teacher_dir / "README.md").write_text("not part of it")
    assert checkpoint_digest(str(teacher_dir)) == digest
    shard(teacher_dir)
    digests = {digest, checkpoint_digest(teacher_dir)}
    for file in [*sorted(teacher_dir.glob("*.safetensors")), teacher_dir / "config.json"]:
        raw = bytearray(file.read_bytes())
        raw[-2] ^= 1
        file.write_bytes(raw)
        digests.add(checkpoint_digest(teacher_dir))
    assert len(digests) == 5


def test_digest_of_nothing_is_refused(tmp_path: Path, teacher_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        checkpoint_digest(tmp_path)
    (teacher_dir / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        checkpoint_digest(teacher_dir)
