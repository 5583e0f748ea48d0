"""Settings from flags, environment and files: each spelling of a value, precedence, and errors that help."""

from __future__ import annotations

import functools
import inspect
import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.ledger.redis import RedisLedger
from proto.errors import SettingsError
from proto.settings import (
    CacheSettings,
    LedgerSettings,
    LocalSettings,
    LogSettings,
    ModelSettings,
    RouterSettings,
    SchedulerSettings,
    WorkerSettings,
)
from tandem import options
from tandem.folklore import FOLKLORE, RENAMED
from tandem.option import SECTIONS, BadValue, Option, Value, all_options, options_of, read_quantity
from tandem.options import COMMANDS, OFFLINE, ROUTER, SERVE, WORKER, Resolved, Scope
from worker.service import TOMBSTONE_S

parser_of = functools.cache(lambda scope: options.build_parser(scope, "tandem", ""))


def resolve(*argv: str, scope: Scope = SERVE, environ: dict[str, str] | None = None) -> Resolved:
    given = parser_of(scope).read(argv)
    return options.resolve(scope, given, environ or {})


def write_yaml(folder: Path, tree: object) -> str:
    path = folder / "tandem.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True))
    return str(path)


def test_without_anything_every_component_has_its_defaults() -> None:
    resolved = resolve()
    for settings in SECTIONS.values():
        assert resolved.get(settings) == settings()
    assert resolved.given == frozenset()
    assert resolved.warnings == ()


def test_option_names_are_unique_but_for_what_a_router_and_a_worker_both_have() -> None:
    names = [option.name for option in all_options()]
    assert {name for name in names if names.count(name) > 1} == {"host", "port", "drain_timeout"}
    assert len({option.key for option in all_options()}) == len(names)


def test_a_short_flag_is_the_long_one() -> None:
    assert resolve("-q", "awq").values == resolve("--quantization", "awq").values


def test_every_option_is_explained() -> None:
    assert [option.key for option in all_options() if not option.help] == []


def test_no_folklore_flag_hides_a_real_one() -> None:
    assert {entry.name for entry in FOLKLORE} & {option.name for option in all_options()} == set()


# --- one value, every spelling ---------------------------------------------------------------------------------------

_texts = st.text("aZ09 ,[]{}\"'-_=:/#*~é漢", min_size=1, max_size=12).filter(
    lambda text: text == text.strip() and not text.startswith("-") and text != options.MASK
)


def _values(option: Option) -> st.SearchStrategy[Value]:
    made: st.SearchStrategy[Value]
    low = int(option.low) if option.low is not None else -(10**6)
    high = int(option.high) if option.high is not None else 10**12
    if option.choices:
        made = st.sampled_from(option.choices)
    elif option.base is str:
        made = _texts
    elif option.base is bool:
        made = st.booleans()
    elif option.base is int:
        made = st.integers(low, high)
    elif option.base is float:
        lowest = option.low if option.low is not None else -1e6
        made = st.floats(lowest, option.high if option.high is not None else 1e6, allow_nan=False)
    elif option.base is tuple:
        made = st.lists(_texts, min_size=1, max_size=3).map(tuple)
    else:
        made = st.dictionaries(_texts, st.integers(0, 9) | _texts, max_size=3)
    return st.none() | made if option.is_optional and option.base is not str else made


_one_setting = st.sampled_from(SERVE.options()).flatmap(lambda o: st.tuples(st.just(o), _values(o)))


@given(_one_setting)
def test_a_value_reads_back_from_its_text(setting: tuple[Option, Value]) -> None:
    option, value = setting
    assert option.read(option.write(value)) == value
    assert option.check(value) == value


@given(_one_setting)
def test_flag_environment_and_keyword_agree(setting: tuple[Option, Value]) -> None:
    option, value = setting
    text = option.write(value)
    by_flag = resolve(f"{option.flag}={text}")
    by_underscores = resolve(f"--{option.name}={text}")
    by_environment = resolve(environ={option.env[0]: text})
    assert by_flag.values[option.key] == value
    assert by_underscores.values == by_flag.values
    assert by_environment.values == by_flag.values
    if option.section in OFFLINE.sections:
        assert options.from_keywords(OFFLINE, {option.name: value}).values[option.key] == value


