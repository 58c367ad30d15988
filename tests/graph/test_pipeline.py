import itertools

import numpy as np
import onnx_ir as ir
import pytest

from echoatt_exporter.errors import ContractError, ExportError
from echoatt_exporter.graph import (
    GraphSize,
    PassStep,
    Pipeline,
    check_file,
    export_pipeline,
    rewrite_pipeline,
    run_pipeline,
)
from echoatt_exporter.graph.graph_pass import GraphPass
from echoatt_exporter.graph.properties import Property
from echoatt_exporter.graph.sharing.rewire_probabilities import RewireProbabilities
from echoatt_runtime.errors import PlanError

PLAN = (0, 1, 1, 0)
LAYOUTS = ["separate", "biased", "packed", "split", "heads"]


@pytest.fixture
def export(decoder):
    """Builds a decoder, exports it or applies a plan to it, and gives the graph and its reports."""

    def build(tiny, plan=None, dtype="fp32", model=None):
        model = tiny.build() if model is None else model
        pipeline = export_pipeline if plan is None else rewrite_pipeline
        return model, run_pipeline(model, pipeline(tiny.specification(plan, dtype)))

    return build


def tiny_with(decoder, layout, **fields):
    return decoder(layout=layout, **({"query_heads": 2} if layout == "heads" else {}), **fields)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plain_export_keeps_the_numbers(decoder, export, evaluate, difference, ops, layout):
    tiny = tiny_with(decoder, layout)
    expected = evaluate(tiny.build(), tiny.feeds())
    model, reports = export(tiny)
    counts = ops(model)
    assert counts["If"] == 4 * 2
    assert counts["RMSNormalization"] + counts["SkipSimplifiedLayerNormalization"] == 4 * 2 + 1
    # Queries and keys together where a Split takes the product apart
    together = layout in ("separate", "biased", "split")
    assert counts["RotaryEmbedding"] == 4 * (1 if together else 2)
    assert not {"ReduceMean", "Pow", "Neg", "Constant", "Identity"} & set(counts)
    # A packed product, output projection, gate with up, and down; the head
    assert counts["MatMul"] == 4 * (1 + 1 + 1 + 1) + 1
    assert difference(expected, evaluate(model, tiny.feeds())) < 2e-5
    one = tiny.feeds(tokens=1)
    assert difference(evaluate(tiny.build(), one), evaluate(model, one)) < 2e-5
    assert reports[0].before.nodes > 1.5 * reports[-1].after.nodes
    assert [report.name for report in reports[-2:]] == ["CheckContract", "ClearMetadata"]
    assert not reports[-2].modified


@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rewriting_a_bundle_is_the_same_as_exporting_with_the_plan(
    decoder, export, evaluate, difference, layout, dtype
):
    tiny = tiny_with(decoder, layout, hidden=32)
    exported, _ = export(tiny, PLAN, dtype)
    bundle, _ = export(tiny, None, dtype)
    unshared = evaluate(bundle, tiny.feeds())
    # A bundle is read from its file, where nothing tells of modules any more
    bundle = ir.from_proto(ir.to_proto(bundle))
    rewritten, reports = export(tiny, PLAN, dtype, model=bundle)

    result = evaluate(rewritten, tiny.feeds())
    assert difference(evaluate(exported, tiny.feeds()), result) < 1e-5
    assert GraphSize.of(rewritten) == GraphSize.of(exported)
    assert np.abs(unshared["logits"] - result["logits"]).max() > 0.05
    modified = {report.name for report in reports if report.modified}
    assert {"JoinDecode", "SplitDecode"} <= modified
    assert {"RewireProbabilities", "RemoveDeadBranches", "CutPackedWeights"} <= modified
    assert not {"FuseRmsNorm", "FuseRotary", "PackProjections", "QuantizeWeights"} & modified


@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
def test_a_shared_bundle_loses_exactly_the_followers_weights(decoder, export, dtype):
    tiny = decoder(hidden=32)
    before, after = (GraphSize.of(export(tiny, plan, dtype)[0]) for plan in (None, PLAN))
    columns = (tiny.query_heads + tiny.kv_heads) * tiny.head_dim
    assert before.parameters - after.parameters == 2 * 32 * columns
    # 32 rows are one block: its bits and a float32 scale
    column_bytes = {"fp32": 32 * 4, "int8": 32 + 4, "int4": 16 + 4}[dtype]
    # The sizes of the followers' Splits go too, but the sources' Split has the same
    assert before.bytes - after.bytes == 2 * columns * column_bytes


def test_a_graph_for_a_gpu_branches_where_heads_and_tokens_change_places_only(decoder):
    tiny = decoder()
    model = tiny.build()
    run_pipeline(model, export_pipeline(tiny.specification(device="cuda")))
    inner = {node.op_type for node in model.graph.all_nodes() if node.graph is not model.graph}
    assert inner == {"Reshape", "Transpose"}


