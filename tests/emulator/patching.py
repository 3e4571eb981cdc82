"""Standing in for parts of the project while a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(places: dict[tuple[Any, str], Any]) -> Iterator[None]:
    """Sets attributes, (object, name) to value, and gives back what was there when the block ends."""
    original = {place: getattr(*place) for place in places}
    try:
        for place, value in places.items():
            setattr(*place, value)
        yield
    finally:
        for place, value in original.items():
            setattr(*place, value)
