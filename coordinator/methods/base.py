"""What a method is: what devices get, train and send back, and how one module merges.

Declarations say the first (which rows, which factors, what stays at home), so that the loop serves
every method without asking its name; `step` or `merge` says the second. The base class checks
updates, fixes their order and turns weights into shares, so that a method only says what differs.
It does not know files, assignments, or what made the weights.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from coordinator.lowrank import Bundle, LowRankError, Matrix32, Matrix64, Rows, add_rows
from coordinator.server_optimizer import Plain, ServerOptimizer
from profiles.errors import SketchfleetError
from protos.codecs import all_finite
from protos.contract import AdapterSpec, Part, Pruning, RowChoice

Shares = NDArray[np.float64]
Scaling = Literal["common", "sketch", "constant"]
Normalisation = Literal["auto", "none", "ipw", "coverage"]
SKETCHES: tuple[RowChoice, ...] = ("stratified", "independent")
_NORMALISATIONS = ", ".join(get_args(Normalisation))


class MethodError(SketchfleetError):
    """A method cannot merge what it was given."""


class UnknownMethodError(MethodError):
    """No such method, or an option it cannot use."""


class WeightError(MethodError):
    """Weights that do not make a mean."""


class UpdateError(MethodError):
    """An update whose rows, shape or values do not fit the module."""


@dataclass(frozen=True)
class MethodOptions:
    """The keys of [method] and what they depend on; each method takes those it names.

    Raises `UnknownMethodError` on a value that no method could use.
    """

    rank: int  # r of the global adapter
    optimizer: str = "adamw"  # the devices'
    normalisation: Normalisation = "auto"
    sketches: RowChoice = "stratified"
    energy: float = 0.95
    regularisation: float = 0.01
    side_rank: int = 0  # 0: four times `rank`
    density: float = 0.25
    prune_keep: float = 0.99
    prune_penalty: float = 1e-3

    def __post_init__(self) -> None:
        for key, sound, wanted in (
            ("rank", self.rank >= 1, "at least 1"),
            ("normalisation", self.normalisation in get_args(Normalisation), _NORMALISATIONS),
            ("sketches", self.sketches in SKETCHES, " or ".join(SKETCHES)),
            ("energy", 0 < self.energy <= 1, "a share in (0, 1]"),
            ("regularisation", 0 <= self.regularisation < math.inf, "a number of at least 0"),
            ("side_rank", self.side_rank >= 0, "at least 0, where 0 is four times the rank"),
            ("density", 0 < self.density <= 1, "a share in (0, 1]"),
            ("prune_keep", 0 < self.prune_keep < 1, "a share in (0, 1)"),
            ("prune_penalty", 0 <= self.prune_penalty < math.inf, "a number of at least 0"),
        ):
            if not sound:
                raise UnknownMethodError(f"{key} {getattr(self, key)!r} cannot be; use {wanted}")


@dataclass(frozen=True, eq=False)
class ModuleState:
    """One module beyond the frozen base: dW = side + scale * up' core down.

    adapter: up (r, m), down (r, n); side: a frozen branch at scale 1, any rank; core: (r, r)
    float32, absent where it is the identity; moments: of the server optimiser, by part and name.
    A device's slice of a module has the same form with k rows.
    """

    adapter: Bundle
    side: Bundle | None = None
    core: Matrix32 | None = None
    moments: Mapping[Part, Mapping[str, Matrix32]] = field(default_factory=dict)

    @cached_property
    def product(self) -> Bundle:
        """The adapter with its core multiplied into up: what acts beside base and side."""
        if self.core is None:
            return self.adapter
        up = self.core.T.astype(np.float64) @ self.adapter.up.astype(np.float64)
        return Bundle(up.astype(np.float32), self.adapter.down, self.adapter.scale)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What it consists of."""
        return ("up", "down") if self.core is None else ("up", "down", "core")

    def values(self, part: Part) -> Matrix32:
        """up, down or core. Raises `MethodError` where there is no core."""
        if part == "up":
            return self.adapter.up
        if part == "down":
            return self.adapter.down
        if part != "core" or self.core is None:
            raise MethodError(f"this module has no {part}; the method trains another part")
        return self.core

    def moved(self, steps: Mapping[Part, NDArray[Any]], *, reuse: bool = False) -> ModuleState:
        """With steps added, by part; sums of float64 steps are rounded once.

        reuse: the memory of float32 steps becomes that of the sums.
        """
        new = {part: _added(self.values(part), step, reuse) for part, step in steps.items()}
        adapter = Bundle(
            new.get("up", self.adapter.up), new.get("down", self.adapter.down), self.adapter.scale
        )
        return dataclasses.replace(self, adapter=adapter, core=new.get("core", self.core))


