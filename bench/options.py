"""Flags of ``tandem bench``, under vLLM's names, read into settings. Imports nothing heavy, so that help is instant."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bench.settings import (
    METRICS,
    SHAPES,
    Backend,
    CustomData,
    Dataset,
    Load,
    PrefixData,
    RandomData,
    Sampling,
    Saving,
    ServeSettings,
    Shape,
    Target,
    TokenChoice,
    Wanted,
)
from proto.errors import SettingsError
from router.values import Json, JsonObject

KEY_NAMES = ("TANDEM_API_KEY", "OPENAI_API_KEY")
_ENDPOINTS = {Backend.COMPLETIONS: "/v1/completions", Backend.CHAT: "/v1/chat/completions"}
_VLLM = "vllm"
"""vLLM's name for completions."""
_VERSUS_ROUNDS = 4
_GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True)
class CheckpointWish:
    folder: Path
    shape: Shape
    vocab_size: int
    seed: int
    has_weights: bool


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message[:1].upper()}{message[1:]}. `{self.prog} --help` lists the flags.")


def read_serve(argv: Sequence[str], environ: Mapping[str, str]) -> ServeSettings:
    """Raises SettingsError for flags that are unknown, malformed or contradictory."""
    given = _serve_parser().parse_args([_with_hyphens(arg) for arg in argv])
    backend = Backend.COMPLETIONS if given.backend == _VLLM else Backend(given.backend)
    model = given.served_model_name or given.model
    endpoint = given.endpoint or _ENDPOINTS[backend]
    key = next((environ[name] for name in KEY_NAMES if environ.get(name)), None)

    def target(url: str) -> Target:
        base = _base_url(url)
        return Target(base, endpoint, backend, model, key, given.request_timeout_sec, tuple(given.header))

    return ServeSettings(
        target=target(given.base_url or f"http://{given.host}:{given.port}"),
        dataset=_dataset(given),
        tokens=TokenChoice(given.tokenizer, given.vocab_size),
        load=Load(
            given.num_prompts,
            given.request_rate,
            given.burstiness,
            given.max_concurrency,
            given.num_warmups,
            given.seed,
        ),
        sampling=Sampling(given.temperature, given.ignore_eos, given.extra_body),
        wanted=Wanted(given.percentile_metrics, given.metric_percentiles, dict(given.goodput)),
        saving=_saving(given),
        versus=None if given.versus is None else target(given.versus),
        num_rounds=given.rounds or (_VERSUS_ROUNDS if given.versus else 1),
        ready_timeout_s=given.ready_check_timeout_sec,
    )


def read_compare(argv: Sequence[str]) -> tuple[Path, Path]:
    parser = Parser("tandem bench compare", description="Prints two saved results and their ratios.")
    parser.add_argument("a", metavar="A.json", type=Path)
    parser.add_argument("b", metavar="B.json", type=Path)
    given = parser.parse_args(argv)
    return given.a, given.b


def read_checkpoint(argv: Sequence[str]) -> CheckpointWish:
    parser = Parser(
        "tandem bench checkpoint",
        description="Writes a Llama checkpoint with random weights in Hugging Face's format: for speed, not for sense.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="new, or empty")
    parser.add_argument("--shape", choices=list(SHAPES), default="0.4b", help="(default: 0.4b)")
    parser.add_argument("--vocab-size", type=_whole(300), default=32000, metavar="N", help="(default: 32000)")
    parser.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="(default: 0)")
    parser.add_argument(
        "--without-weights", action="store_true", help="all but the weights, for `tandem serve --load-format dummy`"
    )
    given = parser.parse_args(argv)
    return CheckpointWish(given.folder, SHAPES[given.shape], given.vocab_size, given.seed, not given.without_weights)


def _serve_parser() -> argparse.ArgumentParser:
    about = "Measures a running server that speaks OpenAI's API: Tandem or another."
    parser = Parser("tandem bench serve", description=about, allow_abbrev=False)
    _add_server(parser.add_argument_group("server"))
    _add_dataset(parser.add_argument_group("prompts"))
    _add_load(parser.add_argument_group("load"))
    _add_report(parser.add_argument_group("report"))
    return parser


