"""How this device reaches its coordinator: what [coordinator] and the state folder say together."""

from __future__ import annotations

import json

from edge_agent.bearer import BearerMembership
from edge_agent.certified import CertifiedMembership, OwnPkiMembership, own_credentials
from edge_agent.config import AgentConfig
from edge_agent.identity import Identity
from edge_agent.link import Link
from edge_agent.membership import Membership, MembershipError
from edge_agent.pace import Pace


def identity_of(config: AgentConfig) -> Identity:
    """Where this device keeps its key and certificate."""
    return Identity(config.state.folder / "identity")


def address_of(config: AgentConfig) -> str:
    """Of the coordinator. Raises `MembershipError` before the device has joined."""
    given = config.coordinator
    if given.address:
        return given.address
    if given.plain_text:
        return "127.0.0.1:8470"
    return _joined(config).fleet["address"]


def has_joined(config: AgentConfig) -> bool:
    """Whether this device holds what it shows who it is by."""
    given = config.coordinator
    if given.plain_text:
        return (config.state.folder / "credential.json").is_file()
    return given.own_pki is not None or identity_of(config).exists


def open_link(config: AgentConfig, pace: Pace | None = None) -> Link:
    """A link that is not yet dialled. Raises `MembershipError`, `IdentityError`."""
    given, address = config.coordinator, address_of(config)
    if given.plain_text:
        link = Link(address, pace)
        link.credential = _kept_credential(config)
        return link
    if given.own_pki is not None:
        return Link(address, pace, own_credentials(*given.own_pki))
    return Link(address, pace, _joined(config).credentials)


def membership(config: AgentConfig, link: Link, version: str) -> Membership:
    """Makes calls over that link."""
    given = config.coordinator
    if given.plain_text:
        return BearerMembership(config, link, version)
    if given.own_pki is not None:
        return OwnPkiMembership(link, given.own_pki)
    return CertifiedMembership(_joined(config), link)


def _joined(config: AgentConfig) -> Identity:
    identity = identity_of(config)
    if not identity.exists:
        raise MembershipError(
            "this device has not joined a fleet yet; ask the operator for a join file and run "
            "`sketchfleet-agent enroll FILE`"
        )
    if (name := identity.fleet["device"]) != config.device.name:
        raise MembershipError(
            f"this device joined as {name!r}, but [device] name is {config.device.name!r}; change "
            "it back, or choose another [state] folder and enrol anew"
        )
    return identity


def _kept_credential(config: AgentConfig) -> str:
    """Of a plain-text fleet; empty where there is none that can be read."""
    try:
        kept = (config.state.folder / "credential.json").read_text()
        return str(json.loads(kept)["credential"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
