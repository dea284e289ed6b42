"Paper 02: the notebook run small by papermill, the parts at their edges, the same bytes twice."
import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mammo_nb.core import DataError, ParameterError, WeightsError, read_json, repo_root
from mammo_nb.data.patches import PatchSet, patch_table, pixel_hash
from mammo_nb.metrics.features import make_extractor, texture_patches
from mammo_nb.papers import size as paper
from mammo_nb.report.tables import RESULT_COLUMNS

NOTEBOOK = repo_root()/"nbs"/"02_dcgan_size.ipynb"


def papermill(out, *parameters, cwd=None):
    "Run the notebook in a process of its own."
    args = [a for k, v in parameters for a in ("-p", k, str(v))]
    return subprocess.run([sys.executable, "-m", "papermill", str(NOTEBOOK), str(out), "--no-progress-bar", *args], capture_output=True, text=True, cwd=cwd, timeout=800)


def toy(masses=40, tissue=160, patients=20, size=32):
    "A study set of textures with and without a blob."
    x = np.concatenate([texture_patches(masses, seed=0, size=size), texture_patches(tissue, seed=1, size=size, blob=False)])
    t = patch_table([dict(patch_id=f"p{i}", patient_id=f"toy:{i % patients}", image_id=f"i{i}", target=int(i < masses), lesion_type="mass" if i < masses else "healthy",
                          dataset="toy", pixel_hash=pixel_hash(p)) for i, p in enumerate(x)])
    return PatchSet(x[:, None], t)


def setting(**more):
    S = replace(paper.PRESETS["demo"], shrink=20., imbalance=4, gan_epochs=2, clf_epochs=2, simulation_epochs=2, fid_every=1, fid_n=12, boots=60)
    return SimpleNamespace(setup=replace(S, **more), mode="exact", protocol=paper.protocol_of("paper"), seeds=dict(seed=0, split=0, gan=0, phantom=0), modes=tuple(paper.MODES),
                           scale=1., extractor=make_extractor("embedded"))


class Stages:
    "A run that keeps its stages in one folder and remembers what it was asked for."
    def __init__(self, folder): self.folder, self.device, self.asked, self.notes = Path(folder), SimpleNamespace(type="cpu"), [], {}
    def log(self, **kw): pass
    def note(self, **kw): self.notes.update(kw)
    def stages(self, jobs, **kw): return [self._one(**j) for j in jobs]
    def _one(self, name, fn, inputs, group, shared=False):
        self.asked.append((name, inputs)); d = self.folder/name
        if any(v is None for v in inputs.values()): return None
        d.mkdir(parents=True, exist_ok=True); fn(d); return d


def study(folder, R, ps, sizes=(100,), modes=("org", "aug_gan")):
    run = Stages(folder); run.device = __import__("torch").device("cpu")
    F = paper.make_folds(ps, R); rows = [paper.training_rows(ps, f, R, sizes) for f in F]
    _, G = paper.train_generators(run, R, ps.subset(ps.y == 1), ps, F, rows, sizes)
    return run, paper.train_classifiers(run, R, ps, F, rows, G, sizes=sizes, modes=modes)[0], G


def bytes_of(folder): return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*"))
                              if p.name in ("predictions.csv", "synthetic.npy", "history.csv", "G.safetensors", "classifier.safetensors")}


def test_same_seed_same_bytes(tmp_path):
    ps, R = toy(), setting()
    for d in ("a", "b"): study(tmp_path/d, R, ps)
    a, b = bytes_of(tmp_path/"a"), bytes_of(tmp_path/"b")
    assert a == b and len(a) >= 3*3 + 6*2


def test_modes_share_weights_and_seeds_do_not_reach_the_generators(tmp_path):
    ps, R = toy(), setting()
    run, cells, G = study(tmp_path/"a", R, ps)
    R.seeds = dict(R.seeds, seed=1)
    other, cells1, G1 = study(tmp_path/"b", R, ps)
    gan = lambda r: {n: i for n, i in r.asked if n.startswith("gan-")}
    assert gan(run) == gan(other)                                     # all seeds share the generators, so a second seed finds them done
    assert any(not np.array_equal(a["p"], b["p"]) for a, b in zip(cells, cells1))
    assert {(c["arm"], c["fold"]) for c in cells} == {(m, f) for m in ("org", "aug_gan") for f in range(3)}


def test_folds_train_on_nobody_they_test_on():
    ps, R = toy(), setting()
    R.protocol = paper.protocol_of("clean")
    for f in paper.make_folds(ps, R):
        who = [set(ps.table.patient_id.iloc[i]) for i in (f.train, f.val, f.test)]
        assert not (who[0] & who[1] or who[0] & who[2] or who[1] & who[2])
        paper.check_leaks(train=ps.subset(f.train), val=ps.subset(f.val), test=ps.subset(f.test))


def test_sizes_that_do_not_fit_are_listed():
    ps, R = toy(), setting()
    t = paper.possible_sizes(ps, paper.make_folds(ps, R), R)
    assert t[t.possible]["size"].tolist() == [100, 250] and t.why[2].startswith("25 masses wanted") and not t.why[0]


def test_one_class_missing_and_blank_images():
    R = setting()
    data = SimpleNamespace(name="only", patches=None, lesions=pd.DataFrame(dict(lesion_type=[])), images=pd.DataFrame(dict(image_id=[])))
    with pytest.raises(DataError, match="no data set|needs lesions and tissue"): paper.cut_patches([], R)
    ps = toy()
    with pytest.raises(DataError, match="no mass among"):
        paper.study_set(PatchSet(ps.pixels[:9], ps.table[:9].assign(lesion_type="calcification")), ps.subset(ps.y == 0), R)
    blank = PatchSet(np.full((40, 1, 32, 32), 9, np.uint8), ps.table[:40].assign(pixel_hash="constant:9"))
    with pytest.raises(DataError, match="one grey value only"): paper._not_blank(blank)