@given(_one_setting)
def test_yaml_nested_and_flat_agree_with_the_flag(
    tmp_path_factory: pytest.TempPathFactory, setting: tuple[Option, Value]
) -> None:
    option, value = setting
    folder = tmp_path_factory.mktemp("yaml")
    native = list(value) if isinstance(value, tuple) else value
    nested = resolve("--config", write_yaml(folder, {option.section: {option.name: native}}))
    assert nested.values[option.key] == value
    flat = resolve("--config", write_yaml(folder, {option.name.replace("_", "-"): native}))
    assert flat.values == nested.values


@given(_one_setting)
def test_a_child_process_reads_the_parents_settings_from_its_environment(setting: tuple[Option, Value]) -> None:
    option, value = setting
    parent = resolve(f"{option.flag}={option.write(value)}")
    environ = options.settings_environ(parent.get(kind) for kind in SECTIONS.values())
    assert set(environ) <= {option.env[0]}, "only what differs from the defaults is passed on"
    assert resolve(environ=environ).values == parent.values


@given(st.data())
def test_the_printed_config_is_read_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(_one_setting, max_size=5, unique_by=lambda pair: pair[0].key))
    argv = [f"{option.flag}={option.write(value)}" for option, value in chosen if not option.is_secret]
    resolved = resolve(*argv)
    path = tmp_path_factory.mktemp("yaml") / "printed.yaml"
    path.write_text(resolved.to_yaml())
    assert resolve("--config", str(path)).values == resolved.values


# --- precedence ------------------------------------------------------------------------------------------------------


def test_flag_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    config = write_yaml(tmp_path, {"port": 1, "host": "file", "max_num_seqs": 3, "cache": {"block_size": 32}})
    environ = {"TANDEM_PORT": "2", "TANDEM_HOST": "environment"}
    resolved = resolve("--config", config, "--port", "9", environ=environ)
    assert resolved.get(RouterSettings).port == 9
    assert resolved.get(RouterSettings).host == "environment"
    assert resolved.get(SchedulerSettings).max_num_seqs == 3
    assert resolved.get(CacheSettings).block_size == 32
    assert resolved.get(SchedulerSettings).scheduling_policy == "priority"


def test_nested_keys_win_over_flat_ones_whatever_their_order(tmp_path: Path) -> None:
    for tree in ("router: {port: 1}\nport: 2", "port: 2\nrouter: {port: 1}"):
        path = tmp_path / "both.yaml"
        path.write_text(tree)
        assert resolve("--config", str(path)).get(RouterSettings).port == 1


def test_our_own_environment_name_wins_over_the_borrowed_one() -> None:
    both = {"TANDEM_HF_TOKEN": "ours", "HF_TOKEN": "theirs", "HUGGING_FACE_HUB_TOKEN": "older"}
    assert resolve(environ=both).get(ModelSettings).hf_token == "ours"
    del both["TANDEM_HF_TOKEN"]
    assert resolve(environ=both).get(ModelSettings).hf_token == "theirs"


def test_an_empty_environment_variable_is_not_given() -> None:
    assert resolve(environ={"TANDEM_PORT": "", "VLLM_API_KEY": ""}).given == frozenset()


def test_the_config_file_may_be_named_by_environment(tmp_path: Path) -> None:
    assert resolve(environ={"TANDEM_CONFIG": write_yaml(tmp_path, {"prefill": 4})}).get(LocalSettings).prefill == 4


def test_model_is_an_argument_or_a_flag_or_a_flat_key(tmp_path: Path) -> None:
    config = write_yaml(tmp_path, {"model": "here"})
    for resolved in (resolve("here"), resolve("--model", "here"), resolve("here", "--model=here")):
        assert resolved.get(ModelSettings).model == "here"
    assert resolve("--config", config).get(ModelSettings).model == "here"
    assert resolve("--config", write_yaml(tmp_path, {"model": {"model": "here"}})).get(ModelSettings).model == "here"
    with pytest.raises(SettingsError, match="Two models"):
        resolve("here", "--model", "there")


