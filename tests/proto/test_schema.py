"""The generated module is the schema's, and loads with every protobuf runtime that the package allows."""

from __future__ import annotations

import importlib.resources
import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

import proto
from proto.gen import tandem_pb2 as pb

FOLDER = Path(proto.__file__).parent


def forget_json_names(message: descriptor_pb2.DescriptorProto) -> None:
    """They follow from the fields' names, and not every generator writes them down."""
    for field in message.field:
        field.ClearField("json_name")
    for nested in message.nested_type:
        forget_json_names(nested)


def test_the_generated_module_is_up_to_date(tmp_path: Path) -> None:
    """Compares descriptors, so it does not matter which version of the generator is installed here."""
    pytest.importorskip("grpc_tools")
    out = tmp_path / "tandem.binpb"
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc"),
            *(f"--proto_path={FOLDER}", f"--descriptor_set_out={out}", "tandem.proto"),
        ],
        check=True,
    )
    (schema,) = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    generated = descriptor_pb2.FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    for file in (schema, generated):
        for message in file.message_type:
            forget_json_names(message)
    assert schema == generated, "run scripts/gen-proto"


def test_the_generated_code_accepts_the_oldest_runtime_we_allow() -> None:
    pyproject = FOLDER.parent / "pyproject.toml"
    allowed = re.search(r'"protobuf>=(\d+)\.(\d+)', pyproject.read_text())
    source = (FOLDER / "gen" / "tandem_pb2.py").read_text()
    made_by = re.search(r"Protobuf Python Version: (\d+)\.(\d+)", source)
    assert allowed
    assert made_by
    assert tuple(map(int, made_by.groups())) <= tuple(map(int, allowed.groups()))


def test_the_schema_is_shipped_with_the_package() -> None:
    assert importlib.resources.files("proto").joinpath("tandem.proto").is_file()


def test_proto_is_ours_and_not_another_package_of_that_name() -> None:
    assert Path(__file__).parents[2] == FOLDER.parent
