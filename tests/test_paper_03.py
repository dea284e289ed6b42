"Paper 03: the splits and what they let through, bad input, resume, and the notebook run small under three protocols."
import subprocess, sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mammo_nb.core import DataError, LeakError, ParameterError, WeightsError, rng, read_json
from mammo_nb.data.patches import PatchSet, patch_table
from mammo_nb.papers import cbis as paper, cbis_page as page
from mammo_nb.report.tables import RESULT_COLUMNS

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent/"shared"/"data"


def masses(n=160, **more):
    "Two views of each mass, every fourth patient an official test patient."
    i = np.arange(n)
    t = dict(patch_id=[f"t:{k}" for k in i], patient_id=[f"t:p{k//2}" for k in i], image_id=[f"t:i{k}" for k in i], lesion_id="1", label=[paper.NAMES[k//2%2] for k in i],
             label_raw=[("BENIGN_WITHOUT_CALLBACK", "MALIGNANT")[k//2%2] for k in i], birads="4", density=2., official_split=["test" if k//2%8 > 5 else "train" for k in i], dataset="t", path="x", target=1, lesion_type="mass")
    return pd.DataFrame({**t, **more})


def data(t): return SimpleNamespace(name="t", patches=t, images=[], lesions=[])


def image_set(t, size=32):
    "Malignant masses are brighter in the middle."
    y, g = paper.labels_of(t), rng(0, "toy images")
    x = g.normal(100, 25, (len(t), size, size)); x[:, 8:24, 8:24] += 45*y[:, None, None]
    return PatchSet(x.clip(0, 255).astype(np.uint8)[:, None], patch_table(t.assign(pixel_hash=[f"h{i}" for i in range(len(t))])))


def parameters(**more):
    P = dict(seed=0, preset="demo", mode="exact", protocol="paper", data_dir="", protocols="", models="", cgan_models="", image="", size=0, patients=0, updates=0, synthetic=0, trials=0, search_trials=0, clf_epochs=0,
             lr=0., weights="", augment=True, leak_test=True, boots=0, split_seed=-1, gan_seed=-1, phantom_seed=0)
    return SimpleNamespace(**{**P, **more})


def small(**more):
    "Settings of seconds: the simple CNN, one trial, ten updates."
    R = paper.resolve(parameters(**{**dict(models="cnn", cgan_models="cnn", trials=1, updates=10, clf_epochs=2, boots=40), **more}))
    R.setup = replace(R.setup, size=32, gan=dict(size=32, width=1/8, channels=1), nets={"cnn": dict(kind="notebook_cnn", size=32, widths=(8, 8), hidden=16, channels=1)}, digit_updates=10)
    return R


class Stages:
    "A run that keeps its stages in one folder."
    def __init__(self, folder): import torch; self.folder, self.device, self.asked, self.notes = Path(folder), torch.device("cpu"), {}, {}
    def log(self, **kw): pass
    def note(self, **kw): self.notes.update(kw)
    def stage(self, name, fn, *, inputs, group, shared=False): return self.stages([dict(name=name, fn=fn, inputs=inputs, group=group)])[0]
    def stages(self, jobs, **kw): return [self._one(**j) for j in jobs]
    def _one(self, name, fn, inputs, group, shared=False):
        self.asked[name] = inputs; d = self.folder/name
        if any(v is None for v in inputs.values()): return None
        if not d.is_dir(): d.mkdir(parents=True); fn(d)
        return d


def test_published_size_is_what_was_published():
    R = paper.resolve(parameters(preset="paper"))
    S, g = R.setup, paper.gan_recipe(R)
    assert (S.size, S.image, S.updates, S.n_synthetic(1187), S.blur, S.clf_batch, S.lr, S.clf_epochs) == (224, "full", 30_000, 550, 5, 16, 1e-4, 20)
    assert (g.size, g.nz, g.channels, g.base, g.epochs*g.updates_epoch, g.batch, g.betas, g.lr_g, g.drop) == (224, 100, 3, 14, 30_000, 16, (.5, .999), 2e-4, .4)
    from mammo_nb.clf.cnn import n_params
    from mammo_nb.clf.train import build_classifier
    assert n_params(build_classifier(S.nets["cnn"])) == 1_917_698
    c = R.cells[R.cells.regime == ""]
    assert set(c.model) == set(paper.MODELS) and set(c.model[c.arm == "cgan"]) == {"inceptionresnetv2"} and set(R.cells.protocol) == set(paper.PROTOCOLS)
    with pytest.raises(ParameterError, match="nothing is left of 48 px"): paper.resolve(parameters(preset="paper", size=48))
    with pytest.raises(WeightsError, match="vgg16.safetensors"): paper.resolve(parameters(weights=str(ROOT/"tests")))


def test_one_class_unknown_labels_and_few_patients():
    t, left = paper.mass_rows(data(masses(label=["unknown"]*40 + ["benign", "malignant"]*60)))
    assert len(t) == 120 and left.reason.tolist() == ["pathology unknown"] and left["count"].tolist() == [40]
    with pytest.raises(DataError, match="only one class: 0 malignant and 160 benign"): paper.check_masses(masses(label="benign"), "here")
    with pytest.raises(DataError, match="too few patients"): paper.check_masses(masses(patient_id=[f"t:{k%4}" for k in range(160)]), "here")
    with pytest.raises(DataError, match="no ready patches"): paper.mass_rows(SimpleNamespace(name="t", patches=None, images=[], lesions=[]))


def test_benign_without_callback_is_benign_and_counted_apart():
    t, _ = paper.mass_rows(data(masses()))
    assert set(t.label[t.label_raw == "BENIGN_WITHOUT_CALLBACK"]) == {"benign"}
    assert page.type_shares(t).set_index("pathology").masses.to_dict() == {"MALIGNANT": 60, "BENIGN_WITHOUT_CALLBACK": 60}      # of the training table only


def test_known_test_patient_is_refused_under_clean_and_counted_under_paper():
    ps, R = image_set(masses(patient_id=[f"t:p{k//2}" if k < 158 else "t:p0" for k in range(160)])), small()
    with pytest.raises(LeakError, match="patient"): paper.make_splits(ps, R)
    R = small(protocols="paper"); R.cells = R.cells[R.cells.protocol == "paper"]
    leaks = paper.leak_counts(ps.table, paper.make_splits(ps, R))
    assert leaks.patient_in_training[0] > .5 and leaks.name_accuracy[0] > leaks.majority[0]


def test_no_official_split_is_split_by_patient():
    t = masses(official_split=None)
    side = paper.split_rows(t, "clean", seed=0)
    assert all(len(set(side[(t.patient_id == p).to_numpy()])) == 1 for p in set(t.patient_id)) and set(side) == {"train", "val", "test"}


def test_images_of_mixed_size_and_broken_ones(tmp_path):
    from PIL import Image
    t = masses(12)
    for i, (h, w) in enumerate([(40, 40), (60, 30), (128, 128)]*4): Image.fromarray(rng(0, "mixed", i).integers(0, 255, (h, w), dtype=np.uint8)).save(tmp_path/f"{i}.png")
    (tmp_path/"5.png").write_bytes(b"no picture")
    t["path"] = [str(tmp_path/f"{i}.png") for i in range(12)]
    paper.cut_masses(tmp_path/"stage", t=t, size=32, blur=5)
    ps = PatchSet.load(tmp_path/"stage"/"patches")
    assert ps.pixels.shape == (11, 1, 32, 32) and "t:5" not in set(ps.table.patch_id) and len(ps.skipped) == 1
    assert read_json(tmp_path/"stage"/"sizes.json") == dict(images=11, sizes=3, not_square=4)


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    "All protocols on toy images, twice."
    out, ps = [], image_set(masses())
    for name in "ab":
        R, run = small(), Stages(tmp_path_factory.mktemp(name))
        sides = paper.make_splits(ps, R)
        G = paper.train_generators(run, R, ps, sides)
        cells = paper.train_classifiers(run, R, ps, sides, G)
        out.append((R, run, sides, G, cells, ps))
    return out


def test_same_seed_same_answers(studied):
    a, b = (paper.load_answers(s[4]) for s in studied)
    pd.testing.assert_frame_equal(a, b)


def test_three_test_patients_of_a_class_give_no_quality_and_no_end_of_the_run(tmp_path, studied):
    R, _, sides, G, _, ps = studied[0]
    side, who, y = sides["clean"].copy(), ps.table.patient_id.to_numpy(), paper.labels_of(ps.table)
    for c in (0, 1):
        rest = np.unique(who[(side == "test") & (y == c)])[3:]
        side[np.isin(who, rest) & (side == "test")] = "val"
    paper.measure_generator(tmp_path, generator=G["clean", 0], ps=ps, side=side, R=R, device="cpu")
    assert (side == "test").sum() == 12 and "kid" not in set(pd.read_csv(tmp_path/"quality.csv").metric)


def test_an_interval_that_leaves_out_its_value_is_drawn_as_it_is(tmp_path):
    rows = [dict(scope="masses", regime="", model="cnn", metric=m, protocol=p, arm=a, value=.25, lo=.4, hi=.9) for m in ("accuracy", "auroc") for p in paper.PROTOCOLS for a in page.ARM_ORDER]
    page.protocol_figure(tmp_path, pd.DataFrame(rows), "cnn", "seven patients")
    assert any((tmp_path/"figures").glob("protocols_cnn*"))


def test_who_is_tested(studied):
    R, run, sides, G, cells, ps = studied[0]
    t = paper.load_answers(cells); test = t[t.side == "test"]
    assert test.groupby(["protocol", "arm"]).synthetic.any().to_dict() == {("authors", "cgan"): True, ("authors", "none"): False, ("clean", "cgan"): False, ("clean", "none"): False, ("paper", "cgan"): False, ("paper", "none"): False}
    assert not test[test.protocol == "clean"].known.any() and test[test.protocol == "paper"].known.any()
    train = t[(t.side == "train") & (t.arm == "cgan")]
    assert (train.groupby("protocol").synthetic.sum() > 0).all()
    made = paper.synthetic_of(G["clean", 0])
    who = set(next(iter(made.generators.values())))
    assert not who & set(ps.table.patient_id[sides["clean"] == "test"]) and made.table.label.value_counts().nunique() == 1
    assert sorted(n for n in run.asked if "none" in n and "authors" in n) == []        # trained once, as paper


def test_results_hold_together(studied):
    R, run, sides, G, cells, ps = studied[0]
    units = paper.units_of(paper.load_answers(cells, names=paper.name_answers(ps.table, sides, protocols=R.protocols)))
    r = paper.score_run(units, boots=40, seed=0, tags=dict(paper="03_cgan_augmentation", run="r", seed=0, data="toy", preset="demo"))
    assert list(r.columns) == RESULT_COLUMNS and (r.lo <= r.value + 1e-9).all() and (r.value <= r.hi + 1e-9).all()
    by = r[(r.scope == "masses") & (r.regime == "")].set_index(["protocol", "model", "arm", "metric"]).value
    assert by["authors", "cnn", "none", "accuracy"] == by["paper", "cnn", "none", "accuracy"]
    assert by["paper", "name", "none", "auroc"] > .7 and by["clean", "name", "none", "auroc"] == .5
    for a in ("none", "cgan_average"): assert by["clean", "cnn", a, "overfit_gap"] == pytest.approx(by["clean", "cnn", a, "train_accuracy"] - by["clean", "cnn", a, "accuracy"])
    q = paper.ask(units, boots=40, seed=0).set_index(["question", "metric"]).value
    assert q["cgan_clean", "accuracy"] == pytest.approx(by["clean", "cnn", "cgan_average", "accuracy"] - by["clean", "cnn", "none", "accuracy"])
    assert {"known_patients", "random_split", "dealt_out_again", "synthetic_test", "best_cgan"} <= set(q.index.get_level_values(0))


def test_no_stage_no_number():
    empty = paper.load_answers(small().cells.assign(folder=None)); units = paper.units_of(empty)
    assert units == [] and len(paper.ask(units, boots=10, seed=0)) == 0 and len(paper.delong_table(units)) == 0


def test_several_seeds(tmp_path, studied):
    from mammo_nb.core import write_csv, write_json
    R, run, sides, G, cells, ps = studied[0]
    for s in (0, 1):
        a = paper.load_answers(cells); a["p"] = (a.p + .01*s*rng(s, "jitter").normal(size=len(a))).clip(0, 1); d = tmp_path/f"seed{s}"
        tags = dict(paper="03_cgan_augmentation", run=f"seed{s}", seed=s, data="toy", preset="demo")
        write_csv(d/"results.csv", paper.score_run(paper.units_of(a), boots=40, seed=s, tags=tags)); write_csv(d/"tables"/"answers.csv", a); write_json(d/"run.json", dict(parameters=dict(seed=s)))
    v = page.gather_seeds([tmp_path], tmp_path/"out", boots=40)
    assert set(v) == set(paper.PROTOCOLS) and (tmp_path/"out"/"report.html").stat().st_size < 5_000_000
    q = pd.read_csv(tmp_path/"out"/"tables"/"questions.csv")
    assert (q.seeds == 2).all() and (q.lo <= q.value + 1e-9).all() and (q.value <= q.hi + 1e-9).all()


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, cache):
    import os
    d = tmp_path_factory.mktemp("paper03")
    cmd = [sys.executable, "-m", "papermill", str(ROOT/"nbs"/"03_cgan_augmentation.ipynb"), str(d/"out.ipynb"), "--no-progress-bar"]
    for k, v in dict(seed=1, run_dir=d/"run", patients=40, models="cnn", cgan_models="cnn", trials=1, updates=10, clf_epochs=1, boots=40).items(): cmd += ["-p", k, str(v)]
    done = subprocess.run(cmd, cwd=d, env=os.environ | {"MAMMO_NB_CACHE": str(cache), "MPLBACKEND": "agg"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return d/"run"


def test_notebook_leaves_every_table_and_the_report(small_run):
    assert {"types", "assessment", "forensics", "leaks", "skipped", "quality", "answers", "questions", "delong", "claims"} <= {p.stem for p in (small_run/"tables").glob("*.csv")}
    info, r = read_json(small_run/"run.json"), pd.read_csv(small_run/"results.csv")
    assert info["status"] == "done" and info["data_hash"] and set(r.protocol) == set(paper.PROTOCOLS) and {"none", "cgan_average", "cgan_best"} <= set(r.arm)
    text = (small_run/"report.html").read_text()
    assert "PHANTOM DATA" in text and "223 images (real + synthetic" in text and "only the patient" in text and 'src="http' not in text and len(text) < 10_000_000
    assert len(pd.read_csv(small_run/"tables"/"claims.csv")) == 3


@pytest.mark.data
def test_real_masses_and_the_published_split():
    if not (SHARED/"cbis_mass_patches").is_dir(): pytest.skip("shared/data with the real masses is not here")
    from mammo_nb.data.readers import read_any
    t, left = paper.mass_rows(read_any(SHARED, names=["cbis_mass_patches"])["cbis_mass_patches"])
    assert len(t) == 1696 and left["count"].tolist() == [2]
    assert (100*page.type_shares(t).share).round(1).tolist() == [48.3, 43.8, 7.9]              # Figure 1
    s = paper.split_rows(t, "paper", seed=42)
    assert {k: int((s == k).sum()) for k in ("train", "test", "val")} == dict(train=1187, test=341, val=168)
    leaks = paper.leak_counts(t, dict(paper=s, clean=paper.split_rows(t, "clean", seed=0))).set_index("protocol")
    assert leaks.patient_in_training["paper"] == pytest.approx(.636, abs=5e-4) and leaks.image_in_training["paper"] == pytest.approx(.085, abs=5e-4)
    assert leaks.name_accuracy["paper"] > .75 and leaks.patient_in_training["clean"] == 0 and leaks.name_auroc["clean"] == .5


@pytest.mark.gpu
def test_small_run_on_a_gpu(tmp_path):
    import torch
    R, run, ps = small(), Stages(tmp_path), image_set(masses()); run.device = torch.device("cuda")
    sides = paper.make_splits(ps, R)
    cells = paper.train_classifiers(run, R, ps, sides, paper.train_generators(run, R, ps, sides))
    assert paper.load_answers(cells).p.between(0, 1).all()
