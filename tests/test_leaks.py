"No patient on two sides, whatever the table; and a leak of any kind stops the run."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from mammo_nb.core import DataError, LeakError, rng
from mammo_nb.data.patches import PatchSet, patch_table, pixel_hash, synthetic_patches
from mammo_nb.data.splits import (SPLITS, balance_table, check_leaks, folds, half, nested_subsets, patient_counts, split_patients, without_doubles)

QUICK = settings(max_examples=40, deadline=None, derandomize=True)

@st.composite
def cohort(draw):
    "A patch table: patients with any number of lesions and healthy patches, density often unknown."
    n, seed = draw(st.integers(9, 40)), draw(st.integers(0, 10**6))
    g, rows = rng(seed, "cohort"), []
    for i in range(n):
        lesions = int(g.integers(1, 6)) if i < 3 or g.random() < draw(st.sampled_from([.3, .7])) else 0
        healthy = int(g.integers(0 if lesions else 1, 5))
        d = g.choice([1, 2, 3, 4, np.nan])
        rows += [dict(patient_id=f"d:{i}", target=t, lesion_type=("mass" if i < 3 or g.random() < .5 else "calcification") if t else "healthy", density=d) for t in [1]*lesions+[0]*healthy]
    return pd.DataFrame(rows).assign(patch_id=lambda d: [f"p{i}" for i in range(len(d))])

@QUICK
@given(cohort(), st.integers(0, 100), st.sampled_from(["lesions", "masses"]))
def test_split_is_a_partition_of_patients(table, seed, scope):
    s = split_patients(table, seed=seed, scope=scope, tries=50)
    assert set(s.index) == set(table.patient_id) and s.index.is_unique and set(s) == set(SPLITS)
    lesion = table[table.target.eq(1) & (table.lesion_type.eq("mass") | (scope == "lesions"))].patient_id.map(s)
    assert set(lesion) == set(SPLITS)                                                       # no split is without lesions
    shuffled = table.sample(frac=1, random_state=seed)
    pd.testing.assert_series_equal(s, split_patients(shuffled, seed=seed, scope=scope, tries=50))
    b = balance_table(s, table, scope=scope)
    assert b.patients.sum() == len(s) and b.lesions.sum() == len(lesion)

@QUICK
@given(cohort(), st.integers(0, 100), st.booleans())
def test_folds_keep_patients_together(table, seed, rotating):
    f = folds(table, seed=seed, rotating=rotating, test=1/3, val=.2)
    assert set(f.index) == set(table.patient_id) and f.isin(SPLITS).all().all() and all(set(f[c]) == set(SPLITS) for c in f)
    times = f.eq("test").sum(axis=1)
    assert (times == 1).all() if rotating else times.isin([0, 3]).all()

@QUICK
@given(cohort(), st.integers(0, 100), st.floats(.05, 1), st.floats(.05, 1), st.sampled_from(["patch", "patient"]))
def test_halves_are_nested_and_keep_both_classes(table, seed, a, b, by):
    small, large = (half(table, seed=seed, share=s, by=by) for s in sorted((a, b)))
    assert not (small & ~large).any() and half(table, seed=seed, share=1, by=by).all()
    assert set(table.target[small]) == set(table.target) or by == "patient"
    if by == "patient": assert not set(table.patient_id[small]) & set(table.patient_id[~small])
    else: assert all(small[table.target == c].sum() == np.ceil(min(a, b)*(table.target == c).sum()-1e-9) for c in (0, 1))

