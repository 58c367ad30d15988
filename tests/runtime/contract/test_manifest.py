import dataclasses
import json

import pytest
from tests.wording import says

from echoatt_runtime import DamagedBundleError, ForeignModelError, NewerFormatError
from echoatt_runtime.contract.manifest import METADATA_KEY, Manifest, Verification


@pytest.fixture
def manifest(make_manifest):
    return make_manifest()


def edited(manifest, **changes):
    data = json.loads(manifest.to_json()) | changes
    return json.dumps({key: value for key, value in data.items() if value != "DELETE"})


def test_json_round_trip(make_manifest):
    verification = Verification(
        provider="CPUExecutionProvider", passed=True, tolerance=1e-4, max_abs_error=3e-6, cases=5
    )
    manifest = make_manifest(
        verification=verification, layer_kinds=("sliding", "full", "full"), sliding_window=64
    )
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_head_orders_are_kept(make_manifest):
    ordered = make_manifest(head_orders=((), (), (1, 0)))
    assert Manifest.from_json(ordered.to_json()) == ordered


def test_names_follow_the_graph_contract(manifest):
    assert manifest.input_names == (
        "input_ids",
        "past_lengths",
        "logits_indices",
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.key",
        "past_key_values.1.value",
        "past_key_values.2.value",
    )
    assert manifest.output_names == (
        "logits",
        "present.0.key",
        "present.0.value",
        "present.1.key",
        "present.1.value",
        "present.2.value",
    )
    assert [manifest.is_follower(layer) for layer in range(3)] == [False, False, True]


@pytest.mark.parametrize(
    ("dtype", "element_type", "element_bytes"),
    [
        ("fp32", "float32", 4),
        ("int8", "float32", 4),
        ("int4", "float32", 4),
        ("fp16", "float16", 2),
        ("bf16", "bfloat16", 2),
    ],
)
def test_cache_size_follows_the_dtype(make_manifest, dtype, element_type, element_bytes):
    manifest = make_manifest(dtype=dtype)
    assert manifest.cache_element_type == element_type
    # Five caches of two heads of four elements.
    assert manifest.cache_bytes_per_token == 5 * 2 * 4 * element_bytes


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"sources": [0, 2, 2]}, "layer 1 follows layer 2, which is not an earlier layer"),
        ({"sources": [0, 0, 1]}, "layer 2 follows layer 1, which is itself a follower"),
        ({"sources": [0, 1, -1]}, "layer 2 follows layer -1, which is not an earlier layer"),
        ({"sources": []}, "sources is empty"),
        ({"sources": [0, 1, True]}, "sources is not a list of integers"),
        ({"head_orders": [[], [1, 0]]}, "head_orders has 2 layers and sources 3"),
        ({"head_orders": [[], [], 1]}, "head_orders is not a list of lists of integers"),
        ({"head_orders": None}, "head_orders is not a list of lists of integers"),
        ({"layer_kinds": ["full", "full"]}, "layer_kinds has 2 layers and sources 3"),
        ({"layer_kinds": ["full", "full", "wide"]}, "layer_kinds[2] is 'wide'"),
        (
            {"layer_kinds": ["full", "full", "sliding"], "sliding_window": 8},
            "layer 2 (sliding) follows layer 1 (full), another attention kind",
        ),
        ({"layer_kinds": ["sliding"] * 3}, "sliding_window is null although layers are sliding"),
        ({"sliding_window": 0}, "sliding_window is 0, which is not positive"),
        ({"sliding_window": "8"}, "sliding_window is not an integer or null"),
        ({"num_query_heads": 5}, "5 query heads do not divide into 2 key/value heads"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0, which is not positive"),
        ({"head_dim": 4.0}, "head_dim is not an integer"),
        ({"context_length": "DELETE"}, "context_length is missing"),
        ({"dtype": "fp8"}, "dtype is 'fp8', not one of"),
        ({"device": "tpu"}, "device is 'tpu', not one of"),
        ({"bos_token_id": 10_000}, "bos_token_id has 10000, outside the vocabulary"),
        ({"eos_token_ids": [1, -1]}, "eos_token_ids has -1, outside the vocabulary"),
        ({"eos_token_ids": 1}, "eos_token_ids is not a list of integers"),
        ({"weights_file": "../secret"}, "weights_file is '../secret', not a bare file name"),
        ({"weights_file": ""}, "weights_file is '', not a bare file name"),
        ({"weights_bytes": -1}, "weights_bytes is -1, which is negative"),
        ({"family": None}, "family is not a string"),
        ({"source_checkpoint": {"name": "x"}}, "sha256 is missing"),
        ({"source_checkpoint": {"name": "x", "sha256": "0"}}, "is not 64 hexadecimal digits"),
        ({"verification": {"passed": 1}}, "passed is not true or false"),
    ],
)
def test_every_kind_of_fault_is_named(manifest, changes, fault):
    with pytest.raises(DamagedBundleError) as caught:
        Manifest.from_json(edited(manifest, **changes))
    assert says(str(caught.value), fault)
    assert "\n" not in str(caught.value)


def test_all_faults_are_told_at_once(manifest):
    text = edited(manifest, family=3, sources=[0, 0, 1], dtype="fp8", head_dim="DELETE")
    with pytest.raises(DamagedBundleError) as caught:
        Manifest.from_json(text)
    for fault in ("family is not", "itself a follower", "dtype is 'fp8'", "head_dim is missing"):
        assert says(str(caught.value), fault)


def test_an_inconsistent_manifest_cannot_be_made(manifest):
    with pytest.raises(DamagedBundleError, match="itself a follower"):
        dataclasses.replace(manifest, sources=(0, 0, 1))


def test_unknown_fields_are_left_alone(manifest):
    assert Manifest.from_json(edited(manifest, later_addition={"x": 1})) == manifest


@pytest.mark.parametrize("number", [3, 10])
def test_a_newer_format_asks_for_an_upgrade(manifest, number):
    with pytest.raises(NewerFormatError, match="newer EchoAtt: upgrade"):
        Manifest.from_json(edited(manifest, format=f"echoatt-bundle/{number}", sources="anything"))


def test_an_older_format_asks_for_another_export(manifest):
    with pytest.raises(DamagedBundleError, match="reads 'echoatt-bundle/2' only; export it again"):
        Manifest.from_json(edited(manifest, format="echoatt-bundle/1"))


@pytest.mark.parametrize("value", ["echoatt-bundle/0", "echoatt-bundle/x", "other/1", 1, None])
def test_an_unknown_format_is_damage(manifest, value):
    with pytest.raises(DamagedBundleError, match="format"):
        Manifest.from_json(edited(manifest, format=value))


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_other_json_is_damage(text):
    with pytest.raises(DamagedBundleError, match="is not"):
        Manifest.from_json(text)


def test_metadata_without_a_manifest_is_foreign():
    with pytest.raises(ForeignModelError, match=r"a\.onnx is an ONNX file without an EchoAtt"):
        Manifest.from_metadata({"other": "{}"}, "a.onnx")


def test_metadata_names_the_file(manifest):
    assert Manifest.from_metadata({METADATA_KEY: manifest.to_json()}, "a.onnx") == manifest
    with pytest.raises(DamagedBundleError, match=r"a\.onnx"):
        Manifest.from_metadata({METADATA_KEY: "{"}, "a.onnx")
