import dataclasses
import shutil

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from echoatt_runtime import (
    ChatTemplateError,
    ContextOverflowError,
    DamagedBundleError,
    EchoModel,
    NumericalError,
    OptionError,
    PromptError,
    SamplingParams,
)
from echoatt_runtime.bundle import read_manifest

PARAMS = SamplingParams(max_new_tokens=30, ignore_eos=True)


def test_text_is_the_decoded_tokens(model, decoder):
    prompt = "Hello, world"
    result = model.generate(prompt, PARAMS)[0]
    prompt_ids = model.tokenizer.encode(prompt)
    assert list(result.token_ids) == decoder.greedy(prompt_ids, 30)
    whole = model.tokenizer.decode([*prompt_ids, *result.token_ids])
    assert whole == prompt + result.text
    assert (result.prompt_tokens, result.new_tokens) == (12, 30)
    assert result.finish_reason == "length"


def test_stream_pieces_join_to_the_result(model):
    pieces = list(model.stream("Hello", PARAMS))
    result = pieces[-1].result
    assert "".join(piece.text for piece in pieces) == result.text
    assert sum((piece.token_ids for piece in pieces), ()) == result.token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert [piece.result is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert all(piece.text for piece in pieces[:-1])
    assert result.text == model.generate("Hello", PARAMS)[0].text
    assert result.token_ids == model.generate("Hello", PARAMS)[0].token_ids


def test_timings_add_up(model):
    timings = model.generate("Hello", PARAMS)[0].timings
    assert timings.time_to_first_token > 0
    assert timings.decode_tokens_per_second == pytest.approx(29 / timings.decode_seconds)
    single = model.generate("Hello", SamplingParams(max_new_tokens=1))[0]
    assert single.timings.decode_tokens_per_second == 0


def test_kinds_of_prompts_and_batches(model):
    tokens = model.tokenizer.encode("Hello")
    expected = model.generate("Hello", PARAMS)[0].token_ids
    for prompts in (tokens, tuple(tokens), np.array(tokens), ["Hello"], [tokens]):
        (result,) = model.generate(prompts, PARAMS)
        assert result.token_ids == expected
    first, second = model.generate(["Hello", [72, 1, 5]], PARAMS)
    assert first.token_ids == expected
    assert second.token_ids == model.generate([72, 1, 5], PARAMS)[0].token_ids


def test_a_batch_of_texts_equals_its_prompts_alone(model):
    prompts = ["a", "some words " * 30, "é"]
    for params in (PARAMS, SamplingParams(max_new_tokens=30, temperature=1.0, seed=3)):
        together = model.generate(prompts, params)
        alone = [model.generate(prompt, params)[0] for prompt in prompts]
        for ours, theirs in zip(together, alone, strict=True):
            assert (ours.text, ours.token_ids, ours.finish_reason) == (
                theirs.text,
                theirs.token_ids,
                theirs.finish_reason,
            )


def test_stop_strings_end_a_row_and_not_the_others(model):
    prompts = ["Hello", "World"]
    free = model.generate(prompts, PARAMS)
    # Two characters of the first text that the second lacks, neither of them the very first.
    stop = next(
        text
        for at in range(1, len(free[0].text) - 1)
        if (text := free[0].text[at : at + 2]) not in free[1].text
    )
    params = SamplingParams(max_new_tokens=30, ignore_eos=True, stop=stop)
    first, second = model.generate(prompts, params)
    assert first.text == free[0].text[: free[0].text.index(stop)]
    assert first.finish_reason == "stop"
    assert first.new_tokens < 30
    assert first.token_ids == free[0].token_ids[: first.new_tokens]
    assert (second.text, second.finish_reason) == (free[1].text, "length")
    assert "".join(piece.text for piece in model.stream("Hello", params)) == first.text


def test_an_end_token_is_counted_but_is_no_text(model):
    free = model.generate("Hello", PARAMS)[0]
    end = free.token_ids[10]
    place = free.token_ids.index(end)
    params = SamplingParams(max_new_tokens=30, ignore_eos=True, stop_token_ids=[end])
    result = model.generate("Hello", params)[0]
    assert result.token_ids == free.token_ids[: place + 1]
    assert result.finish_reason == "stop"
    shorter = SamplingParams(max_new_tokens=place, ignore_eos=True)
    assert result.text == model.generate("Hello", shorter)[0].text


def test_held_back_text_comes_at_the_end(model):
    free = model.generate("Hello", PARAMS)[0]
    never_completed = free.text[-3:] + "\0never"
    params = SamplingParams(max_new_tokens=30, ignore_eos=True, stop=[never_completed])
    assert model.generate("Hello", params)[0].text == free.text


def test_logits_of_a_whole_text(bundle, decoder):
    tokens = list(np.random.default_rng(0).integers(0, 256, 600))
    for chunk in (100, 256, 1000):
        model = EchoModel.load(bundle, prefill_chunk=chunk)
        logits_SV = model.logits(tokens)
        np.testing.assert_allclose(logits_SV, decoder.logits(tokens), atol=1e-4)
    with pytest.raises(ContextOverflowError, match="601 tokens do not fit the context of 600"):
        model.logits([*tokens, 1])
    with pytest.raises(PromptError, match="no tokens"):
        model.logits([])


@pytest.mark.parametrize(
    ("prompts", "fault"),
    [
        ("", "the prompt is empty"),
        ([], "there are no prompts"),
        ([""], "the prompt is empty"),
        (["a", []], "the prompt is empty"),
        ([1, "a"], "mixes kinds"),
        (["a", [True]], "mixes kinds"),
        ([[1.5]], "mixes kinds"),
        ([5, 400], "outside the vocabulary"),
    ],
)
def test_prompts_that_cannot_run(model, prompts, fault):
    with pytest.raises(PromptError, match=fault):
        model.generate(prompts, PARAMS)


def test_stream_complains_at_the_call(model):
    with pytest.raises(PromptError, match="empty"):
        model.stream("", PARAMS)
    with pytest.raises(ContextOverflowError, match="shorten the prompt"):
        model.stream("x" * 600, PARAMS)


def test_chat_messages_go_through_the_template(make_bundle, model, byte_tokenizer):
    # The template writes all special tokens itself: what the tokenizer adds would double them.
    byte_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    directory = make_bundle(
        companions={"tokenizer.json": byte_tokenizer.to_str(), "chat_template.jinja": template}
    )
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    chatting = EchoModel.load(directory)
    rendered = "<user>Hi<assistant>Yes?<assistant>"
    expected = model.generate(rendered, PARAMS)[0].token_ids
    assert chatting.generate(chat, PARAMS)[0].token_ids == expected
    assert chatting.generate([chat, "a"], PARAMS)[0].token_ids == expected
    assert chatting.generate("a", PARAMS)[0].prompt_tokens == 2
    with pytest.raises(ChatTemplateError, match="no chat template"):
        model.generate(chat, PARAMS)


def test_without_a_tokenizer_the_bundle_loads_and_says_what_is_missing(bundle, tmp_path, restamp):
    directory = shutil.copytree(bundle, tmp_path / "bare")
    manifest = read_manifest(directory)
    bare_manifest = dataclasses.replace(manifest, files=(manifest.weights,))
    restamp(directory / "model.onnx", bare_manifest.to_json())
    bare = EchoModel.load(directory)  # and not the stranger's tokenizer beside it
    assert bare.logits([1, 2]).shape == (2, 258)
    with pytest.raises(DamagedBundleError, match=r"no tokenizer\.json"):
        bare.generate("a", PARAMS)


def test_chunks_out_of_range(bundle):
    with pytest.raises(OptionError, match="prefill_chunk is 0"):
        EchoModel.load(bundle, prefill_chunk=0)


def test_parameters_for_each_prompt(model):
    prompts = ["Hello", "World", "Hello"]
    each = [PARAMS, SamplingParams(max_new_tokens=5, temperature=1.0, seed=2), PARAMS]
    together = model.generate(prompts, each)
    for prompt, own, result in zip(prompts, each, together, strict=True):
        assert result.token_ids == model.generate(prompt, own)[0].token_ids
    with pytest.raises(OptionError, match="2 sampling parameters for 3 prompts"):
        model.generate(prompts, each[:2])


def test_errors_of_one_prompt(make_bundle, decoder):
    embedding = decoder.weights["embedding"].copy()
    embedding[7] = np.nan
    model = EchoModel.load(make_bundle(weights={"embedding": embedding}))
    bad, good = model.generate([[1, 7], [1, 2]], PARAMS, return_errors=True)
    assert (bad.finish_reason, bad.new_tokens, bad.text) == ("error", 0, "")
    assert isinstance(bad.error, NumericalError)
    assert (good.finish_reason, good.error) == ("length", None)
    with pytest.raises(NumericalError, match="after 2 tokens are not finite"):
        model.generate([[1, 7], [1, 2]], PARAMS)
    with pytest.raises(NumericalError, match="not finite"):
        list(model.stream([1, 7], PARAMS))
