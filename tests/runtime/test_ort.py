"""Sessions and what ONNX Runtime raises, on real models made for it."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from echoatt_runtime import (
    DamagedBundleError,
    DeviceError,
    OptionError,
    OutOfMemoryError,
    RunError,
)
from echoatt_runtime.contract import ELEMENT_TYPES
from echoatt_runtime.ort import SessionOptions, SharedWeights, has_cuda, open_session

FLOAT = ELEMENT_TYPES["float32"]


def model_of(nodes, inputs, initializers=(), output="y", opset=24):
    """A model file's bytes; inputs are names and shapes of float32."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "test",
        [value(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [value(output, TensorProto.FLOAT, None)],
        initializers,
    )
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=11).SerializeToString()


def run(session, **arrays):
    """What a session makes of arrays bound by their addresses."""
    binding = session.new_binding()
    for name, array in arrays.items():
        binding.bind_input(name, "cpu", FLOAT, array.shape, array.ctypes.data)
    binding.bind_open_output("y")
    session.run(binding)
    return binding.read_open_output("y")


ADD = model_of([helper.make_node("Add", ["a", "b"], ["y"])], {"a": ["n"], "b": ["m"]})


def test_bound_memory_is_read_anew_at_every_run():
    session = open_session(ADD, SessionOptions())
    a, b = np.zeros(3, np.float32), np.array([1, 2, 3], np.float32)
    binding = session.new_binding()
    for name, array in (("a", a), ("b", b)):
        binding.bind_input(name, "cpu", FLOAT, array.shape, array.ctypes.data)
    y = np.zeros(3, np.float32)
    binding.bind_output("y", "cpu", FLOAT, y.shape, y.ctypes.data)
    for step in range(3):
        a[:] = step
        session.run(binding)
        np.testing.assert_array_equal(y, b + step)
    assert session.run_seconds > 0
    assert [value.name for value in (*session.inputs, *session.outputs)] == ["a", "b", "y"]


def test_outputs_are_told_apart_however_they_were_bound():
    nodes = [helper.make_node("Neg", ["a"], ["z"]), helper.make_node("Add", ["a", "a"], ["y"])]
    model = onnx.load_from_string(model_of(nodes, {"a": ["n"]}))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    session = open_session(model.SerializeToString(), SessionOptions())
    a = np.array([1, 2], np.float32)
    binding = session.new_binding()
    binding.bind_input("a", "cpu", FLOAT, a.shape, a.ctypes.data)
    for name in ("z", "y", "z"):
        binding.bind_open_output(name)
    session.run(binding)
    assert binding.read_open_output("y").tolist() == [2, 4]
    assert binding.read_open_output("z").tolist() == [-1, -2]


def test_a_refused_step_is_an_error_of_ours():
    session = open_session(ADD, SessionOptions(), "the adder")
    with pytest.raises(RunError, match="refuses a step of the adder") as caught:
        run(session, a=np.zeros(3, np.float32), b=np.zeros(4, np.float32))
    assert "\n" not in str(caught.value)


def test_no_memory_in_a_step_is_an_error_of_ours():
    """A product of two long vectors takes more than any machine has."""
    outer = model_of([helper.make_node("Mul", ["a", "b"], ["y"])], {"a": ["n", 1], "b": ["m"]})
    session = open_session(outer, SessionOptions())
    size = 1 << 24
    with pytest.raises(OutOfMemoryError, match="no memory left on cpu for a step"):
        run(session, a=np.zeros((size, 1), np.float32), b=np.zeros(size, np.float32))
    assert run(session, a=np.ones((2, 1), np.float32), b=np.ones(2, np.float32)).sum() == 4


