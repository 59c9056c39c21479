"""One line of the cluster check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What one step of the check found.

    Args:
        step: what was tried, such as `accounting` or `partition gpu`.
        text: what was found.
        remedy: what to do about it; None when it is as jobs need it, empty when the text says what to do.
    """

    step: str
    text: str
    remedy: str | None = None

    @property
    def ok(self) -> bool:
        """Whether it is as jobs need it."""
        return self.remedy is None
