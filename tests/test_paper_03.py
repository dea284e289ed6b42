"Paper 03: the splits and what they let through, bad input, what keys know, and the notebook run small under three protocols."
import ast
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest

from mammo_nb.clf.cnn import n_params
from mammo_nb.clf.train import build_classifier
from mammo_nb.core import DataError, LeakError, ParameterError, WeightsError, read_json, rng
from mammo_nb.data.patches import PatchSet, patch_table
from mammo_nb.gans.fit import measured
from mammo_nb.metrics.answers import Answers, Intervals
from mammo_nb.paper import settle
from mammo_nb.papers import cbis as paper, cbis_answers as its, cbis_figures as figures, cbis_masses as masses_of, cbis_page, cbis_words as say
from mammo_nb.params import Params
from mammo_nb.report.claims import claims
from mammo_nb.report.figures import show
from mammo_nb.report.page import LAYOUT, RunFolder, gather, page
from mammo_nb.report.tables import RESULT_COLUMNS
from mammo_nb.runs import Run, job_key

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent/"shared"/"data"


def masses(n=160, **more):
    "Two views of each mass, every fourth patient an official test patient."
    i = np.arange(n)
    t = dict(patch_id=[f"t:{k}" for k in i], patient_id=[f"t:p{k//2}" for k in i], image_id=[f"t:i{k}" for k in i], lesion_id="1", label=[masses_of.NAMES[k//2%2] for k in i],
             label_raw=[("BENIGN_WITHOUT_CALLBACK", "MALIGNANT")[k//2%2] for k in i], birads="4", density=2., official_split=["test" if k//2%8 > 5 else "train" for k in i], dataset="t", path="x", target=1, lesion_type="mass")
    return pd.DataFrame({**t, **more})


def data(t): return SimpleNamespace(name="t", patches=t, images=[], lesions=[])


def image_set(t, size=32):
    "Malignant masses are brighter in the middle."
    y, g = masses_of.labels_of(t), rng(0, "toy images")
    x = g.normal(100, 25, (len(t), size, size)); x[:, 8:24, 8:24] += 45*y[:, None, None]
    return PatchSet(x.clip(0, 255).astype(np.uint8)[:, None], patch_table(t.assign(pixel_hash=[f"h{i}" for i in range(len(t))])))


def declared():
    "The parameters of the notebook as they stand there."
    cell = next(c for c in nbformat.read(ROOT/"nbs"/"03_cgan_augmentation.ipynb", 4).cells if "parameters" in c.metadata.get("tags", []))
    return {node.target.id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}


def settled(**changes): return settle(paper.PAPER, Params(**declared() | changes))


def begin(folder, **changes):
    "A run of seconds: the simple CNN, one trial, ten updates, images of 32 px."
    small = dict(models="cnn", cgan_models="cnn", trials=1, updates=10, clf_epochs=2, boots=40, arms="plain,none_steps,swapped", device="cpu", run_dir=str(folder))
    params = Params(**declared() | small | changes)
    chosen = settle(paper.PAPER, params)
    nets = {"cnn": dict(kind="notebook_cnn", size=32, widths=(8, 8), hidden=16, channels=1)}
    setup = replace(chosen.setup, size=32, gan=dict(size=32, width=1/8, channels=1), nets=chosen.setup.nets | nets, digit_updates=10)
    return Run(params, paper=paper.PAPER.name, **vars(replace(chosen, setup=setup)))


def study_of(run, ps):
    protocols = [*paper.asked_protocols(run.params), *run.grid.protocol]
    return paper.Study(ps, masses_of.make_splits(ps, protocols, seed=run.seeds.split, val_share=run.setup.val_share))


def test_published_size_is_what_was_published():
    chosen = settled(preset="paper")
    S, g, grid = chosen.setup, paper.gan_recipe(chosen.setup), chosen.grid
    assert (S.size, S.image, S.updates, S.n_synthetic(1187), S.blur, S.clf_batch, S.lr, S.clf_epochs) == (224, "full", 30_000, 550, 5, 16, 1e-4, 20)
    assert (g.size, g.nz, g.channels, g.base, g.epochs*g.updates_epoch, g.batch, g.betas, g.lr_g, g.drop) == (224, 100, 3, 14, 30_000, 16, (.5, .999), 2e-4, .4)
    assert S.arms == paper.ARMS and not set(paper.PRETRAINED) & set(grid.model)          # their weights are not there
    with pytest.raises(WeightsError, match="start from ImageNet"): settled(preset="paper", models="cnn,vgg16")
    grid = settled(preset="paper", weights="random").grid
    assert n_params(build_classifier(S.nets["cnn"])) == 1_917_698
    c = grid[grid.regime == ""]
    assert set(c.model) == set(paper.MODELS) and set(c.arm) == {"none", "cgan", *paper.CONTROLS} and set(c.model[c.arm == "cgan"]) == {"inceptionresnetv2"} and set(grid.protocol) == set(masses_of.PROTOCOLS)
    with pytest.raises(ParameterError, match="nothing is left of 48 px"): settled(preset="paper", size=48)
    with pytest.raises(WeightsError, match="vgg16.safetensors"): settled(weights=str(ROOT/"tests"))


def test_one_class_unknown_labels_and_few_patients():
    t, left = masses_of.mass_rows(data(masses(label=["unknown"]*40 + ["benign", "malignant"]*60)))
    assert len(t) == 120 and left.reason.tolist() == ["pathology unknown"] and left["count"].tolist() == [40]
    with pytest.raises(DataError, match="only one class: 0 malignant and 160 benign"): masses_of.check_masses(masses(label="benign"), "here")
    with pytest.raises(DataError, match="too few patients"): masses_of.check_masses(masses(patient_id=[f"t:{k%4}" for k in range(160)]), "here")
    with pytest.raises(DataError, match="no ready patches"): masses_of.mass_rows(SimpleNamespace(name="t", patches=None, images=[], lesions=[]))


def test_benign_without_callback_is_benign_and_counted_apart():
    t, _ = masses_of.mass_rows(data(masses()))
    assert set(t.label[t.label_raw == "BENIGN_WITHOUT_CALLBACK"]) == {"benign"}
    assert say.type_shares(t).set_index("pathology").masses.to_dict() == {"MALIGNANT": 60, "BENIGN_WITHOUT_CALLBACK": 60}      # of the training table only


def test_known_test_patient_is_refused_under_clean_and_counted_under_paper():
    ps = image_set(masses(patient_id=[f"t:p{k//2}" if k < 158 else "t:p0" for k in range(160)]))
    with pytest.raises(LeakError, match="patient"): masses_of.make_splits(ps, masses_of.PROTOCOLS, seed=0)
    leaks = masses_of.leak_counts(ps.table, masses_of.make_splits(ps, ["paper"], seed=0))
    assert leaks.patient_in_training[0] > .5 and leaks.name_accuracy[0] > leaks.majority[0]


def test_no_official_split_is_split_by_patient():
    t = masses(official_split=None)
    side = masses_of.split_rows(t, "clean", seed=0)
    assert all(len(set(side[(t.patient_id == p).to_numpy()])) == 1 for p in set(t.patient_id)) and set(side) == {"train", "val", "test"}


def test_images_of_mixed_size_and_broken_ones(tmp_path):
    from PIL import Image
    t = masses(12)
    for i, (h, w) in enumerate([(40, 40), (60, 30), (128, 128)]*4): Image.fromarray(rng(0, "mixed", i).integers(0, 255, (h, w), dtype=np.uint8)).save(tmp_path/f"{i}.png")
    (tmp_path/"5.png").write_bytes(b"no picture")
    files = masses_of.Files(tuple(str(tmp_path/f"{i}.png") for i in range(12)))
    masses_of.cut_masses(tmp_path/"stage", masses=t.drop(columns=["path", "target", "lesion_type"]), files=files, size=32, blur=5)
    ps = PatchSet.load(tmp_path/"stage"/"patches")
    assert ps.pixels.shape == (11, 1, 32, 32) and "t:5" not in set(ps.table.patch_id) and len(ps.skipped) == 1
    assert read_json(tmp_path/"stage"/"sizes.json") == dict(images=11, sizes=3, not_square=4)
    before = files.key(); (tmp_path/"5.png").write_bytes(b"another picture")
    assert files.key() != before                                                       # a file counts by what is in it


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    "All protocols on toy images, twice, each with a cache of its own."
    out, ps = [], image_set(masses())
    for name in "ab":
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as m:
            m.setenv("MAMMO_NB_CACHE", str(folder/"cache"))
            run = begin(folder/"run"); study = study_of(run, ps)
            made = run.do(paper.draws(run, study, run.do(paper.generators(run, study), workers=1)), workers=1)
            sets = paper.synthetic_sets(run, made)
            jobs = paper.classifiers(run, study, sets)
            cells = paper.everywhere(run.grid, run.do(jobs, workers=1))
        out.append(SimpleNamespace(run=run, study=study, made=made, sets=sets, jobs=jobs, cells=cells))
    return out


def answers_of(s, named=True):
    names = its.name_answers(s.study.patches.table, s.study.sides, masses_of.PROTOCOLS) if named else {}
    return Answers.of(s.cells | names, ("train", "test"), fewest=0)


def test_same_seed_same_answers(studied):
    a, b = (answers_of(s).frame for s in studied)
    pd.testing.assert_frame_equal(a, b)


def test_three_test_patients_of_a_class_give_no_quality_and_no_end_of_the_run(tmp_path, studied):
    s = studied[0]; t, y = s.study.patches.table, masses_of.labels_of(s.study.patches.table)
    side, who = s.study.sides["clean"].copy(), t.patient_id.to_numpy()
    for c in (0, 1):
        rest = np.unique(who[(side == "test") & (y == c)])[3:]
        side[np.isin(who, rest) & (side == "test")] = "val"
    few = replace(s.study, sides=s.study.sides | dict(clean=side))
    found = measured(s.run.do(paper.measures(s.run, few, {("clean", 0): s.made["clean", 0]}), workers=1), ("split", "trial"))
    assert (side == "test").sum() == 12 and "kid" not in set(found.metric)


def test_an_interval_that_leaves_out_its_value_is_drawn_as_it_is():
    rows = [dict(scope="masses", regime="", model="cnn", metric=m, protocol=p, arm=a, value=.25, lo=.4, hi=.9) for m in ("accuracy", "auroc") for p in masses_of.PROTOCOLS for a in say.ARM_ORDER]
    assert show(figures.protocol_figure(pd.DataFrame(rows), "cnn", "seven patients")["fig"]).png.startswith(b"\x89PNG")


def test_who_is_tested(studied):
    s = studied[0]; t = answers_of(s, named=False).frame; test = t[t.side == "test"]
    both = test[test.arm.isin(["none", "cgan"])]
    assert both.groupby(["protocol", "arm"]).synthetic.any().to_dict() == {("authors", "cgan"): True, ("authors", "none"): False, ("clean", "cgan"): False, ("clean", "none"): False, ("paper", "cgan"): False, ("paper", "none"): False}
    assert not test[test.protocol == "clean"].known.any() and test[test.protocol == "paper"].known.any()
    train = t[(t.side == "train") & (t.arm == "cgan")]
    assert (train.groupby("protocol").synthetic.sum() > 0).all()
    made = s.sets["clean", 0]
    who = set(next(iter(made.generators.values())))
    assert not who & set(s.study.part("clean", "test").table.patient_id) and made.table.label.value_counts().nunique() == 1
    assert both.patient_id[both.synthetic].nunique() == 1                               # one generator is one patient of the bootstrap
    assert not [c for c in s.jobs if c.protocol == "authors" and c.arm == "none"]        # trained once, as paper


def test_results_hold_together(studied):
    s = studied[0]; answers, how = its.in_groups(answers_of(s)), Intervals(40, 0)
    r = s.run.results(its.all_scores(answers, how))
    t = r[r.scope != "synthetic"]
    assert list(r.columns) == RESULT_COLUMNS and (t.lo <= t.value + 1e-9).all() and (t.value <= t.hi + 1e-9).all()
    assert len(r) > len(t) and r[r.scope == "synthetic"].lo.isna().all()                 # of one generator there is no interval
    by = r[(r.scope == "masses") & (r.regime == "")].set_index(["protocol", "model", "arm", "metric"]).value
    assert by["authors", "cnn", "none", "accuracy"] == by["paper", "cnn", "none", "accuracy"]
    assert by["paper", "name", "none", "auroc"] > .7 and by["clean", "name", "none", "auroc"] == .5
    for a in ("none", "cgan_average"): assert by["clean", "cnn", a, "overfit_gap"] == pytest.approx(by["clean", "cnn", a, "train_accuracy"] - by["clean", "cnn", a, "accuracy"])
    q = its.ask(answers, how).set_index(["question", "metric"]).value
    assert q["cgan_clean", "accuracy"] == pytest.approx(by["clean", "cnn", "cgan_average", "accuracy"] - by["clean", "cnn", "none", "accuracy"])
    assert {"known_patients", "random_split", "dealt_out_again", "synthetic_test", "best_cgan"} <= set(q.index.get_level_values(0))


def test_no_stage_no_number(tmp_path):
    run = begin(tmp_path/"run", only="report"); study, cells = paper.Study(None, {}), {}
    made = run.do(paper.draws(run, study, run.do(paper.generators(run, study))))
    cells = paper.everywhere(run.grid, run.do(paper.classifiers(run, study, paper.synthetic_sets(run, made))))
    answers = its.in_groups(run.answers(cells, ("train", "test"), fewest=0))
    assert set(made.values()) == set(cells.values()) == {None} and not answers
    assert len(its.ask(answers, Intervals(10, 0))) == 0 and len(its.delong_table(answers)) == 0


# ---------------------------------------------------------------- what a job's key knows, without any training
def keys_of(run, study, sets):
    jobs = {("gan", *k): j for k, j in paper.generators(run, study).items()} | paper.classifiers(run, study, sets)
    return {k: job_key(j, "cpu", "exact") for k, j in jobs.items()}

def edited(study, edit):
    ps = study.patches.subset(np.arange(len(study.patches))); edit(ps, np.flatnonzero(study.sides["clean"] == "train")[0])
    return replace(study, patches=ps)

def test_a_key_knows_labels_pixels_and_seeds(tmp_path, studied):
    s = studied[0]; n = iter(range(99))
    def other(**changes): return begin(tmp_path/str(next(n)), **changes)
    before = keys_of(s.run, s.study, s.sets)
    assert keys_of(other(boots=7), s.study, s.sets) == before                              # what does not matter to a training does not count
    def relabel(ps, i): ps.table.loc[i, "label"] = "benign" if ps.table.label[i] == "malignant" else "malignant"
    def repaint(ps, i): ps.pixels[i, 0, 0, 0] ^= 1
    def readmit(ps, i): ps.table.loc[i, "patient_id"] = "t:somebody"
    clean = [k for k in before if "clean" in (k[1] if isinstance(k, tuple) else k.protocol)]
    for edit in (relabel, repaint, readmit):
        after = keys_of(s.run, edited(s.study, edit), s.sets)
        assert clean and all(after[k] != before[k] for k in clean)
    gans = [k for k in before if isinstance(k, tuple)]
    assert all(keys_of(other(gan_seed=3), s.study, s.sets)[k] != before[k] for k in gans)
    drawn = lambda run: {k: job_key(j, "cpu", "exact") for k, j in paper.draws(run, s.study, s.made).items()}
    assert not set(drawn(s.run).values()) & set(drawn(other(gan_seed=3)).values())         # a draw counts its own seed
    changed = keys_of(s.run, s.study, {k: ps.subset(np.arange(len(ps)-1)) for k, ps in s.sets.items()})
    assert all((changed[c] != before[c]) == (c.arm in ("cgan", "swapped")) for c in s.jobs)
    moved = keys_of(other(augment=False), s.study, s.sets), keys_of(other(lr=.5), s.study, s.sets), keys_of(other(clf_epochs=1), s.study, s.sets)
    assert all((m[c] != before[c]) == (c.regime != "plain" or m is not moved[0]) for m in moved for c in s.jobs)    # `plain` has no classic augmentation to lose


def test_several_seeds(tmp_path, studied):
    s = studied[0]
    for seed in (0, 1):
        run = begin(tmp_path/f"seed{seed}", seed=seed); how, cells = Intervals(40, seed), {}
        for cell, folder in s.cells.items():
            t = pd.read_csv(folder/"answers.csv", dtype=dict(patient_id=str, patch_id=str))
            p = (t.p + .01*seed*rng(seed, "jitter", *vars(cell).values()).normal(size=len(t))).clip(0, 1)
            cells[cell] = t.assign(p=p, rank=p)
        answers = its.in_groups(run.answers(cells, ("train", "test"), fewest=0))
        run.results(its.all_scores(answers, how)); run.table("questions", its.ask(answers, how)); run.finish()
    report = gather([tmp_path], out=tmp_path/"out")
    text, tables = report.read_text(), tmp_path/"out"/"tables"
    assert len(text) < 5_000_000
    judged = pd.read_csv(tables/"claims_by_protocol.csv")
    assert set(judged.id) == {c.id for c in claims("03_cgan_augmentation")} and len(judged) == 3*judged.id.nunique()
    tested = judged[judged.ours.notna()]
    assert len(tested) and (tested.trainings >= 2).all() and tested.how.str.contains("patients").all()     # both seeds are trainings, women are cases
    assert (tested.lo <= tested.ours + 1e-9).all() and (tested.ours <= tested.hi + 1e-9).all()
    q = pd.read_csv(tables/"questions.csv")
    assert (q.seeds == 2).all() and q.value.notna().all() and not ((q.lo > q.value + 1e-9) | (q.value > q.hi + 1e-9)).any()     # two equal runs have no interval
    assert set(pd.read_csv(tables/"by_seed.csv").protocol) == set(pd.read_csv(tables/"protocols.csv").protocol) == set(masses_of.PROTOCOLS)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, cache):
    d = tmp_path_factory.mktemp("paper03")
    cmd = [sys.executable, "-m", "papermill", str(ROOT/"nbs"/"03_cgan_augmentation.ipynb"), str(d/"out.ipynb"), "--no-progress-bar"]
    for k, v in dict(seed=1, run_dir=d/"run", patients=40, models="cnn", cgan_models="cnn", trials=1, updates=10, clf_epochs=1, boots=40).items(): cmd += ["-p", k, str(v)]
    done = subprocess.run(cmd, cwd=d, env=os.environ | {"MAMMO_NB_CACHE": str(cache), "MPLBACKEND": "agg"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return d/"run"


def test_notebook_leaves_every_table_and_the_report(small_run):
    assert {"types", "assessment", "forensics", "leaks", "skipped", "quality", "questions", "delong", "claims"} <= {p.stem for p in (small_run/"tables").glob("*.csv")}
    info, r = read_json(small_run/"run.json"), pd.read_csv(small_run/"results.csv")
    assert info["status"] == "done" and info["layout"] == LAYOUT and info["data_hash"] and set(r.protocol) == set(masses_of.PROTOCOLS) and {"none", "cgan_average", "cgan_best"} <= set(r.arm)
    assert len(RunFolder(small_run).answers()) > 0
    text = (small_run/"report.html").read_text()
    assert "PHANTOM DATA" in text and "223 images (real + synthetic" in text and "only the patient" in text and 'src="http' not in text and len(text) < 10_000_000
    assert len(pd.read_csv(small_run/"tables"/"claims.csv")) == 15


def test_the_page_is_written_again_from_the_folder_alone(small_run):
    before = (small_run/"report.html").read_bytes(); (small_run/"report.html").unlink()
    page(small_run, cbis_page.SECTIONS)
    assert (small_run/"report.html").read_bytes() == before


@pytest.mark.data
def test_real_masses_and_the_published_split():
    if not (SHARED/"cbis_mass_patches").is_dir(): pytest.skip("shared/data with the real masses is not here")
    from mammo_nb.data.readers import read_any
    t, left = masses_of.mass_rows(read_any(SHARED, names=["cbis_mass_patches"])["cbis_mass_patches"])
    assert len(t) == 1696 and left["count"].tolist() == [2]
    assert (100*say.type_shares(t).share).round(1).tolist() == [48.3, 43.8, 7.9]              # Figure 1
    s = masses_of.split_rows(t, "paper", seed=42)
    assert {k: int((s == k).sum()) for k in ("train", "test", "val")} == dict(train=1187, test=341, val=168)
    leaks = masses_of.leak_counts(t, dict(paper=s, clean=masses_of.split_rows(t, "clean", seed=0))).set_index("protocol")
    assert leaks.patient_in_training["paper"] == pytest.approx(.636, abs=5e-4) and leaks.image_in_training["paper"] == pytest.approx(.085, abs=5e-4)
    assert leaks.name_accuracy["paper"] > .75 and leaks.patient_in_training["clean"] == 0 and leaks.name_auroc["clean"] == .5


@pytest.mark.gpu
def test_small_run_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("MAMMO_NB_CACHE", str(tmp_path/"cache"))
    run = begin(tmp_path/"run", device="cuda"); study = study_of(run, image_set(masses()))
    sets = paper.synthetic_sets(run, run.do(paper.draws(run, study, run.do(paper.generators(run, study)))))
    assert run.answers(run.do(paper.classifiers(run, study, sets)), fewest=0).frame.p.between(0, 1).all()
