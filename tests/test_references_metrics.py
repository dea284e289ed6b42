"Classification metrics and statistics against independent implementations, invariances and simulated truth."
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from sklearn import metrics as skm

from mammo_nb.core import DataError, ParameterError, rng
from mammo_nb.metrics.auc import METRICS, auc, both_scores, binary_scores, f1_consistency, majority_scores
from mammo_nb.metrics.boot import (bca, boot_contrasts, boot_diff, boot_scores, corrected_t, holm, over_seeds, paired_seeds, prob_better,
                                   weighted_metric)
from mammo_nb.metrics.delong import auc_interval, delong, joint_test, paired_test

def data(seed, n=80, levels=0, k=20):
    "Targets, scores (with ties when `levels`) and patients; both classes are there."
    g = rng(seed, "test data"); y = np.r_[0, 1, g.random(n-2) < .4].astype(int)
    p = np.clip(.25*y + .75*g.random(n), 0, 1)
    return y, np.round(p*levels)/levels if levels else p, g.integers(0, k, n)

seeds = st.integers(0, 10**6); ties = st.sampled_from([0, 3, 20])

# ---- values

@settings(max_examples=40, deadline=None)
@given(seeds, ties)
def test_auc_is_mann_whitney(seed, levels):
    y, p, _ = data(seed, levels=levels)
    u = stats.mannwhitneyu(p[y==1], p[y==0]).statistic
    assert auc(y, p) == pytest.approx(u/((y==1).sum()*(y==0).sum()), abs=1e-12)

@settings(max_examples=40, deadline=None)
@given(seeds, ties)
def test_scores_against_sklearn_for_both_positive_classes(seed, levels):
    y, p, _ = data(seed, levels=levels); b = both_scores(y, p); called = (p > .5).astype(int)
    for name, pos in (("healthy",0), ("lesion",1)):
        s = b.loc[name]
        assert s.accuracy == pytest.approx(skm.accuracy_score(y, called))
        assert s.f1 == pytest.approx(skm.f1_score(y, called, pos_label=pos, zero_division=0))
        assert s.auprc == pytest.approx(skm.average_precision_score(y==pos, p if pos else 1-p))
        lo, hi = f1_consistency(s.accuracy, s.f1); assert lo-1e-9 <= s.prevalence <= hi+1e-9

def test_positive_class_is_never_guessed():
    y, p, _ = data(1)
    with pytest.raises(ParameterError, match="did you mean 'lesion'"): binary_scores(y, p, positive="lesions")
    with pytest.raises(DataError, match="auc needs both classes, got 2 malignant and 0 benign"): auc([1,1], [.1,.2], names=("benign","malignant"))

def test_majority_is_the_better_constant():
    y = np.r_[np.zeros(30,int), np.ones(70,int)]
    for positive in ("healthy","lesion"):
        m = majority_scores(y, positive=positive)
        assert m["accuracy"] == .7 and m["auroc"] == .5 and m["auprc"] == pytest.approx(m["prevalence"])

@settings(max_examples=30, deadline=None)
@given(seeds, ties, st.sampled_from(["healthy","lesion"]))
def test_weighted_metrics_against_sklearn(seed, levels, positive):
    y, p, _ = data(seed, levels=levels); g = rng(seed, "weights"); w = g.integers(0, 4, (3,len(y))).astype(float); w[:,:2] = 1
    pos, score, called = (y==1, p, p>.5) if positive=="lesion" else (y==0, 1-p, p<=.5)
    refs = dict(accuracy=lambda w: skm.accuracy_score(pos, called, sample_weight=w), f1=lambda w: skm.f1_score(pos, called, sample_weight=w),
                auroc=lambda w: skm.roc_auc_score(pos, score, sample_weight=w), auprc=lambda w: skm.average_precision_score(pos, score, sample_weight=w))
    for m, f in refs.items():
        assert weighted_metric(m, y.astype(bool), p, positive=positive)(w) == pytest.approx([f(r) for r in w], abs=1e-10), m

# ---- bootstrap

def test_bca_against_scipy():
    "Without widening (very many patients) it is scipy's BCa on the same resamples."
    x = rng(0, "skewed").exponential(size=60)
    for stat in (np.mean, np.median):
        r = stats.bootstrap((x,), stat, n_resamples=4000, method="BCa", rng=np.random.default_rng(1))
        jack = np.array([stat(np.delete(x, i)) for i in range(len(x))])
        ours = bca(float(stat(x)), r.bootstrap_distribution, jack, n=10**9)
        assert (ours["lo"], ours["hi"]) == pytest.approx((r.confidence_interval.low, r.confidence_interval.high), abs=2e-3)
        assert ours["se"] == pytest.approx(r.standard_error)

