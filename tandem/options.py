"""Reads settings from flags, environment and a YAML file, in that order of precedence, over the defaults.

    flag --max-model-len 32K  >  TANDEM_MAX_MODEL_LEN=32K  >  max_model_len: 32K  >  the field's default

Knows ``proto.settings`` and where values come from; starts nothing. Imports only the standard library until a YAML
file is read or printed, so that ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from proto.errors import SettingsError
from proto.settings import CacheSettings, EngineSettings, ModelSettings, SchedulerSettings
from tandem.folklore import BY_NAME, FOLKLORE, hint_for
from tandem.option import ENV_PREFIX, SECTIONS, BadValue, Option, Value, all_options, options_of
from tandem.parser import Parser, nearest

T = TypeVar("T")

MASK = "***"
OTHER_ENV = frozenset({"TANDEM_CONFIG", "TANDEM_CACHE", "TANDEM_DEMO_ONCE", "TANDEM_VERSION"})
"""Environment names of ours that are not settings; the version is of compose's images."""
_KUBERNETES = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
"""What Kubernetes sets for a service whose name begins with tandem; beside these there is X_PORT=tcp://..."""
_ADDRESSES = ("tcp://", "udp://", "sctp://")


@dataclass(frozen=True, slots=True)
class Scope:
    """The settings one command takes: whole components, less the options named in ``without`` (section.name)."""

    sections: tuple[str, ...]
    without: frozenset[str] = frozenset()
    takes_model: bool = False
    """Whether the command takes the model as its first argument."""
    is_all: bool = False
    """Whether the command is the whole deployment: settings that it does not take are nobody's."""

    def options(self) -> tuple[Option, ...]:
        found = (option for section in self.sections for option in options_of(section))
        return tuple(option for option in found if option.key not in self.without)


_OWN_ADDRESS = frozenset(f"worker.{name}" for name in ("host", "port", "http_port", "worker_id"))
_SHARED = frozenset({"router.drain_timeout"})
"""One command has one drain timeout: the workers'."""
_ENGINE = ("model", "cache", "scheduler")
_OF_ROUTER = frozenset(
    (
        "model.tokenizer",
        "model.revision",
        "model.served_model_name",
        "model.seed",
        "model.generation_config",
        "model.override_generation_config",
        "model.download_dir",
        "model.hf_token",
        "cache.prefix_hash_key",
    )
)
"""What a router needs of the engine's settings; the rest it learns from the workers."""
_NOT_OF_ROUTER = frozenset(option.key for section in ("model", "cache") for option in options_of(section)) - _OF_ROUTER
_NOT_OF_WORKER = frozenset(("model.generation_config", "model.override_generation_config"))
"""The router fills in what a request does not say of sampling."""

SERVE = Scope(
    ("local", *_ENGINE, "ledger", "rpc", "worker", "router", "log"),
    _OWN_ADDRESS | _SHARED,
    takes_model=True,
    is_all=True,
)
WORKER = Scope((*_ENGINE, "ledger", "rpc", "worker", "log"), _NOT_OF_WORKER, takes_model=True)
ROUTER = Scope(("router", "ledger", "rpc", "model", "cache", "log"), _NOT_OF_ROUTER)
OFFLINE = Scope(_ENGINE)

COMMANDS = {"serve": SERVE, "router": ROUTER, "prefill": WORKER, "decode": WORKER}
"""Each command's scope, of those that start a deployment or a part of it."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """Every setting of a scope with its final value. ``given`` holds the keys that are not defaults by omission."""

    scope: Scope
    values: Mapping[str, Value]
    given: frozenset[str]
    warnings: tuple[str, ...] = ()

    def get(self, settings: type[T]) -> T:
        """One component's settings; fields outside the scope have their defaults."""
        section = next(name for name, kind in SECTIONS.items() if kind is settings)
        prefix = f"{section}."
        fields = {key.removeprefix(prefix): v for key, v in self.values.items() if key.startswith(prefix)}
        return settings(**fields)

    def engine(self) -> EngineSettings:
        return EngineSettings(
            model=self.get(ModelSettings), cache=self.get(CacheSettings), scheduler=self.get(SchedulerSettings)
        )

    def to_yaml(self) -> str:
        """Nested YAML that ``--config`` takes back; secrets are masked."""
        import yaml

        tree: dict[str, dict[str, object]] = {}
        for option in self.scope.options():
            value = self.values[option.key]
            shown: object = list(value) if isinstance(value, tuple) else value
            tree.setdefault(option.section, {})[option.name] = MASK if option.is_secret and value else shown
        return yaml.safe_dump(tree, sort_keys=False, default_flow_style=False, allow_unicode=True)


def takers(option: Option) -> tuple[str, ...]:
    """The commands that take it, as one types them."""
    return tuple(f"`tandem {name}`" for name, scope in COMMANDS.items() if option in scope.options())


