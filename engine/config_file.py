"""Typed reading of a model's JSON files: a wrong or missing entry becomes an error that names file and key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from proto.errors import CheckpointError


class ConfigFile:
    """The entries of one JSON object. ``null`` counts as absent, as in ``transformers``."""

    def __init__(self, name: str, entries: Mapping[str, object]) -> None:
        self.name = name
        self._entries = entries

    @classmethod
    def load(cls, path: Path) -> ConfigFile:
        """Raises CheckpointError when the file is missing or is no JSON object."""
        try:
            entries = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise CheckpointError(f"{path.parent} has no {path.name}.") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if not isinstance(entries, dict):
            raise CheckpointError(f"{path} must hold a JSON object.")
        return cls(str(path), entries)

    def has(self, key: str) -> bool:
        return self._entries.get(key) is not None

    def states(self, key: str) -> bool:
        """Whether the file has the key at all, be it null."""
        return key in self._entries

    def whole(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._wrong(key, "a whole number", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(key, "a number", value)
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if self.has(key) else None

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def texts(self, key: str) -> list[str]:
        value = self._value(key, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "a list of strings", value)
        return value

    def numbers(self, key: str) -> list[int]:
        value = self._value(key, None)
        if not isinstance(value, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in value):
            raise self._wrong(key, "a list of whole numbers", value)
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; none when absent."""
        value = self._entries.get(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            raise self._wrong(key, "a token id or a list of them", value)
        return tuple(items)

    def section(self, key: str) -> ConfigFile | None:
        """A nested object; None when absent or empty."""
        value = self._entries.get(key)
        if not value:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, "an object", value)
        return ConfigFile(f"{self.name}: {key}", value)

    def sections(self) -> dict[str, ConfigFile]:
        """Every entry, where each must be an object (that may be empty), by its key."""
        for key, value in self._entries.items():
            if not isinstance(value, dict):
                raise self._wrong(key, "an object", value)
        return {
            key: ConfigFile(f"{self.name}: {key}", value)
            for key, value in self._entries.items()
            if isinstance(value, dict)
        }

    def _value(self, key: str, default: object) -> object:
        value = self._entries.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.name} has no {key}.")
        return value

    def _wrong(self, key: str, kind: str, value: object) -> CheckpointError:
        return CheckpointError(f"{self.name}: {key} must be {kind}, got {value!r}.")
