"""The fairness ledger's facts: what a device was asked in a round, gave, and got.

Plain facts; knows nothing of where they are kept (`ledger`) or what is made of them (`fairness`).
"""

from __future__ import annotations

from dataclasses import dataclass

NOTHING_HEARD = "nothing heard"  # the outcome of a device that was given work and did not report


@dataclass(frozen=True)
class Contribution:
    """What one update gave to a merge.

    weight: p_i, of the round's sum. share: of the merged update; a round's sum to 1, and one that
    pulls the other way has less than 0; None where nothing moved, or moved against all of them.
    alignment: cosine with the merged update; None where either is zero. norm: ||D_i||, Frobenius,
    in weight space, None beyond float32; alignment and norm are estimates for fleets of many rows.
    components: (r,) the share of modules in which the update held each global row, times 255.
    """

    weight: float
    share: float | None
    alignment: float | None
    norm: float | None
    components: bytes


@dataclass(frozen=True)
class LedgerRow:
    """One device in one round. What was not measured is None, never zero.

    Losses are nats per token, lower is better; accuracies are of the next token, in [0, 1]; all on
    the device's own held-out code. Shares and cosines have no unit.
    """

    round: int
    device_id: str
    board: str  # as the device names it; "" if it never sent a profile
    tier: str  # kind of hardware: its name in profiles/boards, else `board`
    language: str  # most of the device's code; "" if nothing was heard
    method: str
    rank: int  # k, rows of the device's slice
    global_rank: int  # r
    ratio: float  # k / r, in (0, 1]
    encoding: str  # of the update: what the device chose, else what was planned
    bits_per_value: float | None  # bits sent per value of the update, values left out among them
    density: float  # share of the update's values that was kept, in (0, 1]
    outcome: str  # of the report, or `NOTHING_HEARD`
    message: str  # why it failed, in words; "" if it did not
    reason: str  # why this k, in words with numbers
    loss_received: float | None = None  # the global adapter, as received
    accuracy_received: float | None = None
    loss_trained: float | None = None  # the device's own after training: Ditto's, else its slice
    accuracy_trained: float | None = None
    # The local-only adapter (same budget, own code alone) as the round began, after all the rounds
    # before it: what `loss_received` is to be compared with. None until it was trained once.
    loss_local: float | None = None
    accuracy_local: float | None = None
    nats: tuple[float, ...] = ()  # summed loss of each held-out example under the global adapter
    tokens: tuple[int, ...] = ()  # predicted tokens of the same examples
    examples: int | None = None  # sequences in the device's training split
    up_bytes: int = 0  # of the update's file, as it arrived
    down_bytes: int | None = None  # of the files fetched
    dense_bytes: int = 0  # of a dense float32 adapter of rank r; 0 if no update arrived
    wait_s: float | None = None  # seconds, as the device measured them; idle before the round
    fetch_s: float | None = None
    train_s: float | None = None
    evaluate_s: float | None = None
    pack_s: float | None = None
    push_s: float | None = None
    joules: float | None = None  # of the whole board in this round, where it can tell
    temperature_c: float | None = None  # the highest during training, °C
    merged: bool = False  # whether the update went into the model, in time or late
    weight: float | None = None  # of the update in its merge; those of a merge sum to 1
    update_share: float | None = None  # of the merged update; a merge's sum to 1, one may be < 0
    alignment: float | None = None  # cosine of the device's update with the merged one, [-1, 1]
    evaluate_only: bool = False  # the round after the last: measured, not trained
    update_norm: float | None = None  # Frobenius, in weight space, of the update times its weight
    components: tuple[float, ...] = ()  # (r,) share of modules in which it trained each global row
    loss_local_trained: float | None = None  # the same after this round: beside `loss_trained`
    accuracy_local_trained: float | None = None
