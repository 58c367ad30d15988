"""A bundle's files: finding, reading and checking them without ONNX Runtime."""

from echoatt_runtime.bundle.files import Bundle, file_sha256, find_model, read_manifest
from echoatt_runtime.bundle.onnx_file import read_onnx_file

__all__ = ["Bundle", "file_sha256", "find_model", "read_manifest", "read_onnx_file"]
