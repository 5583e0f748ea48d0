"""One settings field as an option: its flag, its environment names, its YAML key, and how its values are read.

    text (flag, environment) ──read──▶ value ◀──check── native value (YAML, keyword argument)
                              ◀──write──

Knows fields and values; knows nothing of argparse, files or precedence (``tandem.options``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from dataclasses import dataclass
from decimal import Decimal

from proto.settings import (
    CacheSettings,
    LedgerSettings,
    LocalSettings,
    LogSettings,
    ModelSettings,
    RouterSettings,
    RpcSettings,
    SchedulerSettings,
    WorkerSettings,
)

Value = str | int | float | bool | tuple[str, ...] | dict[str, object] | None

ENV_PREFIX = "TANDEM_"

SECTIONS: dict[str, type] = {
    "local": LocalSettings,
    "model": ModelSettings,
    "cache": CacheSettings,
    "scheduler": SchedulerSettings,
    "ledger": LedgerSettings,
    "rpc": RpcSettings,
    "worker": WorkerSettings,
    "router": RouterSettings,
    "log": LogSettings,
}
"""Component name (the YAML key that nests its settings) to its settings, in the order of the help text."""

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
_NOTHING = frozenset({"none", "null"})

# As vLLM reads them: lower-case letters are powers of 1000, capitals powers of 1024; GiB and GB say it themselves.
_SCALES: dict[str, int] = {letter.lower(): 1000 ** (i + 1) for i, letter in enumerate("KMGT")} | {
    letter: 1024 ** (i + 1) for i, letter in enumerate("KMGT")
}
_QUANTITY = re.compile(r"(?P<number>[+-]?\d+(?:\.\d+)?)\s*(?P<scale>[kmgtKMGT]?)(?P<unit>(?:[iI]?[bB])?)")


class BadValue(ValueError):
    """A value that does not fit its option. The message names neither the option nor where it was given."""


def read_quantity(text: str, *, is_size: bool) -> int:
    """``32K`` is 32768, ``32k`` is 32000, ``1.5M`` works; sizes also take ``4GiB`` (2**32) and ``4GB`` (4 * 10**9).

    Raises BadValue, also where the result is not whole.
    """
    match = _QUANTITY.fullmatch(text.strip().replace("_", ""))
    if match is None or (match["unit"] and not is_size):
        raise BadValue(f"{text!r} is not {'a size such as 4GiB' if is_size else 'a number such as 4096, 32K or 32k'}")
    letter, unit = match["scale"], match["unit"].lower()
    if unit == "ib" and not letter:
        raise BadValue(f"{text!r} is not a size such as 4GiB")
    if unit:
        letter = letter.upper() if unit == "ib" else letter.lower()
    exact = Decimal(match["number"]) * _SCALES.get(letter, 1)
    if exact != int(exact):
        raise BadValue(f"{text!r} is not a whole number")
    return int(exact)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """``base`` is the type without ``| None``; ``section`` the component whose settings hold the field."""

    section: str
    name: str
    base: type
    is_optional: bool
    default: Value
    help: str
    choices: tuple[str, ...]
    metavar: str | None
    extra_env: tuple[str, ...]
    kind: str
    short: str | None
    is_secret: bool
    low: float | None
    high: float | None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def key(self) -> str:
        """The nested YAML key, and the one name no other option has."""
        return f"{self.section}.{self.name}"

    @property
    def env(self) -> tuple[str, ...]:
        """Environment names, the one that wins first."""
        return (ENV_PREFIX + self.name.upper(), *self.extra_env)

    def read(self, text: str) -> Value:
        """The value that ``text`` spells. Raises BadValue."""
        if self.is_optional and self.base is not str and text.strip().lower() in _NOTHING:
            return None
        return self._bounded(self._parse(text))

    def check(self, value: object) -> Value:
        """``value`` as this option's type: numbers and lists as they are, text as ``read`` takes it.

        Raises BadValue.
        """
        if value is None:
            if self.is_optional:
                return None
            raise BadValue("needs a value")
        if isinstance(value, str) and self.base is not str:
            return self.read(value)
        if isinstance(value, list | tuple) and self.base is tuple:
            if not all(isinstance(item, str) for item in value):
                raise BadValue(f"expects a list of texts, got {value!r}; quote its items")
            return tuple(str(item) for item in value)
        if self.base is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, self.base) or (isinstance(value, bool) and self.base is not bool):
            hint = "; quote it" if self.base is str else ""
            raise BadValue(f"expects {self._expected()}, got {value!r}{hint}")
        return self._bounded(typing.cast(Value, value))

    def write(self, value: Value) -> str:
        """Text that ``read`` turns back into ``value``."""
        match value:
            case None:
                return "none"
            case bool():
                return "true" if value else "false"
            case tuple():
                is_plain = value and not any("," in v or v != v.strip() or not v for v in value) and value[0][0] != "["
                return ",".join(value) if is_plain else json.dumps(value)
            case dict():
                return json.dumps(value)
            case float():
                return repr(value)
            case _:
                return str(value)

    def _expected(self) -> str:
        names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", tuple: "a list"}
        return names.get(self.base, "a JSON object")

    def _parse(self, text: str) -> Value:
        if self.base is str:
            return text
        if self.base is bool:
            return _read_bool(text)
        if self.base is tuple:
            return _read_list(text)
        if self.base is dict:
            return _read_object(text)
        if self.kind == "length" and text.strip().lower() == "auto":
            return -1
        if self.kind in ("size", "count", "length"):
            return read_quantity(text, is_size=self.kind == "size")
        try:
            return int(text) if self.base is int else float(text)
        except ValueError:
            raise BadValue(f"expects {self._expected()}, got {text!r}") from None

    def _bounded(self, value: Value) -> Value:
        if isinstance(value, str):
            if self.choices and value not in self.choices:
                raise BadValue(f"must be one of {', '.join(self.choices)}, got {value!r}")
            if not value and self.default:
                raise BadValue("must not be empty")
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise BadValue(f"must be finite, got {value}")
            if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
                bounds = f"at least {self.low:g}" if self.high is None else f"between {self.low:g} and {self.high:g}"
                raise BadValue(f"must be {bounds}, got {value}")
        return value


def _read_bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in _TRUE | _FALSE:
        raise BadValue(f"expects true or false, got {text!r}")
    return word in _TRUE


def _read_list(text: str) -> tuple[str, ...]:
    if text.lstrip().startswith("["):
        items = _read_json(text)
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise BadValue(f"expects a JSON list of texts, got {text!r}")
        return tuple(items)
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _read_object(text: str) -> dict[str, object]:
    value = _read_json(text)
    if not isinstance(value, dict):
        raise BadValue(f"expects a JSON object, got {text!r}")
    return value


def _read_json(text: str) -> object:
    try:
        return typing.cast(object, json.loads(text))
    except json.JSONDecodeError as error:
        raise BadValue(f"is not JSON ({error.msg} at character {error.pos}): {text!r}") from None


@functools.cache
def options_of(section: str) -> tuple[Option, ...]:
    """The options of one component, in its fields' order."""
    settings = SECTIONS[section]
    hints = typing.get_type_hints(settings)
    made = []
    for field in dataclasses.fields(settings):
        base, is_optional = _base_type(hints[field.name])
        meta = field.metadata
        made.append(
            Option(
                section=section,
                name=field.name,
                base=base,
                is_optional=is_optional,
                default=typing.cast(Value, field.default),
                help=meta["help"],
                choices=meta["choices"],
                metavar=meta["metavar"],
                extra_env=meta["env"],
                kind=meta["kind"],
                short=meta["short"],
                is_secret=meta["secret"],
                low=meta["low"],
                high=meta["high"],
            )
        )
    return tuple(made)


@functools.cache
def all_options() -> tuple[Option, ...]:
    return tuple(option for section in SECTIONS for option in options_of(section))


def _base_type(hint: object) -> tuple[type, bool]:
    """``int | None`` is (int, True), ``tuple[str, ...]`` is (tuple, False)."""
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    members = [m for m in typing.get_args(hint) if m is not types.NoneType] if is_union else [hint]
    assert len(members) == 1, f"a setting has one type, got {hint}"
    base = typing.get_origin(members[0]) or members[0]
    assert isinstance(base, type)
    return base, is_union
