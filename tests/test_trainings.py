"Inference over patients and trainings: equal to the programs of the field, honest in simulation, typed at its edges."
import json

import numpy as np
import pandas as pd
import pytest

from mammo_nb.core import DataError, ParameterError, rng
from mammo_nb.metrics.boot import boot_contrasts, over_seeds
from mammo_nb.metrics.delong import delong
from mammo_nb.metrics.trainings import (Interval, Range, chance_of_gain, could_have_known, decidable, effect_of, hillis,
                                        interval_of, jack_covariance, left_out, partitions_interval, power_of,
                                        prediction_interval, smallest_effect, spread_of, tost, trainings_interval)

from conftest import ROOT, SHARED

DATA = ROOT/"tests"/"data"
EXPECTED = json.loads((DATA/"trainings.json").read_text())
MRMC = SHARED/"mrmc"

def reference(name):
    "Units of one reference study, readers in order within an arm."
    f = pd.read_csv(DATA/"trainings.csv").query("study==@name")
    given = [c for c in f.columns if c.startswith("m") and f[c].notna().all()]
    common = dict(y=f.truth.values, patients=f.patient.values, case=f.case.values)
    return [common | dict(p=f[c].values, arm=c[:2], replicate=c[3:]) for c in given]

def van_dyke():
    f = pd.read_csv(MRMC/"van_dyke.csv").sort_values(["modality","reader","case"])
    unit = lambda g: dict(y=g.truth.values, p=g.score.values/5, patients=g.case.values, case=g.case.values)
    return [unit(g) | dict(arm=f"m{m}", replicate=str(r)) for (m,r),g in f.groupby(["modality","reader"])]

def plain(x):
    "The expected file without the names of the programs."
    if isinstance(x, dict): return x["value"] if "value" in x else {k: plain(v) for k,v in x.items()}
    return [plain(v) for v in x] if isinstance(x, list) else x

def weights(units, *arms):
    "The difference of two arms, or one arm, spread over trainings."
    S = len({u["replicate"] for u in units})
    return [1/S if u["arm"]==arms[0] else -1/S if u["arm"] in arms else 0 for u in units]

def close(a, b): assert a == pytest.approx(b, rel=1e-9, abs=1e-12)

STUDIES = [("clustered","case","a_OR_jackknife"), ("apart","case","a_OR_jackknife"),
           ("clustered","patients","patient_clustered_OR_jackknife_over_patients")]

def check_study(units, leave, wanted):
    t = left_out(units, metric="auroc", leave=leave)
    effect = effect_of(t, weights(units, "m1", "m2"))
    found = trainings_interval(effect.d, effect.jack)
    both, single = wanted["difference_random_readers_random_cases"], wanted["single_contrast_form"]
    close([found.value, found.se, found.df, found.p], [both["estimate"], both["se"], both["df_Hillis"], both["p"]])
    close([found.lo, found.hi], both["ci95"])
    C = jack_covariance(effect.jack)
    S = len(C)
    close([effect.d.var(ddof=1), np.trace(C)/S], [single["MS_R"], single["Var_within"]])
    close((C.sum()-np.trace(C))/(S*S-S), single["Cov_between"])
    for arm,one in zip(("m1","m2"), wanted["single_modality"]):
        e = effect_of(t, weights(units, arm))
        i = trainings_interval(e.d, e.jack)
        close([i.value, i.se, i.df, *([i.lo, i.hi])], [one["auc"], one["se"], one["df_Hillis_single"], *one["ci95"]])
        kept = interval_of(e)
        assert 0 <= kept.lo <= kept.value <= kept.hi <= 1 and "logit" in kept.how

@pytest.mark.parametrize("study, leave, key", STUDIES)
def test_equal_to_the_programs_of_the_field(study, leave, key):
    check_study(reference(study), leave, EXPECTED[study][key])

@pytest.mark.parametrize("study, clustered, key", [
    ("clustered", False, "a_OR_delong"), ("apart", False, "a_OR_delong"),
    ("clustered", True, "patient_clustered_OR_obuchowski1997_covariance")])
def test_delong_and_obuchowski_covariances(study, clustered, key):
    "The same formula on the closed-form covariances."
    units = reference(study)
    S = len(units)//2
    who = units[0]["patients"] if clustered else None
    found = delong(units[0]["y"], np.stack([u["p"] for u in units]), patients=who)
    D = np.c_[np.eye(S), -np.eye(S)]
    variance, df = hillis(D@found.auc, D@found.cov@D.T)
    wanted = EXPECTED[study][key]["difference_random_readers_random_cases"]
    close([np.sqrt(variance), df], [wanted["se"], wanted["df_Hillis"]])
    shown = EXPECTED[study]["auc_variance_per_reader"]["obuchowski1997_clustered" if clustered else "delong"]
    close(np.diag(found.cov), np.ravel(shown))

