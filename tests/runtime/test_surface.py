"""What callers hand in by mistake, and what is as good as Python's own."""

import os
import re

import numpy as np
import pytest

from echoatt_runtime import (
    BundleNotFoundError,
    DeviceError,
    EchoAttError,
    EchoModel,
    OptionError,
    PlanError,
    PromptError,
    SamplingError,
    SamplingParams,
    SharingPlan,
)


def named(value):
    """A test's name, which is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", ascii(value))


PARAMS = SamplingParams(max_new_tokens=3, ignore_eos=True)
MESSAGE = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("arguments", "error", "fault"),
    [
        ({"path": None}, BundleNotFoundError, "None is no path"),
        ({"path": 5}, BundleNotFoundError, "5 is no path"),
        ({"path": b"model.onnx"}, BundleNotFoundError, "b'model.onnx' is no path"),
        ({"device": None}, DeviceError, "unknown device None"),
        ({"device": ["cpu"]}, DeviceError, r"unknown device \['cpu'\]"),
        ({"device": np.array(["cpu", "cuda"])}, DeviceError, "unknown device array"),
        ({"threads": 1.5}, OptionError, "threads is 1.5; give an integer from 1 to"),
        ({"threads": "2"}, OptionError, "threads is '2'"),
        ({"threads": True}, OptionError, "threads is True"),
        ({"threads": 0}, OptionError, "threads is 0"),
        ({"threads": 2**31}, OptionError, "threads is 2147483648"),
        ({"prefill_chunk": 1.5}, OptionError, "prefill_chunk is 1.5"),
        ({"prefill_chunk": "8"}, OptionError, "prefill_chunk is '8'"),
        ({"prefill_chunk": None}, OptionError, "prefill_chunk is None"),
    ],
    ids=named,
)
def test_arguments_of_loading(bundle, arguments, error, fault):
    with pytest.raises(error, match=fault):
        EchoModel.load(**({"path": bundle} | arguments))


def test_numpys_numbers_load_a_bundle(bundle):
    model = EchoModel.load(bundle, threads=np.int64(1), prefill_chunk=np.uint8(7))
    assert type(model.prefill_chunk) is int
    assert model.generate([1, 2], PARAMS)[0].new_tokens == 3


@pytest.mark.parametrize(
    ("prompts", "fault"),
    [
        (None, "a prompt is None; give text"),
        (5, "a prompt is int"),
        (np.int64(5), "a prompt is int64"),
        (1.5, "a prompt is float"),
        ([1.5], "a prompt is float"),
        (np.array([1.5]), "a prompt is float"),
        (np.array(5), "a prompt is ndarray"),
        (b"Once", "a prompt is bytes"),
        (bytearray(b"Once"), "a prompt is bytearray"),
        (["a", b"Once"], "a prompt is bytes"),
        (["a", None], "a prompt is None"),
        ({"a"}, "a prompt is set"),
        ((text for text in "ab"), "a prompt is generator"),
        (MESSAGE, "put the single message into a list"),
        (["a", MESSAGE], "put the single message into a list"),
        ([["a"]], "mixes kinds"),
        ([[[1]]], "mixes kinds"),
        ([1, None], "mixes kinds"),
        ([[MESSAGE, "a"]], "mixes kinds"),
        ("a \ud83d b", r"no Unicode text \(character 2 is '\\ud83d'"),
        (["a", "\udcff"], r"no Unicode text \(character 0 is '\\udcff'"),
        ([1, 2**70], "mixes kinds|outside the vocabulary"),
        (np.array([2**63], np.uint64), "outside the vocabulary"),
    ],
    ids=named,
)
def test_what_is_no_prompt(model, prompts, fault):
    for call in (model.generate, model.stream):
        with pytest.raises(PromptError, match=fault) as caught:
            call(prompts, PARAMS)
        assert str(caught.value).isprintable()
        if isinstance(prompts, list | np.ndarray):
            return  # for a stream these are one prompt, and it mixes kinds


@pytest.mark.parametrize(
    "params", [{}, {"max_new_tokens": 2}, 5, "x", [None], np.array([1]), iter([PARAMS])], ids=named
)
def test_what_are_no_sampling_parameters(model, params):
    for call in (model.generate, model.stream):
        with pytest.raises(OptionError, match="sampling parameters"):
            call("a", params)


@pytest.mark.parametrize(
    ("tokens", "fault"),
    [
        (None, "the prompt is None; give a list of tokens"),
        ("ab", "the prompt is str"),
        (b"ab", "the prompt is bytes"),
        ([1.5], "has token 1.5, outside"),
        ([True], "has token True, outside"),
        (np.array([1.5]), "has token 1.5, outside"),
        ([], "no tokens"),
    ],
    ids=named,
)
def test_what_has_no_logits(model, tokens, fault):
    with pytest.raises(PromptError, match=fault):
        model.logits(tokens)


def test_integers_of_any_kind_are_tokens(model):
    expected = [model.generate(row, PARAMS)[0].token_ids for row in ([1, 2], [3, 4])]
    for prompts in (
        np.array([[1, 2], [3, 4]], np.int32),
        [np.array([1, 2], np.uint8), np.array([3, 4])],
        ([np.int64(1), np.int8(2)], range(3, 5)),
        [(1, 2), [3, np.uint64(4)]],
    ):
        assert [result.token_ids for result in model.generate(prompts, PARAMS)] == expected
    assert np.array_equal(model.logits(np.array([3, 4], np.uint16)), model.logits([3, 4]))
    each = (PARAMS, PARAMS)
    assert [r.token_ids for r in model.generate([[1, 2], [3, 4]], each)] == expected


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"ignore_eos": "no"}, "ignore_eos is 'no', not True or False"),
        ({"stop": b"x"}, "stop is (b'x',), not strings"),
        ({"stop": (text for text in "a")}, "not strings"),
        ({"stop": ["\ud83d"]}, r"stop is ('\ud83d',), no Unicode text"),
        ({"stop_token_ids": np.array([1.5])}, "stop_token_ids is 1.5, not an integer"),
        ({"temperature": np.float32("nan")}, "temperature is np.float32(nan)"),
        ({"top_p": float("inf")}, "top_p is inf"),
        ({"min_p": None}, "min_p is None"),
        ({"seed": np.int64(-1)}, "seed is np.int64(-1)"),
    ],
    ids=named,
)
def test_sampling_parameters_of_another_kind(changes, fault):
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**changes)
    assert fault in str(caught.value)


def test_arrays_of_stops():
    params = SamplingParams(
        stop=np.array(["a", "b"]), stop_token_ids=np.array([5, 6]), ignore_eos=np.True_
    )
    assert params == SamplingParams(stop=["a", "b"], stop_token_ids=[5, 6], ignore_eos=True)


def test_templates_are_handed_their_arguments(make_bundle, model):
    template = "{{ messages[0].content }}{{ tools | tojson }}{{ enable_thinking }}"
    chatting = EchoModel.load(make_bundle(companions={"chat_template.jinja": template}), threads=1)
    options = {"tools": [{"name": "f"}], "chat_template_kwargs": {"enable_thinking": False}}
    expected = model.generate('hi[{"name": "f"}]False', PARAMS)[0].token_ids
    assert chatting.generate([MESSAGE], PARAMS, **options)[0].token_ids == expected
    both = chatting.generate([[MESSAGE], "a"], PARAMS, **options)
    assert [result.token_ids for result in both] == [
        expected,
        model.generate("a", PARAMS)[0].token_ids,
    ]
    *_, last = chatting.stream([MESSAGE], PARAMS, **options)
    assert last.result.token_ids == expected
    for only in options:
        with pytest.raises(OptionError, match="no prompt is a chat"):
            chatting.generate("a", PARAMS, **{only: options[only]})
    with pytest.raises(PromptError, match="no Unicode text"):
        chatting.generate([{"role": "user", "content": "\ud83d"}], PARAMS)


def test_a_relative_path_holds_after_the_working_directory_has_changed(bundle, monkeypatch):
    monkeypatch.chdir(bundle.parent)
    model = EchoModel.load(bundle.name, threads=1)
    (bundle.parent / "elsewhere").mkdir(exist_ok=True)
    os.chdir("elsewhere")
    assert model.generate("a", PARAMS)[0].new_tokens == 3
    assert model.bundle.is_unchanged()


def test_plan_files_of_another_kind(tmp_path):
    for path in (None, 5, "a\0b"):
        with pytest.raises(PlanError, match="cannot read the sharing plan"):
            SharingPlan.load(path)
    text = '\ufeff{"format": "echoatt-plan/1", "sources": [0, 0]}'
    (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    assert SharingPlan.load(tmp_path / "plan.json").sources == (0, 0)


def test_messages_can_be_shown(model):
    with pytest.raises(EchoAttError) as caught:
        model.generate(["\ud83d"], PARAMS)
    str(caught.value).encode("ascii")
