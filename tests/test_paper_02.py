"Paper 02: the notebook run small by papermill, the parts at their edges, keys that count everything, the same bytes twice."
import hashlib
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mammo_nb.clf.train import build_classifier
from mammo_nb.core import DataError, ParameterError, WeightsError, read_json, repo_root
from mammo_nb.data.patches import PatchSet, patch_table, pixel_hash
from mammo_nb.metrics.features import texture_patches
from mammo_nb.paper import settle
from mammo_nb.papers import size as paper
from mammo_nb.papers import size_setup, size_study
from mammo_nb.params import Params
from mammo_nb.report.tables import RESULT_COLUMNS
from mammo_nb.runs import Run, job_key

NOTEBOOK = repo_root()/"nbs"/"02_dcgan_size.ipynb"
USUAL = dict(seed=0, preset="demo", mode="exact", protocol="paper", switches="", data_dir="", run_dir="", device="cpu", only="",
             weights="", k_shrink=0., modes="", sizes="", split_seed=-1, gan_seed=-1, phantom_seed=0, folds=0, replicates=1, scaling="minmax")
USUAL |= {k: "" if k == "extractor" else 0 for k in size_setup.KNOBS}
SMALL = dict(shrink=20., imbalance=4, trained=3, even=False, gan_epochs=2, clf_epochs=2, simulation_epochs=2, fid_every=1, fid_n=12, boots=60)


def papermill(out, *parameters, cwd=None):
    "Run the notebook in a process of its own."
    args = [a for k, v in parameters for a in ("-p", k, str(v))]
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(out), "--no-progress-bar", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=800)


def toy(masses=40, tissue=160, patients=20, size=32):
    "A study set of textures with and without a blob."
    x = np.concatenate([texture_patches(masses, seed=0, size=size), texture_patches(tissue, seed=1, size=size, blob=False)])
    kinds = ["mass"]*masses + ["healthy"]*tissue
    rows = [dict(patch_id=f"p{i}", patient_id=f"toy:{i % patients}", image_id=f"i{i}", target=int(kinds[i] == "mass"), lesion_type=kinds[i],
                 dataset="toy", pixel_hash=pixel_hash(p)) for i, p in enumerate(x)]
    return PatchSet(x[:, None], patch_table(rows))


def a_run(folder, **over):
    "A run at toy size that keeps everything in its own folder."
    params = Params(**USUAL | dict(run_dir=str(folder)) | over)
    settled = settle(size_setup.PAPER, params)
    return Run(params, paper="02_dcgan_size", **vars(replace(settled, setup=replace(settled.setup, **SMALL))))


def study_of(run, ps, sizes=(100,)): return size_study.make_study(ps, run.setup, sizes, run.protocol.unit, run.seeds.split)


def trained(run, ps, monkeypatch, modes=("org", "aug_gan")):
    monkeypatch.setenv("MAMMO_NB_CACHE", str(run.dir/"cache"))
    study = study_of(run, ps)
    made = run.do(paper.drawings(run, study, run.do(paper.generators(run, ps.subset(ps.y == 1), study))))
    return paper.train(run, paper.classifiers(run, study, made, modes=modes), {})[0]


def bytes_of(folder):
    names = ("answers.csv", "made.csv", "history.csv", "G.safetensors", "classifier.safetensors", "fid.csv")
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*")) if p.name in names}


def test_same_seed_same_bytes(tmp_path, monkeypatch):
    ps = toy()
    found = []
    for name in ("a", "b"):
        answers = trained(a_run(tmp_path/name), ps, monkeypatch)
        found.append(bytes_of(tmp_path/name))
    assert found[0] == found[1] and len(found[0]) >= 3*3 + 6
    assert set(answers.cells().arm) == {"org", "aug_gan"} and answers.frame.replicate.nunique() == 3


def keys(run, ps, lesions=None):
    "Names and keys of all jobs that need no finished job."
    study = study_of(run, ps)
    jobs = {**paper.generators(run, ps.subset(ps.y == 1) if lesions is None else lesions, study), **paper.classifiers(run, study, {}, modes=("org",))}
    return {job.name: job_key(job, "cpu", run.params.mode) for job in jobs.values()}


def test_seeds_share_generators_and_not_classifiers(tmp_path):
    ps = toy()
    a, b = keys(a_run(tmp_path/"a"), ps), keys(a_run(tmp_path/"b", seed=1), ps)
    same = {n for n in a if a[n] == b[n]}
    assert same == {n for n in a if n.startswith(("gan-", "simulation"))}
    other = keys(a_run(tmp_path/"c", gan_seed=5), ps)
    assert {n for n in a if a[n] == other[n]} == set(a) - same