@pytest.mark.skipif(not MRMC.is_dir(), reason="needs ../shared/data/mrmc")
def test_equal_on_the_classic_study():
    "Van Dyke 1993, whose data are not ours to ship."
    wanted = plain(json.loads((MRMC/"expected.json").read_text()))["van_dyke"]
    check_study(van_dyke(), "case", wanted["a_OR_jackknife"])

def test_scalar_references():
    s = EXPECTED["scalar_checks"]
    for key,share in (("n_train_900_n_test_100", 1/9), ("n_train_400_n_test_100", 1/4)):
        i, w = partitions_interval(s["nadeau_bengio"]["differences"], test_share=share), s["nadeau_bengio"][key]
        close([i.value, i.se**2, i.df, i.p], [w["mean"], w["variance"], w["df"], w["p"]])
    w = s["prediction_interval_general"]
    close(prediction_interval(w["original"], w["se_original"], w["se_replication"]), w["interval95"])
    for w in s["tost"].values():
        if isinstance(w, dict):
            close(tost(Interval(w["d"], 0, 0, w["se"], w["df"], 1, "", 2, 2, False), w["low"], w["high"]), w["p"])
    for w in s["false_claim_probability_classification"]["cases"]:
        close(chance_of_gain(w["p_A"], w["p_B"], w["p_11"], w["n"]), w["P_false"])

# ---- any metric, each patient left out

def booted(units, C, metric):
    "The estimate of `boot_contrasts`."
    return boot_contrasts(units, C, metric=metric, n_boot=2).value[0]

@pytest.mark.parametrize("metric", ["accuracy","balanced_accuracy","f1","precision","recall","auroc","auprc"])
def test_left_out_is_the_metric_without_her(metric):
    g = rng(0, "left out", metric)
    who = [f"w{k:02}" for k in np.arange(60)%12]
    scores = lambda: np.round(g.random(60), 1)
    answer = lambda: dict(y=np.r_[0, 1, g.integers(0, 2, 58)], p=scores(), rank=scores())
    units = [answer() | dict(patients=who, arm=arm) for arm in ("a","b")]
    t = left_out(units, metric=metric)
    for k in (0, 5, 11):
        for i,u in enumerate(units):
            keep = np.arange(60)%12 != k
            less = dict(y=u["y"][keep], p=u["p"][keep], rank=u["rank"][keep], patients=np.array(u["patients"])[keep])
            assert t.jack[k,i] == pytest.approx(booted([less], [1], metric), abs=1e-12)
    assert t.value @ [1,-1] == pytest.approx(booted(units, [1,-1], metric), abs=1e-12)

