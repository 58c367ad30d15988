import os
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from echoatt_runtime.executor.session import open_session, read_manifest

from echoatt_runtime import (
    BundleNotFoundError,
    ContextOverflowError,
    DamagedBundleError,
    DeviceError,
    ForeignModelError,
    NewerFormatError,
    OptionError,
)
from echoatt_runtime.bundle.onnx_file import read_metadata
from echoatt_runtime.contract import METADATA_KEY

TOKENS = np.random.default_rng(1).integers(0, 256, 40)


def positions(count):
    return np.arange(count, dtype=np.int64)[None]


def copied(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


def edit_metadata(path, value):
    model = onnx.load(path, load_external_data=False)
    del model.metadata_props[:]
    if value is not None:
        model.metadata_props.add(key=METADATA_KEY, value=value)
    onnx.save(model, path)


def test_a_prompt_at_once_equals_the_whole_computation(session, decoder):
    cache = session.new_cache(1, 64)
    logits = session.run(cache, TOKENS[None], np.zeros(1, np.int64), positions(40))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[0], decoder.logits(TOKENS), atol=1e-4)


def test_only_the_wanted_positions_come_back(session, decoder):
    cache = session.new_cache(1, 64)
    logits = session.run(cache, TOKENS[None], np.zeros(1, np.int64), np.array([[39, 3]]))
    assert logits.shape == (1, 2, 258)
    np.testing.assert_allclose(logits[0], decoder.logits(TOKENS)[[39, 3]], atol=1e-4)


def test_steps_on_a_cache_equal_the_whole_computation(session, decoder):
    cache = session.new_cache(1, 64)
    steps = [
        session.run(cache, TOKENS[None, at : at + 1], np.array([at]), np.zeros((1, 1), np.int64))
        for at in range(40)
    ]
    np.testing.assert_allclose(np.concatenate(steps, 1)[0], decoder.logits(TOKENS), atol=1e-4)


def test_padded_rows_of_different_lengths_equal_their_own_computation(session, decoder):
    first, second = TOKENS[:9], TOKENS[9:14]
    padded = np.stack([first, np.concatenate([second, [7, 7, 7, 7]])])
    cache = session.new_cache(2, 16)
    logits = session.run(cache, padded, np.zeros(2, np.int64), np.array([[8], [4]]))
    np.testing.assert_allclose(logits[0, 0], decoder.logits(first)[-1], atol=1e-4)
    np.testing.assert_allclose(logits[1, 0], decoder.logits(second)[-1], atol=1e-4)
    # The next token of the second row overwrites its first pad.
    more = session.run(cache, np.array([[1], [2]]), np.array([9, 5]), np.zeros((2, 1), np.int64))
    np.testing.assert_allclose(more[0, 0], decoder.logits([*first, 1])[-1], atol=1e-4)
    np.testing.assert_allclose(more[1, 0], decoder.logits([*second, 2])[-1], atol=1e-4)


def test_logits_are_not_overwritten_by_the_next_run(session):
    cache = session.new_cache(1, 64)
    first = session.run(cache, TOKENS[None, :1], np.array([0]), np.zeros((1, 1), np.int64))
    kept = first.copy()
    session.run(cache, TOKENS[None, 1:2], np.array([1]), np.zeros((1, 1), np.int64))
    np.testing.assert_array_equal(first, kept)


def test_caches_of_one_session_are_independent(session, decoder):
    one, other = session.new_cache(1, 64), session.new_cache(1, 32)
    for at in range(10):
        for cache, tokens in ((one, TOKENS[:10]), (other, TOKENS[10:20])):
            logits = session.run(
                cache, tokens[None, at : at + 1], np.array([at]), np.zeros((1, 1), np.int64)
            )
            np.testing.assert_allclose(
                logits[0, 0], decoder.logits(tokens[: at + 1])[-1], atol=1e-4
            )


def test_the_cache_is_never_overrun(session):
    cache = session.new_cache(2, 16)
    with pytest.raises(ContextOverflowError, match="17 tokens do not fit a cache of 16"):
        session.run(cache, np.zeros((2, 3), np.int64), np.array([2, 14]), np.zeros((2, 1), int))


def test_fp16_runs_on_the_cpu(make_bundle, make_manifest, decoder):
    session = open_session(make_bundle(make_manifest(dtype="fp16")))
    cache = session.new_cache(1, 64)
    assert {array.dtype for array in cache.to_host()} == {np.dtype(np.float16)}
    logits = session.run(cache, TOKENS[None], np.zeros(1, np.int64), positions(40))
    # Half precision moves single logits by up to 0.2; another graph would move all of them by 3.
    assert np.abs(logits[0] - decoder.logits(TOKENS)).mean() < 0.02


