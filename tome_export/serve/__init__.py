"""Serving in Triton Inference Server: model repositories, a real server, and a client."""