@dataclass(frozen=True, eq=False)
class ModuleUpdate:
    """What one device changed in one module.

    rows: (k,) int64, sorted global rows; begin: gives the slice it began with, at its own scale
    s_i, when a method asks for it; delta: trained minus received, for the parts it sent; weight:
    any non-negative number, usually the device's training sequences; lift: s_i / s, what up is
    multiplied by to be a row of the global adapter (1 where slices are not rescaled); on_time: the
    slice was cut from the very model that the update is merged into; sound: whoever reads its
    values looks at their shapes and that they are finite.
    """

    device_id: str
    rows: Rows
    begin: Callable[[], ModuleState]
    delta: Mapping[Part, Matrix32]
    weight: float
    lift: float = 1.0
    on_time: bool = True
    sound: bool = False

    @property
    def k(self) -> int:
        """Rows of the slice."""
        return len(self.rows)

    @property
    def trained(self) -> ModuleState:
        """The slice as the device ended with it, at its own scale.

        Made anew each time: kept for every device, these would be most of a merge's memory.
        """
        return self.begin().moved(self.delta)

    def add_change(self, totals: Mapping[Part, Matrix32 | Matrix64], factor: float) -> None:
        """Adds factor * delta to its rows of the totals of every part that it holds, in place.

        totals: (r, m) of up, (r, n) of down, (r, r) of core.
        """
        pieces = []
        for part, delta in self.delta.items():
            if part == "core":  # the block of its rows and columns
                totals[part][np.ix_(self.rows, self.rows)] += factor * delta.astype(np.float64)
            else:
                pieces.append((totals[part], factor * (self.lift if part == "up" else 1), delta))
        if pieces:
            add_rows(self.rows, *pieces)


