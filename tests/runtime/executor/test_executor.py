import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest

from echoatt_runtime import ContextOverflowError, DamagedBundleError, DeviceError, OptionError
from echoatt_runtime.executor import open as opening
from echoatt_runtime.executor import open_executor, run_texts, slots_of
from echoatt_runtime.ort import PROVIDERS, SessionOptions, has_cuda, open_session

TOKENS = np.random.default_rng(1).integers(0, 256, 40)


def positions(count):
    return np.arange(count, dtype=np.int64)[None]


def test_a_prompt_at_once_equals_the_whole_computation(executor, decoder):
    cache = executor.new_cache(1, 64)
    logits = executor.run(cache, TOKENS[None], np.zeros(1, np.int64), positions(40))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[0], decoder.logits(TOKENS), atol=1e-4)


def test_only_the_wanted_positions_come_back(executor, decoder):
    cache = executor.new_cache(1, 64)
    logits = executor.run(cache, TOKENS[None], np.zeros(1, np.int64), np.array([[39, 3]]))
    assert logits.shape == (1, 2, 258)
    np.testing.assert_allclose(logits[0], decoder.logits(TOKENS)[[39, 3]], atol=1e-4)


def test_steps_on_a_cache_equal_the_whole_computation(executor, decoder):
    cache = executor.new_cache(1, 64)
    steps = [
        executor.run(cache, TOKENS[None, at : at + 1], np.array([at]), np.zeros((1, 1), np.int64))
        for at in range(40)
    ]
    np.testing.assert_allclose(np.concatenate(steps, 1)[0], decoder.logits(TOKENS), atol=1e-4)


def test_padded_rows_of_different_lengths_equal_their_own_computation(executor, decoder):
    first, second = TOKENS[:9], TOKENS[9:14]
    padded = np.stack([first, np.concatenate([second, [7, 7, 7, 7]])])
    cache = executor.new_cache(2, 16)
    logits = executor.run(cache, padded, np.zeros(2, np.int64), np.array([[8], [4]]))
    np.testing.assert_allclose(logits[0, 0], decoder.logits(first)[-1], atol=1e-4)
    np.testing.assert_allclose(logits[1, 0], decoder.logits(second)[-1], atol=1e-4)
    # The next token of the second row overwrites its first pad.
    more = executor.run(cache, np.array([[1], [2]]), np.array([9, 5]), np.zeros((2, 1), np.int64))
    np.testing.assert_allclose(more[0, 0], decoder.logits([*first, 1])[-1], atol=1e-4)
    np.testing.assert_allclose(more[1, 0], decoder.logits([*second, 2])[-1], atol=1e-4)


def test_logits_are_not_overwritten_by_the_next_run(executor):
    cache = executor.new_cache(1, 64)
    first = executor.run(cache, TOKENS[None, :1], np.array([0]), np.zeros((1, 1), np.int64))
    kept = first.copy()
    executor.run(cache, TOKENS[None, 1:2], np.array([1]), np.zeros((1, 1), np.int64))
    np.testing.assert_array_equal(first, kept)


