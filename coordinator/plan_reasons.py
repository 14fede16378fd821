"""Why a device is asked for what it is asked for, in a sentence with numbers.

Says which constraint binds, and what the next larger part would need. Words only: every figure
comes from the device's `Search`.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.plan_search import Choice, Search
from coordinator.plan_types import Level, PlanPolicy
from profiles.cost import ASSUMED_LINK, Cost, LocalWork


def reason(
    search: Search, choice: Choice, round_s: float, policy: PlanPolicy, *, stays: bool
) -> str:
    """The sentence of one device's plan."""
    work, level = choice.work, choice.offer.level
    why = _why(search, choice, round_s)
    if policy.aim != "fastest":
        wish = {"fairest": "as much as everybody", "cheapest": "the fewest bytes that cover"}
        why = f"{wish[policy.aim]}; {why}"
    parts = [f"k={_named(level)}: {why}", *_concessions(search, policy, work, choice)]
    if stays:
        parts.append("as in the round before, no change is clear enough")
    return "; ".join(parts)


def _why(search: Search, choice: Choice, round_s: float) -> str:
    """What binds k."""
    policy, work, level = search.policy, choice.work, choice.offer.level
    cost, peak = search.cost(work), search.peak_bytes(work)
    top = policy.levels[-1]
    if level == top or not policy.local_steps:
        whole = "the whole rank fits" if level.rank == policy.rank else "no more rows are wanted"
        return (
            f"{whole}; the round takes {_s(cost.total_s)} of {_s(round_s)} "
            f"({_s(cost.p90_s)} in nine of ten), memory {_gb(peak)} of {_gb(search.memory_bytes)}"
        )
    next_level = policy.levels[min(policy.levels.index(level) + 1, len(policy.levels) - 1)]
    share = policy.share(next_level)
    link = search.profile.link
    if share > search.most_share + 1e-9:
        return (
            f"the link is metered, so {search.most_share:.0%} of the rank at most is sent "
            f"({_mb(choice.offer.moved_bytes)} both ways)"
        )
    limit = search.terms.size_bytes
    if limit is not None and (least := search.sizes.least_update_bytes(next_level)) > limit:
        return (
            f"an update may have {_kb(limit)}, one of k={_named(next_level)} takes {_kb(least)} at "
            "least"
        )
    if choice.offer.fit is not None and search.could(next_level, choice, round_s):
        return (
            f"of the {_kb(choice.offer.budget_bytes)} that an update may have, k="
            f"{_named(next_level)} in the same bytes would lose more"
        )
    if level == search.largest_in_memory:
        return (
            f"memory of {_gb(search.memory_bytes)} allows no more at {work.precision} (this k "
            f"needs {_gb(peak)}, k={_named(next_level)} "
            f"{_gb(search.peak_bytes(_at(search, choice, next_level)))}); the {_s(round_s)} round "
            f"would allow {_named(_allowed(search, round_s))}"
        )
    more = _at(search, choice, next_level)
    needs = search.cost(more)
    moved = needs.up_bytes + needs.down_bytes
    budget = search.budget_bytes
    if budget is not None and moved > budget and link is not None:
        assert link.budget_bytes is not None
        return (
            f"{_mb(choice.offer.moved_bytes)} both ways of the {_mb(budget)} that the owner's "
            f"budget of {_mb(link.budget_bytes)} leaves to this round; k={_named(next_level)} "
            f"would take {_mb(moved)}"
        )
    return (
        f"{_time_bound(search, cost, round_s)}; k={_named(next_level)} would take "
        f"{_s(needs.p90_s)} in nine rounds of ten; memory would allow "
        f"{_named(search.largest_in_memory)}"
    )


def _at(search: Search, choice: Choice, level: Level) -> LocalWork:
    """The chosen settings at another level."""
    chosen = choice.work
    work = search.sizes.work(
        chosen.precision, chosen.sequence_tokens, choice.offer.encoding, level,
        evaluates=chosen.evaluates_global, steps=chosen.local_steps,
    )  # fmt: skip
    return replace(
        work,
        micro_batch=chosen.micro_batch,
        accumulation=chosen.accumulation,
        checkpointing=chosen.checkpointing,
    )


def _allowed(search: Search, round_s: float) -> Level:
    """The largest level that the round would allow, were memory no matter."""
    roomy = replace(search.profile, memory_available_bytes=2**60, memory_cap_bytes=None)
    if roomy.gpu is not None:
        roomy = replace(roomy, gpu=replace(roomy.gpu, memory_free_bytes=2**60))
    free = Search(
        search.shape, search.sizes, search.device_id, roomy, search.correction, search.terms
    )
    found = free.best(round_s)
    return search.policy.levels[0] if found is None else found.offer.level


def does_not_fit(search: Search) -> str:
    """Why a device cannot be given anything: memory, or the bytes its owner allows."""
    policy = search.policy
    if search.lacks_bytes:
        return _lacks_bytes(search)
    if search.fits_memory:
        link = search.profile.link
        left = link.budget_bytes if link is not None and link.budget_bytes is not None else 0
        return (
            f"{search.device_id} may move {_mb(left)} more today, the least part takes "
            f"{_mb(_least_bytes(search))}; it takes part again when its daily budget is renewed, "
            "or raise [network] daily_mb of its agent.toml"
        )
    level = policy.levels[0]
    work = search.sizes.work(
        policy.precisions[-1], policy.sequences[-1], policy.encodings[-1], level,
        evaluates=policy.measuring[-1],
    )  # fmt: skip
    least = min(search.sizes.variants(work), key=search.peak_bytes)
    trusted = f" ({search.correction.note})" if search.correction.memory_share < 1 else ""
    return (
        f"{search.device_id} does not fit: needs {_gb(search.peak_bytes(least))} at "
        f"{least.precision} and rank {least.rank}, the device has "
        f"{_gb(search.memory_bytes)}{trusted}; use a smaller base or a lower precision"
    )