def test_single_patient_of_tissue():
    ps, R = toy(), setting()
    one = PatchSet(ps.pixels, ps.table.assign(patient_id=np.where(ps.y == 1, ps.table.patient_id, "toy:one")))
    assert len(paper.make_folds(one, R)) == 3                          # as the thesis: by patch
    with pytest.raises(DataError, match="protocol paper"): paper.make_folds(one, R, "patient")


def parameters(**more):
    P = dict(seed=0, preset="demo", mode="exact", protocol="paper", switches="", data_dir="", patients=0, gan_epochs=0, simulation_epochs=0, clf_epochs=0, boots=0, imbalance=0, tissue_per_image=0,
             extractor="", weights="", k_shrink=0., fid_n=0, modes="", sizes="", split_seed=-1, gan_seed=-1, phantom_seed=0)
    return SimpleNamespace(**{**P, **more})


def test_published_size_is_what_was_published():
    R = paper.resolve(parameters(preset="paper", extractor="embedded"))
    assert len(R.cells) == 72 and len(paper.plan_generators(R.cells)) == 18
    r = paper.dcgan_recipe(R)
    assert (r.nz, r.batch, r.betas, r.lr_g, r.lr_d, r.decay, r.decay_g, r.decay_d, r.labels, r.jitter) == (200, 64, (0., .99), 4e-4, 2e-4, .99, 10, 8, (.7, 1.), .05)
    assert (R.setup.gan_epochs, R.setup.clf_epochs, R.setup.imbalance, R.setup.factor, R.setup.tsne_iter) == (1000, 20, 10, 1.5, 4000)
    net = paper.build_classifier(dict(kind="fcn", size=128, widths=R.setup.fcn), seed=0)
    assert sum(p.numel() for p in net.parameters()) == 357_768


def test_missing_weights_stop_the_run_at_its_start(tmp_path):
    with pytest.raises(WeightsError, match="or ask for extractor='embedded'"): paper.resolve(parameters(preset="paper", weights=str(tmp_path)))
    with pytest.raises(ParameterError, match="no departures"): paper.resolve(parameters(protocol="clean", switches="no_jitter"))


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    d = tmp_path_factory.mktemp("paper02")
    done = papermill(d/"out.ipynb", ("seed", 1), ("run_dir", d/"run"), ("patients", 24), ("sizes", "100,250"), ("modes", "org,aug_gan"), ("gan_epochs", 3), ("simulation_epochs", 3),
                     ("fid_n", 24), ("clf_epochs", 2), ("boots", 60), cwd=d)
    assert done.returncode == 0, done.stderr[-3000:]
    return d/"run"


def test_notebook_leaves_every_table_figure_and_report(small_run):
    tables = {p.stem for p in (small_run/"tables").glob("*.csv")}
    assert {"counts", "skipped", "leaks", "sizes", "probe", "fid_curve", "quality", "quality_all", "scores", "gains", "claims", "conflicts"} <= tables
    assert "splits" in tables or "not possible" in read_json(small_run/"run.json")["split_comparison"]
    figures = {p.stem for p in (small_run/"figures").glob("*.png")}
    assert figures == {"fig08_fid", "fig09_f1", "table3_auc", "fig10_11_13_tsne", "fig12_batches", "fig14_progress", "fig15_samples", "copies"}
    page = (small_run/"report.html").read_text()
    assert "PHANTOM DATA" in page and "0.9836" in page and "Aug GAN" in page and "src=\"http" not in page
    results = pd.read_csv(small_run/"results.csv")
    assert list(results.columns) == RESULT_COLUMNS and set(results.metric) == {"f1", "auroc", "auprc", "accuracy", "fid"}
    body = results[results.metric != "fid"]
    assert (body.lo <= body.value).all() and (body.value <= body.hi).all()
    claims = pd.read_csv(small_run/"tables"/"claims.csv")
    assert len(claims) == 9 and claims.shown.str.contains("phantom, demo|not run").all()


@pytest.mark.parametrize("name,value,words", [("sead", 1, "did you mean 'seed'"), ("sizes", "100,200", "is not possible"), ("extractor", "inceptoin", "did you mean 'inception'")])
def test_wrong_parameters_are_named(tmp_path, name, value, words):
    done = papermill(tmp_path/"out.ipynb", (name, value), ("run_dir", tmp_path/"run"))
    assert done.returncode != 0 and words in done.stderr and not (tmp_path/"run").exists()


@pytest.mark.data
def test_real_patches(tmp_path):
    root = repo_root().parent/"shared"/"data"
    if not (root/"cbis_mass_patches").is_dir(): pytest.skip("shared/data with the real patches is not here")
    R = setting(); R.setup = replace(R.setup, tissue_per_image=60, imbalance=1, shrink=10.)
    sets, _ = paper.load_sets(parameters(data_dir=str(root)), R)
    lesions, tissue = paper.cut_patches(sets, R)
    ps = paper.study_set(lesions, tissue, R); F = paper.make_folds(ps, R)
    assert len(lesions) > 1600 and len(tissue) > 100
    assert paper.possible_sizes(ps, F, R)["possible"].iloc[0] and paper.leak_counts(ps, F).tissue_of_training_patients.min() > 0
