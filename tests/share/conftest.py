"""Fixtures for the PyTorch side."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.share.reference import share_by_hand
from tests.tiny_models import VOCAB_SIZE
from transformers import PreTrainedModel

from echoatt_exporter import EchoAttForCausalLM, SharingPlan, share_attention

# Between two ways to add up the same float32 numbers; tiny models' logits are of size 1 to 4.
TOLERANCE = 2e-5


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two rows of 17 token ids, none of them special."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCAB_SIZE, (2, 17), generator=generator)


@pytest.fixture
def student_of(
    tiny_model: Callable[..., PreTrainedModel], plan_for: Callable[[str], SharingPlan]
) -> Callable[..., EchoAttForCausalLM]:
    """`student_of(family, plan=None, **fields)`: a tiny student, by default with its plan."""

    def build(name: str, plan: SharingPlan | None = None, **fields: object) -> EchoAttForCausalLM:
        return share_attention(tiny_model(name, **fields), plan or plan_for(name))

    return build


@pytest.fixture
def reference_of(
    tiny_model: Callable[..., PreTrainedModel], plan_for: Callable[[str], SharingPlan]
) -> Callable[..., PreTrainedModel]:
    """`reference_of(family, plan=None, **fields)`: the same, shared by hand."""

    def build(name: str, plan: SharingPlan | None = None, **fields: object) -> PreTrainedModel:
        return share_by_hand(tiny_model(name, **fields), (plan or plan_for(name)).sources)

    return build


@pytest.fixture
def assert_close() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Compare logits of two ways to compute the same."""

    def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)

    return check


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., PreTrainedModel]
) -> Path:
    """A tiny Llama teacher's directory; tests work on copies of it."""
    path = tmp_path_factory.mktemp("saved") / "teacher"
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.fixture
def teacher_dir(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(saved, tmp_path / "teacher"))


@pytest.fixture
def student_dir(
    tiny_model: Callable[..., PreTrainedModel],
    plan_for: Callable[[str], SharingPlan],
    tmp_path: Path,
) -> Path:
    """The directory of its student."""
    share_attention(tiny_model("llama"), plan_for("llama")).save_pretrained(tmp_path / "student")
    return tmp_path / "student"
