"""`study rank-shift`: its runs, one that is played, and what is concluded from planted effects."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from coordinator.document import markdown
from tests.tiny_base import write_encoder
from trials.study.command import write_report
from trials.study.engine import write_whole
from trials.study.rank_shift import (
    ShiftPlayer,
    ShiftRecord,
    facts_of,
    play_rank_shift,
    runs_of,
)
from trials.study.rank_shift_analysis import analyse
from trials.study.rank_shift_report import conclude
from trials.study.rank_shift_settings import RankShiftSettings, load_rank_shift
from trials.study.settings import SHIPPED, StudyError

LABELS = ("entailment", "not_entailment")
LEARNING = {
    "targets": ["query", "value"], "sequence_tokens": 32, "micro_batch": 4, "local_steps": 2,
    "learning_rate": 1e-2, "rounds": 2, "held_out_sequences": 8,
}  # fmt: skip


def settings_of(base: str = "", **design) -> RankShiftSettings:
    facts = {
        "seeds": [1, 2, 3, 4, 5], "examples": 10, "alphas": [0.1, 100.0],
        "methods": ["fslora", "fedit"],
        "ranks": {"uniform": [4, 4, 4], "steep": [8, 2, 2]},
    }  # fmt: skip
    return RankShiftSettings.model_validate({
        "study": "rank-shift",
        "task": {"kind": "classification", "base": base, "labels": LABELS,
                 "train": ["train.tsv"], "held_out": ["dev.tsv"]},
        "learning": LEARNING,
        "design": facts | design,
        "analysis": {"replicates": 400},
    })  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 80), ("dev", 24)):
        rows = [f"{i}\tpair {name} {i}\t{'yes' if i % 2 else 'no'} {i}\t{LABELS[i % 2]}"
                for i in range(count)]  # fmt: skip
        (folder / f"{name}.tsv").write_text(
            "\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n"
        )
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> RankShiftSettings:
    return settings_of(str(write_encoder(tmp_path_factory.mktemp("base"))))


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("rank_shift*.toml")), ids=lambda p: p.stem)
def test_shipped_studies_compare_ranks_of_the_same_total(path):
    design = load_rank_shift(path).design
    assert len({sum(ranks) for ranks in design.ranks.values()}) == 1
    assert design.baseline == "uniform" and len(design.seeds) >= 2


def test_a_method_for_one_rank_gets_the_lowest_and_is_played_once_for_all_that_share_it(data):
    s = settings_of("base", ranks={"uniform": [4, 4], "steep": [6, 2], "flat": [2, 2]}, seeds=[1])
    fedit = [facts_of(s, data, "fedit", spread, 0.1, 1) for spread in s.design.ranks]
    assert [f.ranks for f in fedit] == [(4, 4), (2, 2), (2, 2)]
    assert fedit[1].key == fedit[2].key != fedit[0].key
    # fslora plays three spreads, fedit two ranks; at two alphas.
    assert len(runs_of(s, data)) == (3 + 2) * 2


def test_ranks_are_dealt_by_the_seed_and_alike_for_all_that_is_compared(data):
    s = settings_of("base", ranks={"uniform": [4] * 6, "steep": [8, 6, 4, 3, 2, 1]})
    dealt = {
        facts_of(s, data, method, "steep", alpha, seed).ranks
        for seed in (1, 2)
        for method in ("fslora", "flexlora")
        for alpha in (0.1, 100.0)
    }
    assert len(dealt) == 2 and all(sorted(d) == [1, 2, 3, 4, 6, 8] for d in dealt)


def test_a_run_is_the_same_again_and_its_figures_are_of_the_shares_dealt(tmp_path, settings, data):
    run = facts_of(settings, data, "fslora", "steep", 0.1, 1)
    first = ShiftPlayer(tmp_path / "a").play(run)
    again = ShiftPlayer(tmp_path / "b").play(run)
    same = [dataclasses.replace(r, seconds=0) for r in (first, again)]
    assert same[0] == same[1]
    shares = np.array(first.shares)
    assert shares.shape == (3, 2) and np.allclose(shares.sum(1), 1)
    assert [len(own) for own in first.nats[1]] == [8, 8]
    assert first.nats[0] != first.nats[1], "nothing was trained"
    # The whole head travels whatever the rank, so bytes rise with it but are not proportional.
    by_rank = sorted(zip(run.ranks, first.up_bytes, strict=True))
    assert by_rank[0][1] == by_rank[1][1] < by_rank[2][1] < 4 * by_rank[0][1]


def made_up(s, data, loss) -> dict[str, ShiftRecord]:
    """Records with losses as `loss(run, class)` says, and noise that all runs of a seed share."""
    records = {}
    for run in runs_of(s, data):
        draw = np.random.default_rng(run.seed)
        noise = draw.normal(0, 0.2, size=(2, 40))
        key = [run.seed, zlib.crc32(run.key.encode())]
        own = np.random.default_rng(key).normal(0, 0.01, (2, 40))
        after = [(loss(run, c) + noise[c] + own[c]).tolist() for c in range(2)]
        before = [(1.0 + noise[c]).tolist() for c in range(2)]
        ones = [[1] * 40] * 2
        share = draw.dirichlet([run.alpha] * 2, len(run.ranks))
        records[run.key] = ShiftRecord(
            run.key, LABELS, [before, after], [ones, ones], [[0.5, 0.5]] * 2, share.tolist(),
            [100 * k for k in run.ranks], 1.0,
        )  # fmt: skip
    return records


def supported(found) -> list[str]:
    return [claim.words for claim in found.claims if claim.supported]


def test_a_planted_effect_of_ranks_is_found_with_its_size_and_nothing_else_is(data):
    s = settings_of("base", methods=["fslora"])
    planted = made_up(s, data, lambda run, c: 0.5 + 0.1 * (run.spread == "steep"))
    found = analyse(s, data, planted)
    ranks = [claim for claim in found.claims if claim.kind == "ranks"]
    assert len(ranks) == 4 and all(claim.supported for claim in ranks)
    for claim in ranks:
        assert claim.estimate.low < 0.1 < claim.estimate.high
    assert not [c for c in found.claims if c.kind != "ranks" and c.supported], supported(found)
    text = markdown(conclude(s, data, planted)[0])
    assert "spread over the devices? Shown in 4 of 4 comparisons" in text
    assert "high rank? No relation was shown in any of 2 comparisons" in text
    assert "Nothing was learnt" not in text


def test_where_nothing_was_planted_nothing_is_supported(data):
    s = settings_of("base", methods=["fslora"])
    records = made_up(s, data, lambda run, c: 1.0)
    assert supported(analyse(s, data, records)) == []
    words = markdown(conclude(s, data, records)[0])
    assert "Nothing was learnt that the intervals could tell" in words
    assert words.count("No relation was shown") == 3


def test_a_model_that_favours_one_label_is_worse_for_the_worst_device_under_skew(data):
    s = settings_of("base", methods=["fslora"], ranks={"uniform": [4] * 4})
    found = analyse(s, data, made_up(s, data, lambda run, c: 0.2 + 1.2 * c))
    worst = next(c for c in found.claims if "worst device at alpha 0.1" in c.words)
    assert worst.supported and worst.estimate.value > 0.2
    cell = found.cells["fslora", "uniform", 0.1]
    # The worst device has nearly only the label of loss 1.4; what the fleet's mean hides.
    assert cell["worst device"].value > 1.2 and cell["mean"].value < 1.1
    assert found.skews[0.1] > 0.25
    assert found.skews[100.0] < 0.1


def test_low_ranks_that_happen_to_have_the_hard_label_are_no_effect_of_ranks(data):
    """Two seeds in which chance dealt so: the gap is large, and permuting the ranks tells why."""
    s = settings_of("base", methods=["fslora"], seeds=[1, 2],
                    ranks={"uniform": [5] * 4, "steep": [8, 8, 2, 2]})  # fmt: skip
    records = made_up(s, data, lambda run, c: 0.2 + 1.2 * c)
    for run in runs_of(s, data):
        if run.alpha == 0.1:
            hard = [[0.05, 0.95] if k == 2 else [0.95, 0.05] for k in run.ranks]
            records[run.key] = dataclasses.replace(records[run.key], shares=hard)
    found = analyse(s, data, records)
    gap = next(c for c in found.claims if c.kind == "tiers" and "alpha 0.1" in c.words)
    assert gap.estimate.value > 0.8 and not gap.supported


def test_low_ranks_that_are_worse_in_every_seed_are_found(data):
    s = settings_of("base", methods=["fslora"], seeds=list(range(8)), alphas=[1.0],
                    ranks={"uniform": [5] * 4, "steep": [8, 8, 2, 2]})  # fmt: skip
    records = made_up(s, data, lambda run, c: 0.2 + 1.2 * c)
    for run in runs_of(s, data):
        hard = [[0.4, 0.6] if k == 2 else [0.5, 0.5] for k in run.ranks]
        records[run.key] = dataclasses.replace(records[run.key], shares=hard)
    (gap,) = (c for c in analyse(s, data, records).claims if c.kind == "tiers")
    assert gap.supported and gap.estimate.value == pytest.approx(0.12, abs=0.05)


def test_a_finished_study_is_reported_without_playing_and_another_is_refused(tmp_path, data):
    s = settings_of("base", methods=["fslora"])
    for key, record in made_up(s, data, lambda run, c: 0.5).items():
        (tmp_path / "runs").mkdir(exist_ok=True)
        write_whole(tmp_path / "runs" / f"{key}.json", json.dumps(dataclasses.asdict(record)))
    with pytest.raises(StudyError, match="holds no study"):
        play_rank_shift(s, data, tmp_path, 1, print)
    (tmp_path / "study.json").write_text(
        json.dumps(s.model_dump(mode="json", exclude={"analysis", "link"}))
    )
    records = play_rank_shift(s, data, tmp_path, 1, lambda line: None)
    write_report(tmp_path, "rank-shift", s, *conclude(s, data, records), "the command")
    assert (tmp_path / "report.md").read_text().startswith("# Ranks unevenly spread")
    assert "<svg" in (tmp_path / "report.html").read_text()
    plain = json.loads((tmp_path / "report.json").read_text())
    assert len(plain["cells"]) == 4 and plain["claims"]
    other = s.model_copy(update={"learning": s.learning.model_copy(update={"rounds": 9})})
    with pytest.raises(StudyError, match="other settings"):
        play_rank_shift(other, data, tmp_path, 1, print)


def test_labelled_files_must_be_placed(tmp_path):
    with pytest.raises(StudyError, match="--data"):
        play_rank_shift(settings_of("base"), None, tmp_path, 1, print)
