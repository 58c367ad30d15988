"""What exporter and runtime agree on: sharing plan, caches, element types, manifest.

A `Specification` is what is to be built; a `Manifest` is what was published. Neither needs torch
or ONNX Runtime.
"""

from echoatt_runtime.contract.caches import CacheSpec, lay_out_caches
from echoatt_runtime.contract.element_types import DTYPES, ELEMENT_TYPES, Dtype, ElementType
from echoatt_runtime.contract.manifest import (
    CAPABILITIES,
    COMPANION,
    FORMAT,
    FORMAT_NUMBER,
    WEIGHTS,
    BundleFile,
    Manifest,
    RoundingCost,
    Verification,
    required_by,
)
from echoatt_runtime.contract.names import (
    CHOICES,
    INPUT_IDS,
    LOGIT_SUMS,
    LOGITS,
    LOGITS_INDICES,
    METADATA_KEY,
    MODEL_FILE,
    PAST_LENGTHS,
)
from echoatt_runtime.contract.plan import SharingPlan, head_order_fault
from echoatt_runtime.contract.quantisation import ROUNDINGS, Bits, Quantisation
from echoatt_runtime.contract.specification import (
    DEVICES,
    LAYER_KINDS,
    LayerKind,
    SourceCheckpoint,
    Specification,
)

__all__ = [
    "CAPABILITIES",
    "CHOICES",
    "COMPANION",
    "DEVICES",
    "DTYPES",
    "ELEMENT_TYPES",
    "FORMAT",
    "FORMAT_NUMBER",
    "INPUT_IDS",
    "LAYER_KINDS",
    "LOGITS",
    "LOGITS_INDICES",
    "LOGIT_SUMS",
    "METADATA_KEY",
    "MODEL_FILE",
    "PAST_LENGTHS",
    "ROUNDINGS",
    "WEIGHTS",
    "Bits",
    "BundleFile",
    "CacheSpec",
    "Dtype",
    "ElementType",
    "LayerKind",
    "Manifest",
    "Quantisation",
    "RoundingCost",
    "SharingPlan",
    "SourceCheckpoint",
    "Specification",
    "Verification",
    "head_order_fault",
    "lay_out_caches",
    "required_by",
]
