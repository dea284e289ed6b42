"One table of answers gives each of the five papers the numbers its own code gave."
import io
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest

from mammo_nb.core import rng, write_csv
from mammo_nb.metrics.answers import Answers, Cell, Intervals, contrast, said, scores, write_answers
from mammo_nb.metrics.boot import boot_contrasts, holm
from mammo_nb.report.claims import CELL, claims, gains, verdict_table, verdicts

BOOTS, SEED = 60, 3
EXPECTED = Path(__file__).parent/"expected"
CLASSES = ("Healthy", "Benign", "Malignant")


def same(ours:pd.DataFrame, name:str, tmp_path, old:pd.DataFrame=None):
    "The bytes of the table are those that were frozen from the papers' own code, and those of this code where it is still there."
    text = write_csv(tmp_path/f"{name}.csv", ours).read_text()
    frozen = EXPECTED/f"answers_{name}.csv"
    if old is not None: assert text == write_csv(tmp_path/f"{name}_old.csv", old).read_text()
    if old is not None and not frozen.exists(): write_csv(frozen, old)
    a, b = pd.read_csv(io.StringIO(text)), pd.read_csv(frozen)
    pd.testing.assert_frame_equal(a, b, rtol=1e-7, atol=1e-9)


def scored(n, patients, *key, classes=2, gain=1.):
    "Made-up test patches with a class, a patient and answers that know a little."
    g = rng(SEED, "patches", n, patients, classes)
    y, who = np.arange(n) % classes, g.integers(patients, size=n)
    z = rng(SEED, *map(str, key)).normal(size=(n, classes)) + gain*np.eye(classes)[y]
    P = np.exp(z)/np.exp(z).sum(1, keepdims=True)
    t = pd.DataFrame(dict(patch_id=[f"x{i}" for i in range(n)], patient_id=[f"w{i:02d}" for i in who]))
    return t, y, P


# ---------------------------------------------------------------- 04: one training a cell, few patients, another score for ranks
def cells_04(tmp_path):
    out = {}
    for i,(scope,model,regime,arm) in enumerate(product(("lesions","masses"), ("cnn","swin"), ("100","50"), ("none","bcdr_wgangp","bcdr_dcgan","bcdr_real"))):
        t, y, P = scored(60, 20 if scope == "lesions" else 14, "04", i, gain=.5 + .2*(arm != "none"))
        if scope == "masses": t.loc[y == 0, "patient_id"] = [f"n{k % 3}" for k in range((y == 0).sum())]     # healthy tissue of three patients
        out[Cell(scope, model, arm, regime)] = write_answers(tmp_path/f"s{i}", dict(val=said(t[:20], y[:20], P[:20]), test=said(t, y, P, rank=1/(1+np.exp(P[:,0]))))).parent
    out[Cell("masses", "swin", "both_a", "100")] = None
    return out


def test_04_sharing(tmp_path):
    cells = cells_04(tmp_path)
    a, how = Answers.of(cells), Intervals(BOOTS, SEED)
    assert a.few() == ["healthy"]
    res = scores(a, [(m,c) for c in ("healthy","lesion") for m in ("accuracy","f1","auroc","auprc")], how, by_cell=True)
    v = verdicts("04_sharing", a, how, data="phantom", preset="demo")
    g = pd.concat([gains(a, "04_sharing", metric=m, positive="healthy", how=how).assign(metric=m) for m in ("f1","auroc")])
    same(res[[*CELL, "metric", "positive", "value", "lo", "hi", "n", "n_patients"]], "04_results", tmp_path)
    same(v, "04_claims", tmp_path)
    same(g, "04_gains", tmp_path)


