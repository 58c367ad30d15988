"""A teacher's attention maps, of one sample at a time.

Shapes in names: L layers, H query heads, T tokens.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from echoatt_exporter.architecture import architecture_of
from echoatt_exporter.errors import AnalysisError
from echoatt_exporter.share.lending_attention import lending_attention
from echoatt_exporter.share.modeling_echoatt import ATTENTION_NAME, MaterializedAttention
from echoatt_runtime.errors import one_line


class _MapCollector(MaterializedAttention):
    """Unshared attention that writes every layer's probabilities into one tensor."""

    def __init__(self, maps_LHTT: torch.Tensor) -> None:
        super().__init__(range(len(maps_LHTT)))
        self._lending = set(self.sources)
        self.maps_LHTT = maps_LHTT
        self.seen: set[int] = set()

    def lend(self, layer: int, probabilities: torch.Tensor) -> None:
        """Put a layer's probabilities [1, N, G·T, T] in their place."""
        self.maps_LHTT[layer] = probabilities.reshape(self.maps_LHTT.shape[1:])
        self.seen.add(layer)


@torch.no_grad()
def attention_maps(teacher: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    """Each layer's attention probabilities on one sample.

    The teacher runs in evaluation mode, without a cache, and is left as it was.

    Args:
        teacher: A Hugging Face model for causal LM of a supported family.
        window: Int64 [T] token ids.

    Returns:
        float32 [L, H, T, T] on the teacher's device: row t holds what token t gives to each token,
        sums to 1, and is zero for later tokens and outside a sliding window.

    Raises:
        UnsupportedModelError: The teacher's family is not supported.
        AnalysisError: A window longer than the model's context or of another vocabulary, layers
            with different numbers of heads, or a teacher that hands no attention probabilities out.
    """
    architecture = architecture_of(teacher.config)
    T = len(window)
    if architecture.context_length < T:
        raise AnalysisError(
            f"windows of {T} tokens are longer than the model's context of"
            f" {architecture.context_length}; make them shorter"
        )
    largest = int(window.max())
    if largest >= architecture.vocab_size:
        raise AnalysisError(
            f"token {largest} is outside the model's vocabulary of {architecture.vocab_size}; the"
            " tokenizer is another model's"
        )
    heads = architecture.query_heads
    if len(set(heads)) > 1:
        raise AnalysisError(
            f"layers have {sorted(set(heads))} query heads; similarity is head by head and needs as"
            " many in every layer"
        )
    L, H = architecture.num_layers, heads[0]
    collector = _MapCollector(torch.zeros((L, H, T, T), device=teacher.device))
    with lending_attention(teacher, ATTENTION_NAME):
        try:
            teacher(
                input_ids=window[None].to(teacher.device),
                use_cache=False,
                logits_to_keep=1,
                shared_attention=collector,
            )
        except TypeError as error:  # a class of its own that takes fewer arguments
            raise AnalysisError(_no_maps(teacher, one_line(error))) from error
    if missing := sorted(set(range(L)) - collector.seen):
        raise AnalysisError(_no_maps(teacher, f"none from layers {missing}"))
    return collector.maps_LHTT


def _no_maps(teacher: PreTrainedModel, cause: str) -> str:
    return (
        f"{type(teacher).__name__} gives no attention maps ({cause}): it does not use transformers'"
        " attention interface; load it with transformers' own class"
    )