def test_a_batch_that_does_not_fit_ends_in_one_line(bundle):
    """The same with a real bundle, in a process that may not take much more than it has."""
    program = """
        import resource, sys
        import numpy as np
        from echoatt_runtime import EchoModel, OutOfMemoryError
        model = EchoModel.load(sys.argv[1], threads=1)
        model.generate([1])
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (64 << 20),) * 2)
        cache = model.executor.new_cache(500, 256, 256)
        tokens, first = np.zeros((500, 256), np.int64), np.zeros((500, 1), np.int64)
        for wanted in (first, tokens):  # the graph's own memory, and the logits'
            try:
                model.executor.run(cache, tokens, first[:, 0], wanted)
            except OutOfMemoryError as error:
                print(error)
        print(len(model.generate([1])))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(bundle)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    step, logits, after = done.stdout.splitlines()
    assert "no memory left on cpu for a step" in step
    assert "no memory left for the logits of 128000 tokens" in logits
    assert after == "1"


def test_a_missing_kernel_and_a_refused_model_are_told_apart():
    missing = model_of([helper.make_node("MatMul", ["a", "a"], ["y"])], {"a": [2, 2]})
    double = onnx.load_from_string(missing)
    for value in (*double.graph.input, *double.graph.output):
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    with pytest.raises(DeviceError, match="has no kernel on cpu for the product"):
        open_session(double.SerializeToString(), SessionOptions(optimise=False), "the product")
    with pytest.raises(DamagedBundleError, match="refuses the product"):
        open_session(b"no model", SessionOptions(), "the product")


def test_options_out_of_range():
    with pytest.raises(OptionError, match="threads is 0"):
        open_session(ADD, SessionOptions(threads=0))
    with pytest.raises(DeviceError, match="unknown device 'tpu'"):
        open_session(ADD, SessionOptions(device="tpu"))


def test_a_library_that_is_none_is_refused(tmp_path):
    library = tmp_path / "libnone.so"
    library.write_bytes(b"nothing")
    with pytest.raises(DamagedBundleError, match=r"libnone\.so"):
        open_session(ADD, SessionOptions(libraries=[library]))


def test_a_profile_is_written_where_it_was_asked_for(tmp_path):
    session = open_session(ADD, SessionOptions(profile=tmp_path / "trace"))
    run(session, a=np.zeros(3, np.float32), b=np.zeros(3, np.float32))
    trace = session.end_profiling()
    assert trace.parent == tmp_path
    names = {event["name"] for event in json.loads(trace.read_text())}
    assert "model_run" in names


def test_sessions_read_weights_that_they_share():
    """Both read the same memory: what is written there shows in both."""
    stored = np.arange(4, dtype=np.float32)
    shared = np.full(4, 10, np.float32)
    model = model_of(
        [helper.make_node("Add", ["a", "w"], ["y"])],
        {"a": ["n"]},
        [numpy_helper.from_array(stored, "w")],
    )
    weights = SharedWeights(tensors={"w": shared}, types={"w": FLOAT})
    sessions = [
        open_session(model, SessionOptions(weights=weights, optimise=False)) for _ in range(2)
    ]
    a = np.zeros(4, np.float32)
    assert [run(session, a=a).tolist() for session in sessions] == [[10] * 4] * 2
    shared[:] = 20
    assert [run(session, a=a).tolist() for session in sessions] == [[20] * 4] * 2
    assert run(open_session(model, SessionOptions()), a=a).tolist() == stored.tolist()


def test_a_build_without_cuda_has_none():
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime is built with CUDA")
    assert not has_cuda()
    with pytest.raises(DeviceError, match="needs onnxruntime-gpu"):
        open_session(ADD, SessionOptions(device="cuda"))


def test_threads_reach_onnxruntime(bundle):
    """How many there are shows in the process; the caller's own is one of them."""
    program = (
        "import os, sys; from echoatt_runtime import EchoModel\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "model = EchoModel.load(sys.argv[1], threads=int(sys.argv[2]))\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    if sys.platform != "linux":
        pytest.skip("threads are counted in /proc")
    counts = [
        int(subprocess.check_output([sys.executable, "-c", program, str(bundle), threads]))
        for threads in ("1", "4")
    ]
    assert counts[1] - counts[0] == 3
