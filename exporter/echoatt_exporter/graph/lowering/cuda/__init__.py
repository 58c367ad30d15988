"""The lowering for CUDA."""

from __future__ import annotations

from echoatt_exporter.graph.lowering.cuda.choose_tokens import ChooseTokens
from echoatt_exporter.graph.lowering.cuda.view_one_token import ViewOneToken
from echoatt_exporter.graph.lowering.fewer_kernels import fewer_kernels
from echoatt_exporter.graph.run import PassStep
from echoatt_runtime.contract import Specification


def steps(specification: Specification) -> list[PassStep]:
    """The passes of this lowering."""
    return [
        *fewer_kernels(specification),
        PassStep(
            transform=ChooseTokens(),
            why="on the logits as they are given out",
        ),
        PassStep(
            transform=ViewOneToken(),
            why="after all that looks for patterns, which branches would hide",
        ),
    ]
