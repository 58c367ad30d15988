"""The one place that touches ONNX Runtime.

Sessions and bindings are made here, with options, providers and libraries; and what ONNX Runtime
raises, when a session is made and when it runs, becomes an `EchoAttError` here.
"""

from echoatt_runtime.ort.binding import Binding
from echoatt_runtime.ort.lent_tensor import LentTensor, LentWeights
from echoatt_runtime.ort.library import PROVIDERS, cuda_library, has_cuda, import_onnxruntime
from echoatt_runtime.ort.session import (
    OrtSession,
    SessionOptions,
    SharedWeights,
    TensorInfo,
    open_session,
)
from echoatt_runtime.ort.top_model import TOP_LOGITS, TOP_LOGITS_INPUT, TOP_TOKENS, top_model

__all__ = [
    "PROVIDERS",
    "TOP_LOGITS",
    "TOP_LOGITS_INPUT",
    "TOP_TOKENS",
    "Binding",
    "LentTensor",
    "LentWeights",
    "OrtSession",
    "SessionOptions",
    "SharedWeights",
    "TensorInfo",
    "cuda_library",
    "has_cuda",
    "import_onnxruntime",
    "open_session",
    "top_model",
]