# ---------------------------------------------------------------- 01: arms against a baseline, DeLong on the units
def test_01_context(tmp_path):
    from mammo_nb.papers.context_arms import compare_arms
    arms = ("baseline","decay10","decay25","decay50","decay75","decay100","baseline_again")
    frames = {arm: scored(80, 25, "01", arm, gain=.7+.05*i) for i,arm in enumerate(arms)}
    folders = {arm: write_answers(tmp_path/arm, dict(test=said(t, y, P, kind=np.where(y == 1, "malignant_mass", "normal")))).parent for arm,(t,y,P) in frames.items()}
    a, how = Answers.of({Cell("lesions","resnet50",arm): f for arm,f in folders.items()}), Intervals(BOOTS, SEED)
    v = verdicts("01_contextual_gan", a, how, data="phantom", preset="demo")
    same(compare_arms(a.units()), "01_arms", tmp_path)
    same(v, "01_claims", tmp_path)


# ---------------------------------------------------------------- 02: folds, the wider of patients and folds
def test_02_size(tmp_path):
    from mammo_nb.papers import size as old
    cells, lists = {}, []
    for size,k,mode in product(("100","250","1300"), range(3), ("org","gan","aug_org","aug_gan")):
        t, y, P = scored(50, 12, "02", size, k, mode, gain=1 + .3*(mode != "org"))
        t = t.assign(patient_id=f"f{k}" + t.patient_id, patch_id=f"f{k}" + t.patch_id)
        f = write_answers(tmp_path/f"{size}{k}{mode}", dict(test=said(t, y, P))).parent
        cells[Cell("masses", "fcn", mode, size, replicate=f"fold{k}")] = f
        d = pd.read_csv(f/"answers.csv")
        lists.append(dict(scope="masses", model="fcn", arm=mode, regime=size, fold=k, patients=t.patient_id.to_numpy(), y=d.y.to_numpy(), p=d.p.to_numpy()))
    a, how = Answers.of(cells, fewest=0), Intervals(BOOTS, SEED, over="wider")
    interval = ["value","lo","hi","lo_patients","hi_patients","lo_folds","hi_folds","sd_folds","n","n_patients"]
    res = scores(a, [(m,"lesion") for m in ("f1","auroc","auprc","accuracy")], how)[[*CELL, "metric", "positive", *interval]]
    rows, M = a.rows()
    at = {(r.arm, r.regime): i for i,r in enumerate(rows.itertuples())}
    pairs = [(x,y,r) for x,y in (("gan","org"), ("aug_org","org"), ("aug_gan","org"), ("aug_gan","aug_org")) for r in ("100","250","1300")]
    C = np.array([M[at[x,r]]-M[at[y,r]] for x,y,r in pairs])
    more = [contrast(a, C, metric=m, positive="lesion", how=how).assign(scope="masses", model="fcn", arm=[f"{x}-{y}" for x,y,_ in pairs], regime=[r for *_,r in pairs], metric=m, positive="lesion") for m in ("f1","auroc")]
    won = pd.concat(more, ignore_index=True)[[*CELL, "metric", "positive", *interval, "p"]]
    v = verdicts("02_dcgan_size", a, how, data="phantom", preset="demo")
    before = [None]*3
    if hasattr(old, "score_cells"):
        before = [f(lists, n_boot=BOOTS, seed=SEED) for f in (old.score_cells, old.score_gains)]
        ev = {c.id: old.from_folds(c, lists, n_boot=BOOTS, seed=SEED) for c in claims("02_dcgan_size")}
        before.append(verdict_table(claims("02_dcgan_size"), ev, data="phantom", preset="demo"))
    same(res, "02_results", tmp_path, before[0])
    same(won, "02_gains", tmp_path, before[1])
    same(v, "02_claims", tmp_path, before[2])


# ---------------------------------------------------------------- 00: three and two classes, rotating folds and draws of a crop
def answers_00(old):
    cells, lists = {}, []
    def add(c, k, t, y, P):
        two = "binary" in c[0]
        names = ("healthy","lesion") if two else CLASSES
        cells[Cell(*c, replicate=k)] = said(t, np.minimum(y,1) if two else y, P, names=names)
        lists.append(dict(zip(CELL, c), replicate=k, cls=y, P=P, patients=t.patient_id.to_numpy(object), patch_id=t.patch_id.to_numpy(object)))
    for c in old.plan_cells().itertuples(index=False):
        draws = [f"draw{i}" for i in range(3)] if c.regime.endswith("crop") else ["draw0"] if "ensemble" in c.model else [f"fold{i}" for i in range(5)]
        for i,k in enumerate(draws):
            t, y, P = scored(60+i if k.startswith("fold") else 60, 18, "00", *c, k, classes=3)
            t = t.assign(patient_id="f" + ("0" if k.startswith("draw") else str(i % 3)) + t.patient_id)
            if "binary" in c.scope: P = np.stack([P[:,0], 1-P[:,0]], 1)
            add(tuple(c), k, t, y, P)
    return Answers.of(cells, fewest=0), lists


