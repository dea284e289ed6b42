"Paper 01: the notebook run small by papermill, the sampler, the parts at their edges, and what its keys count."
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mammo_nb.core import DataError, ParameterError, WeightsError, read_json, repo_root
from mammo_nb.data.patches import PatchSet, patch_table
from mammo_nb.metrics.answers import Answers, Cell, said
from mammo_nb.paper import settle
from mammo_nb.papers import context as paper
from mammo_nb.papers.context_arms import compare_arms, rescue
from mammo_nb.papers.context_decay import Decay, decay_order
from mammo_nb.papers.context_figures import layer_table
from mammo_nb.papers.context_patches import Cut, check_kinds, wanted_kinds
from mammo_nb.params import Params
from mammo_nb.runs import RESULT_COLUMNS, Run, job_key


def parameters(**more):
    usual = dict(seed=0, preset="demo", mode="exact", protocol="paper", switches="", data_dir="", run_dir="", only="", device="cpu", arms="", tasks="", patients=0, train_share=1.,
                 gan_updates=0, d_mult=0, synthetic=0, clf_samples=0, boots=0, weights="", min_tissue=.9, scaling="minmax", dataset="", split_seed=-1, gan_seed=-1, phantom_seed=0,
                 ablations="", normal="images", show_real=False)
    return Params(**usual | more)


def settled(**more): return settle(paper.PAPER, parameters(**more))


def a_run(folder, **more):
    p = parameters(run_dir=str(folder), **more)
    return Run(p, paper=paper.PAPER.name, **vars(settle(paper.PAPER, p)))


@pytest.mark.parametrize("rule,published", [("multiplicative", 25_000), ("subtractive", 7_500)])
def test_synthetic_draws_of_half_a_million(rule, published):
    d, g = Decay(.5, rule=rule), np.random.default_rng(0)
    y, s = np.repeat([0, 1, 0, 1], [400, 60, 50, 100]), np.repeat([False, True], [460, 150])
    drawn = sum(int(s[decay_order(y, s, 5000, share=d.share(k), draws=g)].sum()) for k in range(100))
    expected = d.expected(500_000, 5000)
    assert round(expected, -2) == published and abs(drawn-expected) < 5*np.sqrt(expected)


def test_published_size_is_what_was_published():
    of = settled(preset="paper", only="data")
    S, protocol = of.setup, of.protocol
    assert (S.size, S.synthetic, S.samples, S.every, S.decay, S.clf_lr, S.weights, S.min_tissue) == (256, 5000, 500_000, 5000, .1, 1e-5, "imagenet_v2", .9)
    assert S.train == dict(normal=400_000, malignant_mass=42_280, malignant_calc=24_100, benign_mass=3_500, benign_calc=6_580) and set(S.held.values()) == {1000}
    for task, steps in (("mass", 2), ("calc", 1), ("remove", 1)):
        r = paper.gan_recipe(task, S, protocol)
        assert (r.lr_g, r.lr_d, r.betas, r.penalty, r.k, r.weight, r.d_mult, r.fade, r.steps_g) == (1e-5, 1e-5, (0., .99), 10, 1., .2, 8, 3000, steps)
    assert paper.gan_recipe("mass", settled(preset="paper", only="data", d_mult=4).setup, protocol).d_mult == 4
    assert not paper.gan_recipe("mass", S, protocol, benign=False).benign
    t = layer_table(paper.gan_recipe("mass", S, protocol))
    assert t[t.net == "generator"].weights.sum() == 4_391_111


def test_one_lesion_type_can_be_left_out():
    S = settled(tasks="mass,remove").setup
    assert set(wanted_kinds(S.train, S.tasks)) == {"normal", "malignant_mass", "benign_mass"}
    with pytest.raises(DataError, match="-p tasks calc,remove"): check_kinds({"normal": 3}, {"normal": 3, "malignant_mass": 5}, "train")


