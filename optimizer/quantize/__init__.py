"""Quantization in torch, once for all backends: policy, calibration, solvers, application."""
