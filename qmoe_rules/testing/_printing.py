"""How designs are printed: as Python that makes them again, without what is as it is by default."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["Brief"]


class Brief:
    """A base of frozen dataclasses that prints the fields that differ from their defaults."""

    def __repr__(self) -> str:
        fields = (f"{name}={value!r}" for name, value in self._changed().items())
        return f"{type(self).__name__}({', '.join(fields)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Prints it in an example that hypothesis found."""
        with printer.group(4, f"{type(self).__name__}(", ")"):
            for count, (name, value) in enumerate(self._changed().items()):
                if count:
                    printer.text(",")
                    printer.breakable()
                printer.text(f"{name}=")
                printer.pretty(value)

    def _changed(self) -> dict[str, Any]:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        values = {field.name: getattr(self, field.name) for field in fields}
        return {f.name: values[f.name] for f in fields if values[f.name] != f.default}