def test_00_shift(tmp_path):
    from mammo_nb.papers import shift as old
    a, lists = answers_00(old)
    how = Intervals(BOOTS, SEED, together=True)
    res = scores(a, [("accuracy",""), *(("auroc",c) for c in (*CLASSES,"lesion"))], how)
    v = verdicts("00_annotation_shift", a, how, data="phantom", preset="demo")
    theirs = a.where(model="resnet50", arm=["G1","G3"], regime=["G1","G2","G3"], scope="three_class")
    other = theirs.named(protocol="lr_constant")
    other.frame["p_malignant"] *= 1 - other.frame.p_benign
    both = Answers.join(other, theirs)
    rows, M = both.rows()
    half = len(rows)//2
    d = contrast(both, M[:half]-M[half:], metric="auroc", positive="Malignant", how=how)
    moved = rows[:half].assign(switch="lr_constant", value=d.value, lo=d.lo, hi=d.hi, p=d.p)[["switch","arm","regime","value","lo","hi","p"]]
    before = [None]*3
    if hasattr(old, "score_cells"):
        before = [old.score_cells(lists, boots=BOOTS, seed=SEED)]
        before.append(verdict_table(claims("00_annotation_shift"), old.weigh_claims(lists, boots=BOOTS, seed=SEED), data="phantom", preset="demo"))
        some = [r for r in lists if r["scope"] == "three_class" and r["model"] == "resnet50" and r["arm"] in ("G1","G3") and r["regime"] in ("G1","G2","G3")]
        changed = [r | dict(P=np.c_[r["P"][:,:2], r["P"][:,2]*(1-r["P"][:,1])]) for r in some]
        before.append(old.departure_effects(lists, dict(lr_constant=changed), boots=BOOTS, seed=SEED))
    same(res[[*CELL, "metric", "positive", "value", "lo", "hi", "n", "n_patients", "sd", "replicates"]], "00_results", tmp_path, before[0])
    same(v, "00_claims", tmp_path, before[1])
    same(moved, "00_departures", tmp_path, before[2])


# ---------------------------------------------------------------- 03: protocols, trials, groups of images, the best trial, training images
def groups_03(t):
    out, protocol, side = dict(masses=np.ones(len(t), bool)), t.protocol.iloc[0], t.side.iloc[0]
    if side != "test": return out
    if protocol == "paper": out |= dict(shared=t.known, new=~t.known)
    if protocol == "authors" and t.synthetic.any(): out |= dict(real=~t.synthetic, synthetic=t.synthetic)
    return out


def same_images(a):
    "`unknown` on the images that count as shared under `known`."
    known = a.where(regime="known", scope="shared", side="test")
    out = []
    for names,t in known.parts:
        u = a.where(regime="unknown", model=names["model"], scope="masses", side="test")
        out.append(Answers(u.frame[u.frame.patient_id.isin(t.patient_id)].assign(scope="shared")))
    return Answers.join(a, *out)


def table_03(a, side="test"):
    "Mean and best trial of each arm under the paper's names."
    frame, W = a.rows("mean", side=side)
    _, B = a.rows("best", side=side, chosen_on="masses")
    names, out = [], []
    for row,w,b in zip(frame.to_dict("records"), W, B):
        arm = row["arm"]
        names.append(row | dict(arm=dict(none="none", cgan="cgan_average")[arm]))
        out.append(w)
        if b.any() and ((w > 0).sum() > 1 or arm == "cgan"):
            names.append(row | dict(arm=f"{arm}_best"))
            out.append(b)
    return pd.DataFrame(names, columns=frame.columns), np.array(out).reshape(len(out), len(a.units()))