def test_the_file_itself_may_be_named(bundle):
    manifest = open_session(bundle / "model.onnx").manifest
    assert open_session(str(bundle)).manifest == manifest
    assert read_manifest(bundle) == read_manifest(bundle / "model.onnx") == manifest


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


def test_missing_bundles(tmp_path):
    with pytest.raises(BundleNotFoundError, match=re.escape(str(tmp_path / "model.onnx"))):
        open_session(tmp_path)
    with pytest.raises(BundleNotFoundError, match=r"nothing\.onnx"):
        open_session(tmp_path / "nothing.onnx")


def test_foreign_and_newer_and_damaged_manifests(bundle, tmp_path):
    path = copied(bundle, tmp_path) / "model.onnx"
    edit_metadata(path, None)
    with pytest.raises(ForeignModelError, match="without an EchoAtt manifest"):
        open_session(path)
    edit_metadata(path, '{"format": "echoatt-bundle/9"}')
    with pytest.raises(NewerFormatError, match="upgrade"):
        open_session(path)
    edit_metadata(path, '{"format": "echoatt-bundle/2"}')
    with pytest.raises(DamagedBundleError, match="sources is missing"):
        open_session(path)


def test_a_lost_weight_file(bundle, tmp_path):
    directory = copied(bundle, tmp_path)
    (directory / "model.onnx.data").unlink()
    with pytest.raises(DamagedBundleError, match=r"lost its weight file model\.onnx\.data"):
        open_session(directory)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_weight_file_of_another_size(bundle, tmp_path, change):
    path = copied(bundle, tmp_path) / "model.onnx.data"
    size = path.stat().st_size
    os.truncate(path, size + change)
    with pytest.raises(DamagedBundleError, match=f"has {size + change} bytes instead of {size}"):
        open_session(path.parent)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_model_file_cut_short(bundle, tmp_path, keep):
    path = copied(bundle, tmp_path) / "model.onnx"
    os.truncate(path, int(keep * path.stat().st_size))
    with pytest.raises(DamagedBundleError, match=r"cut short|no ONNX graph"):
        open_session(path)


@pytest.mark.parametrize("content", [b"hello, this is no model\n", bytes(200), b"\xff" * 50])
def test_a_file_that_is_no_model(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(DamagedBundleError, match=r"not an ONNX model|no ONNX graph"):
        open_session(path)


def test_a_graph_that_onnxruntime_refuses(make_bundle):
    def misspell(model):
        model.graph.node[-1].op_type = "Cats"

    with pytest.raises(DamagedBundleError, match=r"ONNX Runtime .* refuses .*Cats") as caught:
        open_session(make_bundle(edit_graph=misspell))
    assert "\n" not in str(caught.value)


def test_metadata_is_read_without_a_session(bundle):
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    assert read_metadata(bundle / "model.onnx") == {
        entry.key: entry.value for entry in model.metadata_props
    }


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
        open_session(make_bundle(edit_graph=edit))
    for fault in faults:
        assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"num_kv_heads": 1}, "input past_key_values.0.key has shape ['batch', 2, 'capacity', 4]"),
        ({"head_dim": 8}, "output present.2.value has shape ['batch', 2, 4, 'capacity']"),
        ({"vocab_size": 300}, "output logits has shape ['batch', 'n', 258], not [?, ?, 300]"),
        ({"dtype": "fp16"}, "input past_key_values.0.key is tensor(float), not tensor(float16)"),
        ({"sources": (0, 1, 2)}, "input past_key_values.2.key is missing"),
        ({"sources": (0, 0, 0)}, "input past_key_values.1.key is surplus"),
    ],
)
def test_a_manifest_that_describes_another_graph(make_bundle, changes, fault):
    with pytest.raises(DamagedBundleError, match=re.escape(fault)):
        open_session(make_bundle(**changes))


def test_unknown_devices(bundle):
    with pytest.raises(DeviceError, match="unknown device 'tpu'; use one of cpu, cuda"):
        open_session(bundle, device="tpu")


def test_bf16_needs_another_device(make_bundle):
    with pytest.raises(DeviceError, match="bf16 bundle"):
        open_session(make_bundle(dtype="bf16"))


def test_cuda_is_never_replaced_by_the_cpu(bundle):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime is built with CUDA")
    with pytest.raises(DeviceError, match="needs onnxruntime-gpu"):
        open_session(bundle, device="cuda")


@pytest.mark.parametrize("threads", [0, -2])
def test_threads_out_of_range(bundle, threads):
    with pytest.raises(OptionError, match=f"threads is {threads}"):
        open_session(bundle, threads=threads)


def test_threads_reach_onnxruntime(bundle):
    options = open_session(bundle, threads=3)._ort_session.get_session_options()
    assert options.intra_op_num_threads == 3
