"""Roles follow from where a weight stands, in a traced graph and in a bundle's alike."""

import dataclasses
import itertools

import numpy as np
import onnx_ir as ir
import pytest
import torch

from echoatt_exporter.architecture import architecture_of, specification_fields
from echoatt_exporter.errors import ContractError
from echoatt_exporter.graph import export_pipeline, rewrite_pipeline, run_pipeline
from echoatt_exporter.graph.roles import Kind, Part, Use, is_weight, role_of
from echoatt_exporter.share.apply import share_attention
from echoatt_exporter.trace.tracer import trace_student
from echoatt_runtime.contract import (
    SharingPlan,
    SourceCheckpoint,
    Specification,
    lay_out_caches,
)

PLAN = (0, 1, 1, 0)
LAYOUTS = ["separate", "biased", "packed", "split", "heads"]


def roles_at(model, pipeline, name):
    """Run a pipeline; what each weight's parts serve before the pass of this name."""
    found = {}

    def note(step):
        if step.name == name:
            weights = [v for v in model.graph.initializers.values() if is_weight(v)]
            found.update({value.name: role_of(value) for value in weights})

    run_pipeline(model, pipeline, on_step=note)
    return found


def part(columns, *uses):
    return Part(frozenset(Use(*use) for use in uses), columns)


