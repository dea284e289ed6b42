"The privacy audit: a copying generator is caught, one that never saw the data is not accused, a discriminator that learnt by heart gives itself away, patients count and not patches."
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mammo_nb.core import DataError, LeakError, WeightsError, hash_of, read_json, rng
from mammo_nb.data.patches import PatchSet, patch_table
from mammo_nb.gans.fit import generator_folders, take_generator
from mammo_nb.metrics.features import texture_patches
from mammo_nb.gans.privacy import (FEW, NAMES, Audit, attack_scores, audit, discriminator_scores, load_discriminator, looks, member_control, nearness, no_audit, tpr_at)
from mammo_nb.papers import sharing as paper
from mammo_nb.params import Params
from mammo_nb.runs import Run

def women(k, seed, patches=2, size=32):
    "Patches of k patients; several of one patient are one texture, shifted and noisy."
    x, g = texture_patches(k, seed=seed, size=size), rng(seed, "women")
    px = np.stack([np.clip(np.roll(x, 2*j, axis=2) + g.normal(0, 3, x.shape), 0, 255).astype(np.uint8) for j in range(patches)], 1)
    return SimpleNamespace(pixels=px.reshape(-1, 1, size, size), table=pd.DataFrame(dict(patient_id=np.repeat([f"{seed}:{i}" for i in range(k)], patches))))

MEMBERS, HELD = women(40, 1), women(40, 2)

def planted(rows, noise=4., seed=0):
    "Training patches as a copying generator hands them out: flipped, a little noisy."
    x = MEMBERS.pixels[rows,0][:,::-1]
    return np.clip(x + rng(seed, "planted").normal(0, noise, x.shape), 0, 255).astype(np.uint8)

@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_copies_are_caught(seed):
    a = audit(planted(np.arange(80), seed=seed), MEMBERS, HELD, seed=seed, boots=200)
    attacks = a.table[a.table.attack != NAMES["blind"]]
    assert (attacks.tpr >= .9).all() and (attacks.fpr <= .01).all() and (attacks.lo > .8).all() and set(attacks.verdict) == {"leak"} and a.verdict == "leak"
    assert (attacks.control_lo < .5).all() and (attacks.control_hi > .5).all(), "members against members stay around 0.5"
    assert (a.pairs.ratio < a.pairs.held_1pct).all() and "Members can be recognised" in a.words

def test_a_few_planted_patients_are_caught_although_the_auroc_is_near_half():
    mixed = np.concatenate([texture_patches(200, seed=9, size=32), planted(np.arange(0, 32, 2))])      # 16 of 40 patients
    a = audit(mixed, MEMBERS, HELD, seed=0, boots=200)
    assert a.verdict == "leak" and (a.table.auc[:2] < .9).all() and (a.table.tpr_lo[:2] > .1).all()

def test_a_generator_that_never_saw_the_data_is_not_accused():
    "Two attacks on each of twelve innocent generators, new patients each time: 0.5 lies within the interval about 19 times in 20, a verdict is rare."
    inside = accused = 0
    for s in range(12):
        a = audit(texture_patches(120, seed=1000+s, size=32), women(24, 100+s), women(24, 200+s), seed=s, boots=100)
        t = a.table[a.table.attack != NAMES["blind"]]
        inside += ((t.lo <= .5) & (t.hi >= .5)).sum(); accused += (t.verdict == "leak").sum()
    assert inside >= 20 and accused <= 1, (inside, accused)

def test_patients_count_and_not_patches():
    "Thirty copies of each patch add nothing to what is known."
    many = SimpleNamespace(pixels=np.repeat(MEMBERS.pixels[::2], 6, 0), table=MEMBERS.table.iloc[np.repeat(np.arange(0,80,2), 6)].reset_index(drop=True))
    one = SimpleNamespace(pixels=MEMBERS.pixels[::2], table=MEMBERS.table[::2].reset_index(drop=True))
    fake = texture_patches(80, seed=5, size=32)
    a, b = (audit(fake, m, HELD, seed=0, boots=200).table for m in (many, one))
    np.testing.assert_allclose(a.auc[:2], b.auc[:2], atol=1e-9)
    np.testing.assert_allclose(a.lo[:2], b.lo[:2], atol=1e-6); np.testing.assert_allclose(a.hi[:2], b.hi[:2], atol=1e-6)

def test_biased_split_gives_no_verdict():
    dark = SimpleNamespace(pixels=(HELD.pixels*.85).astype(np.uint8), table=HELD.table)
    a = audit(texture_patches(80, seed=5, size=32), MEMBERS, dark, seed=0, boots=100)
    assert a.verdict == "cannot tell" and a.table.verdict.iloc[-1] == "biased split"

def test_tpr_at_is_the_roc_curve_of_scikit_learn():
    from sklearn.metrics import roc_curve
    g = rng(0, "roc")
    for n in (50, 400):
        y, s = g.random(n) < .5, np.round(g.normal(size=n), 1)
        w = g.integers(0, 3, n).astype(float)
        for weights in (None, w):
            fpr, tpr, _ = roc_curve(y, s, sample_weight=weights, drop_intermediate=False)
            for at in (0., .01, .1, .5): assert tpr_at(y, s, fpr=at, weights=weights)[0,0] == pytest.approx(tpr[fpr <= at + 1e-12].max())

