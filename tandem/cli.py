"""The ``tandem`` command. Each subcommand imports what it needs when it runs, so that ``--help`` is instant.

Knows subcommands, exit codes and where output goes; settings are ``tandem.options``' business.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from proto.errors import SettingsError, TandemError
from proto.settings import (
    CacheSettings,
    LedgerSettings,
    LogSettings,
    ModelSettings,
    RouterSettings,
    RpcSettings,
    WorkerSettings,
)
from proto.version import __version__
from tandem.options import ROUTER, SERVE, WORKER, Resolved, Scope, build_parser, resolve
from tandem.parser import Parser

_EXIT_SETUP = 2
_EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Command:
    """``run`` takes the arguments after the command's name and returns the exit status."""

    name: str
    about: str
    run: Callable[[Sequence[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 for a failure, 2 where the command or deployment is wrong."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args)
    except TandemError as error:
        print(f"tandem: {error.message}", file=sys.stderr)
        return _EXIT_SETUP
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except BrokenPipeError:  # `tandem ... | head`: nobody reads on; the interpreter must not try to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if args else _EXIT_SETUP
    if args[0] in ("-v", "-V", "--version"):
        args[0] = "version"
    command = next((command for command in COMMANDS if command.name == args[0]), None)
    if command is None:
        close = difflib.get_close_matches(args[0], [command.name for command in COMMANDS], n=1)
        hint = f" Did you mean {close[0]}?" if close else " `tandem --help` lists them."
        raise SettingsError(f"Unknown command {args[0]!r}.{hint}")
    return command.run(args[1:])


def _overview() -> str:
    lines = [f"  {command.name:<9} {command.about}" for command in COMMANDS]
    return "\n".join(
        [
            "usage: tandem COMMAND [...]",
            "",
            "Serves large language models, with prefill and decode in processes (or on machines) of their own.",
            "",
            *lines,
            "",
            "`tandem COMMAND --help` shows a command's settings.",
        ]
    )


def read_settings(
    scope: Scope, name: str, about: str, argv: Sequence[str], environ: Mapping[str, str] = os.environ
) -> Resolved | None:
    """The command's settings; None where they were only to be printed. Raises SettingsError."""
    given = build_parser(scope, f"tandem {name}", about).read(argv)
    resolved = resolve(scope, given, environ)
    for warning in resolved.warnings:
        print(f"tandem: warning: {warning}", file=sys.stderr)
    if given.print_config:
        print(resolved.to_yaml(), end="")
        return None
    return resolved


def _serve(argv: Sequence[str]) -> int:
    about = "Runs all tiers on this machine: a private Redis (unless --redis), the router, and the workers."
    resolved = read_settings(SERVE, "serve", about, argv)
    if resolved is None:
        return 0
    from service import logs
    from service.process import run_service
    from tandem.builtin_model import NOTICE, with_some_model
    from tandem.local import LocalStack, StackSettings, print_line, print_ready
    from tandem.machine import this_machine

    wanted = resolved.engine()
    if wanted.model.model is None:
        print(NOTICE, file=sys.stderr)
    settings = StackSettings.of(resolved, with_some_model(wanted))
    logs.setup(settings.log)
    stack = LocalStack(
        settings,
        this_machine(),
        say=print_line,
        on_ready=print_ready,
    )
    return run_service(stack, drain_timeout=settings.stop_timeout_s)


def _router(argv: Sequence[str]) -> int:
    resolved = read_settings(ROUTER, "router", "Runs the router: HTTP in front, the workers behind.", argv)
    if resolved is None:
        return 0
    ledger = _meeting_place(resolved)
    from router.server import run

    return run(
        resolved.get(RouterSettings),
        ledger,
        resolved.get(ModelSettings),
        resolved.get(LogSettings),
        resolved.get(CacheSettings),
        resolved.get(RpcSettings),
    )


def _prefill(argv: Sequence[str]) -> int:
    resolved = read_settings(WORKER, "prefill", "Runs one prefill worker: it computes prompts.", argv)
    if resolved is None:
        return 0
    ledger = _meeting_place(resolved)
    from prefill.server import run

    return run(
        resolved.engine(),
        resolved.get(WorkerSettings),
        ledger,
        resolved.get(LogSettings),
        resolved.get(RpcSettings),
    )


def _decode(argv: Sequence[str]) -> int:
    resolved = read_settings(WORKER, "decode", "Runs one decode worker: it generates from computed prompts.", argv)
    if resolved is None:
        return 0
    ledger = _meeting_place(resolved)
    from decode.server import run

    return run(
        resolved.engine(),
        resolved.get(WorkerSettings),
        ledger,
        resolved.get(LogSettings),
        resolved.get(RpcSettings),
    )


def _meeting_place(resolved: Resolved) -> LedgerSettings:
    ledger = resolved.get(LedgerSettings)
    if ledger.redis is None:
        raise SettingsError(
            "One tier alone needs a Redis to meet the others: give --redis redis://host:6379/0 (or TANDEM_REDIS), the "
            "same for all. `tandem serve` runs everything on this machine, with a Redis of its own."
        )
    if resolved.scope is WORKER and resolved.get(ModelSettings).model is None:
        raise SettingsError("Which model? Give a folder or hub name as the argument, or as TANDEM_MODEL.")
    return ledger


def _chat(argv: Sequence[str]) -> int:
    from tandem import chat

    return chat.main("chat", argv)


def _complete(argv: Sequence[str]) -> int:
    from tandem import chat

    return chat.main("complete", argv)


def _bench(argv: Sequence[str]) -> int:
    if argv[:1] == ["chaos"]:  # it starts a stack, which bench itself cannot
        from tandem import chaos

        return chaos.main(argv[1:])
    from bench import command

    return command.main(argv)


def _demo(argv: Sequence[str]) -> int:
    from tandem import demo

    return demo.main(argv)


def _version(argv: Sequence[str]) -> int:
    Parser("tandem version", "Prints the version.").read(argv)
    print(f"tandem {__version__}")
    return 0


COMMANDS = (
    Command("serve", "all tiers on this machine", _serve),
    Command("router", "the HTTP side, alone", _router),
    Command("prefill", "one worker that computes prompts", _prefill),
    Command("decode", "one worker that generates", _decode),
    Command("chat", "talk to a running server", _chat),
    Command("complete", "let a running server continue a text", _complete),
    Command("bench", "measure a running server, or compare two results", _bench),
    Command("demo", "start everything, ask one question, show where the time went", _demo),
    Command("version", "print the version", _version),
)
