"""The names of the two parts that a VAE's half is cut into for seamless tiles."""

from __future__ import annotations

__all__ = ["AFTER", "BEFORE", "PARTS"]

BEFORE = "before"
AFTER = "after"
PARTS = (BEFORE, AFTER)
"""Forms of a half: what comes before its attention, and what comes after it (runners.vae_parts)."""
