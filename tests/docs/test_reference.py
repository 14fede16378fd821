"""The reference pages are what the code says today, and leave nothing out."""

from __future__ import annotations

import argparse

import pytest

from protos.sketchfleet.v1 import fleet_pb2
from tools import reference


@pytest.mark.parametrize("path", sorted(reference.pages()), ids=lambda p: p.name)
def test_a_reference_page_is_current(path):
    assert path.read_text() == reference.pages()[path], "run: python -m tools.reference"


def test_every_option_of_every_command_is_on_the_page():
    page = reference.cli_page()
    for make in reference.PARSERS:
        for command, _ in reference.commands(make()):
            start = page.index(f"### {command.prog}\n")
            section = page[start : page.find("\n### ", start)]
            for action in command._actions:
                if not isinstance(action, argparse._HelpAction) and action.help != "==SUPPRESS==":
                    assert all(f"{o}" in section for o in action.option_strings), command.prog


def test_every_message_and_call_is_on_the_page_with_its_comment():
    page, said = reference.protobuf_page(), reference.comments(reference.PROTO.read_text())
    names = {f"{service.name}.{method.name}"
             for service in fleet_pb2.DESCRIPTOR.services_by_name.values()
             for method in service.methods}  # fmt: skip
    assert names <= set(said), "every call says what it does"
    assert all(text in page for name, text in said.items())
    assert all(f"### {name}\n" in page for name in fleet_pb2.DESCRIPTOR.message_types_by_name)


def test_comments_belong_to_what_follows_them():
    said = reference.comments(
        "// A thing.\nmessage Thing {\n  // How\n  // many.\n  int32 count = 1;\n  bool odd = 2;\n"
        "  // Of what kind.\n  enum Kind {\n    KIND_UNSPECIFIED = 0;\n    // The first.\n"
        "    KIND_ONE = 1;\n  }\n}\n"
    )
    assert said == {
        "Thing": "A thing.", "Thing.count": "How many.", "Thing.Kind": "Of what kind.",
        "Thing.Kind.KIND_ONE": "The first.",
    }  # fmt: skip
