"""What has to lie on disk before a bench: a shape's checkpoint and bundles, made once and kept."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from echoatt_exporter.bench.engines import PEERS, EngineSpec, bundle_engines, why_absent
from echoatt_exporter.bench.peers import peer_engine
from echoatt_exporter.bench.shapes import CONTEXT_LENGTH, SHAPES, Shape, make_checkpoint
from echoatt_exporter.errors import BenchError
from echoatt_exporter.export import export_bundle
from echoatt_exporter.quantise.quantise import RoundingChoice
from echoatt_exporter.share.weight_files import checkpoint_digest
from echoatt_runtime.contract import DTYPES, SharingPlan

OnStep = Callable[[str], None]

# What of this package a bundle's content depends on: a change there makes bundles anew
_EXPORT_SOURCES = (
    "families",
    "share",
    "trace",
    "graph",
    "quantise",
    "bundle",
    "architecture.py",
    "export.py",
)


def default_work() -> Path:
    """Where models are kept that a bench made: in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "echoatt" / "bench"


@dataclass(frozen=True, slots=True)
class Prepared:
    """Engines ready to be measured.

    Attributes:
        engines: Bundles first, then peers.
        absent: Peers that cannot run, and why.
        notes: What a reader must know of the models.
    """

    engines: tuple[EngineSpec, ...]
    absent: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ShapeRequest:
    """Bundles of a named shape.

    Attributes:
        name: A key of `SHAPES`.
        dtype: Of the bundles.
        plans: `unshared` or a ratio in percent each.
        own_plan: A further plan, or its pairs.
    """

    name: str
    dtype: str
    plans: Sequence[str]
    own_plan: SharingPlan | str | None = None


def prepare_shape(
    request: ShapeRequest, work: Path, peers: Sequence[str], on_step: OnStep
) -> Prepared:
    """Make whatever of a shape is not there yet.

    Args:
        request: What.
        work: Where models are kept.
        peers: What to measure beside; `all` stands for every peer that can run.
        on_step: Told what is being made.

    Raises:
        BenchError: No such shape or plan, or a peer asked for by name that cannot run.
        EchoAttError: As `echoatt_exporter.export.export_bundle`.
    """
    shape = _shape(request.name)
    plans = [_plan(shape, text) for text in request.plans]
    if request.own_plan is not None:
        layers = shape.fields["num_hidden_layers"]
        plans.append(SharingPlan.of(request.own_plan, layers))
        plans[-1].validate(["full"] * layers)
    _check_installed(peers)
    home = work / request.name
    on_step(f"making the {request.name} checkpoint")
    checkpoint = home / "checkpoint"
    make_checkpoint(shape, checkpoint)
    bundles = []
    for plan in dict.fromkeys(plans):
        on_step(f"exporting {request.dtype}, {plan.ratio:.0%} shared")
        bundles.append(_bundle(checkpoint, home, plan, request.dtype))
    engines, absent = _with_peers(bundle_engines(bundles), checkpoint, home, peers, on_step)
    notes = (
        f"{request.name}: random bfloat16 weights, seed 0, max_position_embeddings raised to"
        f" {CONTEXT_LENGTH:,}; bundles exported without verification.",
        *_peer_notes(engines),
    )
    return Prepared(tuple(engines), absent, notes)


def prepare_bundles(
    paths: Sequence[Path],
    checkpoint: Path | None,
    work: Path,
    peers: Sequence[str],
    on_step: OnStep,
) -> Prepared:
    """The engines of given bundles and, with the checkpoint they came from, of peers.

    Args:
        paths: The bundles.
        checkpoint: The unshared checkpoint; only peers need it.
        work: As in `prepare_shape`.
        peers: As in `prepare_shape`.
        on_step: As in `prepare_shape`.

    Raises:
        BenchError: Peers without a checkpoint, or one that cannot run.
        EchoAttError: A bundle or the checkpoint cannot be read.
    """
    bundles = bundle_engines(paths)
    if not peers:
        return Prepared(tuple(bundles), _not_asked_for(bundles), ())
    if checkpoint is None:
        raise BenchError(
            "peers run the unshared model, which a bundle does not hold; pass --checkpoint DIR"
        )
    _check_installed(peers)
    home = work / checkpoint_digest(checkpoint)[:16]
    engines, absent = _with_peers(bundles, checkpoint, home, peers, on_step)
    return Prepared(tuple(engines), absent, _peer_notes(engines))