# --- spellings -------------------------------------------------------------------------------------------------------


def test_booleans_have_every_usual_spelling() -> None:
    def prefix_caching(*argv: str) -> bool:
        return resolve(*argv).get(CacheSettings).enable_prefix_caching

    assert prefix_caching("--enable-prefix-caching")
    assert prefix_caching("--enable_prefix_caching=True")
    assert not prefix_caching("--no-enable-prefix-caching")
    assert not prefix_caching("--no_enable_prefix_caching")
    assert not prefix_caching("--enable-prefix-caching=false")
    assert not prefix_caching("--enable-prefix-caching", "False")
    assert not prefix_caching("--no-enable-prefix-caching=true")
    assert prefix_caching("--no-enable-prefix-caching", "false")
    assert not prefix_caching("--disable-radix-cache")
    assert prefix_caching("--disable-radix-cache=false")
    assert not prefix_caching("--no-enable-prefix-caching", "--enable-prefix-caching", "--no-enable-prefix-caching")
    with pytest.raises(SettingsError, match="--enable-prefix-caching: expects true or false"):
        prefix_caching("--enable-prefix-caching=maybe")


def test_a_boolean_before_the_model_does_not_swallow_it() -> None:
    resolved = resolve("--no-enable-prefix-caching", "my/model")
    assert resolved.get(ModelSettings).model == "my/model"
    assert not resolved.get(CacheSettings).enable_prefix_caching


def test_lists_are_repeated_or_comma_separated() -> None:
    resolved = resolve("--served-model-name", "a,b", "--served-model-name", "c")
    assert resolved.get(ModelSettings).served_model_name == ("a", "b", "c")
    assert resolve("--transports", "shm, grpc").get(WorkerSettings).transports == ("shm", "grpc")
    assert resolve("--allowed-origins", '["a,b"]').get(RouterSettings).allowed_origins == ("a,b",)


@pytest.mark.parametrize(
    ("text", "is_size", "number"),
    [
        ("4096", False, 4096),
        ("32K", False, 32768),
        ("32k", False, 32000),
        ("1.5k", False, 1500),
        ("2M", False, 2 << 20),
        ("-1", False, -1),
        ("4GiB", True, 4 << 30),
        ("4gib", True, 4 << 30),
        ("4GB", True, 4 * 10**9),
        ("4G", True, 4 << 30),
        ("0.5 GiB", True, 1 << 29),
        ("512B", True, 512),
        ("1TiB", True, 1 << 40),
    ],
)
def test_quantities(text: str, is_size: bool, number: int) -> None:
    assert read_quantity(text, is_size=is_size) == number


@pytest.mark.parametrize(
    ("text", "is_size"), [("4GiB", False), ("", False), ("K", False), ("1.2", False), ("1e3", False), ("4iB", True)]
)
def test_what_is_no_quantity(text: str, is_size: bool) -> None:
    with pytest.raises(BadValue):
        read_quantity(text, is_size=is_size)


def test_max_model_len_takes_suffixes_auto_and_minus_one() -> None:
    def max_model_len(text: str) -> int | None:
        return resolve("--max-model-len", text).get(ModelSettings).max_model_len

    assert [max_model_len(text) for text in ("32K", "auto", "-1", "none")] == [32768, -1, -1, None]