def _lacks_bytes(search: Search) -> str:
    """Why a byte budget leaves a device nothing to send."""
    policy = search.policy
    remedy = "[wire] error_feedback = true allows to leave values out"
    if policy.feeds_back:
        remedy = "fewer [round] min_rank rows take less"
    return (
        f"{search.device_id} may send {search.terms.size_bytes:,} bytes in this round, the least "
        f"update of {policy.levels[0].rank} rows takes "
        f"{search.sizes.least_update_bytes(policy.levels[0]):,}: raise [plan] bytes_per_round or "
        f"bytes_per_day; {remedy}"
    )


def _least_bytes(search: Search) -> int:
    policy = search.policy
    works = (
        search.sizes.work(policy.precisions[-1], policy.sequences[-1], encoding, policy.levels[0],
                          evaluates=policy.measuring[-1])
        for encoding in policy.encodings
    )  # fmt: skip
    costs = [search.cost(work) for work in works]
    return min(cost.up_bytes + cost.down_bytes for cost in costs)


def too_slow(search: Search, round_s: float) -> str:
    """Why a device is not in a round of this length."""
    offer = min(search.offers, key=lambda o: o.p90_s(search.least_steps))
    work = replace(offer.work, local_steps=search.least_steps)
    cost = search.cost(work)
    return (
        f"{search.device_id} is too slow: rank {work.rank} and {_count(work.local_steps, 'step')} "
        f"need {_s(cost.p90_s)} in nine rounds of ten (fetch {_s(cost.fetch_s)}, train "
        f"{_s(cost.train_s)}, evaluate {_s(cost.evaluate_s)}, send {_s(cost.push_s)} on average), "
        f"the round is {_s(round_s)}; allow longer rounds or fewer tokens per step"
    )


def _time_bound(search: Search, cost: Cost, round_s: float) -> str:
    link = search.profile.link or ASSUMED_LINK
    assumed = "" if search.profile.link else " (assumed, not measured)"
    local_s = cost.load_s + cost.train_s + cost.evaluate_s
    moving_s = cost.push_s + cost.fetch_s
    if local_s > moving_s:
        return (
            f"training and evaluating take {_s(local_s)} of a {_s(round_s)} round, moving "
            f"{_mb(cost.up_bytes + cost.down_bytes)} takes {_s(moving_s)}"
        )
    return (
        f"sending {_mb(cost.up_bytes)} at {link.up_bps / 1e6:.3g} Mbit/s and fetching "
        f"{_mb(cost.down_bytes)} at {link.down_bps / 1e6:.3g} Mbit/s{assumed} take {_s(moving_s)} "
        f"of the {_s(round_s - local_s)} left of a {_s(round_s)} round"
    )


def _concessions(search: Search, policy: PlanPolicy, work: LocalWork, choice: Choice) -> list[str]:
    """What was given up, and for what."""
    made = []
    if policy.precision == "auto" and len(policy.precisions) > 1:
        made.append(f"{work.precision} base")
    if policy.sequence_tokens == "auto" and work.sequence_tokens < policy.sequences[0]:
        made.append(f"rows of {work.sequence_tokens} tokens instead of {policy.sequences[0]}")
    if choice.offer.fit is not None:
        made.append(_update(choice))
    elif policy.update_encoding == "auto":
        made.append(f"updates in {choice.offer.encoding}")
    if work.checkpointing and policy.checkpointing == "auto":
        made.append("checkpointing on to save memory")
    wanted = policy.micro_batch * policy.sequences[0] // work.sequence_tokens
    if work.micro_batch < wanted:
        made.append(f"micro-batch {work.micro_batch} instead of {wanted} for memory")
    if work.local_steps < policy.local_steps:
        most = search.most_steps
        why = "for time" if work.local_steps < most else search.correction.note or "for time"
        made.append(f"{_count(work.local_steps, 'step')} of {policy.local_steps} {why}")
    if search.correction.memory_share < 1:
        made.append(search.correction.note)
    if work.local_only:
        made.append("half of the training is for an adapter of its own, to compare with")
    if policy.evaluates_global and not work.evaluates_global:
        made.append("the whole adapter is not evaluated, it would not fit")
    return list(dict.fromkeys(made))


def _update(choice: Choice) -> str:
    """What a byte budget makes of the update."""
    offer = choice.offer
    assert offer.fit is not None
    payload = offer.fit.payload
    how = f"{payload.encoding} in groups of {payload.group}" if payload.group else payload.encoding
    if payload.density < 1:
        how += f", the largest {payload.density:.2g} of its values"
    return (
        f"update as {how}: {_kb(offer.fit.size_bytes)} of {_kb(offer.budget_bytes)}, expected "
        f"error {offer.error:.2f}"
    )


def _kb(size_bytes: float) -> str:
    return f"{size_bytes / 1e3:.3g} kB" if size_bytes < 999_500 else _mb(size_bytes)


def _named(level: Level) -> str:
    return f"{level.rank}" if level.density == 1 else f"{level.rank} at {level.density:.3g}"


def _s(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.3g} MB"


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e9:.2f} GB"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
