"""The options of `kiln generate` that say how the bundle may be run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from runners.choosing import Wanted
    from runners.memory import Residency

__all__ = ["wanted_of", "way_options"]

_OPTIONS = (
    click.option("--memory", metavar="SIZE", help="The most to take: 8GiB [default: what is free]"),
    click.option("--variant", help="Level of the denoiser [default: the best that fits]"),
    click.option(
        "--residency",
        type=click.Choice(["keep", "sequential"]),
        help="All parts stay open, or one at a time [default: what fits]",
    ),
    click.option(
        "--tiled/--no-tiled", default=None, help="The VAE in tiles [default: where it must be]"
    ),
    click.option(
        "--allow-variant-fallback",
        is_flag=True,
        help="If memory runs out nevertheless, a smaller variant may go on.",
    ),
)


def way_options(command: Callable[..., None]) -> Callable[..., None]:
    """All of them, in the order of the help text."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def wanted_of(
    memory: str | None,
    variant: str | None,
    *,
    residency: Residency | None,
    tiled: bool | None,
    falls_back: bool,
) -> Wanted:
    """What the options say; SpecError for a size that is none."""
    from runners.choosing import Wanted
    from runners.outlook import memory_of

    return Wanted(
        memory_bytes=None if memory is None else memory_of(memory),
        variant=variant,
        residency=residency,
        tiled=tiled,
        falls_back=falls_back,
    )