def test_json_settings() -> None:
    resolved = resolve("--override-generation-config", '{"temperature": 0.5}')
    assert resolved.get(ModelSettings).override_generation_config == {"temperature": 0.5}
    with pytest.raises(SettingsError, match="is not JSON"):
        resolve("--override-generation-config", "{temperature}")


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-modle-len", "3"], r"Unknown flag --max-modle-len\. Did you mean --max-model-len\?"),
        (["--max-model", "3"], r"Unknown flag --max-model\."),
        (["--reasoning-effort", "3"], r"Unknown flag --reasoning-effort\.$"),
        (["--zzzz"], r"Unknown flag --zzzz\.$"),
        (["--port", "http"], r"--port: expects a whole number, got 'http'"),
        (["--port", "70000"], r"--port: must be between 0 and 65535, got 70000"),
        (["--decode", "0"], r"--decode: must be at least 1"),
        (["--gpu-memory-utilization", "1.5"], r"between 0\.01 and 1, got 1\.5"),
        (["--gpu-memory-utilization", "nan"], r"must be finite"),
        (["--dtype", "float8"], r"--dtype: must be one of .*; did you mean --quantization fp8\?"),
        (["--dtype", "fp8"], r"--dtype: must be one of .*; did you mean --quantization fp8\?"),
        (["--quantization", "gguf"], r"--quantization: must be one of .*awq.*, got 'gguf'"),
        (["-tp", "2"], r"--tensor-parallel-size 2 is not supported yet: each worker runs on one device"),
        (["--port"], r"[Ee]xpected one argument"),
        (["model", "and", "more"], r"Unexpected argument 'and'"),
        (["--namespace", ""], r"--namespace: must not be empty"),
        (["--config", "/nonexistent/x.yaml"], r"Cannot read --config /nonexistent/x\.yaml"),
    ],
)
def test_a_wrong_flag_says_what_is_wrong(argv: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        resolve(*argv)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"max_modle_len": 3}, r"max_modle_len is not a setting\. Did you mean max_model_len\?"),
        ({"router": {"prot": 3}}, r"router\.prot is not a setting\. Did you mean port\?"),
        ({"router": {"block_size": 3}}, r"router\.block_size is not a setting"),
        ({"port": "http"}, r"port: expects a whole number"),
        ({"port": True}, r"port: expects a whole number, got True"),
        ({"port": None}, r"port: needs a value"),
        ({"revision": 12}, r"revision: expects a text, got 12; quote it"),
        ({"served_model_name": [1]}, r"expects a list of texts"),
        (["port"], r"must hold a mapping of settings"),
        ({"api_key": ["***"]}, r"api_key was masked"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, tree: object, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        resolve("--config", write_yaml(tmp_path, tree))


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("a: [")
    with pytest.raises(SettingsError, match="is not YAML"):
        resolve("--config", str(path))


def test_an_empty_file_gives_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing yet\n")
    assert resolve("--config", str(path)).given == frozenset()


def test_a_wrong_environment_value_names_the_variable() -> None:
    with pytest.raises(SettingsError, match=r"TANDEM_PORT: expects a whole number, got 'x'"):
        resolve(environ={"TANDEM_PORT": "x"})


def test_kubernetes_service_variables_are_no_settings() -> None:
    resolved = resolve(environ={"TANDEM_PORT": "tcp://10.0.0.1:8000", "TANDEM_SERVICE_HOST": "10.0.0.1"})
    assert resolved.get(RouterSettings).port == 8000
    assert len(resolved.warnings) == 1
    assert "Kubernetes" in resolved.warnings[0]
    others = {
        "TANDEM_ROUTER_SERVICE_PORT_HTTP": "80",
        "TANDEM_ROUTER_PORT": "tcp://10.0.0.1:80",
        "TANDEM_ROUTER_PORT_80_TCP": "tcp://10.0.0.1:80",
        "TANDEM_ROUTER_PORT_80_TCP_ADDR": "10.0.0.1",
        "TANDEM_HTTP_PORT": "tcp://10.0.0.2:80",
    }
    assert resolve(environ=others).warnings == ()


def test_a_misspelt_environment_variable_is_pointed_out() -> None:
    (warning,) = resolve(environ={"TANDEM_MAX_MODLE_LEN": "3"}).warnings
    assert "Did you mean TANDEM_MAX_MODEL_LEN?" in warning


def test_environment_names_that_nothing_reads_are_named_once() -> None:
    environ = {"TANDEM_SHARDS": "4", "TANDEM_TENSOR_PARALLEL_SIZE": "4", "TANDEM_ROUTER_PORT": "80", "TANDEM_EMPTY": ""}
    for scope in (SERVE, WORKER, ROUTER):
        why, names = resolve(scope=scope, environ=environ).warnings
        assert why.startswith("TANDEM_TENSOR_PARALLEL_SIZE is not a setting and is ignored: each worker runs on one")
        assert names == "not settings, and ignored: TANDEM_ROUTER_PORT, TANDEM_SHARDS"
    assert options.without_settings(environ) == {}, "the children of one that has warned need not"


def test_serve_names_what_is_for_a_worker_alone() -> None:
    environ = {"TANDEM_HTTP_PORT": "8001", "TANDEM_WORKER_ID": "me"}
    (warning,) = resolve(environ=environ).warnings
    assert warning.endswith(": TANDEM_HTTP_PORT, TANDEM_WORKER_ID")
    assert resolve(scope=WORKER, environ=environ).warnings == ()


def test_one_environment_serves_the_whole_deployment() -> None:
    environ = {option.env[0]: option.write(option.default) for option in all_options() if option.default is not None}
    environ |= dict.fromkeys(options.OTHER_ENV - {"TANDEM_CONFIG"}, "x")
    for scope in (WORKER, ROUTER):
        assert resolve(scope=scope, environ=environ).warnings == ()


# --- folklore --------------------------------------------------------------------------------------------------------


def test_flags_of_other_servers_are_accepted_with_one_warning_each() -> None:
    argv = ["--enable-metrics", "--swap-space", "4", "--disable-log-requests", "--trust_remote_code", "--swap-space=8"]
    resolved = resolve(*argv)
    assert len(resolved.warnings) == 4
    assert resolve("--enable-metrics=true", *argv[1:3], "--disable-log-requests=True", *argv[4:]).warnings == (
        *resolved.warnings,
    )
    assert resolve("--compilation-config.level", "3").warnings == resolve("--compilation-config", "{}").warnings
    assert all("is not needed: " in warning for warning in resolved.warnings)
    assert resolved.given == frozenset()


@pytest.mark.parametrize(
    "argv",
    [
        ["--tensor-parallel-size", "1", "-pp", "1", "--tokenizer-mode", "auto"],
        ["--tp", "1", "--no-enable-log-requests", "--runner=generate"],
        ["--no-trust-remote-code", "--logprobs-mode", "raw_logprobs", "--performance_mode", "balanced"],
        ["--enable-metrics=false", "--kv-cache-metrics", "false", "--no-headless=true", "--node-rank=0"],
    ],
)
def test_what_asks_for_nothing_is_accepted_in_silence(argv: list[str]) -> None:
    assert resolve(*argv).warnings == ()


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--enable-auto-tool-choice"], "--enable-auto-tool-choice is not supported yet: tool calls"),
        (["--reasoning-parser", "qwen3"], "--reasoning-parser qwen3 is not supported yet: reasoning is part"),
        (["--kv-transfer-config", '{"kv_connector": "X"}'], "prefill and decode are apart as it is"),
        (["--performance-mode", "throughput"], "--max-num-seqs"),
        (["--hf-overrides", '{"a": 1}'], "config.json is taken as it is"),
        (["--kv-transfer-config.kv_connector", "X"], "prefill and decode are apart as it is"),
        (["--kv_transfer_config.kv_role=kv_both"], "prefill and decode are apart as it is"),
        (["--spec-model", "m"], "every token is generated by the model itself"),
        (["--spec-tokens", "3"], "every token is generated by the model itself"),
        (["--spec-method", "mtp"], "every token is generated by the model itself"),
        (["--kv-events-config", '{"publisher": "zmq"}'], "by way of --redis"),
        (["--headless"], "each machine runs its own"),
        (["--node-rank", "1"], "each machine runs its own"),
        (["--master-addr", "10.0.0.1"], "each machine runs its own"),
        (["--logging-config", "l.json"], "--log-format"),
        (["--custom-histogram-buckets", "1,2"], "/metrics"),
        (["--kv-cache-metrics=true"], "/metrics"),
        (["--disaggregation-transfer-backend", "mooncake"], "--transports"),
        (["--max-num-queued-tokens", "9"], "requests that wait are counted, not their tokens"),
    ],
)
def test_what_asks_for_more_than_there_is_says_why_not(argv: list[str], why: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve(*argv)
    assert why in caught.value.message


def test_every_folklore_flag_explains_itself_and_none_hides_a_setting() -> None:
    settings = {option.name for option in all_options()}
    for entry in FOLKLORE:
        assert entry.name not in settings
        try:
            said = entry.judge("something" if entry.takes_value else "true")
        except SettingsError as error:
            said = error.message
        assert said is not None
        assert entry.why in said
    flags = {option.flag for option in all_options()} | {entry.flag for entry in FOLKLORE}
    assert {"--" + ours.removeprefix("--").removeprefix("no-") for ours in RENAMED.values()} <= flags
    assert not set(RENAMED) & flags


def test_other_servers_names_of_our_settings() -> None:
    resolved = resolve(
        *("--model-path", "m", "--context-length", "4K", "--mem_fraction_static=0.5", "--max-running-requests", "8"),
        *("--chunked-prefill-size", "512", "--random-seed", "3", "--shutdown-timeout", "7", "-O3"),
    )
    engine = resolved.engine()
    assert (engine.model.model, engine.model.max_model_len, engine.model.seed) == ("m", 4096, 3)
    assert (engine.scheduler.max_num_seqs, engine.scheduler.max_num_batched_tokens) == (8, 512)
    assert engine.cache.gpu_memory_utilization == 0.5
    assert resolved.get(WorkerSettings).drain_timeout == 7
    assert [warning.split()[0] for warning in resolved.warnings] == ["--optimization-level"]


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["m", "--served-model-name", "a", "b", "--port", "1"], ("a", "b")),
        (["--served-model-name", "a", "m"], ("a",)),
        (["--served-model-name", "a", "m", "--served-model-name=b", "c"], ("a", "b", "c")),
        (["--port", "1", "m", "--served-model-name", "a", "b,c", "--seed", "1"], ("a", "b", "c")),
        (["m", "--served-model-name", "a", "--enable-prefix-caching", "true"], ("a",)),
    ],
)
def test_a_list_goes_on_with_bare_words_once_the_model_is_known(argv: list[str], names: tuple[str, ...]) -> None:
    model = resolve(*argv).get(ModelSettings)
    assert (model.model, model.served_model_name) == ("m", names)


