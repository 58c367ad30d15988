"""Losses in sliding windows: against the model run on every token's context by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.wording import whole
from tokenizers import processors

from echoatt_exporter import AnalysisError, EchoAttForCausalLM, TextError, share_attention
from echoatt_exporter.evaluate import perplexity
from echoatt_exporter.evaluate.models import CheckpointModel
from echoatt_exporter.evaluate.perplexity import compare_documents, score_documents
from echoatt_exporter.evaluate.score import TextComparison, TextScore
from echoatt_exporter.share.checkpoint import load_model
from echoatt_exporter.texts import Text

Models = Callable[..., Any]
LENGTH, STRIDE = 12, 5
# One token, less than a window, a window exactly, one token more, and several windows
SIZES = (1, 4, 12, 13, 38)


def _documents() -> list[Text]:
    generator = np.random.default_rng(3)
    words = [[f"w{n}" for n in generator.integers(2, 61, size)] for size in SIZES]
    return [Text(str(index), " ".join(row)) for index, row in enumerate(words)]


def _losses_one_by_one(model: Any, documents: list[Text], leads: bool) -> list[float]:
    """The loss of each token by itself, from a forward pass over nothing but its context."""
    lead = [1] if leads else []
    width = LENGTH - len(lead)
    losses = []
    for document in documents:
        tokens = [int(word[1:]) for word in document.content.split()]
        for position in range(0 if leads else 1, len(tokens)):
            moves = max(0, math.ceil((position + 1 - width) / STRIDE))
            end = min(width + moves * STRIDE, len(tokens))
            context = lead + tokens[max(0, end - width) : position]
            assert len(context) >= min(LENGTH - STRIDE, len(lead) + position)
            logits = model(torch.tensor([context])).logits[0, -1].double()
            losses.append(-torch.log_softmax(logits, dim=0)[tokens[position]].item())
    return losses


@pytest.mark.parametrize("leads", [True, False], ids=["leading-token", "none"])
@pytest.mark.parametrize(
    ("family", "shared"),
    [("llama", True), ("gemma2", True), ("granite", True), ("gpt_neox", True), ("qwen3", False)],
)
@torch.no_grad()
def test_every_token_once_with_the_context_that_its_window_gives(
    family: str,
    shared: bool,
    leads: bool,
    tiny_model: Models,
    plan_for: Models,
    tokenizer_of: Models,
) -> None:
    model = tiny_model(family)
    if shared:
        model = share_attention(model, plan_for(family))
    documents, told = _documents(), []

    score = score_documents(
        CheckpointModel(model, tokenizer_of(leads)),
        documents,
        length=LENGTH,
        stride=STRIDE,
        batch_size=3,
        on_progress=lambda done, total: told.append((done, total)),
    )

    expected = _losses_one_by_one(model, documents, leads)
    assert score.tokens == len(expected) == sum(SIZES) - (0 if leads else len(SIZES))
    np.testing.assert_allclose(score.nats, expected, rtol=0, atol=2e-5)
    assert score.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
    assert told[-1] == (score.tokens, score.tokens)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_parts_that_logits_are_made_in_do_not_show(
    tiny_model: Models, plan_for: Models, tokenizer_of: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare() -> TextComparison:
        models = (student, CheckpointModel(tiny_model("llama"), tokenizer_of(True)))
        return compare_documents(*models, _documents(), length=LENGTH, stride=STRIDE)

    shared = share_attention(tiny_model("llama"), plan_for("llama"))
    student = CheckpointModel(shared, tokenizer_of(True))
    whole = compare()
    monkeypatch.setattr(perplexity, "_LOGITS_AT_ONCE", 8 * 61 * 3)
    cut = compare()
    np.testing.assert_allclose(cut.score.nats, whole.score.nats, rtol=0, atol=1e-5)
    np.testing.assert_allclose(cut.reference.nats, whole.reference.nats, rtol=0, atol=1e-5)
    np.testing.assert_allclose(cut.divergence, whole.divergence, rtol=0, atol=1e-5)
    assert cut.agreement.tolist() == whole.agreement.tolist()


@pytest.fixture
def uniform(tiny_model: Models) -> Any:
    """A model to which all 61 tokens are equally likely."""
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


@pytest.mark.parametrize(
    ("leads", "max_tokens", "tokens", "size"),
    [
        (True, None, 7, len("w2 w33 w4 w5") + len("w6 w7 w8")),
        (False, None, 5, len(" w33 w4 w5") + len(" w7 w8")),
        (True, 2, 2, len("w2 w33")),
        (True, 5, 5, len("w2 w33 w4 w5") + len("w6")),
        (False, 2, 2, len(" w33 w4")),
        (False, 4, 4, len(" w33 w4 w5") + len(" w7")),
    ],
)
def test_numbers_known_beforehand(
    leads: bool, max_tokens: int | None, tokens: int, size: int, uniform: Any, tokenizer_of: Models
) -> None:
    documents = [Text("a", "w2 w33 w4 w5"), Text("b", "w6 w7 w8")]
    model = CheckpointModel(uniform, tokenizer_of(leads))
    score = score_documents(model, documents, length=8, stride=4, max_tokens=max_tokens)
    assert (score.tokens, score.bytes) == (tokens, size)
    assert score.nats_per_token == pytest.approx(math.log(61), rel=1e-6)
    assert score.perplexity == pytest.approx(61, rel=1e-6)
    assert score.bits_per_byte == pytest.approx(tokens * math.log2(61) / size, rel=1e-6)


def test_bytes_are_utf_8(uniform: Any, tokenizer_of: Models) -> None:
    model = CheckpointModel(uniform, tokenizer_of(True))
    score = score_documents(model, [Text("a", "w2 \u20ac\u20ac w3\n")], length=8, stride=4)
    assert (score.tokens, score.bytes) == (3, 3 + 6 + 3 + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 65}, "windows of 65 tokens are outside .* give 2 to 64"),
        ({"length": 1}, "windows of 1 tokens are outside"),
        ({"stride": 0}, "a stride of 0 tokens does not fit .* give 1 to 7"),
        ({"stride": 8}, "a stride of 8 tokens does not fit windows of 8"),
        ({"batch_size": 0}, "a batch size of 0 leaves nothing to do"),
        ({"max_tokens": 0}, "a maximum of tokens of 0 leaves nothing to do"),
    ],
)
def test_windows_that_cannot_be_are_refused(
    changes: dict[str, int], message: str, uniform: Any, tokenizer_of: Models
) -> None:
    model = CheckpointModel(uniform, tokenizer_of(True))
    with pytest.raises(AnalysisError, match=whole(message)):
        score_documents(model, _documents(), **{"length": 8, "stride": 4, **changes})


def test_text_and_models_that_give_no_number_are_refused(
    tiny_model: Models, uniform: Any, tokenizer_of: Models
) -> None:
    def score(model: Any, content: str, leads: bool = False) -> TextScore:
        scored = CheckpointModel(model, tokenizer_of(leads))
        return score_documents(scored, [Text("a", content)], length=8, stride=4)

    with pytest.raises(TextError, match="no document has two tokens"):
        score(uniform, "w3")
    with pytest.raises(
        AnalysisError, match=whole("token id 60 is outside the model's vocabulary of 50")
    ):
        score(tiny_model("llama", vocab_size=50), "w3 w60")
    torch.nn.init.constant_(uniform.lm_head.weight, math.inf)
    with pytest.raises(AnalysisError, match="loss is not a number"):
        score(uniform, "w3 w4")


def test_models_that_cannot_be_held_against_each_other_are_refused(
    tiny_model: Models, uniform: Any, tokenizer_of: Models
) -> None:
    def compare(reference: CheckpointModel, length: int = 8) -> None:
        model = CheckpointModel(uniform, tokenizer_of(True))
        compare_documents(model, reference, _documents(), length=length, stride=4)

    other = tiny_model("llama", vocab_size=62)
    with pytest.raises(AnalysisError, match="vocabularies of 61 and 62 tokens do not fit"):
        compare(CheckpointModel(other, tokenizer_of(True)))
    other_lead = tokenizer_of(True)
    other_lead.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="w9 $A", special_tokens=[("w9", 9)]
    )
    for tokenizer in (tokenizer_of(False), other_lead):
        with pytest.raises(AnalysisError, match="the text is other tokens to either model"):
            compare(CheckpointModel(uniform, tokenizer))
    short = tiny_model("llama", max_position_embeddings=16)
    with pytest.raises(AnalysisError, match=whole(r"windows of 17 tokens .* give 2 to 16")):
        compare(CheckpointModel(short, tokenizer_of(True)), length=17)


def test_either_kind_of_directory_is_loaded(
    tiny_model: Models, plan_for: Models, tmp_path: Path
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "teacher")
    share_attention(tiny_model("llama"), plan_for("llama")).save_pretrained(tmp_path / "student")
    assert type(load_model(tmp_path / "teacher")).__name__ == "LlamaForCausalLM"
    student = load_model(tmp_path / "student", dtype=torch.float64)
    assert isinstance(student, EchoAttForCausalLM)
    assert student.dtype == torch.float64
