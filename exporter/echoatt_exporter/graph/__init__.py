"""Graph passes: each is an `onnx_ir` pass with one concern; two pipelines order them."""

from echoatt_exporter.graph.checks.check_file import check_file
from echoatt_exporter.graph.pipeline import export_pipeline, rewrite_pipeline
from echoatt_exporter.graph.run import PassReport, PassStep, Pipeline, run_pipeline
from echoatt_exporter.graph.same_bytes import apart, find_same_bytes, written_once
from echoatt_exporter.graph.size import GraphSize

__all__ = [
    "GraphSize",
    "PassReport",
    "PassStep",
    "Pipeline",
    "apart",
    "check_file",
    "export_pipeline",
    "find_same_bytes",
    "rewrite_pipeline",
    "run_pipeline",
    "written_once",
]