@QUICK
@given(cohort(), st.integers(0, 100))
def test_nested_subsets_grow(table, seed):
    top = int(min(table.target.sum(), (table.target == 0).sum()))
    sets = nested_subsets(table, (1, max(1, top//2), top), seed=seed, per_positive=1)
    ks = sorted(sets)
    assert all(not (sets[i] & ~sets[j]).any() for i, j in zip(ks, ks[1:]))
    assert all(table.target[sets[k]].sum() == k == (table.target[sets[k]] == 0).sum() for k in ks)

def test_balance_beats_a_plain_shuffle_of_patients():
    g = rng(0, "many")
    table = pd.concat([pd.DataFrame(dict(patient_id=f"d:{i}", target=1, lesion_type="mass", density=g.choice([1, 2, 3, 4])), index=range(1+g.geometric(.1))) for i in range(115)])
    s = split_patients(table, seed=0)
    share = lambda s: table.patient_id.map(s).value_counts(normalize=True).reindex(SPLITS).to_numpy()-[.7, .15, .15]
    plain = [np.abs(share(pd.Series(rng(i, "plain").permutation(s.to_numpy()), index=s.index))).max() for i in range(50)]
    assert np.abs(share(s)).max() < .01 < np.median(plain)
    b = balance_table(s, table)
    assert (b.filter(like="density").max()-b.filter(like="density").min()).max() < 1.01/17          # one patient of the smallest side

def test_unknown_density_is_a_class_of_its_own():
    table = pd.DataFrame(dict(patient_id=[f"d:{i}" for i in range(20)], target=1, lesion_type="mass", density=[np.nan]*10+[2.]*10))
    assert patient_counts(table)["density unknown"].sum() == 10 and len(split_patients(table, seed=0)) == 20

def test_too_few_patients_is_a_typed_error():
    table = pd.DataFrame(dict(patient_id=["d:1", "d:2"], target=1, lesion_type="mass", density=1.))
    with pytest.raises(DataError, match="only 2 patient"): split_patients(table, seed=0)

# ---- leaks ------------------------------------------------------------------------------------------------------------------------

def patch_set(name, patients, seed=None):
    px = rng(0, seed or name).integers(0, 255, (len(patients), 1, 8, 8)).astype(np.uint8)
    return PatchSet(px, patch_table([dict(patch_id=f"{name}{i}", patient_id=p, image_id=f"{p}/{name}{i}", target=i % 2, pixel_hash=pixel_hash(px[i, 0])) for i, p in enumerate(patients)]))

@QUICK
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.lists(st.integers(0, 30), min_size=1, max_size=8))
def test_a_shared_patient_is_always_found(left, right):
    a, b = patch_set("a", [f"d:{i}" for i in left]), patch_set("b", [f"d:{i}" for i in right])
    if set(left) & set(right):
        with pytest.raises(LeakError, match="patient"): check_leaks(train=a, test=b)
    else: assert check_leaks(train=a, test=b).shared.sum() == 0

def test_shared_image_pixels_and_generator_are_found():
    train, test = patch_set("a", ["d:1", "d:2"]), patch_set("b", ["d:3"])
    image = PatchSet(test.pixels, patch_table(test.table.assign(image_id=train.table.image_id[0])))
    with pytest.raises(LeakError, match="image"): check_leaks(train=train, test=image)
    with pytest.raises(LeakError, match="equal pixels"): check_leaks(train=train, test=patch_set("c", ["d:9"], seed="a"))
    fake = synthetic_patches(rng(0, "fake").integers(0, 255, (3, 8, 8)).astype(np.uint8), generator="g", patients=["d:1", "d:3"])
    with pytest.raises(LeakError, match="d:3"): check_leaks(train=train.concat(fake), test=test)
    with pytest.raises(LeakError, match="d:3"): check_leaks(train=test, val=fake)                  # and the other way round
    copied = synthetic_patches(test.pixels[:, 0], generator="copy", patients=["d:1"])
    with pytest.raises(LeakError, match="equal pixels"): check_leaks(train=train.concat(copied), test=test)   # a generator that copied a test patch
    assert check_leaks(train=train.concat(synthetic_patches(fake.pixels[:, 0], generator="g", patients=["d:1"])), test=test).shared.sum() == 0

def test_generators_survive_subset_concat_and_disk(tmp_path):
    real = patch_set("a", ["d:1"])
    x = rng(0, "fake").integers(0, 255, (4, 8, 8)).astype(np.uint8)
    both = real.concat(synthetic_patches(x[:2], generator="g", patients=["d:5"]), synthetic_patches(x[2:], generator="h", patients=["d:6"]))
    back = PatchSet.load(both.save(tmp_path/"set"))
    test = patch_set("t", ["d:6"])
    with pytest.raises(LeakError, match="d:6"): check_leaks(train=back, test=test)
    assert check_leaks(train=back.subset(np.array([0, 1, 2])), test=test).shared.sum() == 0
    assert back.subset([0, 1]).generators != back.generators

def test_blank_patches_are_no_leak_and_doubles_go():
    a, b = patch_set("a", ["d:1", "d:2"]), patch_set("b", ["d:3"])
    blank = lambda s, n: PatchSet(np.zeros_like(s.pixels), patch_table(s.table.assign(patch_id=[f"{n}{i}" for i in range(len(s))], pixel_hash=pixel_hash(np.zeros((8, 8), np.uint8)))))
    assert check_leaks(train=blank(a, "x"), test=blank(b, "y")).shared.sum() == 0
    twice = a.concat(PatchSet(a.pixels, patch_table(a.table.assign(patch_id=["q", "r"]))))
    assert len(without_doubles(twice)) == 2 and len(without_doubles(a, twice)) == 0
