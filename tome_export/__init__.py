"""Token Merging (ToMe) for deployment: patch, export to ONNX and TensorRT, prove parity."""

__version__ = "0.1.0"
