"""The sharing plan: which layer's attention probabilities each layer uses.

A plan is pure data. It says nothing of weights and imports neither torch nor transformers, so that
it can be read, written and checked anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from echoatt_exporter.errors import PlanError

FORMAT = "echoatt-plan/1"


@dataclass(frozen=True, slots=True)
class SharingPlan:
    """For each layer, the index of the layer whose attention probabilities it uses.

    A *source* layer names itself; a *follower* layer names an earlier source layer. The structure
    and the roles are those of EchoAtt (arXiv 2409.14595, section 3).

    Attributes:
        sources: one layer index per layer, numbered from 0.
        head_orders: how the followers' heads are lined up with their sources', folded into their
            value and output projections when the plan is applied to a teacher. Empty, or one entry
            a layer: ``order[h]`` is the teacher's query head that reads head ``h`` of the source's
            probabilities; an empty entry leaves the layer as it is. It keeps key/value groups
            whole.
    """

    sources: tuple[int, ...]
    head_orders: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def unshared(cls, num_layers: int) -> SharingPlan:
        """The plan in which every one of ``num_layers`` layers is a source."""
        return cls(tuple(range(num_layers)))

    @classmethod
    def from_pairs(cls, text: str, num_layers: int) -> SharingPlan:
        """Read the command line's form, ``follower:source`` pairs: ``3:2,4:2``.

        Args:
            text: comma-separated pairs; blanks around numbers are ignored.
            num_layers: the model's layer count; layers that no pair names are sources.

        Raises:
            PlanError: text that is not a list of pairs, a follower out of range or named twice.
        """
        sources = list(range(num_layers))
        seen: set[int] = set()
        faults: list[str] = []
        for pair in text.split(","):
            follower_text, colon, source_text = pair.partition(":")
            try:
                follower, source = int(follower_text), int(source_text)
            except ValueError:
                colon = ""
            if not colon:
                faults.append(f"{pair.strip()!r} is not a follower:source pair of layer numbers")
            elif not 0 <= follower < num_layers:
                faults.append(f"follower {follower} is outside layers 0 to {num_layers - 1}")
            elif follower in seen:
                faults.append(f"follower {follower} is named twice")
            else:
                seen.add(follower)
                sources[follower] = source
        if faults:
            raise PlanError(f"bad sharing pairs {text!r}: {'; '.join(faults)}; write 3:2,4:2")
        return cls(tuple(sources))

    @classmethod
    def of(cls, plan: SharingPlan | str, num_layers: int) -> SharingPlan:
        """A plan as it is, or from its ``follower:source`` pairs, as :meth:`from_pairs`."""
        return cls.from_pairs(plan, num_layers) if isinstance(plan, str) else plan

    @classmethod
    def from_json(cls, text: str, origin: str = "plan") -> SharingPlan:
        """Read a plan file's text.

        Args:
            text: ``{"format": "echoatt-plan/1", "sources": [0, 1, 2, 2]}``. Further keys are the
                writer's own and are ignored.
            origin: what to call the text in an error, usually the file's path.

        Raises:
            PlanError: text that is not JSON, another format, or sources that are not integers.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanError(f"{origin}: not JSON ({error})") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else None
            raise PlanError(f'{origin}: "format" is {found!r}, expected "{FORMAT}"')
        sources = data.get("sources")
        # bool is an int to Python, never a layer number
        if not isinstance(sources, list) or not all(type(s) is int for s in sources) or not sources:
            raise PlanError(f'{origin}: "sources" must be a list of layer numbers, one a layer')
        return cls(tuple(sources))

    @classmethod
    def load(cls, path: str | Path) -> SharingPlan:
        """Read a plan file.

        Raises:
            PlanError: the file cannot be read, or :meth:`from_json` refuses it.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: cannot read the sharing plan ({error})") from error
        return cls.from_json(text, str(path))

    def to_json(self) -> str:
        """The plan file's text; :meth:`from_json` reads it back."""
        return json.dumps({"format": FORMAT, "sources": list(self.sources)}) + "\n"

    @property
    def num_layers(self) -> int:
        """How many layers the plan is for."""
        return len(self.sources)

    @property
    def followers(self) -> tuple[int, ...]:
        """The follower layers, ascending."""
        return tuple(layer for layer, source in enumerate(self.sources) if layer != source)

    @property
    def shared_sources(self) -> tuple[int, ...]:
        """The source layers that at least one follower names, ascending."""
        return tuple(sorted({self.sources[layer] for layer in self.followers}))

    @property
    def ratio(self) -> float:
        """The sharing ratio: followers / layers."""
        return len(self.followers) / len(self.sources)

    def is_follower(self, layer: int) -> bool:
        """Whether ``layer`` uses another layer's probabilities."""
        return self.sources[layer] != layer

    def faults(
        self, layer_kinds: Sequence[str] | None = None, query_heads: Sequence[int] | None = None
    ) -> list[str]:
        """Everything that is wrong with the plan, each fault a phrase.

        Args:
            layer_kinds: the model's attention kind per layer (``full`` or ``sliding``), if known.
            query_heads: the model's query head count per layer, if known.
        """
        found: list[str] = []
        count = self.num_layers
        if layer_kinds is not None and len(layer_kinds) != count:
            found.append(f"the plan has {count} layers and the model {len(layer_kinds)}")
            layer_kinds = query_heads = None
        for layer in self.followers:
            source = self.sources[layer]
            if not 0 <= source < count:
                found.append(f"layer {layer} uses layer {source}, which does not exist")
                continue
            if source > layer:
                found.append(f"layer {layer} uses layer {source}, which is not earlier")
            if self.is_follower(source):
                found.append(f"layer {layer} uses layer {source}, which is itself a follower")
            if layer_kinds is not None and layer_kinds[layer] != layer_kinds[source]:
                found.append(
                    f"layer {layer} ({layer_kinds[layer]} attention) uses layer {source}"
                    f" ({layer_kinds[source]} attention)"
                )
            if query_heads is not None and query_heads[layer] != query_heads[source]:
                found.append(
                    f"layer {layer} ({query_heads[layer]} query heads) uses layer {source}"
                    f" ({query_heads[source]} query heads)"
                )
        return found

    def validate(
        self, layer_kinds: Sequence[str] | None = None, query_heads: Sequence[int] | None = None
    ) -> None:
        """Check the plan by itself and, where given, against a model.

        Args:
            layer_kinds: as in :meth:`faults`.
            query_heads: as in :meth:`faults`.

        Raises:
            PlanError: names every fault at once.
        """
        if found := self.faults(layer_kinds, query_heads):
            raise PlanError(f"the sharing plan does not fit: {'; '.join(found)}")