def build_parser(scope: Scope, prog: str, description: str) -> Parser:
    """A parser whose namespace holds only what was given: texts under ``section.name``, folklore under its name."""
    epilog = (
        "Every flag is also an environment variable (--max-model-len: TANDEM_MAX_MODEL_LEN) and a key of the YAML file "
        "given with --config. A flag wins over the environment, and that over the file. Lists take commas or "
        "repetition; numbers take suffixes (32K, 4GiB)."
    )
    parser = Parser(prog, description, epilog)
    parser.usage = f"{prog} {'[MODEL] ' if scope.takes_model else ''}[--config FILE] [--print-config] [settings]"
    if scope.takes_model:
        parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings, flat or nested by component")
    parser.add_argument("--print-config", action="store_true", help="print every setting's final value and exit")
    for section in scope.sections:
        doc = (SECTIONS[section].__doc__ or section).strip().splitlines()[0].replace("``", "`")
        group = parser.add_argument_group(section, doc)
        for option in scope.options():
            if option.section == section:
                _add(parser, group, option)
    own = {option.flag for option in scope.options()}
    for option in all_options():
        if option.flag not in own:
            parser.add_stranger(option.flag, f"it is for {', '.join(takers(option))}")
    for entry in FOLKLORE:
        flags = [entry.flag] if entry.short is None else [entry.flag, entry.short]
        dest, hidden = f"folklore.{entry.name}", argparse.SUPPRESS
        if entry.takes_value:
            parser.add_argument(*flags, dest=dest, default=hidden, help=hidden)
        else:
            parser.add_boolean(parser, entry.flag, dest, hidden)
    return parser


def resolve(
    scope: Scope, given: argparse.Namespace, environ: Mapping[str, str], *, config: str | None = None
) -> Resolved:
    """Merges the parsed flags with the environment and the YAML file.

    Raises SettingsError that names where the value came from.
    """
    warnings = list(_folklore_warnings(_folklore_flags(given)))
    values: dict[str, Value] = {option.key: option.default for option in scope.options()}
    found: dict[str, Value] = {}
    path = getattr(given, "config", None) or config or environ.get("TANDEM_CONFIG")
    if path:
        found |= _from_file(scope, Path(path), warnings)
    found |= _from_environ(scope, environ, warnings)
    found |= _from_flags(scope, given)
    return Resolved(scope, values | found, frozenset(found), tuple(warnings))


def from_keywords(scope: Scope, keywords: Mapping[str, object]) -> Resolved:
    """Settings from keyword arguments (``LLM``). Raises SettingsError naming the nearest known one."""
    warnings = list(_folklore_warnings((name, v) for name, v in keywords.items() if name in BY_NAME and v is not False))
    by_name = {option.name: option for option in scope.options()}
    values: dict[str, Value] = {option.key: option.default for option in scope.options()}
    found: dict[str, Value] = {}
    for name, value in keywords.items():
        if name in BY_NAME:
            continue
        if name not in by_name:
            raise SettingsError(f"Unknown setting {name!r}.{nearest(name, by_name)}", param=name)
        found[by_name[name].key] = _checked(by_name[name], value, name)
    return Resolved(scope, values | found, frozenset(found), tuple(warnings))


def settings_environ(settings: Iterable[object]) -> dict[str, str]:
    """Settings as environment variables of a child process: those that differ from their defaults."""
    environ: dict[str, str] = {}
    for item in settings:
        section = next(name for name, kind in SECTIONS.items() if kind is type(item))
        for option in options_of(section):
            value = cast(Value, getattr(item, option.name))
            if value != option.default:
                environ[option.env[0]] = option.write(value)
    return environ