def test_a_command_without_an_argument_takes_every_bare_word_into_the_list() -> None:
    assert resolve("--api-key", "a", "b", scope=ROUTER).get(RouterSettings).api_key == ("a", "b")


def test_folklore_in_a_file_and_as_keywords(tmp_path: Path) -> None:
    (warning,) = resolve("--config", write_yaml(tmp_path, {"swap-space": 4})).warnings
    assert warning.startswith("--swap-space")
    assert options.from_keywords(OFFLINE, {"tensor_parallel_size": 1, "trust_remote_code": False}).warnings == ()
    with pytest.raises(SettingsError, match="--tensor-parallel-size 2 is not supported yet"):
        options.from_keywords(OFFLINE, {"tensor_parallel_size": 2})


# --- scopes and secrets ----------------------------------------------------------------------------------------------


def test_each_command_takes_its_own_host_and_port() -> None:
    assert resolve("--port", "7").get(RouterSettings).port == 7
    assert resolve("--port", "7").get(WorkerSettings).port == 0
    assert resolve("--port", "7", scope=WORKER).get(WorkerSettings).port == 7
    assert resolve("--port", "7", scope=ROUTER).get(RouterSettings).port == 7


def test_one_file_serves_the_whole_deployment(tmp_path: Path) -> None:
    config = write_yaml(tmp_path, {"router": {"port": 1}, "worker": {"port": 2}, "prefill": 3, "redis": "redis://r"})
    worker = resolve("--config", config, scope=WORKER)
    assert worker.get(WorkerSettings).port == 2
    assert worker.get(LedgerSettings).redis == "redis://r"
    assert resolve("--config", config, scope=ROUTER).get(RouterSettings).port == 1
    assert resolve("--config", config).get(LocalSettings).prefill == 3


