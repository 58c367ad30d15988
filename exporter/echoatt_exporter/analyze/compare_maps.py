"""Compare the attention maps of a model's layers, one sample of text at a time.

Shapes in names: L layers, H query heads, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from echoatt_exporter.analyze.attention_maps import attention_maps
from echoatt_exporter.analyze.similarity import HeadSimilarity, LayerSimilarity
from echoatt_exporter.errors import AnalysisError

# Rows of every map that are multiplied at a time: bounds what the products take beside the maps
_ROWS = 32
# Less mass than this beside the first token is rounding, and would be blown up to a whole row
_LEAST_MASS = 1e-6

Floats = NDArray[np.float64]


class _Running:
    """Mean and squared distances of arrays that come one at a time (Welford's method)."""

    def __init__(self, mean: Floats | None = None, squares: Floats | None = None) -> None:
        self.mean = np.zeros(()) if mean is None else mean
        self.squares = np.zeros(()) if squares is None else squares

    def add(self, value: Floats, count: int) -> None:
        """Take in the value that is number `count`, from 1."""
        distance = value - self.mean
        self.mean = self.mean + distance / count
        self.squares = self.squares + distance * (value - self.mean)

    def std(self, count: int) -> Floats:
        """The sample standard deviation; 0 for one sample."""
        return np.asarray(np.sqrt(self.squares / max(1, count - 1)))


class SimilaritySums:
    """What the samples so far add up to.

    Attributes:
        count: Samples so far.
    """

    _NAMES = ("layers", "layers_without_first", "heads")

    def __init__(self, arrays: Mapping[str, Floats] | None = None) -> None:
        """Start with nothing, or with what `arrays` gave."""
        self.count = 0 if arrays is None else int(arrays["count"])
        self._running = {
            name: _Running()
            if arrays is None
            else _Running(arrays[f"{name}_mean"], arrays[f"{name}_squares"])
            for name in self._NAMES
        }

    def arrays(self) -> dict[str, Floats]:
        """Everything, by name; the same sums can be made of it."""
        return {
            "count": np.array(float(self.count)),
            **{f"{name}_mean": one.mean for name, one in self._running.items()},
            **{f"{name}_squares": one.squares for name, one in self._running.items()},
        }

    def add(self, layers: Floats, layers_without_first: Floats, heads: Floats) -> None:
        """Take in one sample's cosines: [L, L] twice and [L, H, L, H]."""
        self.count += 1
        for name, value in zip(self._NAMES, (layers, layers_without_first, heads), strict=True):
            self._running[name].add(value, self.count)

    def mean(self, name: str) -> Floats:
        """The mean of one of the cosines."""
        return self._running[name].mean

    def std(self, name: str) -> Floats:
        """The sample standard deviation of one of the cosines."""
        return self._running[name].std(self.count)


def measure_similarity(
    teacher: PreTrainedModel,
    windows: torch.Tensor,
    *,
    text_digest: str,
    model: str,
    checkpoint_digest: str,
    seed: int,
    sums: SimilaritySums | None = None,
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
        sums: Those of the first samples, from an earlier call; the others are added in place.
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
    sums = SimilaritySums() if sums is None else sums
    for done, window in enumerate(windows[sums.count :], start=sums.count + 1):
        raw_LHLH, without_first_LL = _products(attention_maps(teacher, window))
        if not np.isfinite(raw_LHLH).all():
            raise AnalysisError(
                f"the attention on sample {done} is not a number; load the model as float32"
            )
        L, H = raw_LHLH.shape[:2]
        sums.add(
            _cosines(np.einsum("ihjh->ij", raw_LHLH)),
            _cosines(without_first_LL),
            _cosines(raw_LHLH.reshape(L * H, L * H)).reshape(L, H, L, H),
        )
        if on_sample is not None:
            on_sample(done)
    similarity = LayerSimilarity(
        mean=sums.mean("layers"),
        std=sums.std("layers"),
        mean_without_first=sums.mean("layers_without_first"),
        std_without_first=sums.std("layers_without_first"),
        head_mean=np.einsum("ihjh->ijh", sums.mean("heads")).copy(),
        samples=len(windows),
        length=windows.shape[1],
        seed=seed,
        text_digest=text_digest,
        model=model,
        family=teacher.config.model_type,
        checkpoint_digest=checkpoint_digest,
        versions={name: version(name) for name in ("echoatt", "torch", "transformers")},
    )
    return similarity, HeadSimilarity(sums.mean("heads").astype(np.float32))


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
