"""Commands of the coordinator about who belongs: init, token, devices, approve, revoke, rotate-ca.

They work on the state folder, whether a coordinator serves from it or not; one that does heeds them
at the next message or handshake.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiles.errors import SketchfleetError
from profiles.program import at_least

if TYPE_CHECKING:
    from coordinator.authority import Authority
    from coordinator.enrolment import Enrolment
    from coordinator.store.records import Records

ENROLMENT_PORT = 8471
TRUST_DOMAIN = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0}


class CommandError(SketchfleetError):
    """A command cannot do what it was asked for."""


def add_commands(commands: Any, kept: argparse.ArgumentParser, as_json: Any) -> None:
    """Registers them. kept, as_json: parents with --state and --json."""
    init = commands.add_parser("init", parents=[kept], help="make the certificate authority")
    init.add_argument(
        "--name", action="append", metavar="HOST|ADDRESS",
        help="a name or address that devices reach the coordinator by; may be given again "
        "(default: this host's name and loopback)",
    )  # fmt: skip
    init.add_argument(
        "--trust-domain", default="sketchfleet", metavar="NAME",
        help="of device identities, spiffe://NAME/device/… (default: sketchfleet)",
    )  # fmt: skip
    _passphrase(init)
    init.set_defaults(perform=_init)

    token = commands.add_parser("token", help="create, list or revoke join tokens")
    actions = token.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", parents=[kept, as_json], help="make a join token")
    create.add_argument("--name", metavar="DEVICE", help="only a device of this name may use it")
    create.add_argument("--ttl", type=_duration, default=86400.0, metavar="TIME",
                        help="how long it may be used: 30m, 24h, 7d (default: 24h)")  # fmt: skip
    create.add_argument("--uses", type=at_least(1), default=1, metavar="N",
                        help="how many devices may join with it (default: 1)")  # fmt: skip
    create.add_argument("--address", metavar="HOST:PORT",
                        help="of the enrolment listener as devices reach it (default: the first "
                        f"name of `init`, port {ENROLMENT_PORT})")  # fmt: skip
    create.add_argument("--out", type=Path, metavar="FILE", help="write a join file (mode 0600)")
    create.set_defaults(perform=_create)
    listed = actions.add_parser("list", parents=[kept, as_json], help="tokens, never their secrets")
    listed.set_defaults(perform=_tokens)
    ended = actions.add_parser("revoke", parents=[kept], help="end a token")
    ended.add_argument("token_id", metavar="ID", help="of `token list`")
    ended.set_defaults(perform=_revoke_token)

    for name, run, text in (
        ("approve", _approve, "let a device in that awaits approval"),
        ("revoke", _revoke, "shut a device out, from its next message on"),
    ):
        command = commands.add_parser(name, parents=[kept], help=text)
        command.add_argument("device", metavar="NAME")
        command.set_defaults(perform=run)

    rotate = commands.add_parser(
        "rotate-ca", parents=[kept], help="replace the certificate authority; nobody enrols again"
    )
    what = rotate.add_mutually_exclusive_group()
    what.add_argument("--issuer", action="store_true",
                      help="replace only the issuer below the root")  # fmt: skip
    what.add_argument(
        "--finish", action="store_true",
        help="trust the newest root alone, once every device has renewed",
    )  # fmt: skip
    rotate.add_argument("--force", action="store_true",
                        help="finish although devices have not renewed; they enrol again by the "
                        "proof of their keys")  # fmt: skip
    _passphrase(rotate)
    rotate.set_defaults(perform=_rotate)


def standing(records: Records) -> dict[str, dict[str, Any]]:
    """Of each member: `state`, `certificate_ends_at` (Unix s) and the authority's `generation`."""
    from coordinator.store.members import Members

    members = Members(records)
    try:
        return {
            m.device_id: {"state": m.state, "certificate_ends_at": m.certificate_ends_at,
                          "generation": m.generation}
            for m in members.all_members()
        }  # fmt: skip
    finally:
        members.close()


def standing_words(known: dict[str, Any] | None, now: float) -> str:
    """The same for a table."""
    if known is None:
        return "plain text"
    ends_at = known["certificate_ends_at"]
    if known["state"] != "active" or ends_at is None:
        return str(known["state"])
    left_s = ends_at - now
    when = f"{left_s / 86400:.1f} days left" if left_s > 0 else "expired"
    return f"{known['state']}, {when} ({known['generation']})"


def _passphrase(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--passphrase-file", type=Path, metavar="FILE",
        help="holds the passphrase of the root's key (default: it has none)",
    )  # fmt: skip


def _duration(text: str) -> float:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([mhd])", text)
    if found is None or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 30m, 24h or 7d")
    return float(found[1]) * _UNITS[found[2]]


