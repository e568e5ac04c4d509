"""The findings are sentences made from the numbers: other numbers, other sentences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest
import results_synthetic

from crosscoder.activations.alike import Alike
from crosscoder.common.statistics import correlate
from crosscoder.config import StudySettings
from crosscoder.figures.results import Results
from crosscoder.report.assemble import alike_notes, findings, parts
from crosscoder.report.evaluation import PART, Evaluated

STRENGTH, ROTATION, DIMENSIONALITY = "Strength and life", "Rotation", "Dimensionality"
NGRAMS, TYPES, COMPLEXITY = "N-gram phase", "Feature types", "Complexity"
HONESTY, STABILITY, CROSSCODER = "Honesty of the norm", "Stability across runs", PART.section


class Finding(NamedTuple):
    """A sentence, and the section of the page that it stands in."""

    section: str
    sentence: str


STEPS = np.array([0, 1, 10, 100])


def results(**changes: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    summary: dict[str, Any] = {
        "explained_variance": {"overall": 0.945, "by_snapshot": {"a": 0.9, "b": 0.99}},
        "l0": {"mean": 20.04},
        "n_heldout_tokens": 5_000,
        "dead_fraction": 0.013,
    }
    arrays: dict[str, dict[str, Any]] = {
        "ngrams": {
            "curves.loss": np.array([7.6, 6.0, 4.2, 3.9]),
            "curves.n_predictions": np.array(4_900),
            "entropies.bigram": np.array(4.0),
            "entropies.bigram_corrected": np.array(3.8),
        },
        "life": {
            "cycles.kind": np.repeat([0, 1, 2, 3], [1000, 900, 27, 121]),
            "cycles.steps": STEPS,
            "interval.n_by_kind_low": np.array([990, 850, 0, 0]),
            "interval.n_by_kind_high": np.array([1010, 950, 0, 0]),
            "interval.births_low": np.array([0, 1, 650, 2]),
            "interval.births_high": np.array([0, 1, 760, 2]),
            "interval.level": np.array(0.9),
            "cycles.births": np.array([0, 100, 700, 100]),
            "cycles.lifetime": np.array([1.0, 0.7, 0.2, 0.1]),
            "cycles.emergence": np.array([0, 1, 2, 3]),
        },
        "rotation": {
            f"turning_point.{name}": np.array(value)
            for name, value in {
                "step": 3.0,
                "step_before": 1.0,
                "step_after": 10.0,
                "step_low": 1.0,
                "step_high": 10.0,
                "level": 0.9,
                "within": 0.8,
                "across": 0.1,
                "p_shuffled": 0.004,
                "p_random": 0.001,
                "explained_by_blocks": 0.7,
                "explained_by_lag": 0.4,
            }.items()
        },
        "induction": {"gap": np.array([0.0, 0.0, 0.2, 2.5])},
        "dimensionality": {"rate": np.array([0.5, 0.2, 0.3, 0.6]), "null_rate": np.array([0.9, 0.8, 0.8, 0.7])},
    }
    for name, value in changes.items():
        analysis, key = name.split("__")
        arrays[analysis][key.replace("_dot_", ".")] = np.asarray(value)
    return summary, arrays


def found_in(
    summary: dict[str, Any],
    arrays: dict[str, dict[str, Any]],
    comparisons: dict[str, dict[str, Any]] | None = None,
    others: Iterable[object] = (),
    **tables: Any,
) -> list[Finding]:
    others = [Evaluated(summary, 2048, 4, 8), *others]
    made = results_synthetic.Made(arrays, tables, comparisons or {}, STEPS, others)
    told = findings(made.results, parts())
    return [Finding(section, sentence) for section, sentences in told.items() for sentence in sentences]


def leads(found: list[Finding]) -> dict[str, str]:
    sections = dict.fromkeys(one.section for one in found)
    return {name: " ".join(one.sentence for one in found if one.section == name) for name in sections}


def sentences(summary: dict[str, Any], arrays: dict[str, dict[str, Any]], **tables: Any) -> list[str]:
    return [found.sentence for found in found_in(summary, arrays, **tables)]


def test_sentences_with_the_numbers() -> None:
    summary, arrays = results()
    births, turning, dimension, model, induction, crosscoder = sentences(summary, arrays)
    assert "from 7.60 to 3.90 nats" in model and "between steps 10 and 100 it passes under the 4.00" in model
    assert "on 4,900 held-out tokens" in model and "at no snapshot under the 3.80" in model
    assert (
        "94.5%" in crosscoder
        and "on 5,000 held-out tokens" in crosscoder
        and "90.0% to 99.0%" in crosscoder
        and "20.0 of its 2,048" in crosscoder
    )
    assert births.startswith("1,000 features are there at step 0 (90% interval") and "step 10 to step 10" in births
    assert "Of the 1 born early enough to be present at 60% of the snapshots, 1 are" in births
    assert "between steps 1 and 10" in turning and "0.80 on the same side and 0.10 across" in turning
    assert "p = 0.004 against shuffled snapshots, 0.001 against random directions" in turning
    assert "2.50 nats cheaper" in induction and "between steps 10 and 100" in induction
    assert "from 50% of the width at step 0 over a minimum of 20% at step 1 to 60%" in dimension


def test_each_section_begins_with_its_sentences() -> None:
    summary, arrays = results()
    made = results_synthetic.Made(arrays, steps=STEPS, others=[Evaluated(summary, 2048, 4, 8)])
    begun = findings(made.results, parts())
    assert list(begun) == [STRENGTH, ROTATION, DIMENSIONALITY, NGRAMS, CROSSCODER]
    assert begun[NGRAMS] == sentences(summary, arrays)[3:5]


def test_what_was_not_found_is_said() -> None:
    summary, arrays = results(
        ngrams__curves_dot_loss=[7.6, 6.0, 5.0, 4.5],
        rotation__turning_point_dot_p_shuffled=0.4,
        induction__gap=[0.0, 0.0, 0.0, 0.02],
        life__cycles_dot_births=[0, 0, 0, 0],
    )
    births, turning, _, model, induction, _ = sentences(summary, arrays)
    assert "still above the 4.00" in model
    assert births.endswith("emerge during training (90% interval over features: 850 to 950).")
    assert "No turning point is shown" in turning and "p = 0.4 against shuffled" in turning
    assert "Induction does not form" in induction


def test_other_analyses_have_sentences_where_they_were_run() -> None:
    summary, arrays = results()
    more = results_synthetic.results()
    arrays |= {name: dict(more.arrays[name]) for name in ("types", "complexity", "probes", "latent_scaling")}
    found = leads(found_in(summary, arrays, sweep=results_synthetic.sweep()))
    assert "Kruskal–Wallis p = 0.001), median steps: " in found[TYPES]
    assert found[COMPLEXITY].startswith("Emergent features that emerge later are more complex: rank correlation")
    assert "has the median 0.60 (0.05 with another feature's norms); 2.5% of the norms near 0" in found[HONESTY]
    assert "high norms" not in found[HONESTY], "no share of none"
    assert "1.0 points more of the last snapshot's variance" in found[CROSSCODER] and "one seed" in found[CROSSCODER]
    arrays["types"]["emergent.p"] = np.array(0.3)
    arrays["complexity"]["emergent.context.spearman_p"] = np.array(0.3)
    arrays["probes"]["honesty.correlation_median"] = np.array(0.1)
    found = leads(found_in(summary, arrays))
    assert found[TYPES].endswith(
        "no difference in when types emerge is shown (Kruskal–Wallis p = 0.3): no order is told."
    )
    assert "is not settled" in found[COMPLEXITY] and "hardly follows" in found[HONESTY]


def test_births_have_their_interval_and_their_null() -> None:
    summary, arrays = results()
    null = {"observed": 0.9, "null_mean": 0.5, "null_low": 0.4, "null_high": 0.6, "p": 0.01}
    arrays["life"] |= {f"null.contiguous.{name}": np.array(value) for name, value in null.items()}
    births, order, *_ = sentences(summary, arrays)
    assert "1,000 features are there at step 0 (90% interval over features: 990 to 1,010)" in births
    assert "900 emerge during training (90% interval over features: 850 to 950)" in births
    assert "most at step 10: 700 (650 to 760)." in births
    assert order.startswith("90% of the features live without a gap, more than where the snapshots are shuffled (50%")


def null_of(statistic: str, observed: float, p: float) -> dict[str, np.ndarray]:
    values = {"observed": observed, "null_mean": 0.03, "null_low": 0.01, "null_high": 0.05, "p": p}
    return {f"null.{statistic}.{name}": np.array(value) for name, value in values.items()}


def test_births_are_held_against_shuffled_snapshots() -> None:
    summary, arrays = results()
    arrays["life"] |= null_of("emergent", 0.04, 0.59) | null_of("largest_births", 0.02, 0.57)
    births = sentences(summary, arrays)[0]
    words = "(90 % of the shuffles 1.0% to 5.0%; p = 0.59)"
    assert f"4.0% of those alive, where shuffled snapshots give 3.0% {words}. The number alone shows no more" in births
    assert "2.0% of those alive, not shown to be more than in random order" in births and "p = 0.57" in births
    arrays["life"] |= null_of("emergent", 0.4, 0.01) | null_of("largest_births", 0.3, 0.02)
    births = sentences(summary, arrays)[0]
    assert "So more emerge than in a random order" in births and "chance" not in births
    assert "30.0% of those alive, more than in random order" in births
    arrays["life"] |= null_of("emergent", 0.01, 0.01)
    assert "So fewer emerge than in a random order" in sentences(summary, arrays)[0]


def test_only_births_early_enough_can_live_long() -> None:
    summary, arrays = results(life__cycles_dot_emergence=[0, 2, 2, 3], life__cycles_dot_births=[0, 0, 2, 1])
    assert "early enough" not in sentences(summary, arrays)[0], "of 4 snapshots 2 are left at the second"
    arrays["life"]["cycles.emergence"] = np.array([0, 1, 1, 3])
    births = sentences(summary, arrays)[0]
    assert "Of the 2 born early enough to be present at 60% of the snapshots, 1 are." in births


@pytest.mark.parametrize(("drift", "sharp"), [(0.69, True), (0.7, False), (0.8, False)])
def test_where_a_drift_explains_as_much_there_is_no_sharp_turn(drift: float, sharp: bool) -> None:
    turning = sentences(*results(rotation__turning_point_dot_explained_by_lag=drift))[1]
    assert turning.startswith("Decoder directions turn between" if sharp else "Decoder directions make no sharp turn")
    assert f"{drift:.0%}" in turning and "70%" in turning and "steps 1 and 10" in turning
    assert "0.001 against random directions" in turning


def test_induction_says_what_it_was_measured_on() -> None:
    summary, arrays = results()
    settings = StudySettings(induction_length=70)
    found = {one.section: one.sentence for one in found_in(summary, arrays, others=[settings])}
    assert found[NGRAMS].endswith("measured on 64 sequences of 70 random tokens said twice.")


def test_explanations_have_a_sentence() -> None:
    summary, arrays = results()
    table = results_synthetic.explanations(60, np.random.default_rng(0))
    told = leads(found_in(summary, arrays, explanations=table))[COMPLEXITY]
    marks, detection = np.array(table["complexity"]), np.array(table["detection"])
    assert f"explained {np.isfinite(marks).sum()} of the 60 features" in told
    assert f"median balanced accuracy {np.median(detection):.2f} (detection, 60 features; chance: 0.50" in told
    assert f"words: {np.median(table['detection_control']):.2f}, on average" in told
    assert f"{np.median(table['fuzzing']):.2f} (fuzzing, 60 features; chance: 0.50)" in told, "it has no control here"
    found = correlate(marks, np.log10(1 + np.array(table["emergence"])))
    assert f"rank correlation {found.spearman:.2f} (95 % interval {found.spearman_low:.2f} to" in told
    assert "is not shown to emerge later" in told
    table["complexity"] = [1 + list(results_synthetic.STEPS).index(step) for step in table["emergence"]]
    assert (
        "What it calls complex emerges later: rank" in leads(found_in(summary, arrays, explanations=table))[COMPLEXITY]
    )
    assert COMPLEXITY not in leads(found_in(summary, arrays))


def test_kinds_by_themselves_have_a_sentence() -> None:
    summary, arrays = results()
    more = results_synthetic.results()
    arrays["life"]["cycles.kind"] = more.arrays["life"]["cycles.kind"]
    arrays["kind_dimensionality"] = dict(more.arrays["kind_dimensionality"])
    begun = leads(found_in(summary, arrays))[DIMENSIONALITY]
    assert begun.endswith(
        "By themselves the initialization features would fill 50% of the width at the last snapshot (random "
        "directions: 70%), the emergent features 70% (90%)."
    )


def test_each_comparison_has_a_sentence() -> None:
    summary, arrays = results()
    made = results_synthetic.results()
    arrays["life"]["cycles.kind"] = made.arrays["life"]["cycles.kind"]

    def told(found: dict[str, Any]) -> str:
        [sentence] = [one.sentence for one in found_in(summary, arrays, {"seed1": found}) if one.section == STABILITY]
        return sentence

    found = dict(made.comparisons["seed1"])
    kind, taking = arrays["life"]["cycles.kind"], np.isfinite(found["matching.nearest"])
    shares = [(found["matching.cosine"] >= 0.7)[taking & (kind == code)] for code in (0, 1)]
    assert told(found) == (
        f"Of {int(found['n_first'])} features that are present at the last snapshot, "
        f"{float(found['share_stable']):.0%} have a match of cosine 0.7 or more in seed1 (random directions: 1%): "
        f"{shares[0].mean():.0%} of the initialization ones and {shares[1].mean():.0%} of the emergent ones; "
        "of the 20 such pairs that emerge in training, 10% do so at the same snapshot and 80% at most one apart (pairs "
        "permuted: 30% and 50%)."
    )
    assert "emerge in training" not in told({**found, "emergence_same_emerging": np.array(np.nan)})
    assert told({**found, "share_stable": np.array(np.nan)}).startswith("Nothing is compared with seed1")


def test_ordinary_tokens_have_a_figure_of_their_own_where_norms_were_told_apart() -> None:
    summary, _ = results()
    more: dict[str, Any] = {
        "l0": {"mean": 20.0, "union": 30.0},
        "n_train_tokens": 10_000,
        "explained_variance_by_norm": {"ordinary": 0.8594},
    }
    told = {fact.label: fact for fact in PART.tiles(Results(STEPS, [Evaluated(summary | more, 2048, 4, 8)]))}
    assert (
        told["… of ordinary norms"].value == "0.859"
        and "under 4 median norms" in told["… of ordinary norms"].explanation
    )
    more["explained_variance_by_norm"] = {"ordinary": None}
    assert all(
        "ordinary" not in fact.label for fact in PART.tiles(Results(STEPS, [Evaluated(summary | more, 2048, 4, 8)]))
    )


def test_the_page_names_snapshots_that_are_alike() -> None:
    groups = [Alike(("step0", "step1"), 0.0), Alike(("step8", "step16", "step32"), 2.5e-4)]
    equal, nearly = alike_notes({"alike": [group.to_dict() for group in groups]})
    assert equal == "The snapshots step0, step1 have equal activations: nothing is born or dies between them."
    assert nearly.startswith("The snapshots step8, step16, step32 have nearly equal activations (within 2.5e-04)")
    assert alike_notes({}) == []
