"""Latency and throughput against the unmerged model."""

from tome_export.bench.main import BenchRequest, BenchResult, bench

__all__ = ["BenchRequest", "BenchResult", "bench"]
