"""How alike the attention of a model's layers and heads is.

Shapes in names: L layers, H query heads, T tokens.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from echoatt_exporter.analyze.attention_maps import attention_maps
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

# Rows of every map that are multiplied at a time: bounds what the products take beside the maps
_ROWS = 32
# Less mass than this beside the first token is rounding, and would be blown up to a whole row
_LEAST_MASS = 1e-6

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
        path = Path(path)
        try:
            with tempfile.TemporaryDirectory(prefix=".echoatt-", dir=path.parent) as stage:
                staged = Path(stage) / path.name
                staged.write_text(self.to_json(), encoding="utf-8")
                staged.replace(path)
        except OSError as error:
            raise AnalysisError(f"{path}: cannot write the similarity ({error})") from error


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


class _Running:
    """Mean and variance of arrays that come one at a time (Welford's method)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = np.zeros(())
        self._squares = np.zeros(())

    def add(self, value: Floats) -> None:
        self.count += 1
        distance = value - self.mean
        self.mean = self.mean + distance / self.count
        self._squares = self._squares + distance * (value - self.mean)

    @property
    def std(self) -> Floats:
        """The sample standard deviation; 0 for one sample."""
        return np.asarray(np.sqrt(self._squares / max(1, self.count - 1)))


def measure_similarity(
    teacher: PreTrainedModel,
    windows: torch.Tensor,
    *,
    text_digest: str,
    model: str,
    checkpoint_digest: str,
    seed: int,
    on_sample: Callable[[int], None] | None = None,
) -> tuple[LayerSimilarity, HeadSimilarity]:
    """Compare a model's attention maps on samples of text, one sample at a time.

    Memory beside the model's own is one sample's maps, L · H · T² floats, and a little more. On the
    CPU the same call gives the same numbers, bit for bit, with the same number of threads.

    Args:
        teacher: As `attention_maps` takes it.
        windows: Int64 [samples, T] token ids.
        text_digest: Of the texts that the windows are from, for the record.
        model: What to call the teacher, for the record.
        checkpoint_digest: Of the teacher's directory, for the record.
        seed: That the windows were drawn with, for the record.
        on_sample: Called after each sample with the number of samples done.

    Raises:
        UnsupportedModelError: As `attention_maps`.
        AnalysisError: As `attention_maps`; no samples, windows of one token, or attention
            that is not a number.
    """
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 2:
        raise AnalysisError(
            f"windows {list(windows.shape)} cannot be compared; give [samples, tokens] with at"
            " least one sample of two tokens"
        )
    layers, layers_without_first, heads = _Running(), _Running(), _Running()
    for done, window in enumerate(windows, start=1):
        raw_LHLH, without_first_LL = _products(attention_maps(teacher, window))
        if not np.isfinite(raw_LHLH).all():
            raise AnalysisError(
                f"the attention on sample {done} is not a number; load the model as float32"
            )
        L, H = raw_LHLH.shape[:2]
        layers.add(_cosines(np.einsum("ihjh->ij", raw_LHLH)))
        layers_without_first.add(_cosines(without_first_LL))
        heads.add(_cosines(raw_LHLH.reshape(L * H, L * H)).reshape(L, H, L, H))
        if on_sample is not None:
            on_sample(done)
    similarity = LayerSimilarity(
        mean=layers.mean,
        std=layers.std,
        mean_without_first=layers_without_first.mean,
        std_without_first=layers_without_first.std,
        head_mean=np.einsum("ihjh->ijh", heads.mean).copy(),
        samples=len(windows),
        length=windows.shape[1],
        seed=seed,
        text_digest=text_digest,
        model=model,
        family=teacher.config.model_type,
        checkpoint_digest=checkpoint_digest,
        versions={name: version(name) for name in ("echoatt", "torch", "transformers")},
    )
    return similarity, HeadSimilarity(heads.mean.astype(np.float32))


def _products(maps_LHTT: torch.Tensor) -> tuple[Floats, Floats]:
    """Scalar products of one sample's maps.

    Returns:
        float64 [L, H, L, H] of every pair of heads, and [L, L] of every pair of layers without the
        first token.
    """
    L, H, T, _ = maps_LHTT.shape
    raw = np.zeros((L * H, L * H))
    without_first = np.zeros((L, L))
    for start in range(0, T, _ROWS):
        stop = min(start + _ROWS, T)
        # Causal: what is right of the last row's own column is zero
        rows = maps_LHTT[:, :, start:stop, :stop].contiguous()
        raw += _gram(rows.view(L * H, -1))
        rest = rows[..., 1:]
        mass = rest.sum(dim=-1, keepdim=True)
        rest = torch.where(mass > _LEAST_MASS, rest / mass, 0.0)
        without_first += _gram(rest.reshape(L, -1))
    return raw.reshape(L, H, L, H), without_first


def _gram(vectors: torch.Tensor) -> Floats:
    """Scalar products of the rows of a float32 matrix [n, m], as float64 [n, n]."""
    return (vectors @ vectors.T).cpu().numpy().astype(np.float64)


def _cosines(products: Floats) -> Floats:
    """Cosines from scalar products, [n, n]; a vector of zeros is like nothing."""
    norms = np.sqrt(np.diagonal(products))
    scale = np.outer(norms, norms)
    cosines = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    return np.asarray(np.minimum(cosines, 1.0))
