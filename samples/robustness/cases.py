"""A case: a seed and a number, which give a spoilt copy of a good bundle or checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final, Literal

from samples.robustness import absurd_graphs, checkpoints, companions, damage, graphs, manifests
from samples.robustness.target import Goods, Mutation, Target

Kind = Literal["bundle", "checkpoint"]

_DAMAGE: Final[dict[str, Mutation]] = {
    "cut": damage.truncate,
    "bytes changed": damage.flip,
    "bytes pushed in": damage.insert,
    "bytes taken out": damage.delete,
    "repeated": damage.repeat,
    "other contents": damage.replace,
    "another's file": damage.swap,
    "huge": damage.make_huge,
    "gone": damage.remove,
    "link": damage.link,
    "no file": damage.no_file,
}
_TEXTS: Final[dict[str, Mutation]] = {
    "chat template": companions.template,
    "tokenizer": companions.tokenizer_values,
    "tokenizer, parts": companions.tokenizer_parts,
    "tokenizer configuration": companions.tokenizer_config,
}
FAMILIES: Final[dict[Kind, dict[str, Mutation]]] = {
    "bundle": {
        **_DAMAGE,
        **{f"{name}, fitted": damage.fitting(mutation) for name, mutation in _DAMAGE.items()},
        **_TEXTS,
        "manifest": manifests.values,
        "manifest of format 2": manifests.old_format,
        "manifest, newer": manifests.newer,
        "manifest, files": manifests.files,
        "manifest, text": manifests.text,
        "graph, nodes": graphs.nodes,
        "graph, attributes": graphs.attributes,
        "graph, constants": graphs.constants,
        "graph, weights": graphs.weights,
        "graph, weights outside": graphs.outside,
        "graph, interface": graphs.interface,
        "graph, absurd": absurd_graphs.absurd,
        "graph, around it": graphs.around,
    },
    "checkpoint": {
        **_DAMAGE,
        **_TEXTS,
        "config": checkpoints.config,
        "config, fields": checkpoints.config_fields,
        "generation config": checkpoints.generation_config,
        "weights, header": checkpoints.header,
        "weights, index": checkpoints.index,
        "pickles": checkpoints.pickles,
    },
}
_ALL: Final = [(kind, name) for kind, families in FAMILIES.items() for name in families]


@dataclass(frozen=True, slots=True)
class Case:
    """One case, before it is made.

    Attributes:
        seed: Of the whole run.
        number: Within the run. Numbers one after the other are of all families in turn.
        kind: Of what is spoilt.
        family: How it is spoilt, a key of `FAMILIES`.
    """

    seed: int
    number: int
    kind: Kind
    family: str

    @classmethod
    def of(cls, seed: int, number: int) -> Case:
        """The case with this number."""
        kind, family = _ALL[number % len(_ALL)]
        return cls(seed, number, kind, family)

    def make(self, goods: Goods, place: Path) -> tuple[Target, str]:
        """Make it.

        Args:
            goods: What is copied and spoilt.
            place: A new directory for it.

        Returns:
            The spoilt directory, and in a few words what is wrong with it.
        """
        random = Random(f"{self.seed}/{self.number}")  # noqa: S311
        sources = goods.bundles if self.kind == "bundle" else goods.checkpoints
        name, other = random.sample(sorted(sources), 2)
        target = Target(place / self.kind, sources[other], place / "outside")
        target.outside.mkdir(parents=True)
        shutil.copytree(sources[name], target.folder)
        done = FAMILIES[self.kind][self.family](random, target)
        return target, f"{name}: {done}"
