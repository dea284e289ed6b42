"Paper 05: what its keys and parameters do, without any training; one small run as a process."
import ast
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from mammo_nb.core import ParameterError, rng, write_json
from mammo_nb.data.patches import PatchSet, patch_table
from mammo_nb.data.splits import check_leaks
from mammo_nb.paper import rules_of, settle
from mammo_nb.papers import helps as paper, helps_figures
from mammo_nb.papers.helps_known import frequencies, looked_worlds
from mammo_nb.papers.helps_rows import ARMS, GANS, part
from mammo_nb.params import Params, check_params
from mammo_nb.report.rules import claims, contrasts
from mammo_nb.runs import Run, job_key

ROOT = Path(__file__).resolve().parents[1]

def declared():
    cell = next(c for c in nbformat.read(ROOT/"nbs"/"05_which_helps.ipynb", 4).cells if "parameters" in c.metadata.get("tags", []))
    return {node.target.id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}

def toy(name, lesions, healthy):
    rows = [dict(patch_id=f"{name}:{i}", patient_id=f"{name}:p{i//2}", target=1, lesion_type="mass", label="malignant", dataset=name) for i in range(lesions)]
    rows += [dict(patch_id=f"{name}:h{i}", patient_id=f"{name}:h{i//3}", target=0, lesion_type="healthy", label="normal", dataset=name) for i in range(healthy)]
    return PatchSet(rng(0, name).integers(0, 255, (len(rows), 1, 8, 8)).astype(np.uint8), patch_table(rows))

SIDES = dict(train=toy("a", 24, 72), val=toy("v", 6, 6), test=toy("t", 6, 6))
OTHER = toy("o", 40, 0)

def run_of(tmp_path, **changes):
    params = Params(**declared() | dict(run_dir=str(tmp_path/f"run{len(list(tmp_path.iterdir()))}"), device="cpu", mode="float32") | changes)
    return Run(params, paper=paper.PAPER.name, **vars(settle(paper.PAPER, params)))

def keys_of(tmp_path, sides=SIDES, **changes):
    "Key of every job of a run on the toys, by name."
    run = run_of(tmp_path, **changes)
    study = paper.Study(sides, OTHER, {s: part(sides["train"], s, run.seeds.split) for s in dict.fromkeys(run.grid.regime)}, pd.DataFrame())
    stages = {}
    for kind,share,seeds in paper.sources(run):
        stages[kind,share,seeds] = tmp_path/f"gan-{kind}-{share}-{seeds.gan}"
        write_json(stages[kind,share,seeds]/"done.json", {})
    drawn = {s: toy(f"drawn {s}", paper.wanted(run, study.parts[s[1]][0]), 0) for s in stages}
    jobs = [*paper.generators(run, study).values(), *paper.draws(run, study, stages).values(), *paper.classifiers(run, study, drawn).values()]
    return {j.name: job_key(j, "cpu", run.params.mode) for j in jobs}

ALL = dict(arms=",".join(ARMS), generators=1, trainings=1)

@pytest.fixture(scope="module")
def usual(tmp_path_factory): return keys_of(tmp_path_factory.mktemp("usual"), **ALL)

def changed(a, b): return {n for n in a.keys() | b.keys() if a.get(n) != b.get(n)}

def of(keys, *begins): return {n for n in keys if n.startswith(begins)}

MADE = tuple(f"fit-{a}" for a in ("copies", "noise", "none_healthy", "other"))

@pytest.mark.parametrize("given,begins", [
    (dict(seed=1), ("fit-",)), (dict(clf_epochs=3), ("fit-",)), (dict(dose=.5), ("draw-", *MADE)), (dict(gan_share=.5), ("gan-dcgan", "gan-wgangp", "gan-cgan", "gan-painting", "gan-diffusion"))])
def test_a_parameter_moves_what_it_names(usual, tmp_path, given, begins):
    now = keys_of(tmp_path, **ALL | given)
    fed = {n for n in usual if n.startswith("fit-") and n.split("-")[1].removesuffix("_alone") in GANS} if "dose" in given else set()
    assert changed(usual, now) == of(usual, *begins) | fed and now.keys() == usual.keys()

@pytest.mark.parametrize("switch", ["classes_as_they_come", "steps_grow", "last_epoch", "epoch_chosen_on_test"])
def test_a_choice_of_training_moves_all_classifiers_and_no_generator(usual, tmp_path, switch):
    "A point of the multiverse shares the generators of the run beside it, and nothing of what it changes."
    assert changed(usual, keys_of(tmp_path, **ALL, switches=switch)) == of(usual, "fit-")

def test_more_generators_and_trainings_keep_the_first(usual, tmp_path):
    more = keys_of(tmp_path, **ALL | dict(generators=2, trainings=2))
    assert len(of(more, "gan-")) == 2*len(of(usual, "gan-")) and len(of(more, "fit-")) == 4*len(of(usual, "fit-"))
    assert usual.items() <= more.items() and len(set(more.values())) == len(more)

def test_a_patch_of_a_test_patient_moves_classifiers_only(usual, tmp_path):
    now = keys_of(tmp_path, SIDES | dict(test=toy("t2", 6, 6)), **ALL)
    assert changed(usual, now) == of(usual, "fit-")