def test_a_routers_flags_are_unknown_to_a_worker() -> None:
    with pytest.raises(SettingsError, match="Unknown flag --disagg-threshold: it is for `tandem serve`, "):
        resolve("--disagg-threshold", "1", scope=WORKER)


def test_sampling_defaults_are_the_routers_to_fill_in() -> None:
    for flags in (["--generation-config", "vllm"], ["--override_generation_config={}"]):
        for scope in (SERVE, ROUTER):
            assert len(resolve(*flags, scope=scope).given) == 1
        with pytest.raises(SettingsError, match=r"generation-config: it is for `tandem serve`, `tandem router`\."):
            resolve(*flags, scope=WORKER)


def test_every_flag_of_another_command_says_whose_it_is() -> None:
    for scope in COMMANDS.values():
        own = {option.flag for option in scope.options()}
        for option in all_options():
            for flag in (option.flag, "--no-" + option.flag[2:]):
                if option.flag not in own:
                    with pytest.raises(SettingsError, match=f"^Unknown flag {flag}: it is for `tandem "):
                        resolve(flag, scope=scope)


def test_the_page_names_the_commands_that_take_each_flag() -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    for section in SECTIONS:
        part = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
        for option in options_of(section):
            row = next(line for line in part.splitlines() if line.startswith(f"| `{option.flag}`"))
            above = re.search(r"Taken by (.*)\.", part)
            named = re.findall(r"\w+", above[1] if above else row.split("|")[-2])
            takers = {name for name, scope in COMMANDS.items() if option in scope.options()}
            assert set(named) - {"tandem"} == takers or (named == ["all"] and len(takers) == len(COMMANDS))


