"""How a command line is read: argparse, with our words for what is wrong, lists, and booleans that may be written out.

Knows flags and words; knows no setting.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import NoReturn

from proto.errors import SettingsError
from tandem.folklore import RENAMED, TAKING_VALUES


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours, and which never guesses from a prefix."""

    def __init__(self, prog: str, description: str, epilog: str = "") -> None:
        super().__init__(prog, description=description, epilog=epilog or None, allow_abbrev=False)
        self._booleans: set[str] = set()
        self._lists: set[str] = set()
        self._strangers: dict[str, str] = {}

    def add_boolean(self, group: argparse._ActionsContainer, flag: str, dest: str, text: str) -> None:
        """``--x`` and ``--no-x``; ``--x=false`` and ``--x true`` are understood too, and so for ``--no-x``."""
        self._booleans |= {flag, "--no-" + flag[2:]}
        group.add_argument(flag, dest=dest, default=argparse.SUPPRESS, action="store_const", const="true", help=text)
        group.add_argument(
            "--no-" + flag[2:],
            dest=dest,
            default=argparse.SUPPRESS,
            action="store_const",
            const="false",
            help=argparse.SUPPRESS,
        )

    def add_list(self, group: argparse._ArgumentGroup, flag: str, dest: str, metavar: str, text: str) -> None:
        """``--x a,b``, ``--x a --x b``, and ``--x a b`` where b can be nothing else: see ``_spelled_out``."""
        self._lists.add(flag)
        group.add_argument(flag, dest=dest, default=argparse.SUPPRESS, action="append", metavar=metavar, help=text)

    def add_stranger(self, flag: str, why: str) -> None:
        """A flag that is not this command's: ``why`` is told to who gives it, or its ``--no-`` form."""
        self._strangers |= {flag: why, "--no-" + flag[2:]: why}

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message[:1].upper()}{message[1:]}")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses all of ``argv``. Raises SettingsError that names the nearest flag."""
        found, unknown = self.parse_known_args(self._spelled_out([_in_our_words(arg) for arg in argv]))
        if unknown:
            self._refuse(unknown[0])
        return found

    def _spelled_out(self, argv: Sequence[str]) -> list[str]:
        """``argv`` as argparse reads it: booleans without values, and each item of a list behind its flag.

        A boolean's value becomes the flag or its ``--no-`` form; another word after it stays an argument. A word after
        a list's items is the command's argument (the model) if that is still missing, else one more item.
        """
        made: list[str] = []
        wants_value = list_flag = ""
        has_argument = not self._get_positional_actions()
        for arg in argv:
            name, equals, value = arg.partition("=")
            if wants_value:
                made.append(arg)
                list_flag, wants_value = wants_value if wants_value in self._lists else "", ""
            elif name in self._booleans and equals:
                made.append(_as_switch(name, value))
            elif made and made[-1] in self._booleans and arg.lower() in ("true", "false"):
                made.append(_as_switch(made.pop(), arg))
            elif arg.startswith("-"):
                action = self._option_string_actions.get(name)
                wants_value = name if action is not None and action.nargs is None and not equals else ""
                list_flag = name if name in self._lists else ""
                made.append(arg)
            elif list_flag and has_argument:
                made.append(f"{list_flag}={arg}")
            else:
                made.append(arg)
                has_argument, list_flag = True, ""
        return made

    def _refuse(self, arg: str) -> NoReturn:
        if not arg.startswith("-"):
            raise SettingsError(
                f"Unexpected argument {arg!r}. Lists are written with commas, or by repeating the flag."
            )
        name = arg.split("=")[0]
        if name in self._strangers:
            raise SettingsError(f"Unknown flag {name}: {self._strangers[name]}.")
        raise SettingsError(f"Unknown flag {name}.{nearest(name, self._option_string_actions, cutoff=0.8)}")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of an error message that proposes the ``known`` name closest to ``name``; nothing where none is."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {close[0]}?" if close else ""


def _in_our_words(arg: str) -> str:
    """A flag with hyphens, by our name. One item of another server's JSON (``--x.item``) stands for all of it."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    name = name.replace("_", "-")
    whole = name.partition(".")[0]
    return (whole if whole in TAKING_VALUES else RENAMED.get(name, name)) + equals + value


def _as_switch(flag: str, value: str) -> str:
    if value.lower() not in ("true", "false"):
        raise SettingsError(f"{flag}: expects true or false, got {value!r}.")
    if value.lower() == "true":
        return flag
    return "--" + flag.removeprefix("--no-") if flag.startswith("--no-") else "--no-" + flag[2:]