class Method(ABC):
    """One published rule. Merges are deterministic and independent of the order given.

    heterogeneous: devices may have different k; else everybody has k = r.
    scaling: of a device's adapter of k rows. "common": alpha / k, the product handed out being
    that of its rows (up is rescaled on the way out and back); "sketch": FSLoRA's r/k on untouched
    rows; "constant": alpha / r on untouched rows.
    rows: which rows a device of k holds.
    personal: parts that never leave a device. fresh: a device's down is drawn anew each round.
    keeps_basis: row j means the same next round, so that moments and residuals may be kept.
    has_global: there is one model that all devices share. complement: the branch beside a device's
    slice is its own: the rows it does not train.
    exact: from whole adapters (k = r), side + product becomes the weighted mean of what the devices
    had beside the base, to float32; at the latest from version 1 on, and while a side branch is
    within its budget. dilutes: rows that few devices hold shrink towards zero even if nobody
    changes them. streams: the merge looks at one update's values at a time, so that each may be
    read when its turn comes and nobody's need be held. stacks: so does this one, but only to copy
    what was trained into a stack that takes the memory which others' values would.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()  # of MethodOptions, those this method takes
    heterogeneous: ClassVar[bool] = True
    scaling: ClassVar[Scaling] = "common"
    personal: ClassVar[tuple[Part, ...]] = ()
    fresh: ClassVar[bool] = False
    keeps_basis: ClassVar[bool] = True
    has_global: ClassVar[bool] = True
    complement: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    dilutes: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    stacks: ClassVar[bool] = False
    rows: RowChoice = "prefix"
    density: float = 1.0  # share of the values that travel, at most
    pruning: Pruning | None = None

    def __init__(self, options: MethodOptions) -> None:  # noqa: B027 - most need nothing
        """Takes what it needs; raises `UnknownMethodError` on a value it cannot use."""

    # --- what devices get, train and send -------------------------------------------------------

    # `version` is of the model that a device starts from: 0 at first, then one more than the last
    # round that merged anything.

    def trained(self, version: int) -> tuple[Part, ...]:
        """What devices train from this version."""
        return ("up", "down")

    def sent(self, version: int) -> tuple[Part, ...]:
        """What devices send back."""
        return tuple(part for part in self.trained(version) if part not in self.personal)

    def files(self, version: int) -> tuple[tuple[Part, ...], ...]:
        """The parts of the adapter after `version` rounds that travel down, file by file.

        Parts that do not change together lie in files of their own: a device fetches no file that
        it still holds.
        """
        return (("up", "down"),)

    def parts(self, version: int) -> tuple[Part, ...]:
        """What the adapter consists of after `version` rounds."""
        return ("up", "down")

    def device_scale(self, spec: AdapterSpec, k: int) -> float:
        """The factor on up'down on a device of k rows."""
        if self.scaling == "common":
            return spec.scale(k)
        whole = spec.scale(spec.rank)
        return whole * (spec.rank / k) if self.scaling == "sketch" else whole

    def cut(self, state: ModuleState, rows: Rows, scale: float) -> ModuleState:
        """What a device gets to train: these rows of the module, at its own scale."""
        part = state.adapter.take(rows)
        if self.scaling == "common":
            part = part.at_scale(scale)
        core = None if state.core is None else state.core[np.ix_(rows, rows)]
        return ModuleState(Bundle(part.up, part.down, scale), core=core)

    def branch(self, state: ModuleState, rows: Rows) -> Bundle | None:
        """The frozen branch beside the base while a device trains these rows, at scale 1."""
        return state.side

    def contribution(self, current: ModuleState, update: ModuleUpdate) -> Bundle:
        """The device's model beyond base and `current.side`: what an exact merge averages."""
        return update.trained.product

    def row_factors(
        self, rank: int, updates: Sequence[ModuleUpdate], shares: Shares
    ) -> list[NDArray[np.float64]]:
        """The factor that each row (k,) of each update is added with."""
        return [np.full(u.k, share) for u, share in zip(updates, shares, strict=True)]

    # --- the merge ------------------------------------------------------------------------------

    def merge_module(
        self,
        current: ModuleState,
        updates: Sequence[ModuleUpdate],
        round_: int = 0,
        optimizer: ServerOptimizer | None = None,
    ) -> ModuleState:
        """The module after a round, the same bits whatever the order given.

        Sums in order of device id; updates of weight zero count for nothing. Raises
        `WeightError`, `UpdateError`.
        """
        ordered = sorted(updates, key=lambda update: update.device_id)
        for update in ordered:
            self._check(current, update)
        shares = normalised([update.weight for update in ordered])
        heard = [i for i, share in enumerate(shares) if share > 0]
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                after = self._merged(
                    current, [ordered[i] for i in heard], shares[heard], round_,
                    optimizer or Plain(),
                )  # fmt: skip
        except (LowRankError, np.linalg.LinAlgError) as error:  # of sums that have overflowed
            raise UpdateError(f"the updates have no finite mean: {error}") from error
        _require_finite(after)
        return after

    @abstractmethod
    def _merged(
        self,
        current: ModuleState,
        updates: Sequence[ModuleUpdate],
        shares: Shares,
        round_: int,
        optimizer: ServerOptimizer,
    ) -> ModuleState:
        """The module after the round; `shares` sum to 1, in the order of `updates`."""

    def _check(self, current: ModuleState, update: ModuleUpdate) -> None:
        rows, rank = update.rows, current.adapter.rank
        who = f"update of {update.device_id}"
        if rows.ndim != 1 or not 1 <= update.k <= rank:
            raise UpdateError(f"{who} names {rows.size} of {rank} rows; derive them by slice_rows")
        if rows[0] < 0 or rows[-1] >= rank or (rows[1:] <= rows[:-1]).any():
            raise UpdateError(f"{who} has rows that repeat or leave 0..{rank - 1}; sort them")
        if not self.heterogeneous and update.k != rank:
            raise UpdateError(
                f"{who} has {update.k} of {rank} rows, {self.name} merges whole adapters only; "
                f"assign k={rank} to every device or choose a method for unequal devices"
            )
        if not update.delta:
            raise UpdateError(f"{who} holds nothing; it must send what the method merges")
        for part in update.delta:
            if part not in current.parts:
                raise UpdateError(
                    f"{who} holds {part}, this module has {', '.join(current.parts)}; leave out "
                    "what was trained for another version"
                )
            if update.sound:
                continue
            delta = update.delta[part]
            expected = (update.k, update.k if part == "core" else current.values(part).shape[1])
            if delta.shape != expected:
                raise UpdateError(
                    f"{who} has {part} of shape {delta.shape}, the slice has {expected}; the "
                    "device trained another module or k"
                )
            if not all_finite(delta):
                raise UpdateError(f"{who} holds NaN or infinite values; screen it out of the round")