def _secret(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        secret = path.read_bytes().rstrip(b"\n")
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from error
    if not secret:
        raise CommandError(f"{path} is empty; it must hold the passphrase")
    return secret


@contextmanager
def _enrolment(state: Path) -> Iterator[Enrolment]:
    from coordinator.authority import Authority
    from coordinator.enrolment import Enrolment
    from coordinator.listeners import AUTHORITY
    from coordinator.serve import open_state
    from coordinator.store.members import Members

    authority = Authority(state / AUTHORITY)
    records, _ = open_state(state)
    members = Members(records)
    try:
        yield Enrolment(authority, members, lifetime_s=0.0)
    finally:
        members.close()
        records.close()


def _init(args: argparse.Namespace) -> int:
    from coordinator.authority import Authority, write_settings
    from coordinator.listeners import AUTHORITY

    names = args.name or list(
        dict.fromkeys((socket.getfqdn(), socket.gethostname(), "localhost", "127.0.0.1", "::1"))
    )
    if not TRUST_DOMAIN.fullmatch(args.trust_domain):
        raise CommandError(f"{args.trust_domain!r} is no trust domain; use lower-case letters, "
                           "digits, dots and dashes")  # fmt: skip
    folder = args.state / AUTHORITY
    if (folder / "current").exists():
        authority = Authority(folder)
        write_settings(folder, names, authority.trust_domain)
        print(f"{folder}: the authority stays; the coordinator is now {', '.join(names)}, from its "
              "next start on")  # fmt: skip
        return 0
    authority = Authority.create(folder, names, args.trust_domain, _secret(args.passphrase_file))
    from protos.invitation import pin_of

    print(f"{folder}: certificate authority sha256:{pin_of(authority.trust)}")
    print(f"for a coordinator that is reached as {', '.join(names)}")
    print("Its keys are as good as the fleet: back the folder up, and show it to nobody.")
    return 0


def _create(args: argparse.Namespace) -> int:
    from protos.invitation import Invitation, InvitationError, pin_of
    from protos.transfer import write_durably

    with _enrolment(args.state) as enrolment:
        authority = enrolment.authority
        address = args.address or _default_address(authority)
        pin, trust = pin_of(authority.trust), authority.trust
        token = enrolment.create_token(name=args.name, ttl_s=args.ttl, uses=args.uses)
    invitation = Invitation(token, address, pin, trust)
    if args.out is not None:
        try:
            write_durably(args.out, invitation.to_json().encode(), mode=0o600)
        except OSError as error:
            raise InvitationError(f"{args.out} cannot be written: {error.strerror}") from error
    if args.json:
        print(json.dumps({
            "id": token.get_secret_value().partition(".")[0], "device": args.name,
            "uses": args.uses, "expires_in_s": args.ttl, "address": address, "pin": pin,
            "file": None if args.out is None else str(args.out), "word": invitation.short_form,
        }, indent=2))  # fmt: skip
        return 0
    if args.out is not None:
        print(args.out)
    print(invitation.short_form)
    return 0


def _default_address(authority: Authority) -> str:
    name = authority.names[0]
    return f"[{name}]:{ENROLMENT_PORT}" if ":" in name else f"{name}:{ENROLMENT_PORT}"


def _tokens(args: argparse.Namespace) -> int:
    with _enrolment(args.state) as enrolment:
        found = enrolment.members.all_tokens()
    now = time.time()
    plain = [
        {"id": t.token_id, "device": t.device_name, "uses_left": t.uses_left, "uses": t.uses,
         "expires_in_s": round(t.expires_at - now),
         "state": "revoked" if t.revoked_at is not None else "expired" if t.expires_at <= now
         else "good" if t.uses_left else "used up"}
        for t in found
    ]  # fmt: skip
    if args.json:
        print(json.dumps(plain, indent=2))
        return 0
    from coordinator.tables import print_table

    print_table(
        ("id", "for device", "uses left", "expires in", "state"),
        [[str(t["id"]), str(t["device"] or "any"), f"{t['uses_left']} of {t['uses']}",
          f"{max(0.0, float(str(t['expires_in_s']))) / 3600:.1f} h", str(t["state"])]
         for t in plain],
        "no token was made yet",
    )  # fmt: skip
    return 0


def _revoke_token(args: argparse.Namespace) -> int:
    with _enrolment(args.state) as enrolment:
        if not enrolment.revoke_token(args.token_id):
            raise CommandError(f"there is no token {args.token_id!r} to revoke; see `token list`")
    print(f"token {args.token_id} is revoked; devices that joined with it stay")
    return 0


def _approve(args: argparse.Namespace) -> int:
    return _change(args, lambda enrolment: enrolment.approve(args.device), "is approved")


def _revoke(args: argparse.Namespace) -> int:
    return _change(args, lambda enrolment: enrolment.revoke(args.device), "is revoked")


def _change(args: argparse.Namespace, change: Callable[[Enrolment], bool], done: str) -> int:
    with _enrolment(args.state) as enrolment:
        if not change(enrolment):
            raise CommandError(
                f"no device {args.device!r} has joined with a certificate; see "
                "`sketchfleet-coordinator devices`"
            )
    print(f"{args.device} {done}")
    return 0


def _rotate(args: argparse.Namespace) -> int:
    with _enrolment(args.state) as enrolment:
        authority = enrolment.authority
        if args.finish:
            _finish(enrolment, args.force)
        elif args.issuer:
            authority.replace_issuer(_secret(args.passphrase_file))
            enrolment.note_rotation("issuer")
            print("the issuer is replaced; the coordinator shows it at the next handshake")
        else:
            authority.rotate(_secret(args.passphrase_file))
            enrolment.note_rotation("root")
            print("the root is replaced; devices hear of it at their next poll and renew by "
                  "themselves.\nWhen `sketchfleet-coordinator devices` shows no old certificate: "
                  "sketchfleet-coordinator rotate-ca --finish")  # fmt: skip
    return 0


def _finish(enrolment: Enrolment, force: bool) -> None:
    authority = enrolment.authority
    if not authority.rotating:
        raise CommandError("no rotation is going on; `rotate-ca` begins one")
    late = enrolment.behind()
    if late and not force:
        raise CommandError(
            f"{len(late)} devices have not renewed since: {', '.join(late[:8])}; wait for them, or "
            "finish with --force"
        )
    authority.finish()
    enrolment.note_rotation("finished")
    print("only the newest root is trusted now; the old keys are destroyed", file=sys.stdout)
