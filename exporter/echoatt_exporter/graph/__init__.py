"""Graph passes: each is an `onnx_ir` pass with one concern; `export_pipeline` orders them."""

from echoatt_exporter.graph.canonical.fuse_rms_norm import FuseRmsNorm
from echoatt_exporter.graph.canonical.fuse_rotary import FuseRotary
from echoatt_exporter.graph.canonical.join_decode import JoinDecode
from echoatt_exporter.graph.checks.check_contract import CheckContract
from echoatt_exporter.graph.checks.check_file import check_file
from echoatt_exporter.graph.lowering.cpu.split_decode import SplitDecode
from echoatt_exporter.graph.lowering.fuse_skip_rms_norm import FuseSkipRmsNorm
from echoatt_exporter.graph.lowering.gather_early import GatherEarly
from echoatt_exporter.graph.lowering.pack_projections import PackProjections
from echoatt_exporter.graph.lowering.quantize_weights import QuantizeWeights
from echoatt_exporter.graph.lowering.rotate_together import RotateTogether
from echoatt_exporter.graph.lowering.share_tied_table import ShareTiedTable
from echoatt_exporter.graph.pipeline import export_pipeline
from echoatt_exporter.graph.run import GraphSize, PassReport, PassStep, run_pipeline
from echoatt_exporter.graph.sharing.cut_packed_weights import CutPackedWeights
from echoatt_exporter.graph.sharing.remove_dead_branches import RemoveDeadBranches
from echoatt_exporter.graph.sharing.rewire_probabilities import RewireProbabilities

__all__ = [
    "CheckContract",
    "CutPackedWeights",
    "FuseRmsNorm",
    "FuseRotary",
    "FuseSkipRmsNorm",
    "GatherEarly",
    "GraphSize",
    "JoinDecode",
    "PackProjections",
    "PassReport",
    "PassStep",
    "QuantizeWeights",
    "RemoveDeadBranches",
    "RewireProbabilities",
    "RotateTogether",
    "ShareTiedTable",
    "SplitDecode",
    "check_file",
    "export_pipeline",
    "run_pipeline",
]
