"""What a sharing plan saves: parameters, cache, arithmetic and memory traffic, by count.

The modules themselves are counted, on torch's meta device, where they take no memory.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from echoatt_exporter.architecture import DecoderArchitecture, architecture_of
from echoatt_exporter.errors import AnalysisError
from echoatt_exporter.families import family_of
from echoatt_exporter.families.projections import is_projection
from echoatt_runtime.contract import SharingPlan


@dataclass(frozen=True, slots=True)
class Footprint:
    """The size and the work of one model at one context length.

    A multiply-add is one multiplication and one addition. Projections, attention scores, their
    product with the values, MLP and LM head count; norms, rotary angles and softmax do not.

    Attributes:
        parameters: Elements of all weights; a table that is the LM head too counts once.
        cache_bytes_per_token: Keys of the sources and values of every layer.
        decode_multiply_adds: For one new token that attends to the whole context, itself included.
        forward_multiply_adds: For a token of a sequence as long as the context, on average, logits
            at every position: a training step's forward pass. Only what the causal mask and the
            window leave is counted.
        decode_bytes: Read from memory for one new token: every weight once (of a table that is not
            the LM head too one row, which is left out) and the cache of the context.
    """

    parameters: int
    cache_bytes_per_token: float
    decode_multiply_adds: int
    forward_multiply_adds: float
    decode_bytes: float


@dataclass(frozen=True, slots=True)
class PlanFootprint:
    """A student's footprint beside its teacher's.

    Attributes:
        student: With the plan.
        teacher: Without.
        context: Tokens attended to in what depends on it.
        bytes_per_element: Of a weight and of a cached number.
    """

    student: Footprint
    teacher: Footprint
    context: int
    bytes_per_element: float

    @property
    def parameters(self) -> int:
        """The student's parameters."""
        return self.student.parameters

    @property
    def parameters_removed(self) -> int:
        """Parameters that the plan removes."""
        return self.teacher.parameters - self.student.parameters

    @property
    def parameters_removed_share(self) -> float:
        """Parameters that the plan removes, as a share of the teacher's."""
        return self.parameters_removed / self.teacher.parameters

    @property
    def cache_bytes_per_token(self) -> float:
        """Bytes that the student's cache grows by with a token."""
        return self.student.cache_bytes_per_token

    @property
    def decode_multiply_adds_removed_share(self) -> float:
        """Share of the teacher's arithmetic for a new token that the plan removes."""
        return 1 - self.student.decode_multiply_adds / self.teacher.decode_multiply_adds

    @property
    def forward_multiply_adds_removed_share(self) -> float:
        """Share of the teacher's arithmetic for a sequence that the plan removes."""
        return 1 - self.student.forward_multiply_adds / self.teacher.forward_multiply_adds

    @property
    def estimated_speed(self) -> float:
        """Decoding speed over the teacher's, estimated.

        As if a token took the time in which memory gives the bytes that are read: an estimate for
        one row at a time, and above what arithmetic, activations and launches leave of it.
        """
        return self.teacher.decode_bytes / self.student.decode_bytes


