import os
import sys

import numpy as np
import onnx
import onnx.parser
import pytest

from echoatt_exporter.errors import ContractError
from echoatt_exporter.graph import check_file

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


def test_stderr_works_again_afterwards(tmp_path, capfd):
    check_file(write(tmp_path, GOOD, w=np.eye(4, dtype=np.float32)))
    os.write(2, b"native ")
    print("python", file=sys.stderr)
    assert capfd.readouterr().err == "native python\n"


def test_a_type_error_is_found_by_the_checker(tmp_path):
    path = write(tmp_path, GOOD.replace("float[b,4] x", "int64[b,4] x"), w=np.eye(4, dtype="f4"))
    with pytest.raises(ContractError, match=r"model\.onnx is not valid ONNX: .*MatMul"):
        check_file(path)


def test_an_operator_without_a_kernel_does_not_load(tmp_path):
    text = "g (bfloat16[b,4] x, bfloat16[4,4] w) => (bfloat16[b,4] y) { y = MatMul(x, w) }"
    path = write(tmp_path, text)
    with pytest.raises(ContractError, match=r"ONNX Runtime does not load model\.onnx: .*MatMul"):
        check_file(path)
    check_file(path, provider=None)


def test_a_missing_weight_file_is_an_error(tmp_path):
    path = write(tmp_path, GOOD, w=np.eye(4, dtype=np.float32))
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ContractError) as error:
        check_file(path)
    assert "model.onnx.data" in str(error.value)
    assert "\n" not in str(error.value)