def test_every_arm_adds_and_shows_as_many(tmp_path):
    run = run_of(tmp_path, **ALL)
    study = paper.Study(SIDES, OTHER, {s: part(SIDES["train"], s, 0) for s in dict.fromkeys(run.grid.regime)}, pd.DataFrame())
    sets = {s: toy(f"drawn {s}", paper.wanted(run, study.parts[s[1]][0]), 0) for s in paper.sources(run)}
    n = {r.arm: len(paper.added(run, study, r, sets, run.seeds)) for r in run.grid[run.grid.regime == "50"].itertuples()}
    assert {n[a] for a in (*GANS, "copies", "noise", "none_healthy", "other")} == {12} and {n[a] for a in ("none", "longer", "classic")} == {0}
    shown = {a: paper.training_of(run, a, run.seeds, 0).recipe for a in n}
    assert len({r.epoch_size for r in shown.values()}) == 1 and {a for a in n if shown[a].epochs != shown["none"].epochs} == {"longer"}
    for share in ("25", "50"): check_leaks(train=study.parts[share][0], val=SIDES["val"], test=SIDES["test"])
    assert set(study.parts["25"][0].table.patient_id) <= set(study.parts["50"][0].table.patient_id)

@pytest.mark.parametrize("given,said", [(dict(arms="dcgn"), "did you mean 'dcgan'"), (dict(task="malign"), "did you mean 'malignant'"), (dict(dose=99.), "dose"),
    (dict(task="malignant", arms="painting"), "needs healthy tissue"), (dict(home="mine"), "phantoms have their places"),
    (dict(multiverse="split_by_pach"), "did you mean 'split_by_patch'"), (dict(switches="last"), "last_epoch")])
def test_bad_parameters_are_refused(given, said):
    values = declared() | given
    types = {k: type(v) for k,v in values.items()}
    with pytest.raises(ParameterError, match=said):
        settle(paper.PAPER, check_params(values | {"__annotations__": types}, stages=paper.PAPER.stages, **rules_of(paper.PAPER, types)))

def test_claims_compare_every_arm_with_its_control():
    "One claim an arm and size, whose cells a run can have; an arm that is its control's equal gains nothing."
    mine, cells = claims("05_which_helps"), pd.DataFrame([dict(scope="lesions", model="cnn", arm=a, regime=r) for a in ARMS for r in paper.SHARES])
    assert {c.id for c in mine} == {f"05.{a}.{r}" for a in ARMS if a not in ("none", "noise") for r in ("50", "100")}
    for c in mine:
        arm, C = c.id.split(".")[1], contrasts(c, cells)[0]
        assert {cells.arm[i]: w for i,w in enumerate(C[0]) if w} == {arm: 1, helps_figures.AGAINST[arm]: -1}

@pytest.mark.slow
def test_known_looks():
    "Worlds of known truth through the stop rule: the committed counts again (some 1.5 CPU s a world)."
    kept = pd.read_csv(ROOT/"reports"/"known_looks.csv")
    pd.testing.assert_frame_equal(frequencies(looked_worlds(range(kept.worlds[0]))), kept)

@pytest.mark.slow
def test_a_small_run_with_diffusion(papermill, tmp_path):
    "Some 60 CPU s: trained, drawn, measured, audited by its samples alone."
    pytest.importorskip("diffusers", reason="needs the extra `diffusion`")
    papermill("05_which_helps", tmp_path/"out.ipynb", "patients",24, "arms","copies,diffusion", "gan_share",.01, "clf_epochs",1, "trainings",1, "size",16, "run_dir",tmp_path/"run")
    tables = {p.stem: pd.read_csv(p) for p in (tmp_path/"run"/"tables").glob("*.csv")}
    assert set(tables["ranking"].arm) == {"copies", "diffusion"} and tables["quality"][["fid", "trts", "hours"]].notna().all(axis=None)
    assert set(tables["audit"].generator) == {"diffusion"} and not tables["audit"].attack.str.contains("LOGAN").any()
    assert "Diffusion model" in (tmp_path/"run"/"report.html").read_text()

def test_a_small_run_from_start_to_page(papermill, tmp_path):
    papermill("05_which_helps", tmp_path/"out.ipynb", "patients",24, "arms","copies,dcgan", "gan_share",.01, "clf_epochs",1, "trainings",1, "size",16, "run_dir",tmp_path/"run")
    tables = {p.stem: pd.read_csv(p) for p in (tmp_path/"run"/"tables").glob("*.csv")}
    assert set(tables["ranking"].arm) == {"copies", "dcgan"} and set(tables["worth"].arm) == {"copies", "dcgan"}
    assert len(tables["quality"]) == 2 and tables["quality"][["fid", "trts", "hours"]].notna().all(axis=None)
    assert tables["claims"].shown.str.contains("phantom, demo|not run").all() and not tables["claims"].verdict.str.startswith("holds").any()
    html = (tmp_path/"run"/"report.html").read_text()
    for heading in ("Which of them helps?", "What holds", "How many real patients is it worth?", "Do quality and cost foretell use?", "Data"): assert f"{heading}</h2>" in html, heading
    assert "PHANTOM DATA" in html
