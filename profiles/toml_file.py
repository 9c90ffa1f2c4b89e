"""A TOML file -> a model of pydantic's, strictly: every wrong entry is named."""

from __future__ import annotations

import tomllib
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from profiles.errors import SpecError

__all__ = ["parse_toml"]


T = TypeVar("T", bound=BaseModel)


def parse_toml(model: type[T], text: str, *, what: str, name: str) -> T:
    """Parse the file of `what` (a profile, a card) called `name`, which must say so itself.

    Raises `SpecError` naming every wrong entry.
    """
    try:
        fields = tomllib.loads(text)
        found = model.model_validate(fields)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"The {what} {name} is no valid TOML: {error}.") from error
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
        )
        raise SpecError(f"The {what} {name} is wrong: {wrong}.") from error
    if fields["name"] != name:
        raise SpecError(f"The {what} {name} says it is called {fields['name']!r}: make them equal.")
    return found
