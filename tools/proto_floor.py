"""Runs the generated wire code at the oldest protobuf and grpcio that pyproject.toml admits.

Started by `make proto-check` in an environment that holds exactly those versions and nothing
else of the project; the main environment runs the same code at the newest ones.
"""

from __future__ import annotations

import sys

import google.protobuf
import grpc

from protos.sketchfleet.v1 import fleet_pb2, fleet_pb2_grpc


def main() -> int:
    """Imports, round-trips one message with every kind of field, and builds each stub."""
    sent = fleet_pb2.NextTaskResponse(
        kind=fleet_pb2.NextTaskResponse.KIND_ASSIGNMENT,
        remaining_s=12.5,
        spec=fleet_pb2.AdapterSpec(
            run_id="run",
            seed=2**63,
            modules=[fleet_pb2.ModuleShape(name="q_proj", out_features=64, in_features=64)],
        ),
        assignment=fleet_pb2.Assignment(
            round=3, checkpointing=True, slice=[fleet_pb2.BlobRef(digest="d", size_bytes=2**40)]
        ),
    )
    received = fleet_pb2.NextTaskResponse.FromString(sent.SerializeToString(deterministic=True))
    if received != sent or received.assignment.HasField("global_side"):
        print("a message did not survive its round trip", file=sys.stderr)
        return 1
    with grpc.insecure_channel("127.0.0.1:9") as channel:  # never connected
        for name in fleet_pb2.DESCRIPTOR.services_by_name:
            getattr(fleet_pb2_grpc, f"{name}Stub")(channel)
    print(f"wire code runs on protobuf {google.protobuf.__version__}, grpcio {grpc.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