def _shape(name: str) -> Shape:
    if name not in SHAPES:
        raise BenchError(f"there is no shape {name!r}; choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def _plan(shape: Shape, text: str) -> SharingPlan:
    if text == "unshared":
        return SharingPlan.unshared(shape.fields["num_hidden_layers"])
    if not text.isdecimal():
        raise BenchError(f"a plan is 'unshared' or a ratio in percent, not {text!r}")
    return shape.plan(int(text))


def _check_installed(peers: Sequence[str]) -> None:
    """Before anything is made: refuse a peer that was asked for by name and is absent."""
    for peer in peers:
        if peer != "all" and (reason := why_absent(peer)):
            raise BenchError(f"{peer} cannot run: {reason}")


def _with_peers(
    bundles: list[EngineSpec], checkpoint: Path, home: Path, peers: Sequence[str], on_step: OnStep
) -> tuple[list[EngineSpec], dict[str, str]]:
    engines = list(bundles)
    failed: dict[str, str] = {}
    wanted = list(PEERS) if "all" in peers else list(dict.fromkeys(peers))
    for peer in wanted:
        for dtype in dict.fromkeys(bundle.dtype for bundle in bundles):
            on_step(f"making {peer}'s {dtype} model")
            try:
                engine = peer_engine(peer, checkpoint, home, dtype)
            except BenchError as error:
                if "all" not in peers:
                    raise
                failed[peer] = str(error)
                continue
            # torch is float32 whatever the bundles are, and the same again
            if engine not in engines:
                engines.append(engine)
    if wrong := {e.vocab_size for e in engines} - {bundles[0].vocab_size}:
        raise BenchError(
            f"{checkpoint} has a vocabulary of {wrong.pop()} and the bundles one of"
            f" {bundles[0].vocab_size}; give the checkpoint that they were made from"
        )
    return engines, {**_not_asked_for(engines), **failed}


def _not_asked_for(engines: Sequence[EngineSpec]) -> dict[str, str]:
    kinds = {engine.kind for engine in engines}
    return {
        peer: why_absent(peer) or f"not asked for; add --against {peer}"
        for peer in PEERS
        if peer not in kinds
    }


def _peer_notes(engines: Sequence[EngineSpec]) -> tuple[str, ...]:
    kinds = {engine.kind for engine in engines}
    notes = {
        "genai": "genai: its own builder's model of the unshared checkpoint; quantised by its"
        " default, symmetric blocks of 32 at accuracy level 4, as EchoAtt's are.",
        "torch": "torch: transformers' generate with SDPA and a DynamicCache, float32.",
        "llama.cpp": "llama.cpp: every matrix in the type named, the head too; its cache is"
        " float16.",
    }
    return tuple(note for kind, note in notes.items() if kind in kinds)


def _bundle(checkpoint: Path, home: Path, plan: SharingPlan, dtype: str) -> Path:
    key = hashlib.sha256(plan.to_json().encode()).hexdigest()[:8]
    stem = f"{dtype}-{plan.ratio:.0%}-{key}".replace("%", "")
    directory = home / f"{stem}-{_exporter_digest()[:8]}"
    model = directory / "model.onnx"
    if not model.is_file():
        # of an older exporter, and only in the way
        for stale in home.glob(f"{stem}-*"):
            shutil.rmtree(stale)
        # How long a step takes does not depend on which level a weight has
        nearest = None if DTYPES[dtype].bits is None else RoundingChoice(rounding="nearest")
        export_bundle(checkpoint, model, plan, dtype=dtype, rounding=nearest, verify=False)
        # gigabytes that only cycles hold: the engines will need them
        gc.collect()
    return model


def _exporter_digest() -> str:
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for name in _EXPORT_SOURCES:
        path = root / name
        for source in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(source.read_bytes())
    return digest.hexdigest()
