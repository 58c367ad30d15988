"""A bundle of the format before this one, as its exporter wrote it, still loads and runs.

It is a random Llama of four layers with the plan [0, 0, 2, 2], in int8, with a tokenizer and a chat
template that passes the messages' contents on. What is expected was computed by the runtime of its
own time.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from echoatt_runtime import DamagedBundleError, EchoModel, SamplingParams
from echoatt_runtime.bundle import read_manifest

BUNDLE = Path(__file__).parent / "data" / "format-2"
GREEDY = {
    "Hello": (160, 124, 9, 51, 282, 207, 175, 275, 266, 160, 6, 195),
    "abc def": (128, 169, 106, 4, 218, 20, 26, 48, 164, 208, 81, 175),
}
# Below it the next token may be another one on a CPU with other int8 kernels
CLEAR_MARGIN = 0.05


@pytest.fixture(scope="module")
def model() -> EchoModel:
    return EchoModel.load(BUNDLE, verify=True)


def test_manifest_is_read_as_the_present_one(model: EchoModel) -> None:
    specification = model.manifest.specification
    assert specification.plan.sources == (0, 0, 2, 2)
    assert specification.dtype == "int8"
    assert [cache.name for cache in specification.caches] == [
        "0.key", "0.value", "1.value", "2.key", "2.value", "3.value",
    ]  # fmt: skip
    assert model.manifest.verification is not None
    assert model.manifest.weights.bytes == (BUNDLE / "model.onnx.data").stat().st_size
    assert read_manifest(BUNDLE) == model.manifest


@pytest.mark.parametrize("prompt", list(GREEDY))
def test_it_generates_what_it_did(model: EchoModel, prompt: str) -> None:
    expected = GREEDY[prompt]
    [result] = model.generate(prompt, SamplingParams(max_new_tokens=12, ignore_eos=True))
    ids = model.tokenizer.encode(prompt)
    # The margins along the expected tokens, which this CPU may leave at an unclear one
    logits = np.sort(model.logits([*ids, *expected[:-1]])[len(ids) - 1 :])
    margins = logits[:, -1] - logits[:, -2]
    clear = int(np.argmax(margins < CLEAR_MARGIN)) or len(expected)
    assert clear >= 6
    assert result.token_ids[:clear] == expected[:clear]


def test_logits_are_what_they_were(model: EchoModel) -> None:
    np.testing.assert_allclose(
        model.logits([1, 2, 3, 4, 5])[-1, :4],
        [-1.578036904335022, -1.0938977003097534, -0.5519397258758545, 0.9915019273757935],
        atol=1e-2,
    )


def test_companions_that_lie_beside_it_are_its_own(model: EchoModel, tmp_path: Path) -> None:
    """Its manifest lists none: such a bundle takes what there is."""
    greedy = SamplingParams(max_new_tokens=4, ignore_eos=True)
    [chat] = model.generate([{"role": "user", "content": "Hello"}], greedy)
    assert chat.token_ids == GREEDY["Hello"][:4]

    for name in ("model.onnx", "model.onnx.data"):
        shutil.copyfile(BUNDLE / name, tmp_path / name)
    bare = EchoModel.load(tmp_path)
    assert bare.logits([1, 2, 3]).shape == (3, 300)
    with pytest.raises(DamagedBundleError, match=r"no tokenizer\.json"):
        bare.generate("Hello", greedy)
