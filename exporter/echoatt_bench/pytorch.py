"""transformers' `generate` with SDPA in float32."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from echoatt_bench.engine import Decode, Load, Prefill, package

if TYPE_CHECKING:
    from torch import Tensor

_FILL = 512


class TorchEngine:
    """A Hugging Face directory. Its `DynamicCache` is cropped to go back."""

    PACKAGES: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    def __init__(self, load: Load) -> None:
        self._torch, self._transformers = package("torch"), package("transformers")
        self._torch.set_num_threads(load.threads)
        self._model = self._transformers.AutoModelForCausalLM.from_pretrained(
            load.path, dtype=self._torch.float32, attn_implementation="sdpa", local_files_only=True
        ).eval()
        self._sequences_BT = self._torch.from_numpy(load.draw_tokens())
        self._cache: Any = None
        # no end token and no other processors: generate() only takes the greatest logit
        self._model.generation_config = self._transformers.GenerationConfig(pad_token_id=0)

    def facts(self) -> dict[str, Any]:
        """Versions, and what is read for a token."""
        config = self._model.config.get_text_config()
        table = self._model.get_input_embeddings().weight
        tied = self._model.get_output_embeddings().weight is table
        elements = sum(parameter.numel() for parameter in self._model.parameters())
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        rows = config.num_hidden_layers * config.num_key_value_heads * head_dim
        return {
            "version": f"torch {version('torch')}, transformers {version('transformers')}",
            "weight_bytes": 4 * (elements - (0 if tied else table.numel())),
            "cache_bytes_per_token": 4 * 2 * rows,
        }

    def prefill(self, context: int) -> Prefill:
        """See `Engine`."""
        self._cache = None
        begin = time.perf_counter()
        self._cache = self._transformers.DynamicCache()
        sequences, _ = self._generate(context, 1, self._cache)
        return Prefill(time.perf_counter() - begin, sequences[:, -1].tolist())

    def decode(self, start: int, new_tokens: int) -> Decode:
        """See `Engine`."""
        if self._cache is None:
            self._cache = self._transformers.DynamicCache()
        held = self._cache.get_seq_length()
        kept = min(held, start - 1)
        if kept < held:
            self._cache.crop(kept - held)
        for begin in range(kept, start - 1, _FILL):
            tokens = self._sequences_BT[:, begin : min(begin + _FILL, start - 1)]
            with self._torch.inference_mode():
                self._model(tokens, past_key_values=self._cache, logits_to_keep=1)
        sequences, marks = self._generate(start, new_tokens + 1, self._cache)
        if len(sequences) > 1:  # with several rows the next call goes on from here
            self._sequences_BT[:, : sequences.shape[1]] = sequences
        # the first of them took the prompt's last token
        return Decode(np.diff(marks).tolist(), sequences[0, start + 1 :].tolist())

    def _generate(self, start: int, new_tokens: int, cache: Any) -> tuple[Tensor, list[float]]:
        marks: list[float] = []
        criteria = self._transformers.StoppingCriteriaList([_Clock(self._torch, marks)])
        prompt = self._sequences_BT[:, :start]
        sequences = self._model.generate(
            prompt,
            attention_mask=self._torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=criteria,
        )
        return sequences, marks


class _Clock:
    """A stopping criterion that stops nothing and notes when it is asked."""

    def __init__(self, torch: Any, marks: list[float]) -> None:
        self._torch, self._marks = torch, marks

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        self._marks.append(time.perf_counter())
        going_on: Tensor = self._torch.zeros(len(input_ids), dtype=self._torch.bool)
        return going_on
