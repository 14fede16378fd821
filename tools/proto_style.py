"""Checks .proto files against the main rules of Buf's STANDARD category.

    python tools/proto_style.py protos/sketchfleet/v1/fleet.proto

Reads the descriptors of the generated code, which `make proto-check` keeps current. Covers, by
Buf's names: PACKAGE_DIRECTORY_MATCH, PACKAGE_VERSION_SUFFIX, SERVICE_SUFFIX, SERVICE_PASCAL_CASE,
RPC_PASCAL_CASE, RPC_REQUEST_STANDARD_NAME, RPC_RESPONSE_STANDARD_NAME,
RPC_REQUEST_RESPONSE_UNIQUE, ENUM_PASCAL_CASE, ENUM_VALUE_PREFIX, ENUM_ZERO_VALUE_SUFFIX,
ENUM_VALUE_UPPER_SNAKE_CASE, MESSAGE_PASCAL_CASE, FIELD_LOWER_SNAKE_CASE and
ONEOF_LOWER_SNAKE_CASE. `buf lint` with buf.yaml covers these and the rest, wherever buf is
installed.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from google.protobuf import descriptor_pb2 as pb

PASCAL = re.compile(r"[A-Z][A-Za-z0-9]*")
LOWER_SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
UPPER_SNAKE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")
VERSIONED = re.compile(r"[a-z_.]+\.v[0-9]+((alpha|beta)[0-9]*)?")
MODULE_ROOT = "protos/"  # the module path of buf.yaml


def findings(file: pb.FileDescriptorProto) -> Iterator[str]:
    """Each breach of a rule as one sentence; none when the file is clean."""
    folder = str(PurePosixPath(file.name.removeprefix(MODULE_ROOT)).parent)
    if not VERSIONED.fullmatch(file.package):
        yield f"package {file.package} does not end in a version such as .v1"
    if folder != file.package.replace(".", "/"):
        yield f"package {file.package} does not match its folder {folder}"
    for enum in file.enum_type:
        yield from _enum(enum)
    for message in file.message_type:
        yield from _message(message)
    yield from _services(file)


def _services(file: pb.FileDescriptorProto) -> Iterator[str]:
    used: set[str] = set()
    for service in file.service:
        if not (PASCAL.fullmatch(service.name) and service.name.endswith("Service")):
            yield f"service {service.name} is not UpperCamel ending in Service"
        for rpc in service.method:
            if not PASCAL.fullmatch(rpc.name):
                yield f"rpc {rpc.name} is not UpperCamel"
            for kind, full_name in (("Request", rpc.input_type), ("Response", rpc.output_type)):
                name = full_name.rpartition(".")[2]
                allowed = (f"{rpc.name}{kind}", f"{service.name}{rpc.name}{kind}")
                if name not in allowed:
                    yield f"rpc {rpc.name}: {name} should be named {allowed[0]}"
                if full_name in used:
                    yield f"rpc {rpc.name}: {name} already serves another rpc"
                used.add(full_name)


def _message(message: pb.DescriptorProto) -> Iterator[str]:
    if message.options.map_entry:
        return
    if not PASCAL.fullmatch(message.name):
        yield f"message {message.name} is not UpperCamel"
    for field in message.field:
        if not LOWER_SNAKE.fullmatch(field.name):
            yield f"field {message.name}.{field.name} is not lower_snake"
    synthetic = {field.oneof_index for field in message.field if field.proto3_optional}
    for index, oneof in enumerate(message.oneof_decl):
        if index not in synthetic and not LOWER_SNAKE.fullmatch(oneof.name):
            yield f"oneof {message.name}.{oneof.name} is not lower_snake"
    for enum in message.enum_type:
        yield from _enum(enum)
    for nested in message.nested_type:
        yield from _message(nested)


def _enum(enum: pb.EnumDescriptorProto) -> Iterator[str]:
    if not PASCAL.fullmatch(enum.name):
        yield f"enum {enum.name} is not UpperCamel"
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper() + "_"
    for value in enum.value:
        if not (UPPER_SNAKE.fullmatch(value.name) and value.name.startswith(prefix)):
            yield f"enum value {value.name} is not UPPER_SNAKE starting with {prefix}"
        if value.number == 0 and value.name != f"{prefix}UNSPECIFIED":
            yield f"zero value {value.name} should be {prefix}UNSPECIFIED"


def load(path: Path) -> pb.FileDescriptorProto:
    """The descriptor of a .proto file, taken from the generated module beside it."""
    module = ".".join(path.with_name(f"{path.stem}_pb2").parts)
    file = pb.FileDescriptorProto()
    importlib.import_module(module).DESCRIPTOR.CopyToProto(file)
    return file


def main(paths: list[str]) -> int:
    """Prints what is found, one line each; the exit status says whether anything was."""
    found = [f"{path}: {line}" for path in paths for line in findings(load(Path(path)))]
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
