"""Measures and compares: latency, memory, quality, reports, and the reference model."""
