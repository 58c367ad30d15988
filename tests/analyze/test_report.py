"""The report: one page that stands alone, with the numbers that were measured."""

from __future__ import annotations

import base64
import itertools
import math
import re
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tests.analyze.test_pictures import similarity_of
from tests.tiny_models import build_tiny_model
from tests.wording import says

from echoatt_cli import _parser
from echoatt_exporter import SharingPlan
from echoatt_exporter.analyze.candidates import PlanCandidate, PlanSearch
from echoatt_exporter.analyze.diagram import plan_svg
from echoatt_exporter.analyze.findings import (
    AnalysisReport,
    HeadAlignment,
    SinkFinding,
    head_alignment,
)
from echoatt_exporter.analyze.footprint import footprint_of
from echoatt_exporter.analyze.pictures import trade_off_figure
from echoatt_exporter.analyze.probe import PlanCost
from echoatt_exporter.analyze.report import render_report
from echoatt_exporter.analyze.similarity import HeadSimilarity
from echoatt_exporter.architecture import architecture_of

VOID = {"meta", "img", "source", "br"}


class Page(HTMLParser):
    """A page's elements, with every opened one closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, name: str) -> list[str]:
        """Every value of an attribute."""
        return [value or "" for _, attributes in self.tags for key, value in attributes.items()
                if key == name]  # fmt: skip


def candidates(plans: Iterable[tuple[int, ...]]) -> list[PlanCandidate]:
    config = build_tiny_model("gemma2").config
    return [
        PlanCandidate(
            plan=SharingPlan(sources),
            cost=PlanCost(
                kl=0.0123456 * 3**number,
                kl_standard_error=0.00123 * (1 + number),
                perplexity=12.5 * (1 + number / 7),
                teacher_perplexity=12.25,
                windows=5,
            ),
            footprint=footprint_of(config, SharingPlan(sources), context=60),
        )
        for number, sources in enumerate(plans)
    ]


@pytest.fixture(scope="module")
def report() -> AnalysisReport:
    """An analysis of a model with two kinds of attention, by hand; full of marks to escape."""
    front = candidates([(0, 1, 0, 3, 4, 5), (0, 1, 0, 1, 4, 5), (0, 1, 0, 1, 0, 1)])
    pairs_LL = np.full((6, 6), np.nan)
    for follower, source in ((2, 0), (4, 0), (4, 2), (3, 1), (5, 1), (5, 3)):
        pairs_LL[follower, source] = 0.0001 * 7 ** (follower - source)
    return AnalysisReport(
        model_dir=Path("models/a <b> & c"),
        out=Path("out/it's"),
        text_paths=(Path("<script>alert(1)</script>.txt"), Path("two words.md")),
        documents=1234,
        architecture=architecture_of(build_tiny_model("gemma2").config),
        method="cost",
        selection="The <cheapest> plan",
        similarity=similarity_of(6, model="<script>alert(2)</script>"),
        importance=(0.5, 0.7, 0.6, 0.9, 0.8, 0.4),
        chosen=front[1],
        search=PlanSearch(pairs_LL, pairs_LL < 0.01, tuple(front), tuple(front), front[1], tried=9),
        sink=None,
        alignment=(HeadAlignment(2, 0, 3, 4, 0.25, 0.75), HeadAlignment(3, 1, 0, 4, 0.5, 0.5)),
        calibration_windows=5,
        refit=False,
        created="2026-01-02T03:04:05+00:00",
        seconds=67.8,
    )


@pytest.fixture(scope="module")
def page(report: AnalysisReport) -> Page:
    return Page(render_report(report))


def test_the_page_needs_nothing_but_itself(page: Page) -> None:
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    assert all(
        value.startswith("data:image/svg+xml;base64,")
        for name in ("src", "srcset")
        for value in page.values(name)
    )
    assert len(page.values("src")) == len(page.values("srcset")) == 2  # light and dark, of both
    assert page.values("href") == []
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for picture in page.values("src"):
        svg = base64.b64decode(picture.partition(",")[2])
        assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314


def test_names_and_paths_are_text(page: Page) -> None:
    assert "<script>alert(2)</script>: which layers may share attention" in page.text
    assert "<script>alert(1)</script>.txt, two words.md (1,234 documents" in page.text
    assert "The <cheapest> plan; judged on 5 windows of 32 tokens" in page.text


def test_every_number_of_the_front_is_the_searchs(page: Page, report: AnalysisReport) -> None:
    assert report.search is not None
    wanted = [
        float(number)
        for one in report.search.front
        for number in (
            len(one.plan.followers), one.plan.ratio, one.cost.kl, one.cost.kl_standard_error,
            one.cost.perplexity_ratio, one.footprint.parameters,
            one.footprint.cache_bytes_per_token, one.estimated_speed,
        )
    ]  # fmt: skip
    shown = [float(attributes["value"] or "nan") for tag, attributes in page.tags if tag == "data"]
    assert shown[: len(wanted)] == wanted
    pairs = [cost for cost in report.search.pair_costs.flat if not math.isnan(cost)]
    assert shown[len(wanted) : len(wanted) + len(pairs)] == pairs
    assert says(page.text, "0.0123 ± 0.0012")
    assert "● ● 0 1 ● ●" in page.text
    assert page.values("class").count("chosen") == 1
    assert page.values("class").count("used") == 2  # 2 after 0 and 3 after 1
    # unlike layers and what is not earlier
    assert page.text.count("·") == 15 - len(pairs)


def test_the_plan_and_its_savings_are_told(page: Page, report: AnalysisReport) -> None:
    classes = page.values("class")
    assert [classes.count(name) for name in ("source", "follower", "lone")] == [2, 2, 2]
    footprint = report.chosen.footprint
    assert says(page.text, f"{footprint.parameters:,} of {footprint.teacher.parameters:,}")
    assert "layers that follow 2 of 6 33%" in page.text
    assert says(page.text, "2 0 3 of 4 0.250 0.750")
    # the least like the others comes first, with the layer that it is most like
    assert says(page.text, "1 5 own attention 0.400")


def test_commands_can_be_pasted(report: AnalysisReport) -> None:
    """They are read here by the commands' own parsers."""
    lines = re.findall("<pre><code>(.*?)</code></pre>", render_report(replace(report, search=None)))
    commands = [shlex.split(unescape(line)) for line in lines]
    assert [command[0] for command in commands] == ["echoatt"] * 4 + ["echoatt-export"]
    parser = _parser()
    share, refit, distill, evaluate = (parser.parse_args(command[1:]) for command in commands[:4])
    export = parser.parse_args(["export", *commands[4][1:]])
    model, student, healed = "models/a <b> & c", "out/it's-student", "out/it's-healed"
    fitted = "out/it's-fitted"
    assert (share.model_dir, share.student_dir) == (model, student)
    assert share.plan == "out/it's/plan.json"
    assert (refit.student_dir, refit.teacher, refit.out) == (student, model, fitted)
    assert (distill.teacher, distill.student, distill.out) == (model, fitted, healed)
    assert refit.text == distill.text == ["<script>alert(1)</script>.txt", "two words.md"]
    assert (evaluate.model, evaluate.against) == (f"{healed}/student", model)
    assert (export.model_dir, export.out) == (f"{healed}/student", f"{healed}.onnx")


