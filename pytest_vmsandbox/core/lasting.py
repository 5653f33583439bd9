"""What lasts until somebody ends it, or until its block is over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Lasting(ABC):
    """A context manager that ends by `end`, which can also be called without a block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @abstractmethod
    def end(self) -> None:
        """End it. A second call does nothing."""