def test_nearness_by_hand():
    "One sample, two members, one outsider; distances on a line at 0 (sample), 1, 3 (members), 9 (outsider)."
    at = np.array([1., 3., 9.])
    got = nearness((np.array([[1., 3.]]), np.array([[9.]])), np.abs(at[:,None]-at[None]), ["a","b","c"])
    np.testing.assert_allclose(got, np.log([2/1, 2/3, 6/9]))
    same = nearness((np.array([[1., 3.]]), np.array([[9.]])), np.abs(at[:,None]-at[None]), ["a","a","c"])
    np.testing.assert_allclose(same, np.log([8/1, 6/3, 6/9]))                                          # a patch of the same patient is no reference

@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    "A discriminator that has seen 24 patches of 12 patients far too often."
    from mammo_nb.gans.share import patient_card
    from mammo_nb.gans.train import RECIPES, train_gan
    import mammo_nb.gans.dcgan
    members = women(12, 11, size=16); d = tmp_path_factory.mktemp("gan")
    t = train_gan(RECIPES["sharing_dcgan"].small(size=16, width=1/8, snapshots="last"), members.pixels, folder=d, seed=0, epochs=150, card=patient_card(members.table.patient_id))
    return members, t

def test_discriminator_attack_finds_what_was_learnt_by_heart(learnt):
    members, t = learnt
    held = women(12, 12, size=16)
    a = audit(t.snapshots[-1], members, held, seed=0, discriminator=t.folder, n=64, boots=200)
    d = a.table.set_index("attack").loc[NAMES["discriminator"]]
    assert d.auc > .8 and d.lo > .5 and d.verdict == "leak"
    D = load_discriminator(t.folder)
    assert not D.training and d.auc == pytest.approx(a.table.auc[0])
    flipped = SimpleNamespace(**{**vars(members), "pixels":members.pixels[...,::-1]})
    np.testing.assert_allclose(discriminator_scores(D, flipped.pixels), discriminator_scores(D, members.pixels), atol=1e-5)   # all flips are asked

def test_card_decides_who_is_a_member(learnt):
    members, t = learnt
    with pytest.raises(LeakError, match="saw 12 of the held-out patients and not 12 of the members"): audit(t.snapshots[-1], women(12, 12, size=16), members, seed=0, n=8)

def test_audit_is_the_same_twice_and_survives_a_folder(tmp_path):
    fake = texture_patches(40, seed=5, size=32)
    a, b = (audit(fake, MEMBERS, HELD, seed=3, boots=50) for _ in range(2))
    assert a.as_json() == b.as_json()
    back = Audit.load(a.save(tmp_path))
    assert back.as_json() == a.as_json() and (tmp_path/"pairs.png").is_file()
    (tmp_path/"audit.json").write_text("[]")
    with pytest.raises(DataError, match="no audit"): Audit.load(tmp_path)

def test_few_patients_and_bad_input(tmp_path):
    few = audit(texture_patches(40, seed=5, size=32), women(FEW-1, 1), HELD, seed=0, boots=50)
    assert few.verdict == "cannot tell" and f"fewer than {FEW} patients" in few.words
    with pytest.raises(LeakError, match="equal pixels"):
        x = lambda who: SimpleNamespace(pixels=MEMBERS.pixels, table=pd.DataFrame(dict(patient_id=[f"{who}{i}" for i in range(80)], pixel_hash=[hash_of(i) for i in range(80)])))
        audit(texture_patches(8, seed=5, size=32), x("a"), x("b"), seed=0)
    with pytest.raises(DataError, match="at one size"): audit(texture_patches(8, seed=5, size=32), MEMBERS, women(4, 5, size=16), seed=0)
    with pytest.raises(WeightsError, match="no discriminator"): load_discriminator(tmp_path)
    (tmp_path/"checkpoint-00010000.json").write_text('{"identity": {"recipe": {"name": "NoSuchGAN"}, "seed": 0}}')
    with pytest.raises((WeightsError, DataError)): load_discriminator(tmp_path)

def as_set(ps):
    "The same patches as a patch set."
    return PatchSet(ps.pixels, patch_table(ps.table.assign(patch_id=[f"x{i}" for i in range(len(ps.table))])))

def test_paper_04_takes_a_generator_that_was_handed_over_and_audits_its_own(tmp_path, learnt):
    members, t = learnt
    stage, trained = tmp_path/"taken", tmp_path/"trained"
    take_generator(stage, path=t.snapshots[-1], patients=["a:1", "a:2"])
    assert [f.name for f in generator_folders(stage)] == [t.snapshots[-1].name] and "none of 2 patients" in read_json(stage/"origin.json")["unseen"]
    with pytest.raises(LeakError): take_generator(tmp_path/"seen", path=t.snapshots[-1], patients=["a:1", members.table.patient_id[0]])
    shutil.copytree(t.folder, trained/"gan")
    params = Params(seed=0, preset="demo", protocol="paper", data_dir="", run_dir=str(tmp_path/"run"), device="cpu", mode="exact", only="")
    run = Run(params, paper=paper.PAPER.name, setup=replace(paper.DEMO, size=16, audit=32, boots=50), protocol=paper.Protocol())
    ours, theirs = ("bcdr_dcgan", "masses"), ("optimam_dcgan", "masses")
    cuts, held = paper.Cuts({}, {("b", "masses"): {16: as_set(members)}}), {ours: as_set(women(12, 12, size=16)), theirs: "it was trained elsewhere"}
    done = run.do(paper.audits(run, cuts, {ours: trained, theirs: stage}, held), workers=1)
    paper.keep_audits(run, done)
    table = paper.audit_table(done, held).set_index("generator")
    assert list(done) == [ours] and "leak" in set(table.verdict["bcdr_dcgan"]) and "trained elsewhere" in table.verdict["optimam_dcgan"]
    assert (run.dir/"audits"/"bcdr_dcgan-masses"/"audit.json").is_file()
