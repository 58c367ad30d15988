"""The configuration: from YAML and from the command line, and what is refused."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

import pytest
from tests.wording import says

from echoatt_cli import distill as command
from echoatt_exporter.distill.config import DistillConfig
from echoatt_exporter.errors import TrainingError


def test_defaults_are_the_papers() -> None:
    config = DistillConfig()
    assert (config.block_weight, config.kl_weight, config.label_weight) == (0.25, 0.25, 0.5)
    assert (config.kl_direction, config.temperature) == ("student_teacher", 1.0)
    assert (config.learning_rate, config.scheduler, config.warmup) == (1e-4, "cosine", 0.005)
    assert config.length == 2048


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = DistillConfig(length=64, stage1_tokens=1000, dtype="bf16", learning_rate=3e-4)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert DistillConfig.of(DistillConfig.read_yaml(tmp_path / "c.yaml")) == config
    # YAML 1.1 takes 1e-4 for text
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-4\nwarmup: 0\n")
    assert DistillConfig.of(DistillConfig.read_yaml(tmp_path / "c.yaml")).learning_rate == 1e-4
    (tmp_path / "c.yaml").write_text("")
    assert DistillConfig.of(DistillConfig.read_yaml(tmp_path / "c.yaml")) == DistillConfig()


def test_every_fault_is_named_in_one_line() -> None:
    values = {
        "lenght": 12,
        "length": 1.5,
        "batch_size": True,
        "dtype": "fp16",
        "gradient_checkpointing": "yes",
        "learning_rate": "fast",
        "temperature": 0,
        "warmup": 1,
        "kl_weight": -1,
        "weight_decay": float("nan"),
        "stage1_steps": 3,
        "stage1_tokens": 3,
        "log_steps": 3,
        "save_steps": 4,
    }
    with pytest.raises(TrainingError) as caught:
        DistillConfig.of(values, "c.yaml")
    message = str(caught.value)
    assert message.startswith("c.yaml: 'lenght' is not an option; ")
    assert "\n" not in message
    for fault in (
        "length must be a whole number, not 1.5",
        "batch_size must be a whole number, not True",
        "dtype must be one of fp32, bf16, not 'fp16'",
        "gradient_checkpointing must be true or false, not 'yes'",
        "learning_rate must be a number, not 'fast'",
        "temperature is 0.0, must be more than 0",
        "warmup is 1.0, must be a share",
        "kl_weight is -1.0, must be 0 or more",
        "weight_decay is nan, must be 0 or more",
        "stage1_steps and stage1_tokens are both given",
        "save_steps is 4, must be a multiple of log_steps (3)",
    ):
        assert says(message, fault)
    with pytest.raises(TrainingError, match=r"are all 0; stage 1 has no loss"):
        DistillConfig(block_weight=0, kl_weight=0, label_weight=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", "must hold names and values"),
        ("a: [", r"not YAML \(.*\)"),
        (b"\xff\xfe\xfd", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_configuration(
    content: str | bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TrainingError, match=rf"c\.yaml: {message}") as caught:
        DistillConfig.read_yaml(path)
    assert "\n" not in str(caught.value)


def test_the_command_line_has_every_option() -> None:
    """With the defaults that its help names, and nothing between it and the configuration."""
    fields = {field.name: field.default for field in dataclasses.fields(DistillConfig)}
    assert list(command.OPTIONS) == list(fields)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    required = ["--teacher", "t", "--student", "s", "--text", "x", "--out", "o"]
    assert {n: getattr(parser.parse_args(required), n) for n in fields} == dict.fromkeys(fields)
    for name, (kind, text) in command.OPTIONS.items():
        default = fields[name]
        if isinstance(default, int | float | str) and kind is not bool:
            said = re.search(r"\(([^(),]+)(, [^()]*)?\)$", text)
            assert said is not None, name
            assert type(default)(said[1]) == default, name
