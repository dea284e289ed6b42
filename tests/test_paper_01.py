"Paper 01: the notebook run small by papermill, the sampler, the parts at their edges."
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mammo_nb.core import DataError, ParameterError, WeightsError, read_json, repo_root, rng
from mammo_nb.papers import context as paper
from mammo_nb.report.tables import RESULT_COLUMNS


def parameters(**more):
    P = dict(seed=0, preset="demo", mode="exact", protocol="paper", switches="", data_dir="", arms="", tasks="", patients=0, train_share=1., gan_updates=0, d_mult=0, synthetic=0, clf_samples=0, boots=0, weights="",
             min_tissue=.9, scaling="minmax", dataset="", split_seed=-1, gan_seed=-1, phantom_seed=0)
    return SimpleNamespace(**{**P, **more})


@pytest.mark.parametrize("rule,published", [("multiplicative", 25_000), ("subtractive", 7_500)])
def test_synthetic_draws_of_half_a_million(rule, published):
    d, g = paper.Decay(.5, rule=rule), np.random.default_rng(0)
    y, s = np.repeat([0, 1, 0, 1], [400, 60, 50, 100]), np.repeat([False, True], [460, 150])
    drawn = sum(int(s[paper.decay_order(y, s, 5000, share=d.share(k), draws=g)].sum()) for k in range(100))
    expected = d.expected(500_000, 5000)
    assert round(expected, -2) == published and abs(drawn-expected) < 5*np.sqrt(expected)


def test_published_size_is_what_was_published():
    R = paper.resolve(parameters(preset="paper"))
    S = R.setup
    assert (S.size, S.synthetic, S.samples, S.every, S.decay, S.clf_lr, S.weights, S.min_tissue) == (256, 5000, 500_000, 5000, .1, 1e-5, "imagenet_v2", .9)
    assert S.train == dict(normal=400_000, malignant_mass=42_280, malignant_calc=24_100, benign_mass=3_500, benign_calc=6_580) and set(S.held.values()) == {1000}
    for task, steps in (("mass", 2), ("calc", 1), ("remove", 1)):
        r = paper.gan_recipe(task, R)
        assert (r.lr_g, r.lr_d, r.betas, r.penalty, r.k, r.weight, r.d_mult, r.fade, r.steps_g) == (1e-5, 1e-5, (0., .99), 10, 1., .2, 8, 3000, steps)
    assert paper.gan_recipe("mass", paper.resolve(parameters(preset="paper", d_mult=4))).d_mult == 4
    assert not paper.gan_recipe("mass", R, benign=False).benign
    t = paper.layer_table(paper.gan_recipe("mass", R))
    assert t[t.net == "generator"].weights.sum() == 4_391_111


def test_one_lesion_type_can_be_left_out():
    R = paper.resolve(parameters(tasks="mass,remove"))
    assert set(paper.wanted_kinds(R, "train")) == {"normal", "malignant_mass", "benign_mass"}
    with pytest.raises(DataError, match="-p tasks calc,remove"): paper.check_kinds({"normal": 3}, {"normal": 3, "malignant_mass": 5}, "train")


def test_missing_weights_stop_the_run_at_its_start(tmp_path):
    R = paper.resolve(parameters(weights=str(tmp_path/"none.pth")))
    with pytest.raises(WeightsError): paper.check_weights(R, [])
    paper.check_weights(R, ["generators"])
    with pytest.raises(ParameterError, match="did you mean"): paper.plan_arms("decay500")


def test_ready_patches_are_refused(tmp_path):
    import PIL.Image
    (tmp_path/"set").mkdir(); PIL.Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64)).save(tmp_path/"set"/"a.png")
    pd.DataFrame([dict(patch_id="a", patient_id="p", path="a.png", target=1, lesion_type="mass", label="malignant")]).to_csv(tmp_path/"set"/"patches.csv", index=False)
    P = parameters(data_dir=str(tmp_path))
    with pytest.raises(DataError, match="ready patches"): paper.load_sets(P, paper.resolve(P))


