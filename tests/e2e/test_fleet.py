import pytest

pytestmark = pytest.mark.e2e


def test_probe(first_run, plans):
    print(first_run.seconds)
    for r in first_run.rounds:
        print(r)
    for a in first_run.assignments:
        print(a.assignment.round, a.assignment.device_id, a.assignment.rank, a.assignment.local_steps, a.assignment.reason, a.update_bytes, a.received_at)
        print(a.report)
    print(plans)