def test_replicates_train_generators_and_classifiers_of_their_own(tmp_path):
    "The first generator of several is the one that a run with one trains; all modes are trained as often."
    ps = toy()
    one, run = keys(a_run(tmp_path/"a"), ps), a_run(tmp_path/"b", replicates=3)
    three = keys(run, ps)
    assert {n: three[n] for n in one} == one and len(set(three.values())) == 1 + 3*(len(one) - 1)


def test_controls_have_as_many_patches_as_the_generator_adds(tmp_path, monkeypatch):
    answers = trained(a_run(tmp_path/"a"), toy(), monkeypatch, modes=("org", "none_steps", "copies", "noise"))
    assert answers.frame.groupby("arm").size().nunique() == 1 and answers.frame.arm.nunique() == 4
    p = answers.frame.pivot(index=["replicate", "patch_id"], columns="arm", values="p")
    assert all((p[a] != p[b]).any() for a in p for b in p if a < b)


@pytest.mark.parametrize("change", ["label", "pixel", "patient"])
def test_what_a_job_is_given_counts(tmp_path, change):
    "One label, one pixel or one patient of a training patch changed: no job that it trains keeps its key."
    ps, run = toy(), a_run(tmp_path/"a")
    i = study_of(run, ps).rows[0][100][0]
    table, pixels = ps.table.copy(), ps.pixels.copy()
    if change == "label": table.loc[i, "label"] = "malignant"
    if change == "patient": table.loc[i, "patient_id"] = "toy:other"
    if change == "pixel": pixels[i, 0, 3, 3] ^= 1
    before, after = keys(run, ps), keys(run, PatchSet(pixels, table))
    moved = {n for n in before if before[n] != after[n]}
    assert {"simulation", "gan-k100-fold0"} <= moved
    assert ("clf-org-k100-fold0" in moved) == (change == "pixel")     # a classifier is given pixels and targets of its training part


def test_folds_train_on_nobody_they_test_on():
    ps = toy()
    folds = size_study.make_folds(ps, "patient", seed=0)
    assert size_study.fold_leaks(ps, folds, True).patient_in_training.sum() == 0
    for f in folds:
        who = [set(ps.table.patient_id.iloc[i]) for i in (f.train, f.val, f.test)]
        assert not (who[0] & who[1] or who[0] & who[2] or who[1] & who[2])


def test_sizes_that_do_not_fit_are_listed(tmp_path):
    ps, setup = toy(), replace(size_setup.PRESETS["demo"], **SMALL)
    t = size_study.possible_sizes(ps, size_study.make_folds(ps, "patch", seed=0), setup)
    assert t[t.possible]["size"].tolist() == [100, 250] and t.why[2].startswith("25 masses wanted") and not t.why[0]


def test_one_class_missing_and_blank_images():
    ps, setup = toy(), size_setup.PRESETS["demo"]
    with pytest.raises(DataError, match="no data set|needs lesions and tissue"): size_study.cut([], setup, size_setup.Protocol(), 0)
    with pytest.raises(DataError, match="no mass among"):
        size_study.study_set(PatchSet(ps.pixels[:9], ps.table[:9].assign(lesion_type="calcification")), ps.subset(ps.y == 0), imbalance=4, seed=0)
    blank = PatchSet(np.full((40, 1, 32, 32), 9, np.uint8), ps.table[:40].assign(pixel_hash="constant:9"))
    with pytest.raises(DataError, match="one grey value only"): size_study.not_blank(blank)


def test_single_patient_of_tissue(tmp_path):
    ps = toy()
    one = PatchSet(ps.pixels, ps.table.assign(patient_id=np.where(ps.y == 1, ps.table.patient_id, "toy:one")))
    assert len(size_study.make_folds(one, "patch", seed=0)) == 3       # as the thesis
    with pytest.raises(DataError, match="protocol paper"): size_study.make_folds(one, "patient", seed=0)
    run = a_run(tmp_path/"a")
    assert paper.other_split(run, one, 100) == {} and run.info["split_comparison"].startswith("not possible")


def test_published_size_is_what_was_published():
    settled = settle(size_setup.PAPER, Params(**USUAL | dict(preset="paper", extractor="embedded")))
    thesis = settled.grid[settled.grid.arm.isin(size_setup.THESIS_MODES)]
    assert len(thesis) == 72 and settled.grid.groupby(["regime", "fold"]).ngroups == 18
    r, setup = paper.dcgan_recipe(settled.setup, settled.protocol), settled.setup
    assert (r.nz, r.batch, r.betas, r.lr_g, r.lr_d, r.decay, r.decay_g, r.decay_d, r.labels, r.jitter) == \
        (200, 64, (0., .99), 4e-4, 2e-4, .99, 10, 8, (.7, 1.), .05)
    assert (setup.gan_epochs, setup.clf_epochs, setup.imbalance, setup.factor, setup.tsne_iter) == (1000, 20, 10, 1.5, 4000)
    net = build_classifier(dict(kind="fcn", size=128, widths=setup.fcn), seed=0)
    assert sum(p.numel() for p in net.parameters()) == 357_768