def test_rescue_is_not_asked_of_one_model():
    cell = dict(scope="lesions", model="resnet50", arm="baseline", regime="", y=np.array([0, 1]*8), p=np.linspace(0, 1, 16), patients=np.arange(16).astype(str), patch_id=np.arange(16).astype(str), kind=np.array(["normal", "malignant_mass"]*8))
    shown, gains = paper.rescue([cell], "", paper.resolve(parameters()))
    assert not len(shown) and gains == []
    t = paper.compare_arms([cell])
    assert len(t) == 1 and np.isfinite(t.auc[0]) and "joint" not in t.attrs


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, cache):
    import os
    d = tmp_path_factory.mktemp("paper01")
    args = dict(run_dir=d/"run", patients=24, gan_updates=2, synthetic=8, clf_samples=40, arms="baseline,decay50,baseline_again", boots=60)
    cmd = [sys.executable, "-m", "papermill", str(repo_root()/"nbs"/"01_contextual_gan.ipynb"), str(d/"out.ipynb"), "--no-progress-bar"] + [w for k, v in args.items() for w in ("-p", k, str(v))]
    done = subprocess.run(cmd, cwd=d, env=os.environ | {"MAMMO_NB_CACHE": str(cache), "MPLBACKEND": "agg"}, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return d


def test_notebook_leaves_tables_figures_and_report(small_run):
    run = small_run/"run"
    tables = {p.stem for p in (run/"tables").glob("*.csv")}
    assert {"sets", "patches", "skipped", "leak_check", "leak_check_synthetic", "probe", "synthesis", "removal", "rescued", "rescue", "claims"} <= tables
    figures = {p.stem for p in (run/"figures").glob("*.png")}
    assert {"fig1_pairs", "fig3_row", "removal", "losses", "roc"} <= figures
    page = (run/"report.html").read_text()
    assert "PHANTOM DATA" in page and "random first weights" in page and "src=\"http" not in page
    results = pd.read_csv(run/"results.csv")
    assert list(results.columns) == RESULT_COLUMNS and "auroc" in set(results.metric)
    claims = pd.read_csv(run/"tables"/"claims.csv")
    assert len(claims) == 5 and claims.shown.str.contains("phantom, demo|not run").all()
    assert read_json(run/"run.json")["status"] == "done"


def test_edits_leave_the_rest_of_the_mammogram_alone(small_run, cache):
    rows = [read_json(p) for p in Path(cache).rglob("row.json")]
    assert rows and all(r["changed_outside_patches"] == r["changed_outside_masks"] == 0 for r in rows if r["found"])
    t = pd.read_csv(small_run/"run"/"tables"/"removal.csv").set_index(["way", "lesion_type"])
    ideal = t.loc["ideal"]
    assert (ideal.gain[ideal.kept > 0] > 0).all()


@pytest.mark.parametrize("name,value,words", [("sead", 1, "did you mean 'seed'"), ("switches", "reading_d", "is not possible"), ("min_tissue", 2., "out of range")])
def test_wrong_parameters_are_named(tmp_path, papermill, name, value, words):
    done = papermill("01_contextual_gan", tmp_path/"out.ipynb", name, value, "run_dir", tmp_path/"run", check=False)
    assert done.returncode != 0 and words in done.stderr and not (tmp_path/"run").exists()


@pytest.mark.gpu
def test_a_generator_and_a_classifier_on_cuda(tmp_path):
    "Written, never run on a GPU."
    import torch
    P = parameters(patients=16, gan_updates=2, synthetic=4, clf_samples=40); R = paper.resolve(P); R.setup = replace(R.setup, patients=24)
    sets, _ = paper.load_sets(P, R); cut = paper.cut_patches(sets, R); dev = torch.device("cuda")
    for k in ("gan", "made", "clf"): (tmp_path/k).mkdir()
    paper.fit_generator(tmp_path/"gan", "mass", cut.sets["train"], R, dev)
    paper.draw_synthetic(tmp_path/"made", "mass", tmp_path/"gan", cut.sets["train"], R, dev)
    paper.fit_arm(tmp_path/"clf", "baseline", cut.sets, {}, R, dev)
    assert (tmp_path/"clf"/"predictions.csv").exists()
