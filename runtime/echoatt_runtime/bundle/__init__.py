"""A bundle's files: finding, reading and checking them without ONNX Runtime."""