@settings(max_examples=15, deadline=None)
@given(seeds)
def test_bootstrap_does_not_depend_on_row_order_and_follows_its_seed(seed):
    y, p, who = data(seed); o = rng(seed, "order").permutation(len(y)); kw = dict(n_boot=100, metrics=("auroc","f1"))
    one = boot_scores(y, p, patients=who, **kw, seed=seed)
    two = boot_scores(y[o], p[o], patients=who[o], **kw, seed=seed); other = boot_scores(y, p, patients=who, **kw, seed=seed+1)
    for c in ("value","lo","hi","se"): assert two[c].values == pytest.approx(one[c].values, abs=1e-9)
    assert list(other.lo) != list(one.lo)

def test_pairing_swaps_sign_and_shares_patients():
    y, a, who = data(3, n=200, k=40); b = np.clip(a + .1*rng(3, "b").normal(size=200), 0, 1)
    ab, ba = boot_diff(y, a, b, patients=who, n_boot=400), boot_diff(y, b, a, patients=who, n_boot=400)
    assert ab.value.values == pytest.approx(-ba.value.values); assert ab.lo.values == pytest.approx(-ba.hi.values, abs=5e-3)
    assert ab.p.values == pytest.approx(ba.p.values, abs=.02)
    gain = boot_contrasts([dict(y=y,p=a,patients=who), dict(y=y,p=b,patients=who)], [[1,-1],[1,0]], metric="auroc", n_boot=400)
    assert gain.value[0] == pytest.approx(ab.value[2]) and gain.value[1] == pytest.approx(auc(y, a))

def test_two_test_sets_meet_in_their_patients():
    "All lesions and masses share patients: the gain over both scopes is one paired contrast."
    y, p, who = data(5, n=120, k=30); half = who < 15
    cells = [dict(y=y, p=p, patients=who), dict(y=y[half], p=p[half], patients=who[half])]
    r = boot_contrasts(cells, [.5,.5], metric="accuracy", n_boot=300).iloc[0]
    assert r.n_patients == len(set(who)) and r.lo <= r.value <= r.hi
    with pytest.raises(DataError, match="need patient ids"): boot_contrasts([dict(c, patients=None) for c in cells], [1,-1], metric="f1")

def _coverage(sims, k, per, d, prevalence):
    "Share of 95 % intervals that hold the true AUROC: patient bootstrap, clustered DeLong, and DeLong that ignores patients."
    true, hits = stats.norm.cdf(d/2**.5), np.zeros(3)
    for i in range(sims):
        g = rng(i, "coverage", k, per, d); who = np.repeat(np.arange(k), per); y = np.repeat(g.random(k) < prevalence, per); y[:2*per] = [0]*per + [1]*per; y[2*per:4*per] = [0]*per + [1]*per
        s = .7**.5*g.normal(size=k)[who] + .3**.5*g.normal(size=k*per) + d*y; p = stats.norm.cdf(s - d/2)
        b = boot_scores(y, p, patients=who, metrics=("auroc",), n_boot=400, seed=i).iloc[0]
        for j, (lo, hi) in enumerate([(b.lo, b.hi), auc_interval(delong(y, p, patients=who)), auc_interval(delong(y, p))]): hits[j] += lo <= true <= hi
    return hits/sims

def test_intervals_cover_when_patients_bring_many_patches():
    boot, clustered, naive = _coverage(250, 50, 4, 1.5, .5)
    assert .90 < boot < .99 and .90 < clustered < .99 and naive < .85

@pytest.mark.slow
@pytest.mark.parametrize("k,per,d,prevalence", [(60,1,1.5,.5), (60,4,1.5,.5), (40,4,2.3,.5), (120,3,1.,.2)])
def test_intervals_cover(k, per, d, prevalence):
    boot, clustered, _ = _coverage(2000, k, per, d, prevalence)
    assert (.93 if k > 40 else .92) < boot < .98 and .92 < clustered < .98                       # 40 patients at AUROC 0.95 is hard: 0.928

def test_no_gain_is_rarely_called_one():
    "Two equal classifiers: the paired test rejects in about 5 % of cases, with clustered patients too."
    p = []
    for i in range(200):
        g = rng(i, "equal"); who = np.repeat(np.arange(40), 4); y = np.repeat(g.random(40) < .5, 4); y[:8] = [0]*4+[1]*4
        a, b = (stats.norm.cdf(y + .8*g.normal(size=40)[who] + .6*g.normal(size=160) - .5) for _ in range(2))
        p.append(boot_diff(y, a, b, patients=who, metrics=("auroc",), n_boot=300, seed=i).p[0])
    assert np.mean(np.array(p) < .05) < .1