def test_warnings_come_before_what_to_do_next(report: AnalysisReport) -> None:
    assert report.warnings == []
    worse = replace(report.chosen.cost, kl=1.7)
    ruined = replace(report, chosen=replace(report.chosen, cost=worse))
    assert says(
        ruined.warnings[0], "This plan ruins the model: perplexity 1.2 times as high, KL 1.70"
    )
    assert not replace(worse, kl=1.5).ruined
    assert replace(worse, kl=0.1, perplexity=5.1 * 12.25).ruined
    beside = SinkFinding(kept=0.04, beside=candidates([(0, 1, 0, 1, 4, 5)])[0])
    both = replace(ruined, search=None, method="paper", sink=beside)
    page = Page(render_report(both)).text
    sink = page.index("The cut is the attention sink's: without the first token 4% is left")
    assert page.index("This plan ruins the model") < sink < page.index("What to do next")
    assert "lets 2 of 6 follow, at a KL of 0.0123" in page
    unlike = replace(both, sink=replace(beside, kept=0.9))
    assert len(unlike.warnings) == 1


@pytest.mark.parametrize("layers", [2, 12, 18, 30, 48, 80])
def test_the_diagram_shows_every_layer_on_the_page(layers: int) -> None:
    """The page is 68 rem wide with margins of 1: 1,056 pixels."""
    sources = tuple(x if x % 3 == 0 else x - x % 3 if x % 2 else 0 for x in range(layers))
    svg = ET.fromstring(plan_svg(SharingPlan(sources), "a plan"))  # noqa: S314 - our own
    width, height = float(svg.attrib["width"]), float(svg.attrib["height"])
    assert width <= 1056
    boxes = []
    for group in svg.iter("g"):
        rect, number, note = list(group)
        x, y, wide, high = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
        boxes.append((y, x, x + wide))
        assert x >= 0
        assert x + wide <= width
        assert y + high + 16 <= height
        # digits of 14 and 12 pixels are less than two thirds of that wide
        assert len(number.text or "") * 14 * 0.6 <= wide
        assert len(note.text or "") * 12 * 0.6 <= wide * 1.3
    assert len(boxes) == layers
    assert boxes == sorted(boxes)
    for (row, _, right), (next_row, left, _) in itertools.pairwise(boxes):
        assert row < next_row or right < left
    arcs = [path.attrib["d"] for path in svg.iter("path") if path.attrib["class"] == "arc"]
    assert len(arcs) == sum(x != source for x, source in enumerate(sources))
    for arc in arcs:
        points = [float(number) for number in re.findall(r"-?[0-9.]+", arc)]
        xs, ys = points[::2], points[1::2]
        assert all(0 <= x <= width for x in xs)
        # a curve reaches three quarters of the way to its control points
        assert ys[0] - 0.75 * (ys[0] - min(ys)) >= 0


