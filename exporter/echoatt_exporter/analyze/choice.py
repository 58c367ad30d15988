"""How a plan is chosen: the method, and the limit that goes with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from echoatt_exporter.architecture import DecoderArchitecture
from echoatt_exporter.errors import AnalysisError

Method = Literal["cost", "paper", "threshold"]

# What the cost method shares when no limit is given
_DEFAULT_RATIO = 0.25
# How far its front goes: to so many times the ratio that is asked for, and to this one at most
_FRONT_TIMES, _FRONT_RATIO = 3, 0.75

_LIMITS: dict[str, tuple[str, ...]] = {
    "cost": ("ratio", "max_kl"),
    "paper": ("ratio",),
    "threshold": ("min_similarity",),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """A method with its limit.

    Attributes:
        method: `cost`, `paper` or `threshold`.
        ratio: Followers / layers wanted, for `cost` and `paper`.
        max_kl: The most that the plan may cost, nats a token, for `cost`.
        min_similarity: Of a follower to its source, for `threshold`.
        refit: Whether a plan costs what it does once its followers are re-fitted, for `cost`.
    """

    method: Method
    ratio: float | None = None
    max_kl: float | None = None
    min_similarity: float | None = None
    refit: bool = False

    @classmethod
    def of(
        cls,
        method: Method,
        *,
        ratio: float | None = None,
        max_kl: float | None = None,
        min_similarity: float | None = None,
        refit: bool = False,
    ) -> Choice:
        """Check what goes with what, and fill in the default ratio of `cost`.

        Raises:
            AnalysisError: An unknown method, a limit of another one, or a limit that cannot be.
        """
        if method not in get_args(Method):
            raise AnalysisError(
                f"unknown method {method!r}; choose one of {', '.join(get_args(Method))}"
            )
        limits = {"ratio": ratio, "max_kl": max_kl, "min_similarity": min_similarity}
        given = [name for name, limit in limits.items() if limit is not None]
        fitting = _LIMITS[method]
        if wrong := [name for name in given if name not in fitting]:
            raise AnalysisError(
                f"{_option(wrong[0])} does not go with the method {method}, which takes"
                f" {' or '.join(map(_option, fitting))}"
            )
        if len(given) > 1:
            raise AnalysisError(f"give either {' or '.join(map(_option, given))}, not both")
        if method == "threshold" and min_similarity is None:
            raise AnalysisError("the method threshold needs --min-similarity")
        if ratio is not None and not 0 < ratio < 1:
            raise AnalysisError(f"a sharing ratio of {ratio:g} is outside 0 to 1; 0.4 is 40 %")
        if max_kl is not None and not max_kl > 0:
            raise AnalysisError(f"a KL of at most {max_kl:g} leaves no plan; give more than 0")
        if min_similarity is not None and not 0 <= min_similarity <= 1:
            raise AnalysisError(f"a similarity of {min_similarity:g} is outside 0 to 1")
        if refit and method != "cost":
            raise AnalysisError(f"--refit does not go with the method {method}, but with cost")
        if method == "cost" and not given:
            ratio = _DEFAULT_RATIO
        return cls(method, ratio, max_kl, min_similarity, refit)

    def check(self, architecture: DecoderArchitecture) -> None:
        """Check the ratio against a model.

        Raises:
            AnalysisError: More followers than the model's layers allow, or none.
        """
        layers, most = architecture.num_layers, _most_followers(architecture)
        if not most:
            raise AnalysisError(f"none of the model's {layers} layers can follow another")
        if self.ratio is not None and round(self.ratio * layers) > most:
            raise AnalysisError(
                f"a sharing ratio of {self.ratio:g} asks for {round(self.ratio * layers)} followers"
                f" in {layers} layers, and at most {most} can be: the first layer of each attention"
                f" kind has no source; give at most {most / layers:.2f}"
            )

    def front_ratio(self, architecture: DecoderArchitecture) -> float | None:
        """How far to search beyond what is asked for, as far as the model allows.

        Who asks for little is shown more than that and need not wait for all. None with `max_kl`,
        which says by itself how far to go.
        """
        if self.ratio is None:
            return None
        most = _most_followers(architecture) / architecture.num_layers
        return max(self.ratio, min(_FRONT_TIMES * self.ratio, _FRONT_RATIO, most))

    @property
    def in_words(self) -> str:
        """How the plan was chosen, for a reader."""
        if self.method == "cost":
            fitted = ", re-fitted" if self.refit else ""
            if self.ratio is None:
                return f"The most followers within a KL of {self.max_kl:g} nats a token{fitted}"
            return f"The cheapest measured plan for a sharing ratio of {self.ratio:.0%}{fitted}"
        if self.method == "threshold":
            return f"Layers follow a source that they are at least {self.min_similarity:g} like"
        where = "at the largest gap" if self.ratio is None else f"where {self.ratio:.0%} follow"
        return f"The paper's selection: layers by mean similarity, cut {where}"


def _most_followers(architecture: DecoderArchitecture) -> int:
    return architecture.num_layers - len(set(architecture.sharing_kinds))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