def test_leases_are_the_routers_to_set() -> None:
    for scope in (SERVE, ROUTER):
        assert resolve("--lease-s", "7", scope=scope).get(RouterSettings).lease_s == 7
    with pytest.raises(SettingsError, match="Unknown flag --lease-s"):
        resolve("--lease-s", "7", scope=WORKER)


def test_what_remembers_a_request_outlives_its_longest_lease() -> None:
    longest = next(option.high for option in options_of("router") if option.name == "lease_s")
    ledger = inspect.signature(RedisLedger).parameters
    assert longest is not None
    assert longest < min(ledger["handoff_ttl_s"].default, ledger["tombstone_ttl_s"].default, TOMBSTONE_S)


def test_secrets_are_masked_when_printed_and_in_errors() -> None:
    resolved = resolve("--api-key", "hush-1,hush-2", "--prefix-hash-key", "hush-3", "--hf-token=hush-4")
    printed = resolved.to_yaml()
    assert "hush" not in printed
    assert yaml.safe_load(printed)["router"]["api_key"] == options.MASK
    assert resolved.get(RouterSettings).api_key == ("hush-1", "hush-2")
    with pytest.raises(SettingsError) as caught:
        resolve("--api-key", '["hush')
    assert "hush" not in str(caught.value)


def test_without_settings_drops_every_setting_and_keeps_the_rest() -> None:
    environ = {"PATH": "/bin", "TANDEM_PORT": "1", "REDIS_URL": "r", "VLLM_API_KEY": "k", "TANDEM_CACHE": "c"}
    assert options.without_settings(environ) == {"PATH": "/bin", "TANDEM_CACHE": "c"}


def test_keywords_name_the_nearest_setting() -> None:
    with pytest.raises(SettingsError, match=r"Unknown setting 'max_modle_len'\. Did you mean max_model_len\?"):
        options.from_keywords(OFFLINE, {"max_modle_len": 3})
    with pytest.raises(SettingsError, match="seed: expects a whole number"):
        options.from_keywords(OFFLINE, {"seed": 1.5})
    assert math.isclose(
        options.from_keywords(OFFLINE, {"gpu_memory_utilization": 1}).get(CacheSettings).gpu_memory_utilization, 1
    )


def test_help_lists_every_flag_of_the_command_by_component() -> None:
    text = options.build_parser(SERVE, "tandem serve", "About.").format_help()
    for option in SERVE.options():
        assert option.flag in text
    positions = [text.index(f"\n{section}:") for section in SERVE.sections]
    assert positions == sorted(positions)
    assert "--swap-space" not in text
    assert not any(
        option.flag in text.split()
        for option in options_of("worker")
        if option.key in SERVE.without and option.name not in ("host", "port")
    )


def test_log_settings_reach_every_command() -> None:
    for scope in (SERVE, WORKER, ROUTER):
        assert resolve("--log-format", "json", scope=scope).get(LogSettings).log_format == "json"
