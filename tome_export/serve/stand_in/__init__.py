"""What stands in for the server's ONNX Runtime backend where the server comes without one."""
