"""The house rules that no single room can check: names, floors, light imports, and pages that tell the truth."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    "proto",
    "kernels",
    "engine",
    "service",
    "kvtransfer",
    "worker",
    "prefill",
    "decode",
    "router",
    "tandem",
    "bench",
    "training",
)


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has after ``code``."""
    report = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FOLDERS)
def test_each_folder_is_the_package_of_its_name(name: str) -> None:
    """``proto`` and ``kernels`` are also names of packages on PyPI."""
    module = importlib.import_module(name)
    assert module.__file__ is not None
    assert Path(module.__file__).parent == ROOT / name
    assert module.__doc__


def test_the_floors_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    if not linter.exists():
        pytest.skip("import-linter is not installed")
    done = subprocess.run([linter, "--no-cache"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_of_the_router_loads_without_torch() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for folder in ("router", "proto")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    loaded = loaded_by(f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)")
    assert loaded >= set(names)
    assert loaded & {"torch", "transformers", "engine", "kernels", "kvtransfer.transports"} == set()


def test_the_front_door_loads_without_torch() -> None:
    assert loaded_by("import tandem, tandem.cli") & {"torch", "numpy", "fastapi", "grpc", "redis"} == set()


@pytest.mark.parametrize("package", ["kernels", "engine", "kvtransfer.sender", "kvtransfer.receiver"])
def test_the_engines_side_loads_without_web_and_redis(package: str) -> None:
    assert loaded_by(f"import {package}") & {"fastapi", "redis", "uvicorn", "starlette"} == set()


def test_the_configuration_page_is_what_the_settings_say() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == script("configuration").render(), "run `make docs`"


def commands_in(page: str) -> list[list[str]]:
    """Every ``tandem ...`` line in the page's code blocks, without its comment."""
    blocks = re.findall(r"```\w*\n(.*?)```", page, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if re.match(r"(\S*/)?tandem ", line)]


def test_the_readmes_commands_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    from bench.options import read_serve
    from tandem.cli import COMMANDS, main

    commands = commands_in((ROOT / "README.md").read_text())
    assert len(commands) >= 5
    for name, *rest in commands:
        assert name in {command.name for command in COMMANDS}
        if name == "bench":
            assert read_serve(rest[1:], {}).load.num_prompts == 64
        elif name != "chat":
            assert main([name, *rest, "--print-config"]) == 0, capsys.readouterr().err


def test_the_readmes_python_compiles() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "README.md", "exec")


def test_the_readmes_paths_exist() -> None:
    page = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\]\(([^)#:]+)\)", page)) | set(re.findall(r"(?:compose|scripts|docs)/[\w.-]+", page))
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_scripts_can_be_run() -> None:
    for name in ("scripts/setup", "scripts/check", "scripts/gen-proto", ".ci/run", "compose/smoke.sh"):
        path = ROOT / name
        assert os.access(path, os.X_OK), name
        subprocess.run(["bash", "-n", path], check=True)


def test_the_compose_file_names_only_real_settings_and_fixes_nothing_that_scales() -> None:
    from tandem.option import all_options

    services = yaml.safe_load((ROOT / "compose" / "compose.yaml").read_text())["services"]
    known = {name for option in all_options() for name in option.env}
    for name, service in services.items():
        assert set(service.get("environment", {})) <= known, name
        assert "container_name" not in service
        assert "healthcheck" in service
    assert {name for name, service in services.items() if "ports" in service} == {"router"}
    assert "noeviction" in services["redis"]["command"]
    for name in ("prefill", "decode"):
        assert services[name]["command"] == [name]
        assert services[name]["depends_on"] == {"redis": {"condition": "service_healthy"}}
