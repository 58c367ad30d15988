"""`echoatt analyze`: a folder with a plan and a report, or one line that says why not."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from matplotlib.image import imread
from tests.tiny_models import VOCAB_SIZE, build_tiny_model
from tests.wording import says
from tokenizers import Tokenizer, models, pre_tokenizers

from echoatt_cli import main
from echoatt_cli.analyze import _HEADINGS, _METHODS, _Lines
from echoatt_exporter import SharingPlan, load_shared
from echoatt_exporter.analyze.choice import Method
from echoatt_exporter.analyze.run import analyze_model
from echoatt_exporter.analyze.similarity import LayerSimilarity
from echoatt_exporter.share.checkpoint import load_teacher
from echoatt_exporter.texts import load_tokenizer, read_texts, sample_windows, texts_digest

LAYERS, LENGTH = 4, 24
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, with a tokenizer of one-letter words, whose name wants to be markup."""
    directory = tmp_path_factory.mktemp("models") / "tiny<script>&"
    build_tiny_model("llama", num_hidden_layers=LAYERS).save_pretrained(directory)
    words = {"<unk>": 0} | {chr(ord("a") + index): index + 1 for index in range(26)}
    words |= {f"w{index}": index for index in range(len(words), VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}'
    )
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven documents of random letters, each of a window and a half."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("texts") / "some <script> letters.jsonl"
    documents = torch.randint(97, 123, (7, LENGTH * 3 // 2), generator=generator).tolist()
    lines = (json.dumps({"text": " ".join(map(chr, document))}) for document in documents)
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*arguments)`: exit code, standard output and standard error of `echoatt`."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@dataclass(frozen=True)
class Analysis:
    """What a run of the command left and printed."""

    out: Path
    printed: str
    told: str

    def read(self, name: str) -> Any:
        return json.loads((self.out / name).read_text())


@pytest.fixture(scope="module")
def by_cost(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    """The default method, run once."""
    out = tmp_path_factory.mktemp("analyses") / "by cost"
    arguments = ("analyze", checkpoint, "--text", text, "--out", out, "--length", LENGTH)
    printed = io.StringIO()
    told = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
        assert main([str(argument) for argument in arguments]) == 0
    return Analysis(out, printed.getvalue(), told.getvalue())


def test_methods_are_those_of_the_library() -> None:
    assert get_args(Method) == _METHODS


def test_cost_writes_everything_and_shows_the_front(by_cost: Analysis, text: Path) -> None:
    assert sorted(path.name for path in by_cost.out.iterdir()) == [
        "front", "plan.json", "report.html", "search.json", "similarity.json", "similarity.png"
    ]  # fmt: skip
    assert [path.name for path in by_cost.out.parent.iterdir()] == ["by cost"]
    search, plan = by_cost.read("search.json"), by_cost.read("plan.json")
    assert plan["sources"] == search["chosen"]["sources"]
    assert (plan["method"], plan["ratio"]) == ("cost", 0.25)
    assert plan["kl"] == search["chosen"]["kl"] > 0
    front = [one["followers"] for one in search["front"]]
    assert front == [1, 2, 3]  # up to 75 %
    for one in search["front"]:
        file = by_cost.out / "front" / f"0{one['followers']}-of-4.json"
        assert list(SharingPlan.load(file).sources) == one["sources"]
        assert says(by_cost.printed, f"{one['kl']:.4f} ± {one['kl_standard_error']:.4f}")
    assert by_cost.printed.startswith("plan: ● ")
    assert "(1 of 4 layers follow, 25%" in by_cost.printed
    assert says(by_cost.printed, "7 samples of 24 tokens")
    similarity = LayerSimilarity.load(by_cost.out / "similarity.json")
    assert (similarity.samples, similarity.length, similarity.seed) == (7, LENGTH, 0)
    assert similarity.text_digest == plan["text_digest"] == texts_digest(read_texts([text]))
    png = imread(by_cost.out / "similarity.png")
    assert png.shape[:2] == (1080, 1920)
    assert png[..., :3].std() > 0.1


def test_without_a_terminal_each_step_is_a_line(by_cost: Analysis) -> None:
    lines = by_cost.told.splitlines()
    assert all(line.startswith("echoatt: ") and line.endswith(" s") for line in lines)
    begun = list(dict.fromkeys(line.split(": ")[1] for line in lines))
    # loading is short; so little text is all run at the first look, which leaves nothing to do for
    # the last step, and pairs are fitted where that is asked for
    assert begun == [_HEADINGS[name] for name in ("samples", "screen", "pairs", "plans")]


def test_lines_of_progress_come_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    on_step = _Lines(clock=lambda: now[0])
    for done in range(1, 50):
        now[0] += 1
        on_step("samples" if done < 30 else "screen", done, 50)
    assert capsys.readouterr().err.splitlines() == [
        "echoatt: comparing attention maps: 1 of 50, after 1 s",
        "echoatt: comparing attention maps: 21 of 50, after 21 s",
        "echoatt: estimating all pairs: 30 of 50, after 30 s",
    ]


class StoppedError(Exception):
    """In the place of a signal."""


def stop_at(step: str, times: int) -> Callable[[str, int, int], None]:
    """An `on_step` that raises when a step has been told of so many times."""
    left = [times]

    def on_step(name: str, _done: int, _total: int) -> None:
        left[0] -= name == step
        if not left[0]:
            raise StoppedError

    return on_step


def test_a_stopped_analysis_goes_on_to_the_same_result(
    by_cost: Analysis,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in every step; what a kill leaves half written is not read."""
    for module in ("progress", "measured"):
        monkeypatch.setattr(f"echoatt_exporter.analyze.{module}._BETWEEN", -1)
    monkeypatch.setattr("echoatt_exporter.analyze.probe._BATCH_TOKENS", LENGTH)
    monkeypatch.setattr("echoatt_exporter.analyze.screen._BATCH_TOKENS", LENGTH)
    monkeypatch.setattr("echoatt_exporter.analyze.probe._FEW_TOKENS", 2 * LENGTH)
    whole_run = analyze_model(checkpoint, [text], tmp_path / "whole", length=LENGTH)
    out = tmp_path / "stopped"
    stops = [("samples", 3), ("screen", 2), ("pairs", 1), ("plans", 2), ("best plans", 4)]
    for step, times in stops:
        with pytest.raises(StoppedError):
            analyze_model(checkpoint, [text], out, length=LENGTH, on_step=stop_at(step, times))
        assert [path.name for path in out.iterdir()] == ["progress"]
    # killed in the middle of writing
    (out / "progress" / ".measured.json.partial").write_text("[{")
    told: list[tuple[str, int, int]] = []
    found = analyze_model(
        checkpoint, [text], out, length=LENGTH, on_step=lambda *news: told.append(news)
    )
    resumed = [done for step, done, _ in told if step == "resumed"]
    assert len(resumed) == 1
    assert resumed[0] > 3
    steps = {step for step, _, _ in told}
    assert steps == {"load", "resumed", "best plans"}  # the others were done
    assert found.search is not None
    assert whole_run.search is not None
    assert found.search.to_dict() == whole_run.search.to_dict()
    for name in ("similarity.json", "search.json", "plan.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in by_cost.out.iterdir()
    )


def test_what_another_analysis_began_is_not_gone_on_with(
    checkpoint: Path, text: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    with pytest.raises(StoppedError):
        analyze_model(checkpoint, [text], out, length=LENGTH, on_step=stop_at("samples", 3))
    command = ("analyze", checkpoint, "--text", text, "--out", out, "--length", LENGTH - 1)
    code, _, err = run(*command)
    assert code == 2
    assert "another analysis was begun here" in err
    assert [path.name for path in out.iterdir()] == ["progress"]
    code, _, err = run(*command, "--force")
    assert code == 0
    assert "going on" not in err
    assert not (out / "progress").exists()


def test_progress_that_cannot_be_kept_is_one_line(
    checkpoint: Path, text: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def fill_the_disk(file: Path, data: bytes) -> int:
        if "samples" in file.name:
            raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr("echoatt_exporter.analyze.progress._BETWEEN", -1)
    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    out = tmp_path / "o"
    command = ("analyze", checkpoint, "--text", text, "--out", out, "--length", LENGTH, "--json")
    code, printed, err = run(*command)
    assert (code, printed) == (2, "")
    assert err.startswith(f"echoatt: {out / 'progress' / 'samples.npz'}: cannot write the file (")
    assert says(err, "No space left on device")
    assert err.count("\n") == 1


def test_interrupted_it_says_what_is_kept(
    checkpoint: Path, text: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("echoatt_exporter.analyze.run.search_plans", interrupted)
    out = tmp_path / "o"
    code, _, err = run("analyze", checkpoint, "--text", text, "--out", out, "--length", LENGTH)
    assert code == 130
    assert err.endswith(
        f"echoatt: stopped; {out / 'progress'} keeps what was measured, and the same command goes"
        " on from there\n"
    )
    assert {path.name for path in (out / "progress").iterdir()} == {
        "key.json", "samples.npz", "screen.npz", "measured.json"
    }  # fmt: skip


def test_a_plan_that_ruins_the_model_is_called_that_before_what_to_do_next(
    by_cost: Analysis, checkpoint: Path, text: Path, run: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert "ruin" not in by_cost.printed
    assert 'class="warning"' not in (by_cost.out / "report.html").read_text()
    monkeypatch.setattr("echoatt_exporter.analyze.probe.RUIN", 1.0)
    out = tmp_path / "o"
    code, printed, _ = run(
        "analyze", checkpoint, "--text", text, "--out", out, "--length", LENGTH,
        "--method", "paper", "--ratio", 0.5,
    )  # fmt: skip
    assert code == 0
    assert printed.index("This plan ruins the model") < printed.index("report.html")
    page = (out / "report.html").read_text()
    assert page.index("This plan ruins the model") < page.index("What to do next")


def test_the_plan_is_what_was_measured(by_cost: Analysis, checkpoint: Path, text: Path) -> None:
    """Student and teacher are run here, on the calibration windows."""
    plan = SharingPlan.load(by_cost.out / "plan.json")
    windows = sample_windows(read_texts([text]), load_tokenizer(checkpoint), length=24, count=200)
    teacher, student = load_teacher(checkpoint), load_shared(checkpoint, plan)
    with torch.no_grad():
        expected, found = (
            model(input_ids=windows).logits.double().log_softmax(-1) for model in (teacher, student)
        )
    kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
    assert by_cost.read("plan.json")["kl"] == pytest.approx(kl, rel=1e-3)


def test_the_page_has_the_measured_numbers_and_escaped_names(by_cost: Analysis) -> None:
    html = (by_cost.out / "report.html").read_text()
    assert "<script" not in html
    assert "tiny&lt;script&gt;&amp;: which layers may share attention" in html
    assert "some &lt;script&gt; letters.jsonl" in html
    for one in by_cost.read("search.json")["front"]:
        for name in ("kl", "kl_standard_error", "perplexity_ratio", "parameters"):
            assert f'<data value="{one[name]}">' in html


def test_max_kl_without_alignment(
    by_cost: Analysis, checkpoint: Path, text: Path, run: Run, tmp_path: Path
) -> None:
    limit = by_cost.read("search.json")["front"][1]["kl"] * 1.2
    code, printed, err = run(
        "analyze", checkpoint, "--text", text, "--out", tmp_path / "o", "--length", LENGTH,
        "--max-kl", limit, "--no-align", "--calibration-windows", 3, "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    report = json.loads(printed)
    assert report["chosen"]["kl"] <= limit
    assert report["chosen"] in report["front"]
    assert report["calibration_windows"] == 3
    assert report["alignment"] is None
    assert all(one["head_orders"] == [] for one in report["front"])
    assert "head_orders" not in json.loads((tmp_path / "o" / "plan.json").read_text())


def test_paper_replaces_an_analysis_and_measures_the_same(
    by_cost: Analysis, checkpoint: Path, text: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    shutil.copytree(by_cost.out, out)
    command = (
        "analyze", checkpoint, "--text", text, "--out", out, "--length", LENGTH,
        "--method", "paper", "--ratio", 0.5,
    )  # fmt: skip
    code, _, err = run(*command)
    assert (code, err) == (2, f"echoatt: {out}: exists; name another folder, or pass --force\n")
    code, printed, _ = run(*command, "--force")
    assert code == 0
    assert "(2 of 4 layers follow, 50%" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "plan-without-first-token.json", "plan.json", "report.html", "similarity.json",
        "similarity.png",
    ]  # fmt: skip
    same = (out / "similarity.json").read_bytes()
    assert same == (by_cost.out / "similarity.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_a_failure_at_the_end_leaves_what_was_there(
    by_cost: Analysis,
    checkpoint: Path,
    text: Path,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("echoatt_exporter.analyze.save.render_report", fail)
    out = tmp_path / "o"
    shutil.copytree(by_cost.out, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    command = (
        "analyze", checkpoint, "--text", text, "--length", LENGTH, "--seed", 1, "--samples", 3,
        "--method", "threshold", "--min-similarity", 0, "--force",
    )  # fmt: skip
    code, printed, err = run(*command, "--out", out)
    assert (code, printed) == (2, "")
    assert err.splitlines()[-1].startswith(f"echoatt: {out}: cannot write the analysis")
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert after.pop("progress")  # what was measured is not lost
    assert after == before
    assert run(*command, "--out", tmp_path / "new")[0] == 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["progress"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "o"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ratio", "0.5", "--max-kl", "1"), "either --ratio or --max-kl, not both"),
        (("--min-similarity", "0.5"), "--min-similarity does not go with the method cost"),
        (("--method", "paper", "--max-kl", "1"), "method paper, which takes --ratio"),
        (("--method", "threshold"), "threshold needs --min-similarity"),
        (("--method", "threshold", "--min-similarity", "2"), "outside 0 to 1"),
        (("--ratio", "nan"), "outside 0 to 1"),
        (("--ratio", "0.9"), "at most 3 can be"),
        (("--max-kl", "0"), "more than 0"),
        (("--samples", "1"), "two samples"),
        (("--length", "65"), "context of 64"),
        (("--length", "1"), "context of 64"),
        (("--length", "40"), "the longest has 36"),
        (("--device", "abacus"), "abacus"),
        (("--text", "{tmp}/absent.txt"), "absent.txt"),
        (("--text", "{tmp}/blank.txt"), "no text"),
        (("--text", "{tmp}/short.txt"), "one sample of 24 tokens"),
        (("--text", "{tmp}/model.onnx"), "not a kind of text file"),
        (("--out", "{tmp}", "--force"), "which is no part of an analysis"),
        (("--out", "{tmp}/blank.txt"), "is a file"),
    ],
)
def test_bad_input_is_one_line_before_any_long_work(
    options: tuple[str, ...],
    message: str,
    checkpoint: Path,
    text: Path,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("echoatt_exporter.analyze.run.measure_similarity")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("a b c " * (LENGTH // 2))
    (tmp_path / "model.onnx").touch()
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = run(
        "analyze", checkpoint, "--text", text, "--out", tmp_path / "o", "--length", LENGTH,
        *(option.format(tmp=tmp_path) for option in options),
    )  # fmt: skip
    assert (code, out) == (2, "")
    assert err.startswith("echoatt: ")
    assert err.count("\n") == 1
    assert says(err, message)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_students_and_directories_without_a_tokenizer_are_refused(
    checkpoint: Path, text: Path, run: Run, tmp_path: Path
) -> None:
    command = ("--text", text, "--out", tmp_path / "o", "--length", LENGTH)
    student = load_shared(checkpoint, "1:0")
    student.save_pretrained(tmp_path / "student")
    code, _, err = run("analyze", tmp_path / "student", *command)
    assert code == 2
    assert "is a student; a teacher is needed here" in err
    shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    code, _, err = run("analyze", tmp_path / "bare", *command)
    assert code == 2
    assert "no tokenizer, and text needs one" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "o").exists()
