import dataclasses
import json
import subprocess
import sys

import pytest
from tests.wording import says

from echoatt_runtime import (
    DamagedBundleError,
    ForeignModelError,
    NewerFormatError,
    SpecificationError,
)
from echoatt_runtime.contract import (
    CAPABILITIES,
    METADATA_KEY,
    BundleFile,
    CacheSpec,
    Manifest,
    RoundingCost,
    SharingPlan,
    Verification,
)


@pytest.fixture
def manifest(make_manifest):
    return make_manifest()


def edited(manifest, **changes):
    data = json.loads(manifest.to_json()) | changes
    return json.dumps({key: value for key, value in data.items() if value != "DELETE"})


def specified(manifest, **changes):
    """The manifest's text with other fields in its specification."""
    data = json.loads(manifest.to_json())["specification"] | changes
    kept = {key: value for key, value in data.items() if value != "DELETE"}
    return edited(manifest, specification=kept)


def with_cache(manifest, **changes):
    """The manifest's text with another first cache."""
    caches = json.loads(manifest.to_json())["specification"]["caches"]
    return specified(manifest, caches=[caches[0] | changes, *caches[1:]])


def test_json_round_trip(make_manifest, make_specification):
    verification = Verification(
        provider="CPUExecutionProvider",
        passed=True,
        method="against PyTorch",
        tolerance=1e-4,
        max_abs_error=3e-6,
        cases=5,
        rounding_cost=RoundingCost(
            positions=81, mean_kl=0.36, top1_agreement=0.6, rms_error=0.3, unknown={"more": 1}
        ),
    )
    manifest = make_manifest(
        make_specification(
            layer_kinds=("sliding", "full", "full"),
            sliding_window=64,
            head_orders=((), (), (1, 0, 3, 2)),
        ),
        verification=verification,
        graph_sha256="a" * 64,
    )
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_names_follow_the_graph_contract(make_specification):
    specification = make_specification()
    assert specification.input_names == (
        "input_ids",
        "past_lengths",
        "logits_indices",
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.key",
        "past_key_values.1.value",
        "past_key_values.2.value",
    )
    assert specification.output_names == (
        "logits",
        "present.0.key",
        "present.0.value",
        "present.1.key",
        "present.1.value",
        "present.2.value",
    )


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
def test_cache_size_follows_the_dtype(make_specification, dtype, element_type, element_bytes):
    specification = make_specification(dtype=dtype)
    assert {cache.element_type for cache in specification.caches} == {element_type}
    # Five caches of two heads of four elements.
    assert specification.cache_bytes_per_token == 5 * 2 * 4 * element_bytes


def test_a_cache_says_how_it_lies():
    cache = CacheSpec(
        name="3.value",
        kind="value",
        layer=3,
        element_type="float16",
        axes=("batch", 2, 8, "capacity"),
    )
    assert cache.shape(5, 300) == (5, 2, 8, 300)
    assert cache.shape("b", "t") == ("b", 2, 8, "t")
    assert (cache.capacity_axis, cache.bytes_per_token) == (3, 32)
    assert (cache.past_name, cache.present_name) == ("past_key_values.3.value", "present.3.value")