def tiny_with(decoder, layout):
    return decoder(layout=layout, hidden=32, **({"query_heads": 2} if layout == "heads" else {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_weight_of_a_traced_graph_has_its_role(decoder, layout):
    tiny = tiny_with(decoder, layout)
    roles = roles_at(tiny.build(), export_pipeline(tiny.specification()), "FuseSkipRmsNorm")
    sizes = {Kind.QUERIES: tiny.query_heads * 4, Kind.KEYS: 8, Kind.VALUES: 8}
    for layer in range(4):
        of_layer = [part(size, (kind, layer)) for kind, size in sizes.items()]
        if layout in ("separate", "biased"):
            for letter, expected in zip("qkv", of_layer, strict=True):
                name = f"model.layers.{layer}.self_attn.{letter}_proj.weight"
                assert roles.pop(name) == (expected,)
                if layout == "biased":
                    assert roles.pop(f"l{layer}_{letter}_bias") == (expected,)
        else:
            packed = (
                [part(4, (kind, layer)) for kind in sizes] * 2 if layout == "heads" else of_layer
            )
            for name in (f"l{layer}_qkv", f"l{layer}_qkv_bias"):
                assert roles.pop(name) == tuple(packed)
        assert roles.pop(f"model.layers.{layer}.self_attn.o_proj.weight") == (
            part(32, (Kind.OUTPUT, layer)),
        )
        for name, columns in (("up", 64), ("gate", 64), ("down", 32)):
            assert roles.pop(f"l{layer}_{name}") == (part(columns, (Kind.FEED_FORWARD, None)),)
        for name in ("norm1", "norm2"):
            assert roles.pop(f"l{layer}_{name}") == (part(32, (Kind.NORM, None)),)
    assert roles == {
        "embed": (part(11, (Kind.EMBEDDING, None)),),
        "head": (part(11, (Kind.HEAD, None)),),
        "final_norm": (part(32, (Kind.NORM, None)),),
        "inv_freq": (part(2, (Kind.POSITIONS, None)),),
    }


@pytest.mark.parametrize("dtype", ["fp32", "int4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bundles_weights_have_the_roles_that_they_had_when_it_was_exported(
    decoder, layout, dtype
):
    tiny = tiny_with(decoder, layout)
    model = tiny.build()
    expected = roles_at(model, export_pipeline(tiny.specification(None, dtype)), "CheckContract")
    assert all(role and all(one.uses for one in role) for role in expected.values())
    data = ir.to_proto(model).SerializeToString()
    assert b"echoatt.role" not in data
    bundle = ir.from_proto(ir.to_proto(model))
    pipeline = rewrite_pipeline(tiny.specification(PLAN, dtype))
    assert roles_at(bundle, pipeline, "RewireProbabilities") == expected


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_what_is_left_of_followers_weights_serves_their_values(decoder, dtype):
    tiny = tiny_with(decoder, "split")
    pipeline = rewrite_pipeline(tiny.specification(PLAN, dtype))
    roles = roles_at(tiny.build(), pipeline, "CheckContract")
    for name, role in roles.items():
        for layer in itertools.filterfalse(lambda layer: PLAN[layer] == layer, range(4)):
            if name.startswith(f"l{layer}_qkv"):
                assert role == (part(8, (Kind.VALUES, layer)),)
    served = {use for role in roles.values() for one in role for use in one.uses}
    assert {use.layer for use in served if use.kind in (Kind.QUERIES, Kind.KEYS)} == {0, 1}


def test_a_weight_of_two_layers_serves_both(decoder):
    tiny = decoder()
    model = tiny.build()
    weights = model.graph.initializers
    name = "model.layers.{}.self_attn.q_proj.weight"
    mine, other = weights[name.format(2)], weights[name.format(1)]
    ir.convenience.replace_all_uses_with(mine, other)
    roles = roles_at(model, rewrite_pipeline(tiny.specification(PLAN)), "RewireProbabilities")
    assert roles[other.name] == (part(16, (Kind.QUERIES, 1), (Kind.QUERIES, 2)),)


def test_a_product_that_serves_nothing_known_has_no_role(decoder):
    tiny = decoder()
    model = tiny.build()
    hidden = next(node for node in model.graph if node.op_type == "MatMul").inputs[0]
    weight = ir.Value(
        name="stray",
        const_value=ir.tensor(np.ones((16, 3), np.float32), name="stray"),
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([16, 3]),
    )
    model.graph.register_initializer(weight)
    product = ir.node("MatMul", [hidden, weight])
    product.outputs[0].name = "lost"
    model.graph.append(product)
    model.graph.outputs.append(product.outputs[0])
    with pytest.raises(ContractError, match=r"\+stray is a weight with columns of unknown role"):
        run_pipeline(model, export_pipeline(tiny.specification()))


# By family, the module that holds each kind's columns; several of one name are packed in that order
MODULES = {
    "qwen3": ["q_proj", "k_proj", "v_proj"],
    "phi3": ["qkv_proj"] * 3,
    "gpt_neox": ["query_key_value"] * 3,
}


SIZES = ("query_heads", "kv_heads", "head_dims")


def trace(tiny_model, family, turned=False):
    """A student, its trace, and what was to be built; `turned` lets caches lie otherwise."""
    student = share_attention(tiny_model(family, num_hidden_layers=1), SharingPlan((0,)))
    fields = specification_fields(architecture_of(student.config.get_text_config()))
    caches = lay_out_caches(SharingPlan((0,)), fields["kv_heads"], fields["head_dims"], "float32")
    if turned:
        axes = {kind: caches[not index].axes for index, kind in enumerate(("key", "value"))}
        caches = tuple(dataclasses.replace(cache, axes=axes[cache.kind]) for cache in caches)
    specification = Specification(
        **fields, plan=SharingPlan((0,)), dtype="fp32", device="cpu", caches=caches,
        bos_token_id=1, eos_token_ids=(2,), pad_token_id=None,
        source_checkpoint=SourceCheckpoint(name="tiny", sha256="0" * 64),
    )  # fmt: skip
    return student, trace_student(student, specification), specification


@pytest.mark.parametrize("family", list(MODULES))
def test_roles_agree_with_the_family(tiny_model, evaluate, family):
    # Nothing but the specification says how caches lie
    turned = family == "gpt_neox"
    student, model, specification = trace(tiny_model, family, turned)
    roles = roles_at(model, export_pipeline(specification), "FuseSkipRmsNorm")
    if turned:
        assert [cache.capacity_axis for cache in specification.caches] == [3, 2]
        assert_same_logits(student, model, specification, evaluate)
    heads, kv_heads, size = (getattr(specification, name)[0] for name in SIZES)
    kinds = {Kind.QUERIES: heads * size, Kind.KEYS: kv_heads * size, Kind.VALUES: kv_heads * size}
    modules = MODULES[family]
    expected = {}
    for (kind, columns), module in zip(kinds.items(), modules, strict=True):
        expected.setdefault(module, []).append(part(columns, (kind, 0)))
    if family == "gpt_neox":
        expected = {modules[0]: [part(size, (kind, 0)) for kind in kinds] * heads}
        config = student.config.get_text_config()
        hidden, inner = config.hidden_size, config.intermediate_size
        expected |= {"dense": [part(hidden, (Kind.OUTPUT, 0))]}
        expected |= {"dense_h_to_4h": [part(inner, (Kind.FEED_FORWARD, None))]}
    if family == "qwen3":
        expected |= {"q_norm": [part(size, (Kind.QUERIES, 0))]}
        expected |= {"k_norm": [part(size, (Kind.KEYS, 0))]}
    for module, parts in expected.items():
        found = [role for name, role in roles.items() if f".{module}." in name]
        assert found
        assert set(found) == {tuple(parts)}
    assert all(role for role in roles.values())


def assert_same_logits(student, model, specification, evaluate):
    tokens = np.random.default_rng(1).integers(3, specification.vocab_size, (2, 4))
    feeds = {
        "input_ids": tokens,
        "past_lengths": np.zeros(2, np.int64),
        "logits_indices": np.arange(8).reshape(2, 4) % 4,
    }
    for cache in specification.caches:
        feeds[cache.past_name] = np.zeros(cache.shape(2, 6), np.float32)
    with torch.no_grad():
        expected = student(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(evaluate(model, feeds)["logits"], expected, atol=1e-4)
