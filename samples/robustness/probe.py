"""What is done with a spoilt directory: what users do with a bundle and with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from samples.robustness.cases import Case
from samples.robustness.judge import Step
from samples.robustness.target import Target

from echoatt_exporter import load_shared
from echoatt_exporter.bundle import copy_checkpoint_files
from echoatt_exporter.share.weight_files import checkpoint_digest
from echoatt_runtime import EchoModel, SamplingParams

_CHAT = [{"role": "user", "content": "Holmes, a b c?"}]
_TEXT = "My dear Watson, aaaa aaaa, said Holmes"
_TOKENS = [5, 6, 7, 8]


def use(case: Case, target: Target) -> Iterator[Step]:
    """Use a spoilt bundle or checkpoint."""
    if case.kind == "checkpoint":
        return _use_checkpoint(target.folder, target.stage)
    # Every third bundle is verified, which must change nothing but how soon a fault is found
    return _use_bundle(target.folder, verify=case.number % 3 == 0)


def _use_bundle(folder: Path, *, verify: bool) -> Iterator[Step]:
    """Load a bundle, score tokens, generate, from a text and from a chat."""
    models: list[EchoModel] = []
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)

    def load() -> None:
        models.append(EchoModel.load(folder, threads=1, verify=verify))

    yield "load", load
    if models:
        (model,) = models
        yield "logits", lambda: model.logits(_TOKENS)
        yield "generate", lambda: model.generate(_TEXT, params)
        yield "stream", lambda: list(model.stream(_CHAT, params))


def _use_checkpoint(folder: Path, stage: Path) -> Iterator[Step]:
    """Load a checkpoint and run it, hash it, and copy what goes beside a bundle."""
    models: list[torch.nn.Module] = []
    stage.mkdir()

    def run() -> None:
        with torch.inference_mode():
            models[0](torch.tensor([_TOKENS]))

    yield "load", lambda: models.append(load_shared(folder, None))
    if models:
        yield "run", run
        yield "digest", lambda: checkpoint_digest(folder)
        yield "copy", lambda: copy_checkpoint_files(folder, stage)