def test_03_cbis(tmp_path):
    from mammo_nb.papers import cbis as old
    grid = [(p,m,arm,"",t) for p in ("paper","authors","clean") for m in ("inceptionresnetv2",) for arm in ("none","cgan") for t in range(2)]
    grid += [("paper",m,"none","",0) for m in ("cnn","vgg16")] + [("paper","inceptionresnetv2","none",r,0) for r in ("known","unknown")]
    cells, rows = {}, []
    for p,m,arm,regime,trial in grid:
        synth = p == "authors" and arm == "cgan"
        sides = {}
        for side,n in (("train",60),("val",20),("test",70 if synth else 50)):
            t, y, P = scored(n, 16, "03", p, m, arm, regime, trial, side, gain=.6+.3*(side == "train"))
            known = t.patient_id < "w08"
            if regime == "unknown": known = t.patient_id < ""
            sides[side] = said(t, y, P, names=("benign","malignant"), synthetic=(np.arange(n) >= 50) & synth & (side == "test"), known=known)
        f = write_answers(tmp_path/"-".join(map(str,(p,m,arm,regime,trial))), sides).parent
        cells[Cell("masses", m, arm, regime, p, str(trial))] = f
        rows.append(dict(protocol=p, model=m, arm=arm, regime=regime, trial=trial, folder=f))
    how = Intervals(BOOTS, SEED)
    a = same_images(Answers.of(cells, ("train","test"), fewest=0).groups(groups_03))
    frame, W = table_03(a)
    asked = [("accuracy","malignant"), ("auroc","malignant"), ("recall","malignant"), ("recall","benign")]
    parts = [scores(a, [q], how, rows=(frame, W)).assign(metric=name, positive="malignant", split="test") for q,name in zip(asked, ("accuracy","auroc","malignant_called_malignant","benign_called_benign"))]
    for i,name in ((2,"malignant_called_benign"), (3,"benign_called_malignant")):
        t = parts[i]
        parts.append(t.assign(metric=name, value=1-t.value, lo=1-t.hi, hi=1-t.lo))
    fit, F = table_03(a, "train")
    parts.append(scores(a, [("accuracy","malignant")], how, rows=(fit, F)).assign(metric="train_accuracy", split="test"))
    keys = ["protocol","scope","model","arm","regime"]
    pairs = fit.reset_index().merge(frame.reset_index(), on=keys, suffixes=("_fit","_test"))
    gap = contrast(a, F[pairs.index_fit]-W[pairs.index_test], metric="accuracy", positive="malignant", how=how)
    sizes = [len(a.units()[int(np.argmax(W[i] != 0))]["y"]) for i in pairs.index_test]
    parts.append(pairs[keys].assign(**{k: gap[k] for k in ("value","lo","hi","n_patients")}, n=sizes, metric="overfit_gap", positive="malignant", split="test"))
    res = pd.concat(parts, ignore_index=True)[["protocol","scope","model","arm","regime","metric","positive","value","lo","hi","n","n_patients","split"]].dropna(subset="value").reset_index(drop=True)
    v = verdicts("03_cgan_augmentation", a, how, data="phantom", preset="demo", protocol="paper", rows=(frame, W))
    before = [None]*2
    if hasattr(old, "score_run"):
        for f in cells.values(): write_csv(f/"predictions.csv", pd.read_csv(f/"answers.csv").drop(columns="classes"))
        units = old.units_of(old.load_answers(pd.DataFrame(rows)))
        before = [old.score_run(units, boots=BOOTS, seed=SEED)]
        ev = {c.id: old.claim_evidence(c, units, protocol="paper", boots=BOOTS, seed=SEED) for c in claims("03_cgan_augmentation")}
        before.append(verdict_table(claims("03_cgan_augmentation"), ev, data="phantom", preset="demo", protocol="paper"))
    same(res, "03_results", tmp_path, before[0])
    same(v, "03_claims", tmp_path, before[1])
