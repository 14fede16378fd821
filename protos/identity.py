"""What both ends of enrolment must agree on beside the messages."""

from __future__ import annotations

REENROL_LABEL = b"sketchfleet re-enrol\n"
"""Stands before what a device signs with an old key, so that no other signature can pass for it."""
BACKDATED_S = 300.0
"""A certificate begins so long before it was made: clocks of devices may be that far behind."""