def test_a_patient_of_another_unit_changes_nothing():
    "Folds that test on their own women: leaving one out moves her fold only."
    g = rng(1, "folds")
    women = lambda j: [f"f{j} w{k:02}" for k in range(40)]
    units = [dict(y=np.arange(40)//20, p=g.random(40), patients=women(j), replicate=str(j)) for j in range(3)]
    t = left_out(units, metric="auroc")
    assert t.jack.shape == (120,3)
    for j in range(3): assert (np.delete(t.jack, np.s_[40*j:40*j+40], 0)[:,j] == t.value[j]).all()

# ---- edges

def test_edges_of_the_formula():
    same = trainings_interval(np.full(3, .125), np.full((10,3), .125) + np.linspace(-.01, .01, 10)[:,None])
    assert same.df > 1e9 and same.lo == pytest.approx(.125 - 1.959963984540054*same.se)
    apart = trainings_interval([0,.1,.2], np.array([[0,.1,.2]]) + .01*np.array([[1,-1,0],[-1,1,0],[0,0,0]]))
    assert apart.df == 2 and apart.se == pytest.approx(.1/np.sqrt(3))
    one = trainings_interval([.1], np.array([.1,.12,.08,.1]))
    assert one.conditional and one.df == 3 and "conditional" in one.how
    flat = trainings_interval([.1,.1], np.full((5,2), .1))
    assert flat.se == 0 and np.isnan(flat.p)
    assert trainings_interval([.9,.99], np.array([[.9,.99],[.8,1],[1,.95]]), within=Range((-1,1))).hi == 1

def test_edges_are_typed():
    with pytest.raises(DataError, match="2 trainings, but 3 left out"): trainings_interval([1,2], np.zeros((5,3)))
    with pytest.raises(DataError, match="needs two patients"): trainings_interval([1,2], np.zeros((1,2)))
    units = [dict(y=[0,1,1], p=[.1,.2,.3], patients=["a","b","c"])]
    t = left_out(units, metric="auroc")
    with pytest.raises(DataError, match="hangs on one patient"): interval_of(effect_of(t, [1]))
    with pytest.raises(ParameterError, match="weights for 1 units"): effect_of(t, [1,-1])
    with pytest.raises(ParameterError, match="without cells"): effect_of(t, [0])
    with pytest.raises(DataError, match="same cell and training twice"):
        effect_of(left_out(units*2, metric="auroc"), [1,-1])

def test_planning_agrees_with_a_run():
    "What a run could have decided, from its own interval and from its variances, is nearly the same number."
    units = reference("clustered")
    effect = effect_of(left_out(units, metric="auroc"), weights(units, "m1", "m2"))
    i = interval_of(effect)
    assert smallest_effect(spread_of(effect), patients=60, trainings=5) == pytest.approx(decidable(i.se, i.df), rel=.02)
    assert power_of(decidable(i.se, i.df), spread_of(effect), patients=60, trainings=5) == pytest.approx(.8, abs=.02)

def test_published_numbers_alone():
    "As in the case `published_power`: three trainings, independent arms, t with two degrees of freedom."
    known, least = could_have_known([.9,.95], [.02,.01], 3, [-1,1])
    assert known.lo < 0 < known.hi and known.df == pytest.approx(2) and least > known.value

# ---- simulation

def coverage(P, S, *, repeats, training, generator=.02, seed=0):
    "Share of null studies, a generator a seed, whose interval holds zero."
    g = rng(seed, "coverage", P, S, training)
    hits = 0
    for _ in range(repeats):
        x = g.normal(size=(P,1)) + g.normal(0, 2**.5, (P,S)) + g.normal(0, (training+generator)**.5, S)
        i = trainings_interval(x.mean(0), (x.sum(0)-x)/(P-1))
        hits += i.lo <= 0 <= i.hi
    return hits/repeats

@pytest.mark.parametrize("S", [3, 5, 10])
def test_coverage_small(S):
    "400 studies: four Monte Carlo errors around 93 to 97 %."
    assert .93-.044 <= coverage(100, S, repeats=400, training=.002) <= .97+.03

@pytest.mark.slow
@pytest.mark.parametrize("training", [.002, .05])
@pytest.mark.parametrize("P", [50, 100, 200])
@pytest.mark.parametrize("S", [3, 5, 10])
def test_coverage_full(S, P, training):
    "4000 studies, three Monte Carlo errors; three trainings by the careful df (Hillis alone: 0.922 to 0.944)."
    error = 3*np.sqrt(.95*.05/4000)
    assert .93-error <= coverage(P, S, repeats=4000, training=training) <= .97

def test_few_trainings_have_fewer_degrees_of_freedom():
    "Only below four; the formula of the field stays what it was from four on."
    g = rng(0, "few")
    for S in (2, 3, 4, 5):
        x = g.normal(size=(40,1)) + g.normal(0, 1, (40,S))
        d, jack = x.mean(0), (x.sum(0)-x)/39
        df, plain = trainings_interval(d, jack).df, hillis(d, jack_covariance(jack))[1]
        assert df == pytest.approx(np.sqrt(plain*(S-1)) if S < 4 else plain)

def auroc_study(g, P, S):
    "Two exchangeable arms, two patches a woman, a generator a training."
    who = np.repeat(np.arange(P), 2)
    y = who%2
    ease = g.normal(0, .5, P)[who] + g.normal(0, .3, 2*P)
    units = []
    for arm in ("a","b"):
        mine = g.normal(0, .35, P)[who] + g.normal(0, .3, 2*P)
        for j in range(S):
            z = (1.3 + g.normal(0, .15))*y + ease + mine + g.normal(0, .6, 2*P)
            said = dict(y=y, p=1/(1+np.exp(-z)), patients=who)
            units.append(said | dict(arm=arm, replicate=str(j), gan=f"g{j}"))
    return units

@pytest.mark.parametrize("S, repeats", [(5, 60), *[pytest.param(s, 1000, marks=pytest.mark.slow) for s in (3, 5, 10)]])
def test_coverage_of_auroc_from_answers(S, repeats):
    "The whole way from answers to interval; t over trainings forgets the women and misses far more often."
    g = rng(0, "auroc coverage", S)
    ours = plain_t = 0
    for _ in range(repeats):
        units = auroc_study(g, 50, S)
        effect = effect_of(left_out(units, metric="auroc"), weights(units, "a", "b"))
        i, t = interval_of(effect), over_seeds(effect.d)
        ours, plain_t = ours + (i.lo <= 0 <= i.hi), plain_t + (t["lo"] <= 0 <= t["hi"])
    error = 3*np.sqrt(.95*.05/repeats)
    assert .93-error <= ours/repeats <= .97+error and plain_t < ours