def test_loading_and_running_is_silent(bundle):
    program = (
        "import sys; from echoatt_runtime import EchoModel, SamplingParams\n"
        "EchoModel.load(sys.argv[1]).generate('a', SamplingParams(max_new_tokens=2))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(bundle)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_graph_that_onnxruntime_refuses(make_bundle):
    def misspell(model):
        model.graph.node[-1].op_type = "Cats"

    with pytest.raises(DamagedBundleError, match=r"ONNX Runtime .* refuses .*Cats") as caught:
        open_executor(make_bundle(edit_graph=misspell))
    assert "\n" not in str(caught.value)


def rename(old, new):
    def edit(model):
        for node in model.graph.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == old:
                        names[index] = new
        for value in (*model.graph.input, *model.graph.output):
            if value.name == old:
                value.name = new

    return edit


def swap_first_caches(model):
    first, second = model.graph.input[3], model.graph.input[4]
    kept = onnx.ValueInfoProto()
    kept.CopyFrom(first)
    first.CopyFrom(second)
    second.CopyFrom(kept)


def drop_last_output(model):
    del model.graph.output[-1]


@pytest.mark.parametrize(
    ("edit", "faults"),
    [
        (
            rename("past_key_values.2.value", "other"),
            ["input past_key_values.2.value is missing", "input other is surplus"],
        ),
        (rename("logits", "scores"), ["output logits is missing", "output scores is surplus"]),
        (swap_first_caches, ["inputs are in the wrong order"]),
        (drop_last_output, ["output present.2.value is missing"]),
    ],
)
def test_a_graph_with_other_names(make_bundle, edit, faults):
    with pytest.raises(DamagedBundleError, match="contract") as caught:
        open_executor(make_bundle(edit_graph=edit))
    for fault in faults:
        assert fault in str(caught.value)


def test_the_cache_is_never_overrun(executor):
    cache = executor.new_cache(2, 16)
    tokens, wanted = np.zeros((2, 3), np.int64), np.zeros((2, 1), int)
    with pytest.raises(ContextOverflowError, match=r"2 rows of 273 tokens .* 2 slots of 272"):
        executor.run(cache, tokens, np.array([2, 270]), wanted)
    with pytest.raises(ContextOverflowError, match="2 rows of 3 tokens from slot 1"):
        executor.run(cache, tokens, np.array([0, 0]), wanted, first_slot=1)


def test_slots_are_apart(executor, decoder):
    cache = executor.new_cache(3, 16)
    texts = [TOKENS[:9].tolist(), TOKENS[9:14].tolist(), TOKENS[20:21].tolist()]
    for slot in (2, 0, 1):
        (chunk,) = run_texts(executor, cache, [texts[slot]], [0], lengths_before=[16] * slot)
        np.testing.assert_allclose(chunk[0].logits, decoder.logits(texts[slot]), atol=1e-4)
    # One run of slots out of the middle, and each goes on where it was
    past = np.array([5, 1])
    more = executor.run(cache, np.array([[1], [2]]), past, np.zeros((2, 1), np.int64), 1)
    np.testing.assert_allclose(more[0, 0], decoder.logits([*texts[1], 1])[-1], atol=1e-4)
    np.testing.assert_allclose(more[1, 0], decoder.logits([*texts[2], 2])[-1], atol=1e-4)


def test_the_most_probable_tokens(executor, decoder):
    cache = executor.new_cache(2, 16)
    rows = np.stack([TOKENS[:9], TOKENS[9:18]])
    choice = executor.choose(cache, rows, np.zeros(2, np.int64), np.array([[8], [3]]))
    expected = [decoder.logits(rows[0])[8].argmax(), decoder.logits(rows[1])[3].argmax()]
    assert choice.token_ids.tolist() == expected
    assert choice.finite.tolist() == [True, True]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_row_whose_logits_are_no_numbers_is_told_from_the_others(
    make_bundle, make_specification, decoder, device
):
    """A graph for CUDA chooses itself."""
    embedding = decoder.weights["embedding"].copy()
    embedding[TOKENS[5]] = np.nan
    bundle = make_bundle(make_specification(device=device), weights={"embedding": embedding})
    executor = open_executor(bundle, foreign=True)
    cache = executor.new_cache(2, 16)
    rows = np.stack([TOKENS[:6], TOKENS[6:12]])
    choice = executor.choose(cache, rows, np.zeros(2, np.int64), np.array([[5], [4]]))
    assert choice.finite.tolist() == [False, True]
    expected = [decoder.logits(rows[row])[4].argmax() for row in (0, 1)]
    assert choice.token_ids[1] == expected[1]
    cache = executor.new_cache(2, 16)
    choice = executor.choose(cache, rows[:, :5], np.zeros(2, np.int64), np.array([[4], [4]]))
    assert choice.token_ids.tolist() == expected
    assert choice.finite.tolist() == [True, True]


def test_caches_of_one_executor_are_independent(executor, decoder):
    one, other = executor.new_cache(1, 64), executor.new_cache(1, 32, limit=40)
    for at in range(10):
        for cache, tokens in ((one, TOKENS[:10]), (other, TOKENS[10:20])):
            logits = executor.run(
                cache, tokens[None, at : at + 1], np.array([at]), np.zeros((1, 1), np.int64)
            )
            np.testing.assert_allclose(
                logits[0, 0], decoder.logits(tokens[: at + 1])[-1], atol=1e-4
            )


def test_a_cache_that_is_gone_is_let_go(executor):
    cache = executor.new_cache(1, 16)
    executor.run(cache, TOKENS[None, :1], np.array([0]), np.zeros((1, 1), np.int64))
    held = len(executor._bound)
    del cache
    assert len(executor._bound) == held - 1


def test_texts_that_have_ended_are_not_run_again(executor, decoder, monkeypatch):
    texts = [TOKENS[:3].tolist(), TOKENS[3:13].tolist(), TOKENS[13:18].tolist()]
    assert slots_of(texts) == [1, 2, 0]
    rows, run = [], executor.run
    monkeypatch.setattr(
        executor, "run", lambda cache, ids, *rest: rows.append(ids.shape) or run(cache, ids, *rest)
    )
    cache = executor.new_cache(3, 4, limit=600)
    found = {text: [] for text in range(3)}
    for chunk in run_texts(executor, cache, texts, [0, 8, 5], 4):
        assert [item.text for item in chunk] == [0, 1, 2]
        for item in chunk:
            found[item.text] += zip(item.positions, item.logits, strict=True)
    assert rows == [(3, 4), (2, 4), (1, 2)]
    assert [[at for at, _ in found[text]] for text in range(3)] == [[0, 1, 2], [8, 9], []]
    for text, first in ((0, 0), (1, 8)):
        logits = np.array([logits_V for _, logits_V in found[text]])
        np.testing.assert_allclose(logits, decoder.logits(texts[text])[first:], atol=1e-4)


def test_fp16_runs_on_the_cpu(make_bundle, make_specification, decoder):
    executor = open_executor(make_bundle(make_specification(dtype="fp16")))
    cache = executor.new_cache(1, 64)
    assert {cache.array(index).dtype for index in range(5)} == {np.dtype(np.float16)}
    logits = executor.run(cache, TOKENS[None], np.zeros(1, np.int64), positions(40))
    # Half precision moves single logits by up to 0.2; another graph would move all of them by 3.
    assert np.abs(logits[0] - decoder.logits(TOKENS)).mean() < 0.02


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"kv_heads": 1}, "input past_key_values.0.key has shape ['batch', 2, 'capacity', 4]"),
        ({"head_dim": 8}, "input past_key_values.2.value has shape ['batch', 2, 4, 'capacity']"),
        ({"vocab_size": 300}, "output logits has shape ['batch', 'n', 258], not [?, ?, 300]"),
        ({"dtype": "fp16"}, "input past_key_values.0.key is tensor(float), not tensor(float16)"),
        ({"sources": (0, 1, 2)}, "input past_key_values.2.key is missing"),
        ({"sources": (0, 0, 0)}, "input past_key_values.1.key is surplus"),
    ],
)
def test_a_specification_of_another_graph(make_bundle, make_specification, changes, fault):
    with pytest.raises(DamagedBundleError, match=re.escape(fault)):
        open_executor(make_bundle(described=make_specification(**changes)))