class RowMethod(Method):
    """A method that moves the rows of one lasting basis, so that a server optimiser may step."""

    streams: ClassVar[bool] = True

    def _merged(
        self,
        current: ModuleState,
        updates: Sequence[ModuleUpdate],
        shares: Shares,
        round_: int,
        optimizer: ServerOptimizer,
    ) -> ModuleState:
        moments = dict(current.moments)
        steps: dict[Part, NDArray[Any]] = {}
        for part, proposed in self.step(current, updates, shares).items():
            steps[part], kept = optimizer.step(proposed, current.moments.get(part, {}))
            if kept:
                moments[part] = kept
        return dataclasses.replace(current.moved(steps, reuse=True), moments=moments)

    @abstractmethod
    def step(
        self, current: ModuleState, updates: Sequence[ModuleUpdate], shares: Shares
    ) -> dict[Part, Matrix32]:
        """What to add, by part: up (r, m), down (r, n)."""


class WholeMethod(Method):
    """A method whose result is no step in the basis it started from; no server optimiser."""

    keeps_basis: ClassVar[bool] = False

    def _merged(
        self,
        current: ModuleState,
        updates: Sequence[ModuleUpdate],
        shares: Shares,
        round_: int,
        optimizer: ServerOptimizer,
    ) -> ModuleState:
        return self.merge(current, updates, shares, round_)

    @abstractmethod
    def merge(
        self,
        current: ModuleState,
        updates: Sequence[ModuleUpdate],
        shares: Shares,
        round_: int,
    ) -> ModuleState:
        """The module after the round; `shares` sum to 1, in the order of `updates`."""


def normalised(weights: Sequence[float]) -> Shares:
    """Weights (U,) divided by their sum, taken from left to right. Raises `WeightError`."""
    if not weights:
        raise WeightError("there is no update to merge; keep the adapter and open the next round")
    if bad := [w for w in weights if not (math.isfinite(w) and w >= 0)]:
        raise WeightError(f"weight {bad[0]} is negative or not finite; weigh by sequences trained")
    total = left_sum(np.array(weights, dtype=np.float64))
    if not (total > 0 and math.isfinite(total)):
        raise WeightError(
            f"{len(weights)} weights sum to {total}; at least one must be positive and all small "
            f"enough to add"
        )
    return np.array(weights, dtype=np.float64) / total


def left_sum(values: NDArray[np.float64]) -> float:
    """The sum in the order given; NumPy's own adds pairwise, which would give other bits."""
    total = 0.0
    for value in values:
        total += float(value)
    return total


def _added(values: Matrix32, step: NDArray[Any], reuse: bool) -> Matrix32:
    """The sum, rounded once, without a float64 copy of either."""
    mine = reuse and step.dtype == np.float32
    new = step if mine else np.empty(values.shape, dtype=np.float32)
    np.add(values, step, out=new, casting="same_kind")
    return new


def _require_finite(state: ModuleState) -> None:
    arrays = [state.adapter.up, state.adapter.down]
    if state.side is not None:
        arrays += [state.side.up, state.side.down]
    if state.core is not None:
        arrays.append(state.core)
    if not all(map(all_finite, arrays)):
        raise UpdateError(
            "the merged module is not finite; an update holds NaN, infinite or far too large "
            "values, leave it out"
        )
