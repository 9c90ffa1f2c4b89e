"""What forms of an engine may hold beside the weights that they share with it."""

from __future__ import annotations

from profiles.errors import BuildError

__all__ = ["require_shared"]


def require_shared(own_bytes: int) -> None:
    """Raise BuildError for a form with more constants of its own than its graph may hold."""
    if own_bytes > _MOST_OWN:
        raise BuildError(
            f"A form of the engine has {own_bytes} bytes of constants that aren't the plain one's: "
            "compile without --controlnet, and report the model."
        )


_MOST_OWN = 1 << 16
