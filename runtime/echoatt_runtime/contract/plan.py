"""The sharing plan: which layer's attention probabilities each layer uses.

A plan is pure data. It says nothing of weights and imports neither torch nor transformers, so that
it can be read, written and checked anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echoatt_runtime.contract.records import join_faults
from echoatt_runtime.errors import PlanError

FORMAT = "echoatt-plan/1"


@dataclass(frozen=True, slots=True)
class SharingPlan:
    """For each layer, the index of the layer whose attention probabilities it uses.

    A *source* layer names itself; a *follower* layer names an earlier source layer. The structure
    and the roles are those of EchoAtt (arXiv 2409.14595, section 3).

    Attributes:
        sources: One layer index per layer, numbered from 0.
        head_orders: How the followers' heads are lined up with their sources', folded into their
            value and output projections when the plan is applied to a teacher. Empty, or one entry
            a layer: `order[h]` is the teacher's query head that reads head `h` of the source's
            probabilities; an empty entry leaves the layer as it is. It keeps key/value groups
            whole.
    """

    sources: tuple[int, ...]
    head_orders: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not any(self.head_orders):  # one way to say that no head moves, so that plans compare
            object.__setattr__(self, "head_orders", ())

    @classmethod
    def unshared(cls, num_layers: int) -> SharingPlan:
        """The plan in which every one of `num_layers` layers is a source."""
        return cls(tuple(range(num_layers)))

    @classmethod
    def from_pairs(cls, text: str, num_layers: int) -> SharingPlan:
        """Read the command line's form, `follower:source` pairs: `3:2,4:2`.

        Args:
            text: Comma-separated pairs; blanks around numbers are ignored.
            num_layers: The model's layer count; layers that no pair names are sources.

        Raises:
            PlanError: Text that is not a list of pairs, a follower out of range or named twice.
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
        """A plan as it is, or from its `follower:source` pairs, as `from_pairs`."""
        return cls.from_pairs(plan, num_layers) if isinstance(plan, str) else plan

    @classmethod
    def from_json(cls, text: str, origin: str = "plan") -> SharingPlan:
        """Read a plan file's text.

        Args:
            text: `{"format": "echoatt-plan/1", "sources": [0, 1, 2, 2]}`, and where heads are
                moved `"head_orders": [[], [], [], [1, 0]]`. Further keys are the writer's own
                and are ignored.
            origin: What to call the text in an error, usually the file's path.

        Raises:
            PlanError: Text that is not JSON, another format, or sources or head orders that are
                not integers.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanError(f"{origin}: not JSON ({error})") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else None
            raise PlanError(f'{origin}: "format" is {found!r}, expected "{FORMAT}"')
        sources = data.get("sources")
        if not _are_numbers(sources) or not sources:
            raise PlanError(f'{origin}: "sources" must be a list of layer numbers, one a layer')
        orders = data.get("head_orders", [])
        if not isinstance(orders, list) or not all(_are_numbers(order) for order in orders):
            raise PlanError(
                f'{origin}: "head_orders" must be a list of lists of head numbers, one list a layer'
            )
        return cls(tuple(sources), tuple(tuple(order) for order in orders))

    @classmethod
    def load(cls, path: str | Path) -> SharingPlan:
        """Read a plan file.

        Raises:
            PlanError: The file cannot be read, or `from_json` refuses it.
        """
        try:
            # Editors on Windows put a byte order mark first
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, TypeError, ValueError) as error:
            raise PlanError(f"{path}: cannot read the sharing plan ({error})") from error
        return cls.from_json(text, str(path))

    def to_json(self) -> str:
        """The plan file's text; `from_json` reads it back."""
        data: dict[str, Any] = {"format": FORMAT, "sources": self.sources}
        if self.head_orders:
            data["head_orders"] = self.head_orders
        return json.dumps(data) + "\n"

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
        """Whether `layer` uses another layer's probabilities."""
        return self.sources[layer] != layer

    def head_order(self, layer: int) -> tuple[int, ...]:
        """The order of `layer`'s heads; empty where they stay as they are."""
        return self.head_orders[layer] if self.head_orders else ()

    def faults(
        self,
        layer_kinds: Sequence[str] | None = None,
        query_heads: Sequence[int] | None = None,
        kv_heads: Sequence[int] | None = None,
    ) -> list[str]:
        """Everything that is wrong with the plan, each fault a phrase.

        Args:
            layer_kinds: The model's attention kind per layer (`full` or `sliding`), if known.
            query_heads: The model's query head count per layer, if known.
            kv_heads: The model's key/value head count per layer, if known.
        """
        found: list[str] = []
        count = self.num_layers
        if layer_kinds is not None and len(layer_kinds) != count:
            found.append(f"the plan has {count} layers and the model {len(layer_kinds)}")
            layer_kinds = query_heads = kv_heads = None
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
        return found + self._head_order_faults(query_heads, kv_heads)

    def _head_order_faults(
        self, query_heads: Sequence[int] | None, kv_heads: Sequence[int] | None
    ) -> list[str]:
        if not self.head_orders:
            return []
        if len(self.head_orders) != self.num_layers:
            return [
                f"the plan has {self.num_layers} layers and {len(self.head_orders)} head orders"
            ]
        found: list[str] = []
        for layer, order in enumerate(self.head_orders):
            if not order:
                continue
            if not self.is_follower(layer):
                found.append(f"layer {layer} has a head order and is not a follower")
            fault = head_order_fault(
                order,
                None if query_heads is None else query_heads[layer],
                None if kv_heads is None else kv_heads[layer],
            )
            if fault:
                found.append(f"layer {layer}'s head order {fault}")
        return found

    def validate(
        self,
        layer_kinds: Sequence[str] | None = None,
        query_heads: Sequence[int] | None = None,
        kv_heads: Sequence[int] | None = None,
    ) -> None:
        """Check the plan by itself and, where given, against a model.

        Args:
            layer_kinds: As in `faults`.
            query_heads: As in `faults`.
            kv_heads: As in `faults`.

        Raises:
            PlanError: Names every fault at once.
        """
        if found := self.faults(layer_kinds, query_heads, kv_heads):
            raise PlanError(f"the sharing plan does not fit: {join_faults(found)}")


def head_order_fault(
    order: Sequence[int], query_heads: int | None = None, kv_heads: int | None = None
) -> str | None:
    """What is wrong with an order of one layer's heads, a phrase; None if nothing is.

    Args:
        order: The head that is put at each position.
        query_heads: The layer's query heads, if known.
        kv_heads: Its key/value heads, if known: query heads that share one must stay together.
    """
    count = len(order) if query_heads is None else query_heads
    if len(order) != count:
        return f"has {len(order)} heads and the model {count}"
    if sorted(order) != list(range(count)):
        return f"{list(order)} does not name each of the heads 0 to {count - 1} once"
    group = max(1, count // (kv_heads or count or 1))
    for start in range(0, count, group):
        together = {head // group for head in order[start : start + group]}
        if len(together) > 1:
            return (
                f"{list(order)} splits a key/value group: positions {start} to {start + group - 1}"
                f" take heads of groups {', '.join(map(str, sorted(together)))}"
            )
    return None


def _are_numbers(value: object) -> bool:
    # bool is an int to Python, never a layer's or a head's number
    return isinstance(value, list) and all(type(item) is int for item in value)