def without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` without any variable that names a setting, or would by its prefix, or the config file."""
    kept = OTHER_ENV - {"TANDEM_CONFIG"}
    names = {name for option in all_options() for name in option.env}
    names |= {name for name in environ if name.startswith(ENV_PREFIX)} - kept
    return {name: value for name, value in environ.items() if name not in names}


def _add(parser: Parser, group: argparse._ArgumentGroup, option: Option) -> None:
    text = (option.help + _shown_default(option)).replace("%", "%%")
    if option.base is bool:
        parser.add_boolean(group, option.flag, option.key, text)
        return
    metavar = option.metavar or ("{" + ",".join(option.choices) + "}" if option.choices else _METAVARS[option.base])
    if option.base is tuple:
        parser.add_list(group, option.flag, option.key, metavar, text)
        return
    flags = [option.flag] if option.short is None else [option.flag, option.short]
    group.add_argument(*flags, dest=option.key, default=argparse.SUPPRESS, metavar=metavar, help=text)


_METAVARS = {str: "TEXT", int: "N", float: "X", tuple: "TEXT", dict: "JSON"}


def _shown_default(option: Option) -> str:
    if option.base is bool:
        return (
            f" (default: {option.write(option.default)}; --no-{option.flag[2:]} turns it off)" if option.default else ""
        )
    if option.default in (None, (), "") or "default:" in option.help:
        return ""
    return f" (default: {option.write(option.default)})"


def _from_flags(scope: Scope, given: argparse.Namespace) -> dict[str, Value]:
    texts = vars(given)
    found: dict[str, Value] = {}
    for option in scope.options():
        if option.key not in texts:
            continue
        if option.base is tuple:
            parts = [_read(option, text, option.flag) for text in texts[option.key]]
            found[option.key] = tuple(item for part in parts for item in cast(tuple[str, ...], part))
        else:
            found[option.key] = _read(option, texts[option.key], option.flag)
    model = texts.get("positional_model")
    if model is not None:
        if found.get("model.model", model) != model:
            raise SettingsError(f"Two models: {model!r} as the argument, and --model {found['model.model']!r}.")
        found["model.model"] = model
    return found


def _from_environ(scope: Scope, environ: Mapping[str, str], warnings: list[str]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for option in scope.options():
        name = next((name for name in option.env if environ.get(name)), None)
        if name is None:
            continue
        text = environ[name]
        if option.base is int and text.startswith(_ADDRESSES):
            warnings.append(f"{name}={text} was set by Kubernetes for a service of that name; it is ignored")
            continue
        found[option.key] = _read(option, text, name)
    warnings.extend(_unread_names(scope, environ))
    return found


def _unread_names(scope: Scope, environ: Mapping[str, str]) -> Iterable[str]:
    """Warnings of names that look like ours and that nothing reads. One environment may serve a whole deployment: what
    other commands read is left to them."""
    settings = {name for option in all_options() for name in option.env}
    known = settings | OTHER_ENV
    given = sorted(name for name, text in environ.items() if name.startswith(ENV_PREFIX) and text)
    given = [name for name in given if not _is_of_kubernetes(name, environ[name])]
    if scope.is_all:
        own = {name for option in scope.options() for name in option.env}
        if unread := [name for name in given if name in settings - own]:
            yield f"ignored here, where every worker gets its own: {', '.join(unread)}"
    unexplained = []
    for name in given:
        entry = BY_NAME.get(name.removeprefix(ENV_PREFIX).lower())
        if name in known:
            continue
        if entry is not None:
            yield f"{name} is not a setting and is ignored: {entry.why}"
        elif near := nearest(name, known, cutoff=0.85):
            yield f"{name} is not a setting and is ignored.{near}"
        else:
            unexplained.append(name)
    if unexplained:
        yield f"not settings, and ignored: {', '.join(unexplained)}"


def _is_of_kubernetes(name: str, text: str) -> bool:
    return _KUBERNETES.fullmatch(name) is not None or (name.endswith("_PORT") and text.startswith(_ADDRESSES))


def _from_file(scope: Scope, path: Path, warnings: list[str]) -> dict[str, Value]:
    """One file may serve a whole deployment: settings of components that are not in ``scope`` are left to them."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"Cannot read --config {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise SettingsError(f"{path} must hold a mapping of settings, not a {type(tree).__name__}.")
    found: dict[str, Value] = {}
    nested: dict[str, Value] = {}
    flat = (*all_options(), *scope.options())  # of two options of one name, the command's own is meant
    for key, value in tree.items():
        name = str(key).replace("-", "_")
        if name in SECTIONS and isinstance(value, dict):
            inner = {str(k).replace("-", "_"): v for k, v in value.items()}
            nested |= _from_mapping(scope, inner, options_of(name), f"{path}: {name}.", warnings)
        else:
            found |= _from_mapping(scope, {name: value}, flat, f"{path}: ", warnings)
    return found | nested


def _from_mapping(
    scope: Scope, mapping: Mapping[str, object], options: Iterable[Option], where: str, warnings: list[str]
) -> dict[str, Value]:
    by_name = {option.name: option for option in options}
    wanted = {option.key for option in scope.options()}
    found: dict[str, Value] = {}
    for name, value in mapping.items():
        if name in BY_NAME:
            warnings.extend(_folklore_warnings([(name, value)]))
            continue
        if name not in by_name:
            raise SettingsError(f"{where}{name} is not a setting.{nearest(name, by_name)}", param=name)
        option = by_name[name]
        if option.is_secret and value in (MASK, [MASK]):
            raise SettingsError(f"{where}{name} was masked when it was printed; give the secret by environment.")
        checked = _checked(option, value, where + name)
        if option.key in wanted:
            found[option.key] = checked
    return found


def _folklore_flags(given: argparse.Namespace) -> list[tuple[str, object]]:
    return [(k.removeprefix("folklore."), v) for k, v in vars(given).items() if k.startswith("folklore.")]


def _folklore_warnings(entries: Iterable[tuple[str, object]]) -> Iterable[str]:
    for name, value in entries:
        warning = BY_NAME[name].judge(value)
        if warning is not None:
            yield warning


def _read(option: Option, text: str, where: str) -> Value:
    try:
        return option.read(text)
    except BadValue as error:
        raise _bad(option, text, where, error) from None


def _checked(option: Option, value: object, where: str) -> Value:
    try:
        return option.check(value)
    except BadValue as error:
        raise _bad(option, value, where, error) from None


def _bad(option: Option, value: object, where: str, error: BadValue) -> SettingsError:
    if option.is_secret:
        return SettingsError(f"{where}: not a value this setting takes.", param=option.name)
    return SettingsError(f"{where}: {error}{hint_for(option.name, value)}.", param=option.name)