def test_layers_may_differ_in_their_heads(make_specification, make_manifest):
    specification = make_specification(
        query_heads=(4, 8, 8), kv_heads=(2, 4, 2), head_dims=(4, 8, 4)
    )
    assert [cache.axes[1:] for cache in specification.caches] == [
        (2, "capacity", 4),
        (2, 4, "capacity"),
        (4, "capacity", 8),
        (4, 8, "capacity"),
        (2, 4, "capacity"),
    ]
    assert specification.cache_bytes_per_token == (2 * 8 + 2 * 32 + 8) * 4
    manifest = make_manifest(specification)
    assert Manifest.from_json(manifest.to_json()) == manifest
    with pytest.raises(SpecificationError, match=r"layer 2 \(4 query heads\) uses layer 1 \(8"):
        make_specification(query_heads=(4, 8, 4))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"plan": {"sources": [0, 2, 2]}}, "layer 1 uses layer 2, which is not earlier"),
        ({"plan": {"sources": [0, 0, 1]}}, "layer 2 uses layer 1, which is itself a follower"),
        ({"plan": {"sources": [0, 1, -1]}}, "layer 2 uses layer -1, which does not exist"),
        ({"plan": {"sources": []}}, "the plan has 0 layers"),
        ({"plan": {"sources": [0, 1, True]}}, "sources is not a list of integers"),
        ({"plan": {"sources": [0, 1, 1], "head_orders": [[], [1, 0]]}}, "and 2 head orders"),
        ({"plan": {"sources": [0, 1, 1], "head_orders": 1}}, "not a list of lists of integers"),
        ({"layer_kinds": ["full", "full"]}, "layer_kinds has 2 layers"),
        ({"layer_kinds": ["full", "full", "wide"]}, "layer_kinds[2] is 'wide'"),
        (
            {"layer_kinds": ["full", "full", "sliding"], "sliding_window": 8},
            "layer 2 (sliding attention) uses layer 1 (full attention)",
        ),
        ({"layer_kinds": ["sliding"] * 3}, "sliding_window is null although layers are sliding"),
        ({"sliding_window": 0}, "sliding_window is 0, which is not positive"),
        ({"sliding_window": "8"}, "sliding_window is not an integer of 64 bits or null"),
        ({"query_heads": [5, 4, 4]}, "the 5 query heads of layer 0 do not divide into 2"),
        ({"kv_heads": [0, 2, 2]}, "kv_heads[0] is 0, which is not positive"),
        ({"head_dims": [4, 4.0, 4]}, "head_dims is not a list of integers"),
        ({"context_length": "DELETE"}, "context_length is missing"),
        ({"context_length": 2**40}, f"context_length is {2**40}"),
        ({"context_length": 2**70}, "context_length is not an integer of 64 bits"),
        ({"dtype": "fp8"}, "dtype is 'fp8', not one of"),
        ({"device": "tpu"}, "device is 'tpu', not one of"),
        ({"bos_token_id": 10_000}, "bos_token_id has 10000, outside the vocabulary"),
        ({"eos_token_ids": [1, -1]}, "eos_token_ids has -1, outside the vocabulary"),
        ({"eos_token_ids": 1}, "eos_token_ids is not a list of integers"),
        ({"family": None}, "family is not a string"),
        ({"source_checkpoint": {"name": "x"}}, "sha256 is missing"),
        ({"source_checkpoint": {"name": "x", "sha256": "0"}}, "is not 64 hexadecimal digits"),
        ({"caches": []}, "layer 0 has the caches none, expected key and value"),
        ({"caches": [1]}, "caches is not a list of caches"),
    ],
)
def test_every_kind_of_fault_in_the_specification_is_named(manifest, changes, fault):
    with pytest.raises(DamagedBundleError) as caught:
        Manifest.from_json(specified(manifest, **changes))
    assert says(str(caught.value), fault)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"name": "0.value"}, "cache 0.value is there twice"),
        ({"name": "first"}, "cache first is not called 0.key"),
        ({"kind": "query"}, "is of kind 'query', not one of key, value"),
        ({"layer": 7}, "is of layer 7, which does not exist"),
        ({"element_type": "float8"}, "has elements of type 'float8', not one of"),
        ({"axes": ["batch", 2, 4]}, "has the axes ['batch', 2, 4]"),
        ({"axes": [2, "batch", "capacity"]}, "expected batch first"),
        ({"axes": ["batch", "capacity", "capacity"]}, "capacity once"),
        ({"axes": ["batch", "capacity", 0]}, "and sizes"),
        ({"axes": ["batch", "capacity", "heads"]}, "and sizes"),
        ({"axes": ["batch", "capacity", True]}, "not a list of names and sizes"),
        ({"scales": "9.key"}, "has its scales in 9.key, which does not exist"),
    ],
)
def test_every_kind_of_fault_in_a_cache_is_named(manifest, changes, fault):
    with pytest.raises(DamagedBundleError) as caught:
        Manifest.from_json(with_cache(manifest, **changes))
    assert says(str(caught.value), fault)


