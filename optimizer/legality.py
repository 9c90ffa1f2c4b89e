"""What a backend and its target can't read, refused in the plan with the layer's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from optimizer.backends import BACKENDS, Backend
from optimizer.quantize.schemes import W4A16, W8A8, Nvfp4, Scheme, Shape
from profiles.errors import UnsupportedError
from profiles.gpu import SINCE, lacking
from profiles.target import Target, sm

__all__ = ["require_formats", "require_target"]


def require_target(backend: Backend, target: Target | None, dtype: str) -> None:
    """Raise UnsupportedError where the backend can't build for the target."""
    if target is None:
        if backend.capabilities:
            raise UnsupportedError(
                f"The backend {backend.name} builds for cards that needn't be here: name them with "
                "--target, such as rtx-4090 or sm86,sm89 (`kiln profiles` lists them), or portable."
            )
        return
    if not backend.capabilities:
        able = [other.name for other in BACKENDS.values() if other.capabilities]
        raise UnsupportedError(
            f"--target {target.name} can't be used with the backend {backend.name}, which builds "
            f"for the machine that it runs on: use --backend {' or '.join(able)}."
        )
    if unknown := [name for name in target.capabilities if name not in backend.capabilities]:
        raise UnsupportedError(
            f"{backend.name} doesn't build for {sm(unknown[0])}: it builds for "
            f"{', '.join(sm(name) for name in backend.capabilities)}, and portable."
        )
    if dtype in SINCE and (short := lacking(target.capabilities, dtype)):
        raise UnsupportedError(
            f"--dtype {dtype} can't be used for {sm(short[0])}, which has no {dtype} products: use "
            "--dtype fp16."
        )


def require_formats(
    layers: Mapping[str, Scheme], shapes: Mapping[str, Shape], backend: Backend, target: Target
) -> None:
    """Raise UnsupportedError, with its layer's name, for the first scheme that can't be built."""
    for name, scheme in layers.items():
        for reason in _reasons(scheme, shapes[name], backend, target.capabilities):
            raise UnsupportedError(f"{name} can't be {scheme.label}: {reason}.")


def _reasons(
    scheme: Scheme, shape: Shape, backend: Backend, capabilities: tuple[str, ...]
) -> Iterator[str]:
    if scheme.format not in backend.formats:
        able = [other.name for other in BACKENDS.values() if scheme.format in other.formats]
        yield (
            f"the backend {backend.name} doesn't read {scheme.format}; use --backend "
            f"{' or '.join(able)}, or another --quant"
        )
    if not backend.zero_points and isinstance(scheme, W8A8) and scheme.zero_point:
        yield f"{backend.name} takes no zero points; set zero_point to false in the policy"
    if isinstance(scheme, W4A16 | Nvfp4) and len(shape) not in backend.int4_axes:
        yield (
            f"{backend.name} takes no convolutions in 4 bits; set linears_only to true in the "
            "policy, which gives them 8"
        )
    if scheme.format in SINCE and (short := lacking(capabilities, scheme.format)):
        yield (
            f"{sm(short[0])} has no {scheme.format}; leave it out of --target, or use another "
            "--quant"
        )
