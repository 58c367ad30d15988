"""What gives the logits that text is scored with: a checkpoint run by PyTorch, or a bundle.

Shapes in names: B windows at once, T tokens of the longest window, n wanted positions of a window,
E hidden size, R rows (wanted positions of all windows) at once, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from echoatt_exporter.architecture import architecture_of
from echoatt_exporter.errors import AnalysisError
from echoatt_exporter.share.checkpoint import load_model
from echoatt_exporter.share.lm_head import head_of
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM, MaterializedAttention
from echoatt_exporter.share.outline import read_outline
from echoatt_exporter.texts import load_tokenizer
from echoatt_runtime.bundle import Bundle
from echoatt_runtime.contract import MODEL_FILE
from echoatt_runtime.errors import DamagedBundleError
from echoatt_runtime.executor import Executor, open_executor, run_texts
from echoatt_runtime.text import TOKENIZER_FILE


@dataclass(frozen=True, slots=True)
class WindowBatch:
    """Windows of text to run together, each by itself.

    Attributes:
        windows: The token ids of each, of any lengths but 0.
        firsts: Of each, the first position whose logits are wanted; so are those of all after it.
        chunk: Positions of every window whose logits are made at once.
    """

    windows: Sequence[Sequence[int]]
    firsts: Sequence[int]
    chunk: int

    @property
    def longest(self) -> int:
        """Tokens of the longest window."""
        return max(map(len, self.windows))

    def wanted(self) -> Iterator[list[range]]:
        """Of one chunk after another, the wanted positions of each window in it, often none."""
        for start in range(0, self.longest, self.chunk):
            stop = start + self.chunk
            yield [
                range(max(first, start), min(len(window), stop))
                for window, first in zip(self.windows, self.firsts, strict=True)
            ]


class TextModel(Protocol):
    """A model whose predictions of text can be scored."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its own tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Width of its logits."""

    @property
    def context_length(self) -> int:
        """The most tokens that it was made for."""

    def logits(self, batch: WindowBatch) -> Iterator[torch.Tensor]:
        """Run windows.

        Yields:
            For each chunk the logits [R, V], float32, of `batch.wanted()`, window by window. R
            may be 0.
        """


class CheckpointModel:
    """A teacher or a student, run by PyTorch.

    Attributes:
        model: In evaluation mode, on any device.
        tokenizer: Its own.
        vocab_size: Width of its logits.
        context_length: The most tokens that it was made for.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        architecture = architecture_of(model.config.get_text_config())
        self.model = model
        self.tokenizer = tokenizer
        self.vocab_size = architecture.vocab_size
        self.context_length = architecture.context_length

    @torch.no_grad()
    def logits(self, batch: WindowBatch) -> Iterator[torch.Tensor]:
        """See `TextModel.logits`."""
        # What stands after a token does not reach it: padding needs no mask
        ids_BT = torch.zeros((len(batch.windows), batch.longest), dtype=torch.int64)
        for row, window in enumerate(batch.windows):
            ids_BT[row, : len(window)] = torch.tensor(window)
        decoder, hidden_BTE = self._hidden_states(ids_BT.to(self.model.device))
        head = head_of(decoder)
        for wanted in batch.wanted():
            hidden_RE = torch.cat(
                [
                    hidden_TE[positions.start : positions.stop]
                    for hidden_TE, positions in zip(hidden_BTE, wanted, strict=True)
                ]
            )
            yield head(hidden_RE[None])[0].float()

    def _hidden_states(self, ids_BT: torch.Tensor) -> tuple[PreTrainedModel, torch.Tensor]:
        """The decoder that has the LM head, and its output [B, T, E] after its last norm."""
        decoder, arguments = self.model, dict[str, Any]()
        if isinstance(self.model, EchoAttForCausalLM):
            decoder = self.model.decoder
            arguments["shared_attention"] = MaterializedAttention(self.model.sources)
        body = getattr(decoder, decoder.base_model_prefix)
        output = body(input_ids=ids_BT, use_cache=False, **arguments)
        return decoder, output.last_hidden_state


class BundleModel:
    """A bundle, run by the runtime.

    Attributes:
        executor: The opened bundle.
        tokenizer: The one beside it.
        vocab_size: Width of its logits.
        context_length: The most tokens that it was made for.
    """

    def __init__(self, executor: Executor, tokenizer: PreTrainedTokenizerBase) -> None:
        self.executor = executor
        self.tokenizer = tokenizer
        self.vocab_size = executor.specification.vocab_size
        self.context_length = executor.specification.context_length

    def logits(self, batch: WindowBatch) -> Iterator[torch.Tensor]:
        """See `TextModel.logits`."""
        cache = self.executor.new_cache(
            len(batch.windows), min(batch.chunk, batch.longest), batch.longest
        )
        for found in run_texts(self.executor, cache, batch.windows, batch.firsts, batch.chunk):
            yield torch.from_numpy(np.concatenate([window.logits for window in found]))


def open_model(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> TextModel:
    """Load what lies at a path, with its tokenizer.

    Args:
        path: A teacher's or student's directory, or a bundle: a file, or a directory with
            `model.onnx`.
        device: Where PyTorch computes, or `cpu` or `cuda` for a bundle.
        dtype: What PyTorch computes in; None for that of the weights. A bundle has its own.
        threads: CPU threads of a bundle; None leaves it to ONNX Runtime. PyTorch's are the whole
            process's (`torch.set_num_threads`).
        trust_remote_code: Run code that a checkpoint or a tokenizer brings.

    Raises:
        CheckpointError: Neither is there, or the checkpoint or its tokenizer cannot be loaded.
        UnsupportedModelError: The checkpoint is of another family.
        BundleError: The bundle cannot be used, or has no tokenizer beside it.
        DeviceError: The bundle cannot run on the device.
        AnalysisError: PyTorch cannot compute on the device.
    """
    path = Path(path)
    is_gguf = path.suffix.lower() == ".gguf"
    if (path.is_file() and not is_gguf) or (path / MODEL_FILE).is_file():
        return _open_bundle(path, device, threads, trust_remote_code)
    read_outline(path, None, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    model = load_model(path, dtype=dtype, trust_remote_code=trust_remote_code)
    model.to(_torch_device(device))
    return CheckpointModel(model, tokenizer)


def _open_bundle(
    path: Path, device: str, threads: int | None, trust_remote_code: bool
) -> BundleModel:
    bundle = Bundle.open(path)
    # transformers would make an empty tokenizer of some families where there is none
    if bundle.companion(TOKENIZER_FILE) is None:
        raise DamagedBundleError(
            f"{bundle.model} has no {TOKENIZER_FILE}; text needs one: export it again from a"
            " checkpoint that has one"
        )
    executor = open_executor(bundle, device, threads)
    tokenizer = load_tokenizer(bundle.model.parent, trust_remote_code=trust_remote_code)
    return BundleModel(executor, tokenizer)


def _torch_device(name: str) -> Any:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise AnalysisError(
            f"torch cannot compute on {name!r} here ({str(error).splitlines()[0]}); try cpu"
        ) from error