WEIGHTS = {"name": "model.onnx.data", "role": "weights", "bytes": 1, "sha256": None}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"files": []}, "0 files are the weights"),
        ({"files": [WEIGHTS, WEIGHTS | {"name": "b"}]}, "2 files are the weights"),
        ({"files": [WEIGHTS | {"name": "../secret"}]}, "'../secret' is not a bare file name"),
        ({"files": [WEIGHTS | {"name": ""}]}, "'' is not a bare file name"),
        ({"files": [WEIGHTS | {"name": ".."}]}, "'..' is not a bare file name"),
        ({"files": [WEIGHTS | {"bytes": -1}]}, "model.onnx.data has -1 bytes, which is negative"),
        ({"files": [WEIGHTS | {"role": "spy"}]}, "model.onnx.data has the role 'spy'"),
        ({"files": [WEIGHTS | {"sha256": "A" * 64}]}, "sha256 of model.onnx.data is not 64"),
        ({"files": [WEIGHTS, WEIGHTS | {"role": "companion"}]}, "a file is listed twice"),
        ({"graph_sha256": "0"}, "graph_sha256 is not 64 hexadecimal digits"),
        ({"verification": {"passed": 1}}, "passed is not true or false"),
        ({"specification": []}, "specification is not an object"),
        ({"exporter_version": "DELETE"}, "exporter_version is missing"),
    ],
)
def test_every_kind_of_fault_in_the_manifest_is_named(manifest, changes, fault):
    with pytest.raises(DamagedBundleError) as caught:
        Manifest.from_json(edited(manifest, **changes))
    assert says(str(caught.value), fault)
    assert "\n" not in str(caught.value)


def test_all_faults_are_told_at_once(manifest):
    text = specified(manifest, family=3, vocab_size=None, dtype=1, eos_token_ids="DELETE")
    with pytest.raises(DamagedBundleError) as caught:
        Manifest.from_json(text)
    for fault in ("family is not", "vocab_size is not", "dtype is not", "eos_token_ids is missing"):
        assert says(str(caught.value), fault)


def test_a_thousand_faults_fit_a_line(manifest):
    text = specified(manifest, layer_kinds=["wide"] * 10_000)
    with pytest.raises(DamagedBundleError, match=r"and 9[0-9]{3} more") as caught:
        Manifest.from_json(text)
    assert len(str(caught.value)) < 1000


def test_what_is_inconsistent_cannot_be_made(make_specification, manifest):
    with pytest.raises(SpecificationError, match="itself a follower"):
        make_specification(plan=SharingPlan((0, 0, 1)))
    with pytest.raises(DamagedBundleError, match="0 files are the weights"):
        dataclasses.replace(manifest, files=())


def test_unknown_fields_are_kept(manifest):
    data = json.loads(manifest.to_json())
    data["later"] = {"x": [1]}
    data["specification"]["later"] = "yes"
    data["specification"]["caches"][0]["later"] = 3
    data["files"][0]["later"] = None
    read = Manifest.from_json(json.dumps(data))
    assert read.unknown == {"later": {"x": [1]}}
    assert read.specification.unknown == {"later": "yes"}
    assert json.loads(read.to_json()) == data


def test_fields_with_defaults_may_be_missing(manifest):
    data = json.loads(manifest.to_json())
    for name in ("requires", "graph_sha256", "verification"):
        del data[name]
    for cache in data["specification"]["caches"]:
        del cache["scales"]
    assert Manifest.from_json(json.dumps(data)) == manifest