def test_devices(make_bundle, make_specification, bundle):
    with pytest.raises(DeviceError, match="unknown device 'tpu'; use one of cpu, cuda"):
        open_executor(bundle, "tpu")
    with pytest.raises(DeviceError, match=r"lowered for cpu and not for cuda.*--device cuda"):
        open_executor(bundle, "cuda")
    bf16 = make_bundle(described=make_specification(dtype="bf16", device="cuda"))
    with pytest.raises(DeviceError, match="bf16 bundle"):
        open_executor(bf16)


def test_a_bundle_for_another_device_opens_only_where_that_is_asked_for(
    make_bundle, make_specification
):
    bundle = make_bundle(make_specification(device="cuda"))
    with pytest.raises(DeviceError, match=r"lowered for cuda and not for cpu.*device='cuda'"):
        open_executor(bundle, "cpu")
    assert open_executor(bundle, "cpu", foreign=True).device == "cpu"


def test_cuda_is_never_replaced_by_the_cpu(make_bundle, make_specification):
    onnxruntime = pytest.importorskip("onnxruntime")
    if PROVIDERS["cuda"] in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime is built with CUDA")
    with pytest.raises(DeviceError, match="needs onnxruntime-gpu"):
        open_executor(make_bundle(make_specification(device="cuda")), "cuda")
    assert not has_cuda()


@pytest.mark.parametrize("threads", [0, -2])
def test_threads_out_of_range(bundle, threads):
    with pytest.raises(OptionError, match=f"threads is {threads}"):
        open_executor(bundle, threads=threads)


def test_a_bundle_that_is_replaced_while_it_is_opened_is_refused(bundle, tmp_path, monkeypatch):
    """Weights of the same size, put there when the files have been checked already."""
    copy = shutil.copytree(bundle, tmp_path / "copy")
    open_session = opening.open_session

    def replace_first(model, options):
        shutil.copyfile(copy / "model.onnx.data", tmp_path / "other")
        (tmp_path / "other").replace(copy / "model.onnx.data")
        return open_session(model, options)

    monkeypatch.setattr(opening, "open_session", replace_first)
    with pytest.raises(DamagedBundleError, match="was replaced while it was opened"):
        open_executor(copy)


def test_a_name_that_is_no_text_is_the_models_fault(bundle):
    data = (bundle / "model.onnx").read_bytes().replace(b"logits_indices", b"logits_indice\xff")
    options = SessionOptions(weights_folder=bundle)
    with pytest.raises(DamagedBundleError, match=r"refuses the model .*decode"):
        open_session(data, options)
