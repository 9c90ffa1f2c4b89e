"""`kiln compare --fail-under`: limits that every level must keep, else exit code 16."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.comparison import Comparison, Row, Shot
from profiles.errors import ParityError, SpecError

__all__ = ["LIMITED", "check_limits", "parse_limits"]

LIMITED = {"psnr": "psnr_db", "ssim": "ssim", "sqnr": "sqnr_db", "adherence": "adherence"}
"""What can be limited -> the row's field; more is better for all."""


def parse_limits(text: str) -> dict[str, float]:
    """Limits by measure of "psnr=30,sqnr=27"; SpecError for an unknown one or no number."""
    limits = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in LIMITED:
            raise SpecError(
                f"--fail-under names {name!r}; use {', '.join(LIMITED)}, such as "
                "--fail-under psnr=30,sqnr=27,adherence=0.9"
            )
        try:
            limits[name] = float(value)
        except ValueError as error:
            raise SpecError(f"--fail-under {part.strip()} needs a number after the =") from error
    return limits


def check_limits(comparison: Comparison, limits: Mapping[str, float]) -> None:
    """Raise ParityError for the first level below a limit, naming the prompt that is worst."""
    for row in comparison.levels:
        if row.reference:
            continue
        for name, limit in limits.items():
            value = getattr(row, LIMITED[name])
            if value is None:
                raise ParityError(f"{name} of {row.name} wasn't measured, so --fail-under fails.")
            if value < limit:
                raise ParityError(
                    f"{row.name} reaches {name} {value:.4g}, and --fail-under asks for {limit:g}"
                    f"{_worst(comparison, row, name)}."
                )


def _worst(comparison: Comparison, row: Row, name: str) -> str:
    """Which picture is worst, where the measure is one of single pictures."""
    field = LIMITED[name]
    if field not in Shot.model_fields:
        return ""
    known = [
        (value, picture.prompt)
        for picture in comparison.pictures
        if (value := getattr(picture.shots[row.name], field)) is not None
    ]
    if not known:
        return ""
    value, prompt = min(known)
    return f"; the worst prompt is {prompt!r} with {value:.4g}"
