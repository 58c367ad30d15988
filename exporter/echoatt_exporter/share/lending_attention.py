"""A teacher that hands its attention to an object of ours, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from echoatt_exporter.share.quiet import quiet_transformers


@contextmanager
def lending_attention(teacher: PreTrainedModel, implementation: str) -> Iterator[None]:
    """A teacher in evaluation mode that asks for a `SharedAttention`; as it was afterwards.

    Args:
        teacher: The model.
        implementation: The attention function to use, by the name that it is registered with.
    """
    former = teacher.config._attn_implementation  # noqa: SLF001  # it has no public name
    training = [module for module in teacher.modules() if module.training]
    try:
        teacher.eval()
        _attend_by(teacher, implementation)
        yield
    finally:
        _attend_by(teacher, former)
        for module in training:
            module.training = True


def _attend_by(teacher: PreTrainedModel, implementation: str) -> None:
    with quiet_transformers():
        teacher.set_attn_implementation(implementation)