def test_missing_weights_stop_the_run_at_its_start(tmp_path):
    with pytest.raises(WeightsError, match="or ask for extractor='embedded'"):
        settle(size_setup.PAPER, Params(**USUAL | dict(preset="paper", weights=str(tmp_path))))
    with pytest.raises(ParameterError, match="no departures"):
        settle(size_setup.PAPER, Params(**USUAL | dict(protocol="clean", switches="no_jitter")))


def test_real_data_have_full_size_and_their_own_shrinking():
    real = settle(size_setup.PAPER, Params(**USUAL | dict(data_dir="/data", k_shrink=4.))).setup
    assert (real.scale, real.shrink) == (1., 4.)
    assert settle(size_setup.PAPER, Params(**USUAL | dict(k_shrink=4.))).setup.shrink == size_setup.PRESETS["demo"].shrink   # phantoms keep theirs


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    d = tmp_path_factory.mktemp("paper02")
    done = papermill(d/"out.ipynb", ("seed", 1), ("run_dir", d/"run"), ("patients", 24), ("sizes", "100,250"), ("modes", "org,aug_gan"),
                     ("gan_epochs", 3), ("simulation_epochs", 3), ("fid_n", 24), ("clf_epochs", 2), ("boots", 60), cwd=d)
    assert done.returncode == 0, done.stderr[-3000:]
    return d/"run"


def test_notebook_leaves_every_table_figure_and_report(small_run):
    tables = {p.stem for p in (small_run/"tables").glob("*.csv")}
    assert {"counts", "skipped", "leaks", "sizes", "probe", "fid_curve", "quality", "quality_all", "scores", "gains", "claims",
            "conflicts", "readings", "left_out", "beside_thesis"} <= tables
    assert "splits" in tables or "not possible" in read_json(small_run/"run.json")["split_comparison"]
    figures = {p.stem for p in (small_run/"figures").glob("*.png")}
    assert figures == {"first_look", "fig01_02_preparation", "fig05_losses", "fig08_fid", "fig09_f1", "table3_auc", "fig10_11_13_tsne", "fig12_batches", "fig14_progress", "fig15_samples", "copies"}
    page = (small_run/"report.html").read_text()
    assert "PHANTOM DATA" in page and "0.9836" in page and "Aug GAN" in page and "src=\"http" not in page
    results = pd.read_csv(small_run/"results.csv")
    assert list(results.columns) == RESULT_COLUMNS and set(results.metric) == {"f1", "auroc", "auprc", "accuracy", "fid"}
    body = results[results.metric != "fid"]
    assert (body.lo <= body.value).all() and (body.value <= body.hi).all()
    claims = pd.read_csv(small_run/"tables"/"claims.csv")
    assert len(claims) == 21 and claims.shown.str.contains("phantom, demo|not run|not testable").all()


@pytest.mark.parametrize("name,value,words", [("sead", 1, "did you mean 'seed'"), ("sizes", "100,1", "'1' is no size"),
                                              ("extractor", "inceptoin", "did you mean 'inception'")])
def test_wrong_parameters_are_named(tmp_path, begin, name, value, words):
    with pytest.raises(ParameterError, match=words): begin("02_dcgan_size", **{"run_dir": str(tmp_path/"run"), name: value})
    assert not (tmp_path/"run").exists()


@pytest.mark.data
def test_real_patches(tmp_path):
    root = repo_root().parent/"shared"/"data"
    if not (root/"cbis_mass_patches").is_dir(): pytest.skip("shared/data with the real patches is not here")
    setup = replace(size_setup.PRESETS["demo"], tissue_per_image=60, imbalance=1, shrink=10., scale=1.)
    run = types.SimpleNamespace(phantom=False, params=Params(data_dir=str(root), scaling="minmax"))
    lesions, tissue = size_study.cut(size_study.load(run)[0], setup, size_setup.Protocol(), 0)
    ps = size_study.study_set(lesions, tissue, imbalance=1, seed=0)
    folds = size_study.make_folds(ps, "patch", seed=0)
    leaks = size_study.fold_leaks(ps, folds, False)
    assert len(lesions) > 1600 and len(tissue) > 100 and size_study.possible_sizes(ps, folds, setup)["possible"].iloc[0]
    assert leaks[leaks.kind == "tissue"].patient_in_training.min() > 0