def test_missing_weights_stop_the_run_at_its_start(tmp_path):
    missing = str(tmp_path/"none.pth")
    with pytest.raises(WeightsError): settled(weights=missing)
    assert settled(weights=missing, only="generators").setup.depth == "50"


def test_ready_patches_are_refused(tmp_path):
    import PIL.Image
    (tmp_path/"set").mkdir()
    PIL.Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64)).save(tmp_path/"set"/"a.png")
    pd.DataFrame([dict(patch_id="a", patient_id="p", path="a.png", target=1, lesion_type="mass", label="malignant")]).to_csv(tmp_path/"set"/"patches.csv", index=False)
    with pytest.raises(DataError, match="whole mammograms"): paper.load(a_run(tmp_path/"run", data_dir=str(tmp_path/"set")))


def test_rescue_is_not_asked_of_one_model():
    t = pd.DataFrame(dict(patch_id=np.arange(16).astype(str), patient_id=np.arange(16).astype(str)))
    y = np.array([0, 1]*8)
    answers = Answers.of({Cell("lesions", "resnet50", "baseline"): said(t, y, np.linspace(0, 1, 16), kind=np.where(y, "malignant_mass", "normal"))})
    shown, gains = rescue(answers)
    assert not len(shown) and not len(gains)
    t = compare_arms(answers.units())
    assert len(t) == 1 and np.isfinite(t.auc[0]) and "joint" not in t.attrs


def toy_cut():
    "Patches of three sides, two views each."
    sets = {}
    for side in ("train", "val", "test"):
        kind = np.arange(15) % 5
        rows = dict(patch_id=[f"{side}{i}" for i in range(15)], patient_id=[f"{side}:{i//3}" for i in range(15)], dataset="toy", target=(kind > 0).astype(int), synthetic=False,
                    label=np.where(kind == 0, "normal", np.where(kind < 3, "malignant", "benign")), lesion_type=np.where(kind == 0, "healthy", np.where(kind % 2 == 1, "mass", "calcification")))
        sets[side] = PatchSet(np.random.default_rng(1).integers(0, 250, (15, 2, 64, 64)).astype(np.uint8), patch_table(pd.DataFrame(rows)))
    return Cut(sets, pd.Series(dtype=object), pd.DataFrame(), pd.DataFrame())


def keys(run, cut):
    jobs = paper.generators(run, cut) | paper.classifiers(run, cut, {})
    return {str(getattr(k, "arm", k)): job_key(j, "cpu", "exact") for k, j in jobs.items()}


def test_keys_count_labels_views_and_seeds(tmp_path):
    "The label-free keys of earlier versions took up stale generators and classifiers."
    run, cut = a_run(tmp_path/"run", arms="baseline,baseline_again", tasks="mass,calc,remove"), toy_cut()
    before = keys(run, cut)
    assert len(set(before.values())) == len(before) == 5
    def changed(edit):
        ps = cut.sets["train"].subset(np.arange(15))
        edit(ps)
        after = keys(run, replace(cut, sets=cut.sets | dict(train=ps)))
        return {k for k in before if after[k] != before[k]}
    def relabel(ps): ps.table.loc[1, "label"] = "benign"
    def retype(ps): ps.table.loc[1, "lesion_type"] = "calcification"
    def last_view(ps): ps.pixels[1, 1, 0, 0] ^= 1
    assert not changed(lambda ps: None)
    for edit in (relabel, retype, last_view): assert {"mass", "remove", "baseline", "baseline_again"} <= changed(edit), edit.__name__
    other = keys(a_run(tmp_path/"other", arms="baseline,baseline_again", tasks="mass,calc,remove", gan_seed=5), cut)
    assert {k for k in before if other[k] != before[k]} == {"mass", "calc", "remove"}


