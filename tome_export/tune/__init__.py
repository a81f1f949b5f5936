"""Which per-layer schedule to build: search, cost tables and the schedule file."""