def test_a_plan_without_followers_and_without_a_search(report: AnalysisReport) -> None:
    (unshared,) = candidates([tuple(range(6))])
    page = Page(
        render_report(replace(report, method="paper", chosen=unshared, search=None, alignment=None))
    )
    assert "No layer follows another" in page.text
    assert {"trade-off", "pairs", "heads"}.isdisjoint(page.values("id"))


def test_a_plan_whose_heads_stay_as_they_stand(report: AnalysisReport) -> None:
    page = Page(render_report(replace(report, search=None, alignment=None)))
    assert "Head alignment was turned off" in page.text


def test_the_trade_off_shows_every_plan(report: AnalysisReport) -> None:
    assert report.search is not None
    figure = trade_off_figure(report.search)
    lines = figure.axes[0].get_lines()
    costs = [np.asarray(line.get_ydata()) for line in lines]
    assert costs[0].tolist() == [one.cost.kl for one in report.search.candidates]
    assert np.asarray(lines[1].get_xdata()).tolist() == [1 / 6, 2 / 6, 4 / 6]
    assert costs[-1].tolist() == [report.chosen.cost.kl]
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.02x", "1.17x", "1.31x"]


def test_alignment_is_measured_on_the_followers_heads() -> None:
    pairs = np.zeros((2, 3, 2, 3), dtype=np.float32)
    pairs[1, :, 0, :] = [[0.1, 0.7, 0.2], [0.6, 0.3, 0.1], [0.0, 0.2, 0.8]]
    plan = SharingPlan((0, 0), head_orders=((), (2, 0, 1)))
    (row,) = head_alignment(plan, HeadSimilarity(pairs))
    assert (row.follower, row.source, row.moved, row.heads) == (1, 0, 3, 3)
    assert row.before == pytest.approx((0.1 + 0.3 + 0.8) / 3)
    assert row.after == pytest.approx((0.0 + 0.7 + 0.1) / 3)
