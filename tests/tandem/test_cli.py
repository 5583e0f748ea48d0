"""The command as its users meet it: exit statuses, messages, secrets, and imports that stay light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tandem
from tandem import cli

HEAVY = ("torch", "fastapi", "grpc", "transformers", "tokenizers", "redis", "numpy", "aiohttp", "uvicorn", "pydantic")
REPORT = """
import json, sys
from tandem.cli import main
try:
    main({argv!r})
except SystemExit:
    pass
json.dump(sorted(sys.modules), sys.stderr)
"""


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    "argv", [["--help"], ["serve", "--help"], ["prefill", "--help"], ["router", "--help"], ["version"]]
)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REPORT.format(argv=argv)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout
    assert set(json.loads(done.stderr)) & set(HEAVY) == set()


def test_help_of_the_chat_imports_no_model_code() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REPORT.format(argv=["chat", "--help"])], capture_output=True, text=True, check=True
    )
    assert "--system-prompt" in done.stdout
    assert set(json.loads(done.stderr)) & {"torch", "fastapi", "grpc", "transformers"} == set()


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "tandem", "version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"tandem {tandem.__version__}\n"


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    import tomllib

    package = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert package["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "proto.version.__version__"}
    assert run(capsys, "--version") == (0, f"tandem {tandem.__version__}\n", "")


def test_the_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(f"\n  {command.name} " in out for command in cli.COMMANDS)
    assert run(capsys)[0] == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["srve"], "Unknown command 'srve'. Did you mean serve?"),
        (["frobnicate"], "Unknown command 'frobnicate'. `tandem --help` lists them."),
        (["serve", "--prot", "1"], "Unknown flag --prot. Did you mean --port?"),
        (["serve", "m", "--dtype", "fp8"], "did you mean --quantization fp8?"),
        (["serve", "m", "--tensor-parallel-size", "2"], "--tensor-parallel-size 2 is not supported yet"),
        (["version", "--x"], "Unknown flag --x."),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("tandem: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("tier", ["router", "prefill", "decode"])
def test_one_tier_alone_needs_a_redis(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tier: str
) -> None:
    for name in ("TANDEM_REDIS", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    status, _, err = run(capsys, tier)
    assert status == 2
    assert "--redis redis://" in err


def test_a_worker_needs_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "decode", "--redis", "redis://127.0.0.1:1")
    assert status == 2
    assert "Which model?" in err


def test_print_config_shows_the_outcome_and_no_secret(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "hush-hush")
    monkeypatch.setenv("TANDEM_PORT", "9")
    status, out, err = run(capsys, "serve", "my/model", "--max-num-seqs", "7", "--print-config")
    assert (status, err) == (0, "")
    tree = yaml.safe_load(out)
    assert tree["model"]["model"] == "my/model"
    assert tree["scheduler"]["max_num_seqs"] == 7
    assert tree["router"]["port"] == 9
    assert tree["router"]["api_key"] == "***"
    assert "hush" not in out


def test_warnings_go_to_stderr_once_each(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "serve", "--enable-metrics", "--swap-space", "4", "--print-config")
    assert status == 0
    assert [line.split(" is not needed")[0] for line in err.splitlines()] == [
        "tandem: warning: --enable-metrics",
        "tandem: warning: --swap-space",
    ]
    assert yaml.safe_load(out)


def test_lazy_exports() -> None:
    from proto.request import SamplingParams

    assert tandem.SamplingParams is SamplingParams
    assert set(tandem.__all__) <= set(dir(tandem))
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        tandem.LMM  # type: ignore[attr-defined]  # noqa: B018
