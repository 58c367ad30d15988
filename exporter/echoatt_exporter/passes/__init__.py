"""Graph passes: each is an `onnx_ir` pass with one concern; `export_pipeline` orders them."""

from echoatt_exporter.passes.check_contract import CheckContract
from echoatt_exporter.passes.check_file import check_file
from echoatt_exporter.passes.cut_packed_weights import CutPackedWeights
from echoatt_exporter.passes.fuse_rms_norm import FuseRmsNorm
from echoatt_exporter.passes.fuse_rotary import FuseRotary
from echoatt_exporter.passes.fuse_skip_rms_norm import FuseSkipRmsNorm
from echoatt_exporter.passes.gather_early import GatherEarly
from echoatt_exporter.passes.join_decode import JoinDecode
from echoatt_exporter.passes.pack_projections import PackProjections
from echoatt_exporter.passes.pipeline import export_pipeline
from echoatt_exporter.passes.quantize_weights import QuantizeWeights
from echoatt_exporter.passes.remove_dead_branches import RemoveDeadBranches
from echoatt_exporter.passes.report import GraphSize, PassReport, PassStep, run_pipeline
from echoatt_exporter.passes.rewire_probabilities import RewireProbabilities
from echoatt_exporter.passes.rotate_together import RotateTogether
from echoatt_exporter.passes.share_tied_table import ShareTiedTable
from echoatt_exporter.passes.split_decode import SplitDecode

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
