#!/usr/bin/env python3
"""Writes docs/configuration.md from the settings themselves; with --check, fails where it is not what it should be."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"
sys.path.insert(0, str(ROOT))

from tandem.folklore import FOLKLORE, RENAMED  # noqa: E402
from tandem.option import SECTIONS, Option, options_of  # noqa: E402
from tandem.options import COMMANDS, takers  # noqa: E402

HEAD = """\
# Configuration

<!-- Written by scripts/configuration.py; `make docs` writes it anew. -->

Every setting has one name, spelt four ways: the flag `--max-model-len` (or `--max_model_len`), the environment
variable `TANDEM_MAX_MODEL_LEN`, the key `max_model_len` of the YAML file given with `--config` (or `TANDEM_CONFIG`),
and, for the first three components below, the keyword of `tandem.LLM(max_model_len=...)`. A flag wins over the
environment, that over the file, and that over the default. `--print-config` prints the outcome, with secrets masked, as
a file that `--config` takes back.

- Numbers take suffixes: `32K` is 32768, `32k` is 32000; sizes also `4GiB` and `4GB`.
- Lists take commas (`--transports shm,grpc`), repetition, or JSON; after the model, also `--served-model-name a b`.
- Booleans are `--x` and `--no-x`; `--x=false` is understood too.
- In the file, keys may be nested under their component or stand flat. Unknown keys are errors. One file may serve a
  whole deployment: each command takes from it what it needs.
- An empty environment variable counts as not set. One environment may serve a whole deployment: what other commands
  read is left to them. A name that begins with `TANDEM_` and that nothing reads is warned of.
"""


def render() -> str:
    parts = [HEAD]
    for section in ("model", "cache", "scheduler", "local", "ledger", "rpc", "worker", "router", "log"):
        doc = (SECTIONS[section].__doc__ or "").strip().replace("``", "`")
        commands = {takers(option) for option in options_of(section)}
        if len(commands) == 1:
            parts.append(f"## {section}\n\n{doc} Taken by {', '.join(*commands)}.\n")
            parts.append("| flag | default | what it is |\n|---|---|---|")
            parts.extend(row(option) for option in options_of(section))
        else:
            parts.append(f"## {section}\n\n{doc}\n")
            parts.append("| flag | default | what it is | taken by |\n|---|---|---|---|")
            parts.extend(f"{row(option)} {briefly(takers(option))} |" for option in options_of(section))
        parts.append("")
    parts.append(
        "## Flags of other servers\n\nWhat is pasted from a guide should do what it says, or explain itself. These are "
        "accepted, with a warning or in silence, where they ask for what is so anyway; a value that asks for more is "
        "an error.\n\n| flag | why |\n|---|---|"
    )
    parts.extend(f"| `{entry.flag}` | {entry.why} |" for entry in FOLKLORE)
    parts.append("\nThese only have another name here:\n\n| flag | here |\n|---|---|")
    parts.extend(f"| `{other}` | `{ours}` |" for other, ours in RENAMED.items())
    return "\n".join(parts) + "\n"


def row(option: Option) -> str:
    names = [f"`{name}`" for name in (option.flag, option.short, *option.extra_env) if name]
    text = option.help if not option.choices else f"{option.help} ({', '.join(option.choices)})"
    bounds = [f"at least {option.low:g}"] if option.low is not None else []
    bounds += [f"at most {option.high:g}"] if option.high is not None else []
    text += f"; {', '.join(bounds)}" if bounds else ""
    default = "" if option.default in (None, (), "") else f"`{option.write(option.default)}`"
    return f"| {', '.join(names)} | {default} | {text.replace('|', '&#124;')} |"


def briefly(commands: tuple[str, ...]) -> str:
    if len(commands) == len(COMMANDS):
        return "all"
    return ", ".join(command.strip("`").removeprefix("tandem ") for command in commands)


def main() -> int:
    text = render()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text)
        return 0
    if PAGE.read_text() == text:
        return 0
    print("docs/configuration.md is out of date: run `make docs`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
