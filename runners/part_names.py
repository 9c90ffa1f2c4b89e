"""The names of the two parts that a VAE's half is cut into for seamless tiles."""

from __future__ import annotations

__all__ = ["PARTS", "TILE", "WHOLE"]

WHOLE = "whole"
TILE = "tile"
PARTS = (WHOLE, TILE)
"""Forms of a half: what sees the whole picture, and what sees tiles (runners.vae_parts)."""