@dataclass(frozen=True, slots=True)
class DecoderSize:
    """What of a decoder's size does not depend on the plan.

    Attributes:
        architecture: The decoder.
        parameters: Of the teacher.
        row_read_parameters: Of embedding tables that are no LM head, and are read row by row.
        weight_multiply_adds: Of all projections of the teacher for a token, LM head included.
        query_key_parameters: That each layer loses when it becomes a follower.
        query_key_multiply_adds: The same for `weight_multiply_adds`.
    """

    architecture: DecoderArchitecture
    parameters: int
    row_read_parameters: int
    weight_multiply_adds: int
    query_key_parameters: tuple[int, ...]
    query_key_multiply_adds: tuple[int, ...]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> DecoderSize:
        """Count the teacher that `config` describes.

        Raises:
            UnsupportedModelError: Its family is not supported.
        """
        architecture = architecture_of(config)
        family = family_of(config)
        with torch.device("meta"):
            teacher: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config))
            layers = family.layers_of(teacher)
            attentions = [family.attention_of(layer) for layer in layers]
            followers = [family.follower_of(module, teacher.config) for module in attentions]
        tables = [module for module in teacher.modules() if isinstance(module, nn.Embedding)]
        head = cast(nn.Linear, teacher.get_output_embeddings())
        pairs = list(zip(attentions, followers, strict=True))
        return cls(
            architecture=architecture,
            parameters=_parameters(teacher),
            row_read_parameters=sum(
                table.weight.numel() for table in tables if table.weight is not head.weight
            ),
            weight_multiply_adds=_multiply_adds(layers) + _multiply_adds(head),
            query_key_parameters=tuple(_parameters(a) - _parameters(f) for a, f in pairs),
            query_key_multiply_adds=tuple(_multiply_adds(a) - _multiply_adds(f) for a, f in pairs),
        )

    def with_plan(
        self, plan: SharingPlan, *, context: int, bytes_per_element: float
    ) -> PlanFootprint:
        """The footprint of a plan; arguments and errors as `footprint_of`."""
        self.architecture.validate_plan(plan)
        longest = self.architecture.context_length
        if not 1 <= context <= longest:
            raise AnalysisError(
                f"a context of {context} tokens is outside what the model was made for; give 1 to"
                f" {longest}"
            )
        if not bytes_per_element > 0:
            raise AnalysisError(f"{bytes_per_element} bytes an element; give more than 0")
        unshared = SharingPlan.unshared(plan.num_layers)
        student, teacher = (self._count(p, context, bytes_per_element) for p in (plan, unshared))
        return PlanFootprint(student, teacher, context, bytes_per_element)

    def _count(self, plan: SharingPlan, context: int, bytes_per_element: float) -> Footprint:
        architecture = self.architecture
        parameters, projections = self.parameters, self.weight_multiply_adds
        for layer in plan.followers:
            parameters -= self.query_key_parameters[layer]
            projections -= self.query_key_multiply_adds[layer]
        decode: float = projections
        forward: float = projections
        cached = 0  # elements that are read for one new token
        grown = 0  # elements that the cache grows by with it
        for layer, kind in enumerate(architecture.layer_kinds):
            window = architecture.sliding_window if kind == "sliding" else None
            width = min(context, window or context)  # tokens attended to
            # a token's window fills up over the first `width` tokens
            mean_width = (width * (width + 1) / 2 + (context - width) * width) / context
            products = 1 if plan.is_follower(layer) else 2  # with the values; with the keys too
            query_width = architecture.query_heads[layer] * architecture.head_dims[layer]
            cache_width = architecture.kv_heads[layer] * architecture.head_dims[layer]
            decode += products * query_width * width
            forward += products * query_width * mean_width
            cached += products * cache_width * width
            grown += products * cache_width
        return Footprint(
            parameters=parameters,
            cache_bytes_per_token=grown * bytes_per_element,
            decode_multiply_adds=int(decode),
            forward_multiply_adds=forward,
            decode_bytes=(parameters - self.row_read_parameters + cached) * bytes_per_element,
        )


def footprint_of(
    config: PreTrainedConfig, plan: SharingPlan, *, context: int, bytes_per_element: float = 2.0
) -> PlanFootprint:
    """Count what a plan leaves of a teacher.

    Args:
        config: The teacher's configuration; nothing else of it is needed.
        plan: The plan.
        context: Tokens attended to, at most what the model was made for.
        bytes_per_element: Of a weight and of a cached number; 2 is half precision.

    Raises:
        UnsupportedModelError: The teacher's family is not supported.
        PlanError: The plan does not fit the teacher.
        AnalysisError: A context or an element size that cannot be.
    """
    return DecoderSize.of(config).with_plan(
        plan, context=context, bytes_per_element=bytes_per_element
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _multiply_adds(module: nn.Module) -> int:
    """Of every projection below `module` for one token."""
    return sum(part.weight.numel() for part in module.modules() if is_projection(part))
