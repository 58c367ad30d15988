"""Which layers of a decoder compute alike, so that one trace serves them all."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from echoatt_exporter.families import family_of
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_runtime.contract import Specification


@dataclass(frozen=True, slots=True)
class LayerKinds:
    """A decoder's layers, grouped by what they compute apart from their weights.

    Attributes:
        template_of: For each layer the first layer of its kind, which is traced in its place.
        sources: The sharing plan as the templates follow it: a template's source is a template too.
    """

    template_of: tuple[int, ...]
    sources: tuple[int, ...]

    @property
    def templates(self) -> tuple[int, ...]:
        """The layers that are traced, ascending."""
        return tuple(sorted(set(self.template_of)))


def find_layer_kinds(student: EchoAttForCausalLM, specification: Specification) -> LayerKinds:
    """Group a student's layers.

    Two layers are of one kind if their modules have the same structure, settings and shapes, if
    they have the same attention kind, and if they play the same part in the sharing plan.
    """
    sources = specification.plan.sources
    lending = {source for layer, source in enumerate(sources) if layer != source}
    first: dict[Hashable, int] = {}
    template_of: list[int] = []
    layers = family_of(student.decoder.config).layers_of(student.decoder)
    for index, layer in enumerate(layers):
        source = sources[index]
        kind = (
            _structure(layer),
            specification.layer_kinds[index],
            index in lending,
            None if source == index else template_of[source],
        )
        template_of.append(first.setdefault(kind, index))
    return LayerKinds(
        template_of=tuple(template_of), sources=tuple(template_of[source] for source in sources)
    )


def _structure(layer: nn.Module) -> Hashable:
    """Everything about a layer but its weights' values and its number."""
    return tuple(
        (
            name,
            type(module).__qualname__,
            module.extra_repr(),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if isinstance(value, bool | int | float | str | None) and key != "layer_idx"
            ),
            tuple(
                (key, parameter.shape, parameter.dtype)
                for key, parameter in module.named_parameters(recurse=False)
            ),
        )
        for name, module in layer.named_modules()
    )


@contextmanager
def only_layers(decoder: PreTrainedModel, indices: Sequence[int]) -> Iterator[None]:
    """Let `decoder` run some of its layers only, which keep their numbers."""
    config = decoder.config
    family = family_of(config)
    path, _, name = family.layers.rpartition(".")
    parent = decoder.get_submodule(path)
    layers, count = family.layers_of(decoder), config.num_hidden_layers
    layer_types = getattr(config, "layer_types", None)
    try:
        setattr(parent, name, nn.ModuleList([layers[index] for index in indices]))
        if layer_types is not None:
            config.layer_types = [layer_types[index] for index in indices]
        # Last, because a configuration holds layer_types against it
        config.num_hidden_layers = len(indices)
        yield
    finally:
        setattr(parent, name, layers)
        config.num_hidden_layers = count
        if layer_types is not None:
            config.layer_types = layer_types
