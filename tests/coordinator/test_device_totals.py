"""What a device gave to a run and got is what its rounds add up to."""

from typing import Any

from coordinator.device_totals import device_totals
from coordinator.ledger_types import NOTHING_HEARD, LedgerRow


def row(device: str, round_: int, received: float | None = None, **changes: Any) -> LedgerRow:
    plain: dict[str, Any] = {
        "board": "pi", "tier": "pi", "language": "go", "method": "fslora", "rank": 4,
        "global_rank": 16, "ratio": 0.25, "encoding": "int8", "bits_per_value": 8.0,
        "density": 1.0, "outcome": "done", "message": "", "reason": "why", "up_bytes": 10,
        "dense_bytes": 100, "fetch_s": 1.0, "train_s": 2.0, "evaluate_s": 3.0, "push_s": 4.0,
        "wait_s": 50.0, "update_share": 0.5,
    }  # fmt: skip
    return LedgerRow(
        round=round_, device_id=device, loss_received=received, loss_trained=9.0,
        **(plain | changes),
    )  # fmt: skip


def test_they_tell_of_the_whole_adapter_and_never_of_the_slice() -> None:
    end = {"update_share": None, "up_bytes": 0, "dense_bytes": 0, "evaluate_only": True}
    a, b, c = device_totals([
        row("b", 0, 3.0), row("b", 1), row("b", 2, 2.0, **end),
        row("a", 0, 2.0), row("a", 2, 1.0, rank=16, ratio=1.0, **end),
        row("c", 1), row("d", 0, outcome=NOTHING_HEARD),
    ])  # fmt: skip
    assert (a.device_id, b.device_id, c.device_id) == ("a", "b", "c")
    assert (b.loss_before, b.loss_after, b.gap) == (3.0, 2.0, 0.5)
    assert (a.loss_before, a.loss_after, a.gap) == (2.0, 1.0, -0.5)
    assert (c.loss_before, c.loss_after, c.gap) == (None, None, None)
    assert (b.rounds_joined, a.rounds_joined) == (2, 1)
    assert (b.update_share, a.update_share) == (0.5, 0.25)
    assert (a.k, a.ratio, a.language) == (4, 0.25, "go")
    assert (b.up_bytes, b.dense_bytes, b.compression, b.seconds) == (20, 200, 10.0, 30.0)


def test_the_local_only_adapter_is_that_of_the_last_measurement() -> None:
    (found,) = device_totals([
        row("a", 0, 3.0), row("a", 1, 2.0, loss_local=2.5), row("a", 2, loss_local=2.2),
        row("a", 3, 1.5, loss_local=2.0, evaluate_only=True),
    ])  # fmt: skip
    assert (found.loss_after, found.loss_local) == (1.5, 2.0)


def test_measured_once_there_is_no_loss_after() -> None:
    (found,) = device_totals([row("a", 0, 2.0)])
    assert (found.loss_before, found.loss_after) == (2.0, None)


def test_a_failed_round_is_not_joined() -> None:
    (found,) = device_totals([row("a", 0), row("a", 1, outcome="out_of_memory")])
    assert found.rounds_joined == 1