def _add_server(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--base-url", metavar="URL", help="wins over --host and --port")
    add("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    add("--port", type=_whole(1), default=8000, metavar="N", help="(default: 8000)")
    backends = [*(backend.value for backend in Backend), _VLLM]
    add("--backend", choices=backends, default="openai", help="completions or chat; vllm is openai")
    add("--endpoint", metavar="PATH", help="(default: /v1/completions, for openai-chat /v1/chat/completions)")
    add("--model", help="a served name (default: the server's first)")
    add("--served-model-name", metavar="NAME", help="wins over --model")
    add("--header", type=_header, nargs="+", default=[], metavar="NAME=VALUE", help="sent with every request")
    add("--ready-check-timeout-sec", type=_number(0.0), default=0.0, metavar="S", help="wait for it (default: 0)")
    add("--versus", metavar="URL", help="a second server; rounds at the two take turns, and ratios are printed")
    add("--rounds", type=_whole(1), metavar="N", help="each of --num-prompts (default: 1, with --versus 4)")
    add("--extra-body", type=_object, default={}, metavar="JSON", help="merged into every request")
    add("--temperature", type=_number(0.0), default=0.0, metavar="T", help="(default: 0)")
    add("--ignore-eos", action="store_true", help="every answer has the length asked for")
    add("--request-timeout-sec", type=_number(0.001), default=3600.0, metavar="S", help="(default: 3600)")
    group.description = f"A key is taken from {' or '.join(KEY_NAMES)}."


def _add_dataset(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dataset-name", choices=["random", "prefix_repetition", "custom"], default="random")
    add("--dataset-path", type=Path, metavar="FILE", help='custom: JSON lines {"prompt": ..., "output_tokens": N}')
    add("--custom-output-len", type=_whole(1), default=256, metavar="N", help="where a line has none (default: 256)")
    add("--random-input-len", "--input-len", type=_whole(1), default=1024, metavar="N", help="(default: 1024)")
    add("--random-output-len", "--output-len", type=_whole(1), default=128, metavar="N", help="(default: 128)")
    add("--random-range-ratio", type=_ratio, default=0.0, metavar="R", help="lengths vary by ±R, 0 to below 1")
    add("--random-prefix-len", type=_whole(0), default=0, metavar="N", help="tokens shared by all, ahead of the input")
    add("--prefix-repetition-prefix-len", type=_whole(1), default=256, metavar="N", help="(default: 256)")
    add("--prefix-repetition-suffix-len", type=_whole(1), default=256, metavar="N", help="(default: 256)")
    add("--prefix-repetition-num-prefixes", type=_whole(1), default=10, metavar="N", help="(default: 10)")
    add("--prefix-repetition-output-len", type=_whole(1), default=128, metavar="N", help="(default: 128)")
    add("--tokenizer", metavar="NAME", help="folder, tokenizer.json or hub name; random prompts are then text")
    add("--vocab-size", type=_whole(1), metavar="N", help="random prompts are ids below N (default: ask /tokenize)")
    add("--seed", type=int, default=0, metavar="N", help="of prompts and arrivals; a new one for prompts not cached")


def _add_load(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--num-prompts", type=_whole(1), default=1000, metavar="N", help="(default: 1000)")
    add("--request-rate", type=_rate, default=math.inf, metavar="R", help="requests per second (default: inf)")
    add("--burstiness", type=_number(1e-6), default=1.0, metavar="B", help="1: Poisson; less: bursts; more: even")
    add("--max-concurrency", type=_whole(1), metavar="N", help="requests open at a time (default: no limit)")
    add("--num-warmups", type=_whole(0), default=0, metavar="N", help="requests sent before, and not measured")


def _add_report(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    shown = ",".join(METRICS)
    add("--percentile-metrics", type=_metrics, default=METRICS[:3], metavar="LIST", help=f"of {shown} (not e2el)")
    add("--metric-percentiles", type=_percents, default=(99.0,), metavar="LIST", help="as 50,95,99 (default: 99)")
    add("--goodput", type=_limit, nargs="+", default=[], metavar="METRIC:MS", help="limits a good request keeps")
    add("--save-result", action="store_true", help="write a JSON file")
    add("--save-detailed", action="store_true", help="with every request's figures in it")
    add("--result-dir", type=Path, default=Path(), metavar="DIR", help="(default: here)")
    add("--result-filename", metavar="NAME", help="(default: of backend, rate, model and time)")


def _dataset(given: argparse.Namespace) -> Dataset:
    if given.dataset_name == "custom":
        if given.dataset_path is None:
            raise SettingsError("--dataset-name custom needs --dataset-path.")
        return CustomData(given.dataset_path, given.custom_output_len)
    if given.dataset_path is not None:
        raise SettingsError(f"--dataset-path is of --dataset-name custom, not {given.dataset_name}.")
    if given.dataset_name == "random":
        return RandomData(
            given.random_input_len, given.random_output_len, given.random_range_ratio, given.random_prefix_len
        )
    return PrefixData(
        given.prefix_repetition_prefix_len,
        given.prefix_repetition_suffix_len,
        given.prefix_repetition_num_prefixes,
        given.prefix_repetition_output_len,
    )


def _saving(given: argparse.Namespace) -> Saving | None:
    if not (given.save_result or given.save_detailed):
        if given.result_filename is not None:
            raise SettingsError("--result-filename needs --save-result.")
        return None
    return Saving(given.result_dir, given.result_filename, given.save_detailed)


def _base_url(url: str) -> str:
    base = url.rstrip("/").removesuffix("/v1").rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise SettingsError(f"A server's address starts with http:// or https://, not {url!r}.")
    return base


def _with_hyphens(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else arg


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expects a whole number of at least {least}, not {text!r}")
        return int(text)

    return read


def _number(least: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        if not least <= (value := _float(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"expects a number of at least {least:g}, not {text!r}")
        return value

    return read


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expects a number, not {text!r}") from None


def _rate(text: str) -> float:
    if not (value := _float(text)) > 0:
        raise argparse.ArgumentTypeError(f"expects requests per second, or inf, not {text!r}")
    return value


def _ratio(text: str) -> float:
    if not 0 <= (value := _float(text)) < 1:
        raise argparse.ArgumentTypeError(f"expects a number from 0 to below 1, not {text!r}")
    return value


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names or not set(names) <= set(METRICS):
        raise argparse.ArgumentTypeError(f"expects some of {','.join(METRICS)}, not {text!r}")
    return names


def _percents(text: str) -> tuple[float, ...]:
    values = tuple(_float(part) for part in text.split(","))
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"expects numbers from 0 to 100, not {text!r}")
    return values


def _limit(text: str) -> tuple[str, float]:
    metric, colon, limit = text.partition(":")
    if not colon or metric not in _GOODPUT_METRICS or not (value := _float(limit)) >= 0:
        raise argparse.ArgumentTypeError(f"expects {'|'.join(_GOODPUT_METRICS)}:MILLISECONDS, not {text!r}")
    return metric, value


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError("expects NAME=VALUE")
    return name.strip(), value.strip()


def _object(text: str) -> JsonObject:
    try:
        found: Json = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expects a JSON object, not {text!r}")
    return found
