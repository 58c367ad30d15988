"""A bench's results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from echoatt_exporter.bench.results import BenchResults, Measured, Phase, Point
from echoatt_exporter.bench.statistics import Spread

_NONE = "-"
_PLACE = ("batch", "context", "engine")
_DECODE_HEADS = (
    "ms a step", "quartiles", "tokens/s", "floor, ms", "x floor", "Python, ms", "text, ms"
)  # fmt: skip
_PREFILL_HEADS = ("ms to the first token", "quartiles", "tokens/s")
_MEMORY_HEADS = ("load, ms", "peak, MB", "without mapped files, MB", "cache bytes a token")


def to_markdown(results: BenchResults) -> str:
    """Everything that a reader needs: what ran, where, the numbers, and what to make of them."""
    parts = [_header(results), *_tables(results), _notes(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(results: BenchResults) -> str:
    machine, options = results.machine, results.options
    speeds = [speed for point in results.points for speed in point.memory_speed]
    spread = Spread.of(speeds)
    lines = [
        f"`{results.command}`",
        "",
        f"- {results.started}, {machine.processor}, {machine.cores} cores,"
        f" {machine.memory_bytes / 2**30:.0f} GiB, {machine.system}, Python {machine.python}",
        f"- {options.threads} threads for every engine; memory read at"
        f" {spread.median / 1e9:.1f} GB/s ({spread.low / 1e9:.1f} to {spread.high / 1e9:.1f})"
        " between the rounds",
    ]
    engines: dict[str, list[str]] = {}
    for name, version in results.versions.items():
        engines.setdefault(version, []).append(name)
    lines += [f"- {', '.join(names)}: {version}" for version, names in engines.items()]
    lines += [f"- not measured: {peer}: {why}" for peer, why in results.absent.items()]
    return "\n".join(lines)


def _tables(results: BenchResults) -> Iterable[str]:
    if "decode" in results.options.phases:
        rows = [row for point in results.points for row in _decode_rows(point)]
        yield _table("Decode", (*_PLACE, *_DECODE_HEADS), rows)
        yield _ratio_table(results, "decode")
    if "prefill" in results.options.phases:
        rows = [row for point in results.points for row in _prefill_rows(point)]
        yield _table("Prefill", (*_PLACE, *_PREFILL_HEADS), rows)
        yield _ratio_table(results, "prefill")
    rows = [row for point in results.points for row in _memory_rows(point)]
    yield _table("Loading and memory", (*_PLACE, *_MEMORY_HEADS), rows)


def _decode_rows(point: Point) -> Iterable[Sequence[str]]:
    for measured in point.measured:
        cells = _spread_cells(measured, "decode", point.batch)
        floor = point.floor_seconds(measured)
        factor = _NONE
        if floor and measured.decode_seconds:
            factor = f"{Spread.of(measured.decode_seconds).median / floor:.2f}"
        extra = measured.extra_seconds
        own = [_milliseconds(extra.get(name, ()), 3) for name in ("python", "text")]
        yield (*_place(point, measured), *cells, _number(floor, 1e3, 2), factor, *own)


def _prefill_rows(point: Point) -> Iterable[Sequence[str]]:
    for measured in point.measured:
        tokens = point.batch * point.context
        yield (*_place(point, measured), *_spread_cells(measured, "prefill", tokens))


def _memory_rows(point: Point) -> Iterable[Sequence[str]]:
    for measured in point.measured:
        kept = measured.cache_bytes_per_token
        yield (
            *_place(point, measured),
            _number(measured.load_seconds, 1e3, 0),
            _number(measured.peak_bytes, 1e-6, 0),
            _number(measured.anonymous_bytes, 1e-6, 0),
            _NONE if kept is None else f"{kept:,}",
        )


def _ratio_table(results: BenchResults, phase: Phase) -> str:
    rows = [
        (
            str(ratio.batch),
            str(ratio.context),
            ratio.engine,
            ratio.against,
            f"{ratio.ratio.median:.2f}",
            f"{ratio.ratio.low:.2f} to {ratio.ratio.high:.2f}",
        )
        for ratio in results.ratios()
        if ratio.phase == phase
    ]
    if not rows:
        return ""
    title = f"{phase.capitalize()}: the other's time / the bundle's, paired by round"
    return _table(title, ("batch", "context", "bundle", "other", "ratio", "quartiles"), rows)


def _notes(results: BenchResults) -> str:
    options = results.options
    lines = [
        "Samples: engines took turns, A B A B; only one works at a time, the others took"
        f" {results.waiting_share:.1%} of one processor together while they waited.",
    ]
    if "decode" in options.phases:
        lines.append(
            f"Decode: {options.rounds} rounds of {options.new_tokens} greedy steps; a round's"
            " sample is the median of its steps, and there is room for all of them before. With"
            " one row every round starts at the context; with several each goes on where the last"
            " stopped. Where no prefill was measured EchoAtt's caches hold random numbers; the"
            " others always run one. Floor: reading the weights of all products and the caches once"
            " at the memory's speed."
        )
    if "prefill" in options.phases:
        lines.append(
            f"Prefill: {options.prefill_rounds} rounds, from an empty cache to the first token."
        )
    lines.append(
        "Memory: of each engine's own process, which did nothing but this point; loading is timed"
        " after importing the package, with files in the page cache."
    )
    failures = [
        f"batch {point.batch}, context {point.context}: {measured.failure}"
        for point in results.points
        for measured in point.measured
        if measured.failure
    ]
    return "\n".join(f"- {line}" for line in (*lines, *results.notes, *failures))


def _place(point: Point, measured: Measured) -> tuple[str, str, str]:
    return str(point.batch), str(point.context), measured.engine


def _spread_cells(measured: Measured, phase: Phase, tokens: int) -> tuple[str, str, str]:
    samples = measured.samples(phase)
    if not samples:
        return "failed", _NONE, _NONE
    spread = Spread.of(samples)
    low, high = _number(spread.low, 1e3, 2), _number(spread.high, 1e3, 2)
    return _number(spread.median, 1e3, 2), f"{low} to {high}", f"{tokens / spread.median:,.1f}"


def _milliseconds(samples: Sequence[float], digits: int) -> str:
    return _number(Spread.of(samples).median, 1e3, digits) if samples else _NONE


def _number(value: float | None, scale: float, digits: int) -> str:
    return _NONE if value is None else f"{value * scale:,.{digits}f}"


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    words = ("engine", "bundle", "other", "operator")
    rule = ["---" if head in words else "--:" for head in heads]
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]
    return "\n".join((f"### {title}", "", *lines))
