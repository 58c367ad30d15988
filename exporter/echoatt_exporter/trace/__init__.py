"""Student to ONNX graph, by the graph contract."""