# ---- DeLong

def pairs_cov(y, S):
    "DeLong's covariance from all pairs."
    y = np.asarray(y, bool); V = [((s[y][:,None] > s[~y]) + .5*(s[y][:,None] == s[~y])) for s in S]
    return np.cov([v.mean(1) for v in V])/y.sum() + np.cov([v.mean(0) for v in V])/(~y).sum()

@settings(max_examples=30, deadline=None)
@given(seeds, ties)
def test_delong_against_all_pairs(seed, levels):
    y, a, who = data(seed, levels=levels); b = data(seed+1, levels=levels)[1]
    d = delong(y, np.stack([a,b]))
    assert d.cov == pytest.approx(pairs_cov(y, [a,b]), abs=1e-12)
    assert d.auc == pytest.approx([skm.roc_auc_score(y, s) for s in (a,b)], abs=1e-12)
    one_each = delong(y, np.stack([a,b]), patients=np.arange(len(y))); assert one_each.cov == pytest.approx(d.cov, abs=1e-14)

@settings(max_examples=20, deadline=None)
@given(seeds)
def test_delong_invariances(seed):
    y, a, who = data(seed); o = rng(seed, "order").permutation(len(y)); d = delong(y, a, patients=who)
    assert delong(y[o], a[o], patients=who[o]).cov == pytest.approx(d.cov, abs=1e-14)
    assert delong(y, np.exp(3*a), patients=who).cov == pytest.approx(d.cov, abs=1e-14)            # only ranks count
    turned = delong(1-y, 1-a, patients=who); assert turned.cov == pytest.approx(d.cov, abs=1e-12) and turned.auc == pytest.approx(d.auc)

def test_joint_test_of_two_is_the_paired_test():
    y, a, who = data(2, n=150); b = data(3, n=150)[1]; d = delong(y, np.stack([a,b]), patients=who)
    assert joint_test(d)["p"] == pytest.approx(paired_test(y, a, b, patients=who, dist="normal")["p"])

def test_a_perfect_score_still_has_an_interval():
    d = delong([0]*30 + [1]*4, np.arange(34.)); lo, hi = auc_interval(d)
    assert d.auc[0] == 1 and hi == 1 and .3 < lo < .45
    same = paired_test([0]*30 + [1]*4, np.arange(34.), np.arange(34.)*2); assert same["p"] == 1 and same["lo"] == same["hi"] == 0

# ---- seeds and many comparisons

def test_seeds_against_scipy():
    a, b = rng(0,"a").normal(size=6), rng(0,"b").normal(size=6); r = paired_seeds(a, b); ref = stats.ttest_rel(a, b); ci = ref.confidence_interval()
    assert (r["p"], r["lo"], r["hi"]) == pytest.approx((ref.pvalue, ci.low, ci.high)); assert over_seeds(a)["sd"] == pytest.approx(a.std(ddof=1))
    w = stats.binomtest(int((a>b).sum()), 6).proportion_ci(method="wilson"); q = prob_better(a, b)
    assert (q["better_lo"], q["better_hi"]) == pytest.approx((w.low, w.high))
    assert corrected_t(a-b, test_share=0)["p"] == pytest.approx(stats.ttest_1samp(a-b, 0).pvalue)
    assert corrected_t(a-b, test_share=.5)["se"] > corrected_t(a-b, test_share=0)["se"]

@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_by_its_definition(p):
    "Step down: a hypothesis is rejected at alpha exactly when its adjusted p is at most alpha."
    adj = holm(p); order = np.argsort(p, kind="stable")
    for alpha in (.01, .05, .2):
        rejected, m = set(), len(p)
        for rank, i in enumerate(order):
            if p[i]*(m-rank) > alpha: break
            rejected.add(int(i))
        assert rejected == {i for i in range(m) if adj[i] <= alpha}

def test_interval_holds_the_auroc_of_a_constant_classifier():
    "A collapsed classifier has AUROC 0.5 whatever the patients; only 0 and 1 take the binomial limit."
    flat = delong([1]*100 + [0]*100, np.full(200, .5))
    assert auc_interval(flat) == auc_interval(flat, scale="plain") == (.5, .5)
    lo, hi = auc_interval(delong([0]*9 + [1]*5, np.arange(14)))
    assert (lo, hi) == (pytest.approx(.025**.2), 1)
    lo, hi = auc_interval(delong([1]*9 + [0]*5, np.arange(14)))
    assert (lo, hi) == (0, pytest.approx(1 - .025**.2))
