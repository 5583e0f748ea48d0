"""The demo's account of where a request's time went."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from proto.settings import RouterSettings
from tandem.client import Chunk
from tandem.demo import CODE_WORD, QUESTION, account, chat_command, main


def test_stages_are_listed_in_the_order_they_happen() -> None:
    text = account(
        Chunk(
            "",
            usage={"prompt_tokens": 900, "completion_tokens": 120},
            timings={
                "ttft_ms": 31.25,
                "total_ms": 400.0,
                "stages_ms": {"decoding": 360.0, "prefilling": 20.0, "queued": 1.0},
                "kv_bytes_moved": 1843200,
                "prefill_workers": ["prefill-0"],
                "decode_workers": ["decode-0"],
            },
        )
    )
    names = [line.split()[0] for line in text.splitlines()]
    assert names == ["stage", "queued", "prefilling", "decoding", "first", "in", "900"]
    assert "1,843,200 bytes of KV moved from prefill-0 to decode-0" in text


def test_nothing_known_is_said_as_nothing() -> None:
    assert "0 bytes of KV moved from nobody to nobody" in account(Chunk(""))


def test_the_question_is_long_enough_to_be_handed_over() -> None:
    words = len(QUESTION.split())
    assert CODE_WORD in QUESTION
    assert words > 2 * RouterSettings().disagg_threshold, "even where every word is one token"


def test_the_command_to_try_is_one_that_works_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(scripts / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    here = "http://127.0.0.1:8000/v1"
    assert chat_command(here, has_keys=False) == f"{scripts}/python -m tandem chat"
    (scripts / "tandem").touch(mode=0o755)
    assert chat_command(here, has_keys=False) == ".venv/bin/tandem chat"
    elsewhere = chat_command("http://127.0.0.1:9000/v1", has_keys=True)
    assert elsewhere == "TANDEM_API_KEY=... .venv/bin/tandem chat --url http://127.0.0.1:9000/v1"
    monkeypatch.chdir(scripts)
    assert chat_command(here, has_keys=False) == f"{scripts}/tandem chat"
    monkeypatch.setenv("PATH", str(scripts))
    assert chat_command(here, has_keys=False) == "tandem chat"


def test_print_config_starts_nothing_and_warnings_are_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.demo.run_service", lambda *_, **__: pytest.fail("the stack was started"))
    assert main(["--swap-space", "4", "--port", "9", "--print-config"], {}) == 0
    out, err = capsys.readouterr()
    assert err.startswith("tandem: warning: --swap-space is not needed")
    assert yaml.safe_load(out)["router"]["port"] == 9
