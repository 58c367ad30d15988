"""How alike the attention of a model's layers and heads is.

Shapes in names: L layers, H query heads.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echoatt_exporter.analyze.files import write_whole
from echoatt_exporter.errors import AnalysisError

SCHEMA = "echoatt-similarity/1"

METRICS = {
    "mean": "cosine of two layers' flattened attention maps, mean over samples",
    "std": "its standard deviation over samples",
    "mean_without_first": (
        "the same with the first token's column left out and the rows made to sum to 1 again"
    ),
    "std_without_first": "its standard deviation over samples",
    "head_mean": "cosine of two layers' maps of the same head, mean over samples",
}

_RECORD = {
    int: ("samples", "length", "seed"),
    str: ("text_digest", "model", "family", "checkpoint_digest"),
    dict: ("versions",),
}

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class LayerSimilarity:
    """Similarity of every pair of layers, averaged over samples.

    The metric is EchoAtt's (arXiv 2409.14595, section 3): the cosine of the flattened maps of all
    heads. Attention sinks inflate it, so that it is also given without the first token.

    Attributes:
        mean: Float64 [L, L].
        std: Float64 [L, L], the sample standard deviation of `mean`; 0 for one sample.
        mean_without_first: Float64 [L, L] as `mean`, with column 0 of every map left out and the
            rows made to sum to 1 again; rows with nothing beside the first token count as zeros.
        std_without_first: Float64 [L, L], the sample standard deviation of that.
        head_mean: Float64 [L, L, H], the cosine of the maps of the same head of both layers.
        samples: How many samples were measured.
        length: Tokens in a sample.
        seed: That the samples were drawn with.
        text_digest: SHA-256 of the texts that the samples are from.
        model: What the model is called, usually its directory's name.
        family: Its Hugging Face `model_type`.
        checkpoint_digest: SHA-256 of its files.
        versions: Of the packages that measured it.
    """

    mean: Floats
    std: Floats
    mean_without_first: Floats
    std_without_first: Floats
    head_mean: Floats
    samples: int
    length: int
    seed: int
    text_digest: str
    model: str
    family: str
    checkpoint_digest: str
    versions: Mapping[str, str]

    def to_json(self) -> str:
        """The text of `similarity.json`; `from_json` reads it back exactly."""
        data = asdict(self)
        for name in METRICS:
            data[name] = data[name].tolist()
        return json.dumps({"schema": SCHEMA, "metrics": METRICS, **data}) + "\n"

    @classmethod
    def from_json(cls, text: str, origin: str = "similarity") -> LayerSimilarity:
        """Read the text of a `similarity.json`.

        Args:
            text: What `to_json` wrote. Further keys are the writer's own and are ignored.
            origin: What to call the text in an error, usually the file's path.

        Raises:
            AnalysisError: Text that is not JSON, another schema, or a field that is missing or
                malformed.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise AnalysisError(f"{origin}: not JSON ({error})") from error
        found = data.get("schema") if isinstance(data, dict) else None
        if found != SCHEMA:
            raise AnalysisError(f'{origin}: "schema" is {found!r}, expected "{SCHEMA}"')
        values = {name: data.get(name) for name in (field.name for field in fields(cls))}
        for name in METRICS:
            values[name] = _matrix(values[name])
        if faults := _faults(values):
            raise AnalysisError(f"{origin}: {'; '.join(faults)}; measure it again")
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> LayerSimilarity:
        """Read a `similarity.json`.

        Raises:
            AnalysisError: The file cannot be read, or `from_json` refuses it.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise AnalysisError(f"{path}: cannot read the similarity ({error})") from error
        return cls.from_json(text, str(path))

    def save(self, path: str | Path) -> None:
        """Write a `similarity.json`, replacing one that is there only when all is written.

        Raises:
            AnalysisError: It cannot be written.
        """
        write_whole(Path(path), self.to_json().encode())


def _matrix(value: Any) -> Floats | None:
    """Nested lists of finite numbers as an array, or None."""
    with contextlib.suppress(ValueError, TypeError):
        matrix = np.array(value, dtype=np.float64)
        if matrix.size and np.isfinite(matrix).all():
            return matrix
    return None


def _faults(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the fields of a `similarity.json`, each fault a phrase."""
    missing = [f'"{name}" is no array of numbers' for name in METRICS if values[name] is None]
    if missing:
        return missing
    layers = len(values["mean"])
    faults = [
        f'"{name}" has the shape {values[name].shape}'
        for name in METRICS
        if values[name].shape[:2] != (layers, layers)
        or values[name].ndim != (3 if name == "head_mean" else 2)
    ]
    faults += [
        f'"{name}" is {values[name]!r}'
        for kind, names in _RECORD.items()
        for name in names
        if type(values[name]) is not kind
    ]
    return faults


@dataclass(frozen=True, eq=False, slots=True)
class HeadSimilarity:
    """Similarity of every pair of heads, averaged over samples.

    Attributes:
        head_pairs: Float32 [L, H, L, H], the cosine of the map of a head of one layer and that of a
            head of another.
    """

    head_pairs: NDArray[np.float32]
