"""A small text-to-image model with Stable Diffusion's architecture, trained on drawn pictures."""