def test_a_student_needs_no_sharing(decoder, export, evaluate, difference):
    tiny = decoder(sources=PLAN, followers=(2, 3))
    expected = evaluate(tiny.build(), tiny.feeds())
    model, reports = export(tiny)
    ran = {report.name for report in reports}
    assert not {"RewireProbabilities", "RemoveDeadBranches", "CutPackedWeights"} & ran
    assert difference(expected, evaluate(model, tiny.feeds())) < 2e-5


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.05), ("int4", 0.7)])
def test_quantised_logits_stay_near(decoder, export, evaluate, dtype, bound):
    tiny = decoder(hidden=64)
    expected = evaluate(tiny.build(), tiny.feeds())["logits"]
    model, _ = export(tiny, None, dtype)
    result = evaluate(model, tiny.feeds())["logits"]
    assert 0 < np.linalg.norm(result - expected) / np.linalg.norm(expected) < bound


def test_the_written_file_is_clean(decoder, export, tmp_path):
    for dtype in ("fp32", "int4"):
        model, _ = export(decoder(hidden=32), PLAN, dtype)
        ir.save(model, tmp_path / f"{dtype}.onnx", external_data=f"{dtype}.data")
        check_file(tmp_path / f"{dtype}.onnx")


def test_no_trace_of_the_source_stays_on_the_nodes(decoder, export):
    tiny = decoder()
    model = tiny.build()
    for node in model.graph:
        node.metadata_props["pkg.torch.onnx.stack_trace"] = "/home/somebody/secret.py"
    model, _ = export(tiny, PLAN, model=model)
    assert b"secret" not in ir.to_proto(model).SerializeToString()


def test_reports_follow_on_and_every_step_says_why(decoder, export):
    seen = []
    tiny = decoder()
    model = tiny.build()
    pipeline = rewrite_pipeline(tiny.specification(PLAN))
    first = GraphSize.of(model)
    reports = run_pipeline(model, pipeline, on_step=lambda step: seen.append(step.name))
    assert seen == [report.name for report in reports] == [step.name for step in pipeline.steps]
    assert reports[0].before == first
    assert all(a.after == b.before for a, b in itertools.pairwise(reports))
    assert all(report.why and "\n" not in report.why for report in reports)
    assert all(report.modified for report in reports if report.before != report.after)


def test_measuring_reads_no_weight(model_of):
    def refuse():
        raise AssertionError("a weight was read")

    model = model_of(
        "g (float[b,4] x, float[4,4] w) => (float[b,4] y) { y = MatMul(x, w) }",
        {"w": np.eye(4, dtype=np.float32)},
    )
    model.graph.initializers["w"].const_value = ir.LazyTensor(
        refuse, dtype=ir.DataType.FLOAT, shape=ir.Shape([4, 4])
    )
    assert GraphSize.of(model) == GraphSize(nodes=1, parameters=16, bytes=64)


def test_integer_constants_are_no_parameters(decoder):
    model = decoder().build()
    model.graph.initializers["zero"].const_value = ir.tensor(np.zeros(1000, np.int64), name="zero")
    before = GraphSize.of(decoder().build())
    assert GraphSize.of(model).parameters == before.parameters
    assert GraphSize.of(model).bytes == before.bytes + 999 * 8


def _only(transform, given=()):
    return Pipeline(steps=[PassStep(transform=transform, why="a test")], given=frozenset(given))


def test_a_refusal_of_a_pass_is_handed_on(decoder):
    tiny = decoder()
    with pytest.raises(PlanError):
        run_pipeline(tiny.build(), _only(RewireProbabilities((0, 1)), {Property.NO_BRANCHES}))
    broken = tiny.build()
    broken.graph.outputs[0].name = "scores"
    with pytest.raises(ContractError, match="outputs missing: logits"):
        run_pipeline(broken, export_pipeline(tiny.specification()))


def test_an_unforeseen_failure_names_the_pass(decoder):
    class Failing(GraphPass):
        def call(self, model):
            raise KeyError("two\nlines")

    with pytest.raises(ExportError, match=r"the graph pass Failing failed: 'two.*lines'") as error:
        run_pipeline(decoder().build(), _only(Failing()))
    assert "\n" not in str(error.value)


def test_a_specification_of_another_model_is_refused(decoder):
    other = decoder(kv_heads=4).specification()
    with pytest.raises(ContractError, match=r"has shape \[batch,2,capacity,4\], expected"):
        run_pipeline(decoder().build(), export_pipeline(other))


def test_a_fault_can_be_planted_after_any_pass(decoder, evaluate, difference):
    tiny = decoder()
    pipeline = export_pipeline(tiny.specification())
    expected = evaluate(tiny.build(), tiny.feeds())
    names = [step.name for step in pipeline.steps]
    for after in ("FuseRmsNorm", "PackProjections", "SplitDecode"):
        model = tiny.build()

        def plant(step, model=model, after=after):
            if step is pipeline.steps[names.index(after) + 1]:
                value = model.graph.initializers["final_norm"]
                value.const_value = ir.tensor(value.const_value.numpy() + 1, name=value.name)

        run_pipeline(model, pipeline, on_step=plant)
        assert difference(expected, evaluate(model, tiny.feeds())) > 0.1
