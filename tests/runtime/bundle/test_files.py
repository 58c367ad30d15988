import json
import os
import re
import shutil

import onnx
import pytest

from echoatt_runtime import (
    BundleNotFoundError,
    DamagedBundleError,
    EchoModel,
    ForeignModelError,
    NewerFormatError,
)
from echoatt_runtime.bundle import Bundle, find_model, read_manifest, read_onnx_file
from echoatt_runtime.contract import METADATA_KEY


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


@pytest.fixture
def make_fit(restamp):
    """Lets a manifest have the hash of the graph as it is now, as somebody would who means harm."""

    def make(path):
        opened = read_onnx_file(path)
        manifest = json.loads(opened.metadata[METADATA_KEY])
        restamp(path, json.dumps(manifest | {"graph_sha256": opened.graph_sha256}))

    return make


def edit_weights(path, **entries):
    """Change where the first external tensor of a model says that it is."""
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    kept = {entry.key: entry.value for entry in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in kept.items():
        tensor.external_data.add(key=key, value=value)
    onnx.save(model, path)


def test_the_file_itself_may_be_named(bundle):
    opened = Bundle.open(bundle / "model.onnx")
    assert Bundle.open(str(bundle)) == opened
    assert read_manifest(bundle) == opened.manifest
    assert opened.weights == bundle / "model.onnx.data"


@pytest.mark.parametrize("name", ["", "nothing.onnx", "a" * 5000, "nul\0l"])
def test_missing_bundles(tmp_path, name):
    with pytest.raises(BundleNotFoundError, match="there is no bundle at"):
        find_model(f"{tmp_path}/{name}")


def test_foreign_and_newer_and_damaged_manifests(copy, restamp):
    path = copy / "model.onnx"
    restamp(path, None)
    with pytest.raises(ForeignModelError, match="without an EchoAtt manifest"):
        Bundle.open(path)
    restamp(path, '{"format": "echoatt-bundle/9"}')
    with pytest.raises(NewerFormatError, match="newer EchoAtt: install that"):
        Bundle.open(path)
    restamp(path, '{"format": "echoatt-bundle/3"}')
    with pytest.raises(DamagedBundleError, match="specification is missing"):
        Bundle.open(path)


@pytest.mark.parametrize("name", ["model.onnx.data", "tokenizer.json"])
def test_a_lost_file(copy, name):
    (copy / name).unlink()
    with pytest.raises(DamagedBundleError, match=f"lost its file {re.escape(name)}"):
        Bundle.open(copy)


@pytest.mark.parametrize("name", ["model.onnx.data", "tokenizer.json"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size(copy, name, change):
    size = (copy / name).stat().st_size
    os.truncate(copy / name, size + change)
    with pytest.raises(DamagedBundleError, match=f"has {size + change} bytes instead of {size}:?"):
        Bundle.open(copy)


def test_a_weight_file_is_no_longer_than_its_weights(copy, restamp):
    """Else hashing it would read whatever somebody hung behind them, a terabyte of nothing too."""
    os.truncate(copy / "model.onnx.data", 1 << 40)
    manifest = json.loads(read_onnx_file(copy / "model.onnx").metadata[METADATA_KEY])
    manifest["files"][0]["bytes"] = 1 << 40
    restamp(copy / "model.onnx", json.dumps(manifest))
    with pytest.raises(DamagedBundleError, match="the weights of the graph end at"):
        Bundle.open(copy, verify=True)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_link_is_not_followed(copy, tmp_path, name):
    (copy / name).rename(tmp_path / "elsewhere")
    (copy / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedBundleError, match="is a link or no plain file"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ({"location": "../model.onnx.data"}, "is in '../model.onnx.data' and not in the bundle's"),
        ({"location": "/etc/hostname"}, "is in '/etc/hostname' and not in the bundle's"),
        ({"location": "tokenizer.json"}, "is in 'tokenizer.json' and not in the bundle's"),
        ({"offset": str(1 << 60)}, "is not inside model.onnx.data"),
        ({"offset": "-8"}, "is not inside model.onnx.data"),
        ({"length": "8"}, "has 8 bytes for the shape"),
    ],
)
def test_weights_lie_in_the_weight_file_and_nowhere_else(copy, make_fit, entries, fault):
    edit_weights(copy / "model.onnx", **entries)
    make_fit(copy / "model.onnx")
    with pytest.raises(DamagedBundleError, match=re.escape(fault)):
        Bundle.open(copy)


def test_weights_of_a_branch_are_looked_at_too(copy, make_fit):
    """What an attribute's graph or tensor names is read by ONNX Runtime like any other."""
    path = copy / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    weight = onnx.TensorProto(name="secret", data_type=1, dims=[2], data_location=1)
    weight.external_data.add(key="location", value="/etc/hostname")
    branch = onnx.helper.make_graph([], "branch", [], [], [weight])
    node = onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    model.graph.node.append(node)
    onnx.save(model, path)
    make_fit(path)
    with pytest.raises(DamagedBundleError, match=r"'secret'.*hostname"):
        Bundle.open(copy)
    assert [t.location for t in read_onnx_file(path).external].count("/etc/hostname") == 2


def flip_bit(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_another_graph_is_found_without_being_asked(copy):
    """Its hash is known anyway, and ONNX Runtime need not bear what no exporter wrote."""
    path = copy / "model.onnx"
    # In the graph, and in no length
    flip_bit(path, path.read_bytes().index(b"TensorScatter"))
    with pytest.raises(DamagedBundleError, match=r"graph of .* \(its hash differs\)"):
        Bundle.open(copy)


def test_a_graph_that_might_run_for_ever_is_refused(copy, make_fit):
    """In a branch too; what has no loops runs each node once."""
    path = copy / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    body = onnx.helper.make_graph([], "body", [], [])
    loop = onnx.helper.make_node("Loop", ["", ""], [], body=body)
    branch = onnx.helper.make_graph([loop], "branch", [], [])
    node = onnx.helper.make_node("If", ["x"], [], then_branch=branch, else_branch=branch)
    model.graph.node.append(node)
    onnx.save(model, path)
    make_fit(path)
    with pytest.raises(DamagedBundleError, match=r"has loops \(Loop\)"):
        Bundle.open(copy)


@pytest.mark.parametrize("name", ["model.onnx.data", "tokenizer.json"])
def test_verifying_finds_a_flipped_bit_that_sizes_do_not_show(copy, name):
    flip_bit(copy / name, (copy / name).stat().st_size // 2)
    Bundle.open(copy)
    with pytest.raises(DamagedBundleError, match="its hash differs"):
        Bundle.open(copy, verify=True)
    with pytest.raises(DamagedBundleError, match="its hash differs"):
        EchoModel.load(copy, verify=True)


def test_a_whole_bundle_verifies(bundle):
    assert EchoModel.load(bundle, verify=True).bundle == Bundle.open(bundle)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_model_file_cut_short(copy, keep):
    path = copy / "model.onnx"
    os.truncate(path, int(keep * path.stat().st_size))
    with pytest.raises(DamagedBundleError, match="cut short"):
        Bundle.open(path)


@pytest.mark.parametrize("content", [b"hello, this is no model\n", bytes(200), b"\xff" * 50])
def test_a_file_that_is_no_model(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(DamagedBundleError, match="not an ONNX model"):
        Bundle.open(path)


def test_a_second_graph_or_manifest_is_damage(copy):
    path = copy / "model.onnx"
    data = path.read_bytes()
    for twice in (
        onnx.ModelProto(graph=onnx.GraphProto(name="other")),
        onnx.helper.make_model(onnx.GraphProto()),
    ):
        path.write_bytes(data + twice.SerializeToString())
        with pytest.raises(DamagedBundleError, match="not an ONNX model"):
            Bundle.open(path)
    manifest = onnx.ModelProto()
    onnx.helper.set_model_props(manifest, {"echoatt.manifest": "{}"})
    path.write_bytes(data + manifest.SerializeToString())
    with pytest.raises(DamagedBundleError, match="not an ONNX model"):
        Bundle.open(path)


def test_metadata_is_read_without_a_session(bundle):
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    found = read_onnx_file(bundle / "model.onnx")
    assert found.metadata == {entry.key: entry.value for entry in model.metadata_props}
    external = {t.name for t in model.graph.initializer if t.external_data}
    assert {tensor.name for tensor in found.external} == external


def test_only_listed_companions_belong_to_a_bundle(copy):
    (copy / "chat_template.jinja").write_text("a stranger's")
    opened = Bundle.open(copy)
    assert opened.companion("chat_template.jinja") is None
    assert opened.companion("tokenizer.json") == copy / "tokenizer.json"
    assert EchoModel.load(copy).tokenizer.chat_template is None