def used(folder, cut, **more):
    "All that a run does with its switches: how patches are cut, and the keys of all jobs."
    run = a_run(folder/("run" + more.get("switches", "")), tasks="mass,calc,remove", arms="baseline,decay50", **more)
    made = {task: folder/"made" for task in run.setup.tasks}
    jobs = paper.generators(run, cut) | paper.classifiers(run, cut, made)
    return dict(cutting=str(paper.cutting_of(run)), **{str(getattr(k, "arm", k)): job_key(j, "cpu", "exact") for k, j in jobs.items()})


GANS, CLASSIFIERS, CUT = {"mass", "calc", "remove"}, {"baseline", "decay50"}, {"cutting"}
USED = {"subtractive_decay": CLASSIFIERS, "normals_only": CLASSIFIERS, "test_as_is": CUT, "joint_types": {"mass", "calc"}}     # every other: all generators


@pytest.mark.parametrize("switch", paper.SWITCHES)
def test_what_a_switch_lists_is_used(tmp_path, switch):
    "The page lists what differs from the text; here the same is seen in what is cut and trained, and nothing else moves."
    (tmp_path/"made").mkdir()
    (tmp_path/"made"/"counts.json").write_text('{"kept": 3}')
    (tmp_path/"made"/"done.json").write_text("{}")
    cut = toy_cut()
    before, after = (used(tmp_path, cut, **more) for more in ({}, dict(switches=switch)))
    assert {k for k in before if after[k] != before[k]} == USED.get(switch, GANS)
    protocol = settled(switches=switch).protocol
    assert {k: v for k, v in vars(protocol).items() if v != getattr(paper.Protocol(), k)} == paper.SWITCHES[switch]


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
    assert {"sets", "patches", "skipped", "leak_check", "leak_check_synthetic", "probe", "synthesis", "removal", "rescued", "rescue", "claims", "types", "reader"} <= tables
    figures = {p.stem for p in (run/"figures").glob("*.png")}
    assert {"fig1_pairs", "fig3_row", "removal", "losses", "roc"} <= figures
    page = (run/"report.html").read_text()
    assert "What to type next" in page and "times as bright as usual" in page
    assert "PHANTOM DATA" in page and "random first weights" in page and "src=\"http" not in page
    results = pd.read_csv(run/"results.csv")
    assert list(results.columns) == RESULT_COLUMNS and "auroc" in set(results.metric)
    claims = pd.read_csv(run/"tables"/"claims.csv")
    assert len(claims) == 12 and claims.shown.str.contains("phantom, demo|not run|not testable").all()
    assert read_json(run/"run.json")["status"] == "done"


def test_edits_leave_the_rest_of_the_mammogram_alone(small_run, cache):
    rows = [read_json(p) for p in Path(cache).rglob("row.json")]
    assert rows and all(r["changed_outside_patches"] == r["changed_outside_masks"] == 0 for r in rows if r["found"])
    t = pd.read_csv(small_run/"run"/"tables"/"removal.csv").set_index(["way", "lesion_type"])
    ideal = t.loc["ideal"]
    assert (ideal.gain[ideal.kept > 0] > 0).all()


@pytest.mark.parametrize("name,value,words", [("sead", 1, "did you mean 'seed'"), ("switches", "reading_d", "is not possible"), ("min_tissue", 2., "out of range")])
def test_wrong_parameters_are_named(tmp_path, begin, name, value, words):
    with pytest.raises(ParameterError, match=words): begin("01_contextual_gan", **{"run_dir": str(tmp_path/"run"), name: value})
    assert not (tmp_path/"run").exists()


@pytest.mark.gpu
def test_a_generator_and_a_classifier_on_cuda(tmp_path):
    "Written, never run on a GPU."
    run = a_run(tmp_path/"run", patients=24, gan_updates=2, synthetic=4, clf_samples=40, arms="baseline", device="cuda")
    sets, _ = paper.load(run)
    cut = paper.cut(run, sets)
    made = run.do(paper.synthetic(run, cut, run.do(paper.generators(run, cut))))
    folders = run.do(paper.classifiers(run, cut, made))
    assert (folders[Cell("lesions", "resnet50", "baseline")]/"answers.csv").exists()
