"""Reads what kiln makes: bundles, engines, and diffusers pipelines that run on them."""
