import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnx.parser
import pytest

from echoatt_exporter.errors import ContractError, ExportError
from echoatt_exporter.graph import check_file
from echoatt_exporter.graph.checks import load_file

GOOD = "g (float[b,4] x, float[4,4] w) => (float[b,4] y) { y = MatMul(x, w) }"


def write(tmp_path, text, opset=24, **weights):
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]> {text}'
    )
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        for value in list(model.graph.input):
            if value.name == name:
                model.graph.input.remove(value)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return path


def test_a_good_file_passes(tmp_path, capfd):
    assert check_file(write(tmp_path, GOOD, w=np.eye(4, dtype=np.float32))) is None
    assert capfd.readouterr().err == ""


def test_a_warning_of_the_runtime_is_an_error(tmp_path, capfd):
    path = write(tmp_path, GOOD, w=np.eye(4, dtype=np.float32), stray=np.eye(4, dtype=np.float32))
    with pytest.raises(ContractError, match=r"ONNX Runtime warns about model\.onnx: .*stray"):
        check_file(path)
    assert capfd.readouterr().err == ""


def test_what_this_process_writes_is_no_warning(tmp_path, capfd):
    path, done = write(tmp_path, GOOD, w=np.eye(4, dtype=np.float32)), threading.Event()

    def write_on():
        while not done.is_set():
            os.write(2, b"progress ")

    with ThreadPoolExecutor() as pool:
        pool.submit(write_on)
        try:
            check_file(path)
        finally:
            done.set()
    assert set(capfd.readouterr().err.split()) == {"progress"}


def test_a_type_error_is_found_by_the_checker(tmp_path):
    path = write(tmp_path, GOOD.replace("float[b,4] x", "int64[b,4] x"), w=np.eye(4, dtype="f4"))
    with pytest.raises(ContractError, match=r"model\.onnx is not valid ONNX: .*MatMul"):
        check_file(path)


def test_an_operator_without_a_kernel_does_not_load(tmp_path):
    text = "g (bfloat16[b,4] x, bfloat16[4,4] w) => (bfloat16[b,4] y) { y = MatMul(x, w) }"
    path = write(tmp_path, text)
    with pytest.raises(ContractError, match=r"has no kernel on cpu for model\.onnx .*MatMul"):
        check_file(path)
    check_file(path, device=None)


def test_a_missing_weight_file_is_an_error(tmp_path):
    path = write(tmp_path, GOOD, w=np.eye(4, dtype=np.float32))
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ContractError) as error:
        check_file(path)
    assert "model.onnx.data" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ending", "error_type", "message"),
    [
        ("kill -KILL $$", ExportError, r"loads model\.onnx .* was killed, most likely for want of"),
        ("echo at x.cc:1 >&2; kill -SEGV $$", ContractError, r"crashes .* fault \(at x\.cc:1\)$"),
        ("echo no module >&2; exit 1", ExportError, r"ended with 1 \(no module\)$"),
        # far less than the weights take
        (
            'ulimit -v 400000; exec "$PYTHON" "$@"',
            ExportError,
            "no memory left on cpu to load model",
        ),
    ],
)
def test_ends_of_the_loading_process_are_told(ending, error_type, message, tmp_path, monkeypatch):
    path = write(tmp_path, GOOD.replace("4", "10240"))
    model = onnx.load(path)
    weights = model.graph.initializer.add(name="w", dims=[10240, 10240], data_type=1)
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="model.onnx.data")
    model.graph.input.pop()
    onnx.save(model, path)
    with (tmp_path / "model.onnx.data").open("wb") as file:
        file.truncate(4 * 10240**2)

    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{ending}\n")
    program.chmod(0o700)
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(ExportError, match=message) as caught:
        check_file(path)
    assert type(caught.value) is error_type
    assert "\n" not in str(caught.value)


def test_no_process_to_load_in_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    with pytest.raises(ExportError, match=r"no process starts to load it \(.*absent"):
        check_file(write(tmp_path, GOOD, w=np.eye(4, dtype=np.float32)))


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel to end the process")
def test_the_loading_process_ends_with_its_parent(tmp_path):
    """Even where it hangs: nobody ever writes to this pipe."""
    os.mkfifo(tmp_path / "model.onnx")
    command = [sys.executable, load_file.__file__, tmp_path / "model.onnx", "cpu"]
    parent = subprocess.Popen(
        [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert parent.stderr.read(1) == load_file.MARK
    parent.kill()
    # both pipes end when nobody holds them any more
    assert parent.communicate(timeout=20) == (b"", b"")
