"""ONNX export: tracing, the merge functions, precision, simplification, checking, files."""
