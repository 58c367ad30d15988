"""Pictures of an analysis, and the folder that they go into."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from echoatt_exporter import AnalysisError, OutputExistsError, SharingPlan
from echoatt_exporter.analyze.diagram import plan_signs, plan_svg
from echoatt_exporter.analyze.pictures import image_bytes, similarity_figure, times
from echoatt_exporter.analyze.publish import check_free, published
from echoatt_exporter.analyze.similarity import LayerSimilarity


def similarity_of(layers: int, model: str = "tiny") -> LayerSimilarity:
    """Layers that are the more alike, the closer they stand."""
    distance = np.abs(np.subtract.outer(np.arange(layers), np.arange(layers)))
    mean = 0.9**distance
    return LayerSimilarity(
        mean=mean,
        std=np.where(distance > 0, 0.1, 0.0),
        mean_without_first=mean**3,
        std_without_first=np.where(distance > 0, 0.2, 0.0),
        head_mean=np.repeat(mean[..., None], 2, axis=2),
        samples=7,
        length=32,
        seed=3,
        text_digest="ab" * 32,
        model=model,
        family="llama",
        checkpoint_digest="cd" * 32,
        versions={"torch": "2"},
    )


def texts_of(figure: object) -> list[str]:
    axes = figure.axes  # type: ignore[attr-defined]
    return [text.get_text() for axis in axes for text in axis.texts]


def test_heat_maps_are_a_slide_with_the_numbers_in_their_cells() -> None:
    figure = similarity_figure(similarity_of(6, model="a$b$ <c>"))
    png = image_bytes(figure, "png")
    image_YXC = imread(io.BytesIO(png))
    assert image_YXC.shape[:2] == (1080, 1920)
    assert image_YXC[..., :3].std() > 0.1
    assert (image_YXC[0, 0, :3] == 1).all()
    assert texts_of(figure)[:7] == [".90", ".81", ".73", ".66", ".59", ".90", ".90"]
    assert figure.texts[0].get_text() == "How alike the layers of a$b$ <c> attend"
    assert figure.texts[1].get_text() == (
        "mean over 7 samples of 32 tokens; a layer is 1 to itself"
    )
    left, right = (axis.images[0] for axis in figure.axes[:2])
    assert left.get_clim() == right.get_clim() == (0.2, 0.9)  # one colour bar speaks for both
    sizes = [float(text.get_fontsize()) for axis in figure.axes for text in axis.texts]
    assert min(sizes) >= 8


def test_titles_fit_and_need_no_font_of_their_own() -> None:
    figure = similarity_figure(similarity_of(2, model="a\n" + "m" * 99))
    title = figure.texts[0]
    assert title.get_text() == "How alike the layers of a " + "m" * 25 + "…"
    extent = title.get_window_extent()
    assert 0 < extent.x0 < extent.x1 < figure.bbox.width
    assert image_bytes(similarity_figure(similarity_of(2, model="模型")), "svg")


def test_the_same_similarity_gives_the_same_bytes() -> None:
    first, second = (image_bytes(similarity_figure(similarity_of(3)), "svg") for _ in range(2))
    assert first == second
    assert ET.fromstring(first).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314


def test_many_layers_have_fewer_ticks_and_no_numbers() -> None:
    figure = similarity_figure(similarity_of(40), dark=True)
    assert texts_of(figure) == []
    image_bytes(figure, "svg")  # ticks are placed when it is drawn
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert 5 <= len(labels) <= 17
    assert all(float(label.replace("\u2212", "-")).is_integer() for label in labels)


@pytest.mark.parametrize(
    ("ratio", "text"), [(1.064, "1.06x"), (1240.4, "1,240x"), (3e8, "3e+08x"), (np.inf, "infx")]
)
def test_ratios_stay_short(ratio: float, text: str) -> None:
    assert times(ratio) == text


def test_a_plan_is_drawn_with_an_arc_for_each_follower() -> None:
    plan = SharingPlan((0, 0, 2, 0, 4))
    svg = ET.fromstring(plan_svg(plan, "five <layers>"))  # noqa: S314
    assert svg.find("title").text == "five <layers>"  # type: ignore[union-attr]
    assert [box.get("class") for box in svg.findall("g")] == [
        "source", "follower", "lone", "follower", "lone"
    ]  # fmt: skip
    notes = ["".join(text.text or "" for text in box.findall("text")) for box in svg.findall("g")]
    assert notes == ["0", "1\u2190 0", "2", "3\u2190 0", "4"]
    assert len([path for path in svg.findall("path") if path.get("class") == "arc"]) == 2
    assert plan_signs(plan.sources) == "● 0 ● 0 ●"


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with published(out, force=False) as stage:
        (stage / "plan.json").write_text("1")
        assert not out.exists()
    assert (out / "plan.json").read_text() == "1"

    def fail() -> None:
        with published(out, force=True) as stage:
            (stage / "plan.json").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (out / "plan.json").read_text() == "1"
    with published(out, force=True) as stage:
        (stage / "report.html").write_text("3")
        assert (out / "plan.json").read_text() == "1"  # whenever the process is killed
    assert [path.name for path in out.iterdir()] == ["report.html"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_folder_that_cannot_take_its_place_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "out", Path.rename
    out.mkdir()
    (out / "plan.json").write_text("1")

    def fail(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(AnalysisError, match="Input/output"), published(out, force=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "plan.json").read_text() == "1"


def test_a_folder_with_anything_in_it_is_kept(tmp_path: Path) -> None:
    (tmp_path / "plan.json").touch()
    with pytest.raises(OutputExistsError, match="exists; name another folder, or pass --force"):
        check_free(tmp_path, force=False)
    check_free(tmp_path, force=True)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(OutputExistsError, match="which is no part"):
        check_free(tmp_path, force=True)
    with pytest.raises(OutputExistsError, match="is a file"):
        check_free(tmp_path / "plan.json", force=True)
    with (
        pytest.raises(AnalysisError, match="cannot write the analysis"),
        published(tmp_path / "plan.json" / "out", force=False),
    ):
        pass