def test_an_unknown_capability_is_named(manifest):
    known = [*CAPABILITIES]
    read = Manifest.from_json(edited(manifest, requires=known))
    assert dataclasses.replace(read, requires=manifest.requires) == manifest
    with pytest.raises(NewerFormatError, match="requires 'int8-caches', which this runtime cannot"):
        # Whatever else is new about it
        Manifest.from_json(edited(manifest, requires=[*known, "int8-caches"], files="new"))


@pytest.mark.parametrize("number", [4, 10])
def test_a_newer_format_asks_for_the_newer_one(manifest, number):
    with pytest.raises(NewerFormatError, match="newer EchoAtt: install that"):
        Manifest.from_json(edited(manifest, format=f"echoatt-bundle/{number}", files="anything"))


def test_an_older_format_asks_for_another_export(manifest):
    with pytest.raises(DamagedBundleError, match="back to number 2; export it again"):
        Manifest.from_json(edited(manifest, format="echoatt-bundle/1"))


@pytest.mark.parametrize("value", ["echoatt-bundle/0", "echoatt-bundle/x", "other/1", 1, None])
def test_an_unknown_format_is_damage(manifest, value):
    with pytest.raises(DamagedBundleError, match="format"):
        Manifest.from_json(edited(manifest, format=value))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_other_json_is_damage(text):
    with pytest.raises(DamagedBundleError, match="is not"):
        Manifest.from_json(text)


FORMAT_2 = {
    "format": "echoatt-bundle/2",
    "exporter_version": "0.1.0",
    "family": "llama",
    "sources": [0, 1, 1],
    "head_orders": [],
    "layer_kinds": ["full", "full", "full"],
    "sliding_window": None,
    "num_query_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "vocab_size": 258,
    "context_length": 600,
    "dtype": "fp32",
    "device": "cpu",
    "bos_token_id": 256,
    "eos_token_ids": [257],
    "pad_token_id": None,
    "weights_file": "model.onnx.data",
    "weights_bytes": 1,
    "source_checkpoint": {"name": "tiny", "sha256": "0" * 64},
    "verification": None,
}


def test_format_2_is_read(make_specification):
    manifest = Manifest.from_json(json.dumps(FORMAT_2))
    assert manifest.specification == make_specification()
    assert manifest.weights == BundleFile(
        name="model.onnx.data", role="weights", bytes=1, sha256=None
    )
    assert "chat_template.jinja" in {file.name for file in manifest.companions}
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"num_kv_heads": "2"}, "kv_heads is not a list of integers"),
        ({"sources": None}, "sources is not a list of integers"),
        ({"dtype": []}, "dtype is not a string"),
        ({"weights_file": "../secret"}, "'../secret' is not a bare file name"),
        ({"head_orders": [[], [1, 0]]}, "and 2 head orders"),
    ],
)
def test_faults_of_format_2_are_named(changes, fault):
    with pytest.raises(DamagedBundleError) as caught:
        Manifest.from_json(json.dumps(FORMAT_2 | changes))
    assert says(str(caught.value), fault)


def test_the_contract_needs_neither_torch_nor_onnxruntime():
    program = """
import sys
from echoatt_runtime.contract import Manifest, SharingPlan
SharingPlan.from_json('{"format": "echoatt-plan/1", "sources": [0, 0]}').validate(("full",) * 2)
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"torch", "transformers", "onnxruntime", "onnx", "echoatt_exporter"}, loaded
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_metadata_without_a_manifest_is_foreign():
    with pytest.raises(ForeignModelError, match=r"a\.onnx is an ONNX file without an EchoAtt"):
        Manifest.from_metadata({"other": "{}"}, "a.onnx")


def test_metadata_names_the_file(manifest):
    assert Manifest.from_metadata({METADATA_KEY: manifest.to_json()}, "a.onnx") == manifest
    with pytest.raises(DamagedBundleError, match=r"a\.onnx"):
        Manifest.from_metadata({METADATA_KEY: "{"}, "a.onnx")
