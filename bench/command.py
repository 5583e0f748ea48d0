"""``tandem bench``: its subcommands, and what they print. Each imports what it needs when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from bench.options import read_checkpoint, read_compare, read_serve
from proto.errors import SettingsError

_USAGE = """\
usage: tandem bench COMMAND [...]

  serve        measure a running server: latency and throughput under a load
  compare      print two saved results and their ratios
  checkpoint   write a model with random weights, to measure with
  chaos        run a stack, harm it under load, and judge every answer
  gpu          measure this machine's GPU: kernels, steps, hand-offs, the stack

`tandem bench COMMAND --help` shows a command's flags."""


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Runs one subcommand and returns the exit status. Raises TandemError."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    match argv[0]:
        case "serve":
            return _serve(argv[1:], environ)
        case "compare":
            return _compare(argv[1:])
        case "checkpoint":
            return _checkpoint(argv[1:])
        case "gpu":
            return _gpu(argv[1:])
    raise SettingsError(f"Unknown command {argv[0]!r}: `tandem bench` has serve, compare, checkpoint, chaos and gpu.")


def _serve(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    settings = read_serve(argv, environ)
    import asyncio

    from bench.serve import serve

    return asyncio.run(serve(settings, print, lambda text: print(text, file=sys.stderr)))


def _compare(argv: Sequence[str]) -> int:
    first, second = read_compare(argv)
    from bench.compare import compare, read_result

    print(compare(read_result(first), read_result(second)))
    return 0


def _checkpoint(argv: Sequence[str]) -> int:
    wish = read_checkpoint(argv)
    from bench.checkpoint import write_checkpoint, write_description

    if not wish.has_weights:
        write_description(wish.folder, wish.shape, wish.vocab_size)
        print(f"{wish.folder}: a model without weights; serve it with --load-format dummy")
        return 0
    num_parameters = write_checkpoint(wish.folder, wish.shape, wish.vocab_size, wish.seed)
    print(f"{wish.folder}: {num_parameters / 1e6:.0f} million random parameters")
    return 0


def _gpu(argv: Sequence[str]) -> int:
    from bench.gpu import command

    return command.main(argv)
