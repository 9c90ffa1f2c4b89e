"""Measurements that need an NVIDIA card."""
