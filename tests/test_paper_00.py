"Paper 00: the notebook as a process at tiny size, what its keys and parameters do, counts of the publication, data that cannot be used."
import ast, json, os, subprocess, sys
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from test_stale import CHANGES

from mammo_nb.clf.augment import patch_arrays
from mammo_nb.clf.resnet import HeadJob, HeadRecipe, Preparation, ResNetClassifier, fit_heads, frozen_resnet, resnet_features, start_head
from mammo_nb.clf.train import fit_classifier
from mammo_nb.core import DataError, LeakError, ParameterError, global_seed, read_json, repo_root, rng, write_json
from mammo_nb.data.boxes import as_box, zoomed_box
from mammo_nb.data.patches import PatchSet, patch_table
from mammo_nb.data.table import make_data
from mammo_nb.metrics.features import texture_patches
from mammo_nb.paper import settle
from mammo_nb.papers import shift as paper, shift_heads, shift_patches, shift_rows, shift_singans
from mammo_nb.params import Params
from mammo_nb.report.tables import published
from mammo_nb.runs import Run, job_key

NOTEBOOK = repo_root()/"nbs"/"00_annotation_shift.ipynb"
TINY = dict(clf_epochs=3, singan_steps=1, boots=40, crops=1, size=32, sifid="embedded")


# ---------------------------------------------------------------- what was published
def test_every_published_cell_is_planned():
    want = published("00_annotation_shift")
    want = want[want.table.isin(["section4","table1","table2","table3","table4"])][["scope","model","arm","regime"]].drop_duplicates()
    have = set(map(tuple, paper.plan_cells().values))
    assert [tuple(r) for r in want.values if tuple(r) not in have] == []

def declared():
    "The parameters of the notebook as they stand there."
    cell = next(c for c in nbformat.read(NOTEBOOK, 4).cells if "parameters" in c.metadata.get("tags", []))
    return {node.target.id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}

def settled(**changes): return settle(paper.PAPER, Params(**declared() | changes))

def test_published_numbers_of_parameters_and_trainings():
    assert [sum(p.numel() for p in start_head(2048, c, seed=0)) for c in (3,1)] == [6147, 2049]
    assert 3*(len(set(shift_rows.ARMS)-set(shift_rows.CONTROLS))+1) == 27
    setup = settled(preset="paper").setup
    h, s = setup.head, setup.singan
    assert (h.epochs, h.bs, h.lr, h.lr_every, h.lr_decay, h.betas, setup.weights, setup.size, s.steps, s.factor) == (100, 128, .01, 5, .1, (.9,.999), "imagenet_v2", 224, 30, .8)


# ---------------------------------------------------------------- last layers: trained alone, or with every epoch through the network
@pytest.mark.slow
def test_cached_heads_equal_the_uncached_loop_on_resnet50(tmp_path):
    from safetensors.torch import save_file
    from torchvision.models import resnet50
    with global_seed(0, "weights"): save_file(resnet50(weights=None).state_dict(), tmp_path/"resnet50.safetensors")
    weights, px, y = str(tmp_path/"resnet50.safetensors"), texture_patches(24, seed=0, size=64), np.arange(24) % 3
    model = ResNetClassifier(weights, size=64, seed=1)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 6147
    fit_classifier(model, patch_arrays(px[:15], y[:15]), patch_arrays(px[15:], y[15:]), seed=1, epochs=3, bs=6, optimiser="adam", lr=1e-2, momentum=.9, lr_decay=.1, lr_every=2,
                   sampling="balanced", monitor="loss", flips="", classes=("healthy","benign","malignant"))
    f = resnet_features(px, net=frozen_resnet(weights), prepare=Preparation(64), folder=tmp_path)
    head, = fit_heads(f, y, [HeadJob("h", tuple(range(15)), tuple(range(15,24)), seed=1)], recipe=HeadRecipe(epochs=3, bs=6, lr_every=2, valid="whole"))
    assert np.abs(head.weight - model.fc.weight.detach().numpy()).max() < 1e-5

PX, KINDS = texture_patches(24, seed=0, size=32), np.r_[np.arange(15) % 3, 0,0,0,0,0,0,1,1,2]
JOB = HeadJob("G1/fold0", tuple(range(15)), tuple(range(15,24)), balanced=True, seed=1)

@pytest.mark.parametrize("valid", ["balanced","sampled","whole"])
def test_both_ways_weigh_validation_alike(tmp_path, valid):
    "`train_whole` chose its epoch by another loss than the recipe said."
    recipe = HeadRecipe(epochs=3, bs=6, lr_every=2, valid=valid)
    model = ResNetClassifier("none", size=32, depth="small", seed=1)
    how = shift_heads.whole_recipe(recipe, True, False)
    fit = fit_classifier(model, patch_arrays(PX[:15], KINDS[:15]), patch_arrays(PX[15:], KINDS[15:]), seed=1, recipe=how)
    f = resnet_features(PX, net=frozen_resnet("none", depth="small"), prepare=Preparation(32), folder=tmp_path)
    head, = fit_heads(f, KINDS, [JOB], recipe=recipe)
    assert np.abs(head.history.valid_loss - fit.history.valid_loss).max() < 1e-4 and head.best_epoch == fit.best_epoch

def test_authors_is_what_it_says(tmp_path):
    "Of protocol `authors`, keep_last and sampled_valid were not heard where batch norm trains."
    setup = settled(protocol="authors", clf_epochs=2).setup
    t = pd.DataFrame(dict(group="G1", patch_id=[str(i) for i in range(24)], patient_id=[str(i) for i in range(24)], cls=KINDS))
    shift_heads.train_whole(tmp_path, rows=shift_rows.Rows(t, PX), jobs=dict(three_class=[JOB]), recipe=setup.head, network=shift_heads.Network("none", "small", 32, "authors"))
    told, = [read_json(f) for f in tmp_path.glob("*/classifier.json")]
    recipe = told["identity"]["recipe"]
    assert (recipe["monitor"], recipe["valid"], recipe["lr_decay"], recipe["epochs"], told["best_epoch"]) == ("last", "sampled", 1., 2, 1)

@pytest.mark.parametrize("switch,field", [("lr_constant","lr_every"), ("keep_last","keep"), ("sampled_valid","valid")])
def test_a_switch_changes_one_thing(switch, field):
    old, new = vars(settled().setup.head), vars(settled(switches=switch).setup.head)
    assert [k for k in old if old[k] != new[k]] == [field]

@pytest.mark.parametrize("sources", ["rotated", "anew"])
def test_sources_of_one_training_are_refused(sources):
    "They changed nothing and said nothing, where SinGANs are trained once."
    with pytest.raises(ParameterError, match="sources"): settled(sources=sources)
    assert settled(sources=sources, replicates=2).setup == settled(replicates=2).setup

@pytest.mark.parametrize("switch", ["long_singan", "one_crop"])
def test_what_a_switch_lists_is_used(switch):
    "The page lists a departure by its field; the sizes that jobs are given must differ in that one thing."
    alike = dict(preset="paper", only="data", weights="none")
    old, new = settled(**alike).setup, settled(**alike, switches=switch).setup
    changed = {k for k in vars(old) if getattr(old, k) != getattr(new, k)}
    assert changed == dict(long_singan={"singan"}, one_crop={"crops"})[switch]
    assert (new.singan.steps, new.singan.restart, new.crops) == ((6000, 30, 10) if switch == "long_singan" else (30, 0, 1))


# ---------------------------------------------------------------- the notebook as a process
def run_notebook(tmp_path, name, **over):
    out = tmp_path/name
    args = [a for k,v in {**TINY, "run_dir": out, **over}.items() for a in (("-r" if isinstance(v, str) or k == "run_dir" else "-p"), k, str(v))]
    done = subprocess.run([sys.executable, "-m", "papermill", str(NOTEBOOK), str(tmp_path/f"{name}.ipynb"), *args, "--no-progress-bar"],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=repo_root())
    return done, out

@pytest.mark.slow
def test_the_notebook_at_tiny_size(tmp_path):
    done, out = run_notebook(tmp_path, "a", seed=1)
    assert done.returncode == 0, done.stderr[-3000:]
    results = pd.read_csv(out/"results.csv")
    assert set(map(tuple, results[["scope","model","arm","regime"]].values)) == set(map(tuple, paper.plan_cells().values))
    assert results.value.between(0,1).all() and not (results.lo > results.hi).any()
    claims = pd.read_csv(out/"tables"/"claims.csv")
    assert len(claims) == 26 and claims.shown.str.contains("phantom, demo|not run|not testable").all()
    assert pd.read_csv(out/"tables"/"leak_check.csv").shared.sum() == 0
    page = (out/"report.html").read_text()
    assert "PHANTOM DATA" in page and "random weights" in page and "http://" not in page and 'src="https://' not in page
    # the same run again in another folder: stages are reused, tables equal to the byte
    again, out2 = run_notebook(tmp_path, "b", seed=1)
    assert again.returncode == 0
    for f in ("answers.csv.gz", "tables/sifid.csv", "tables/departures.csv", "tables/confound.csv"): assert (out/f).read_bytes() == (out2/f).read_bytes(), f
    one, two = (json.loads((o/"run.json").read_text())["stages"]["singans"] for o in (out, out2))
    assert two["reused"] or one["folder"] != two["folder"]                                 # reused, unless the code itself changed between the two

@pytest.mark.slow
def test_left_out_stages_leave_the_rest_out(tmp_path):
    done, out = run_notebook(tmp_path, "c", seed=1, only="data,patches,report", gan_seed=7)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {n for n,_ in json.loads((out/"run.json").read_text())["skipped"]} >= {"singans", "samples", "features", "heads"}
    assert set(pd.read_csv(out/"tables"/"claims.csv").verdict) == {"cannot tell"}

def test_a_misspelt_parameter_ends_the_notebook_before_anything_is_loaded(tmp_path):
    done, out = run_notebook(tmp_path, "x", sead=1)
    assert done.returncode == 1 and "did you mean 'seed'?" in done.stderr and not out.exists()


# ---------------------------------------------------------------- what a job's key knows, without any training
def toy_groups(shift=0):
    "Small patches of made-up women: twelve with a lesion at three zooms, twelve without."
    def group(name, labels):
        rows = [dict(patch_id=f"{'t' if len(labels) > 1 else name}:{i}:x{name[-1]}", patient_id=f"{labels[0]}{i}", target=int(len(labels) > 1), label=labels[i%3%len(labels)], dataset="t") for i in range(12)]
        return PatchSet(rng(shift, name).integers(0, 255, (12,1,32,32)).astype(np.uint8), patch_table(rows))
    return {z: group(z, ["benign","benign","malignant"]) for z in shift_patches.ZOOMS} | {g: group(g, ["normal"]) for g in ("healthy","matched1","matched2","matched3")}

WOMEN = [f"{kind}{i}" for kind in ("benign","normal") for i in range(12)]
FOLDS = pd.DataFrame({f"fold{k}": (["train"]*6+["val"]*3+["test"]*3)*2 for k in range(3)}, index=WOMEN)
FAKE = {f"{z}-{k}": rng(k, z).integers(0, 255, (8,32,32), dtype=np.uint8) for z in ("G1","G3") for k in range(4)}

def new_run(tmp_path, **changes):
    params = Params(**declared() | dict(run_dir=str(tmp_path/f"run{len(list(tmp_path.iterdir()))}"), device="cpu", size=32) | changes)
    return Run(params, paper=paper.PAPER.name, **vars(settle(paper.PAPER, params)))

def jobs_of(tmp_path, *, groups=None, samples=FAKE, folds=FOLDS, **changes):
    "The run and every job on the toys, by name."
    run = new_run(tmp_path, **changes)
    cuts = paper.Cuts(toy_groups() if groups is None else groups, [2,5,2,5], folds)
    sources, stage = paper.sources_of(run, cuts), tmp_path/"stage-key"
    write_json(stage/"done.json", {})
    trials = paper.trials(run, cuts, samples)
    found = [*paper.generators(run, sources).values(), *paper.draws(run, cuts, sources, dict(singans=stage)).values(), *paper.features(run, trials).values(),
             *paper.classifiers(run, trials, {t.norm: stage for t in trials.values()}).values()]
    return run, {j.name: j for j in found}

def keys_of(tmp_path, **changes):
    run, jobs = jobs_of(tmp_path, **changes)
    return {name: job_key(j, "cpu", run.params.mode) for name,j in jobs.items()}

def differ(a, b, *begins):
    "The jobs that changed are those whose names begin so, and all of these changed."
    changed = {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}
    assert changed == {name for name in a.keys() | b.keys() if name.startswith(begins)}, changed

def test_keys_are_the_same_twice(tmp_path):
    assert keys_of(tmp_path) == keys_of(tmp_path)

def test_a_flipped_label_is_another_training(tmp_path):
    "It was not: heads of the old labels answered for the new ones, where the rows stayed the same."
    other = toy_groups()
    for z in shift_patches.ZOOMS: other[z].table.loc[[9,11], "label"] = ["malignant","benign"]                # two women who test
    one, two = (jobs_of(tmp_path, groups=g)[1]["heads"] for g in (toy_groups(), other))
    assert one.given["jobs"] == two.given["jobs"] and job_key(one, "cpu", "exact") != job_key(two, "cpu", "exact")
    differ(keys_of(tmp_path), keys_of(tmp_path, groups=other), "heads")
    differ(keys_of(tmp_path, switches="bn_train"), keys_of(tmp_path, switches="bn_train", groups=other), "heads")

def test_pixels_count(tmp_path):
    other = toy_groups()
    other["healthy"].pixels[0,0,0,0] ^= 1
    differ(keys_of(tmp_path), keys_of(tmp_path, groups=other), "features")                  # heads follow by the name of that folder
    other = toy_groups()
    other["G3"].pixels[2,0,0,0] ^= 1                                                        # a source of the SinGANs
    differ(keys_of(tmp_path), keys_of(tmp_path, groups=other), "features", "singans", "samples")

def test_seeds_and_folds_count(tmp_path):
    alone = dict(departures=False)
    before = keys_of(tmp_path, **alone)
    differ(before, keys_of(tmp_path, **alone, gan_seed=1), "singans", "samples")
    differ(before, keys_of(tmp_path, **alone, seed=1), "heads", "features")                  # features: of other crops
    differ(before, keys_of(tmp_path, **alone, folds=FOLDS.assign(fold2=np.roll(FOLDS.fold2.to_numpy(), 1))), "heads")
    differ(before, keys_of(tmp_path, **alone, samples={k: x[::-1] for k,x in FAKE.items()}), "features")

def test_switches_reach_what_they_name(tmp_path):
    before = keys_of(tmp_path, departures=False)
    def switched(name): return keys_of(tmp_path, departures=False, switches=name)
    for name in ("lr_constant","keep_last","sampled_valid","duplicate_samples"): differ(before, switched(name), "heads")
    differ(before, switched("double_norm"), "features")
    differ(before, switched("stretched_singan"), "singans", "samples")
    differ(before, switched("bn_train"), "heads", "features")
    differ(switched("bn_train"), switched("bn_train,keep_last"), "heads")
    differ(switched("bn_train"), switched("bn_train,sampled_valid"), "heads")

OF_FOLDS = dict(loose_sources="loose_sources", subset_patients="apart")
OF_JOBS = {"lr_constant", "keep_last", "sampled_valid", "duplicate_samples", "double_norm", "stretched_singan", "bn_train"}       # above
OF_SIZES = {"long_singan", "one_crop"}                                                  # test_what_a_switch_lists_is_used

class Dealt(Exception): "Stands for all that comes after the folds."

@pytest.mark.parametrize("switch", OF_FOLDS)
def test_switches_of_the_folds_reach_them(tmp_path, monkeypatch, switch):
    dealt = []
    def stop(groups, sources, how):
        dealt.append(vars(how))
        raise Dealt
    monkeypatch.setattr(paper, "cut_groups", lambda *given: toy_groups())
    monkeypatch.setattr(paper, "pick_sources", lambda *given, **more: ([2,5,2,5], None))
    monkeypatch.setattr(paper, "make_folds", stop)
    for asked in ("", switch):
        with pytest.raises(Dealt): paper.cut(new_run(tmp_path, switches=asked), [])
    assert {k for k in dealt[0] if dealt[0][k] != dealt[1][k]} == {OF_FOLDS[switch]}

def test_no_switch_is_left_out_here():
    assert set(paper.SWITCHES) == {*OF_FOLDS, *OF_JOBS, *OF_SIZES}

def test_replaced_weights_are_others(tmp_path):
    file = tmp_path/"resnet50-11ad3fa6.pth"
    file.write_bytes(b"old")
    before = keys_of(tmp_path, weights=str(file), departures=False)
    file.write_bytes(b"new")
    differ(before, keys_of(tmp_path, weights=str(file), departures=False), "features")

def test_a_left_out_stage_leaves_out_what_needs_it(tmp_path):
    run, _ = jobs_of(tmp_path)
    cuts = paper.Cuts(toy_groups(), [2,5,2,5], FOLDS)
    trials = paper.trials(run, cuts, None)
    assert not any("singan" in j.name for t in trials.values() for jobs in t.jobs.values() for j in jobs) and "duplicate_samples" not in trials
    assert {j.given["features"] for j in paper.classifiers(run, trials, dict(imagenet=None, authors=None)).values()} == {None}


# ---------------------------------------------------------------- every parameter does something
OTHER = CHANGES["00"] | dict(preset="paper", sifid="inception", departures=False)       # all parameters are listed in test_stale.py

def what_is_done(tmp_path, monkeypatch, **changes):
    "Settings, keys, and what the loaders are asked for."
    asked = []
    monkeypatch.setattr(paper, "check_weights", lambda *given: asked.append(given))
    monkeypatch.setattr(paper, "read_any", lambda *given, **more: asked.append((given, more)) or {})
    monkeypatch.setattr(paper, "real_sets", lambda *given: asked.append(given[1:]) or [])
    monkeypatch.setattr(paper.Phantoms, "tree", lambda self: str(self))
    run, jobs = jobs_of(tmp_path, **changes)
    paper.load(run)
    keys = {name: job_key(j, "cpu", run.params.mode) for name,j in jobs.items()}
    lesions = paper.source_sets([0, 1, 2, 3], run.params.sources, run.params.replicates)
    return str((run.setup, run.protocol, paper.replicates(run), lesions, keys, asked))

def test_every_parameter_has_an_effect(tmp_path, monkeypatch):
    (tmp_path/"weights.pth").write_bytes(b"weights")
    real = dict(data_dir=str(tmp_path))
    tried = {k: ({}, v) for k,v in OTHER.items()} | dict(data_dir=({}, str(tmp_path)), dataset=(real, "mine"), label_rules=(real, "vindr.malignant_from=5"), sources=(dict(replicates=2), "rotated"), weights=({}, str(tmp_path/"weights.pth")))
    for name,(base,value) in tried.items():
        assert what_is_done(tmp_path, monkeypatch, **base) != what_is_done(tmp_path, monkeypatch, **base, **{name: value}), f"{name} does nothing"


# ---------------------------------------------------------------- data that cannot be used, and data that has to be
def folder_set(root, n=24, lesion_box=(10,10,50,50), labels=("benign","malignant"), normals=6):
    from PIL import Image
    ims, les = [], []
    for i in range(n+normals):
        img = np.where(np.arange(160)[None] < 120, 60 + 20*rng(i,"t").normal(size=(200,160)), 0).clip(0,255).astype(np.uint8); img[0,0] = 255
        Image.fromarray(img).save(root/f"{i}.png")
        ims.append(dict(image_id=f"t:{i}", patient_id=f"t:p{i}", path=str(root/f"{i}.png"), has_lesion=i < n, normal=i >= n, laterality="L", view="CC", rows=200, cols=160, device="film" if i%2 else "digital"))
        if i < n: les.append(dict(image_id=f"t:{i}", lesion_id="1", **dict(zip(("x0","y0","x1","y1"), lesion_box)), lesion_type="mass", label=labels[i%4 == 0]))
    return make_data("t", ims, les)

CUTTING = shift_patches.Cutting(size=32, scale=.25, film_healthy=1.6, digital_healthy=1.6)
FOLDING = shift_patches.Folding(test=.3, val=.3)

def test_a_lesion_at_the_border_is_cut_at_every_zoom(tmp_path):
    groups = shift_patches.cut_groups([folder_set(tmp_path, lesion_box=(0,0,30,40))], CUTTING)
    assert [len(groups[g]) for g in shift_patches.ZOOMS] == [24]*3
    assert groups["G3"].table.loc[0,["x0","y0","x1","y1"]].tolist() == [0,0,60,80]         # clipped at the border, off centre, as in the paper

def test_a_box_larger_than_the_image_is_the_image():
    assert zoomed_box(as_box((-50,-50,400,400), rows=200, cols=160), rows=200, cols=160, zoom=3) == (0,0,160,200)

def test_healthy_windows_keep_clear_of_lesions(tmp_path):
    data = folder_set(tmp_path)
    groups = shift_patches.cut_groups([data], CUTTING)
    t = groups["healthy"].table.merge(data.lesions[["image_id","x0","y0","x1","y1"]], on="image_id", suffixes=("","_l"))
    meets = (t.x0 < t.x1_l) & (t.x0_l < t.x1) & (t.y0 < t.y1_l) & (t.y0_l < t.y1)
    assert len(t) and not meets.any()

def test_one_class_and_ready_patches_are_refused(tmp_path):
    with pytest.raises(DataError, match="no malignant lesion"): shift_patches.check_sets([folder_set(tmp_path, labels=("benign","benign"))])
    ready = make_data("r", [], [], patches=pd.DataFrame([dict(patch_id="a", patient_id="r:1", path="x.png", target=1, label="benign", dataset="r")]))
    with pytest.raises(DataError, match="no tissue around them"): shift_patches.check_sets([ready])

def cut_folder(tmp_path, n=30):
    groups = shift_patches.cut_groups([folder_set(tmp_path, n=n)], CUTTING)
    rows, _ = shift_patches.pick_sources(groups["G1"], paper.DEMO.singan, seed=0)
    return groups, rows, shift_patches.make_folds(groups, rows, FOLDING)

SAMPLES = {f"{z}-{k}": rng(k,z).integers(0,255,(40,32,32),dtype=np.uint8) for z in ("G1","G3") for k in range(4)}

def test_a_source_that_tests_is_a_leak(tmp_path):
    groups, rows, f = cut_folder(tmp_path)
    assert set(f.loc[groups["G1"].table.patient_id.iloc[rows]].to_numpy().ravel()) == {"train"}
    sources = shift_singans.singan_sources(groups, rows)
    shift_singans.check_sources(groups, sources, SAMPLES, f)
    f.loc[sources.table.patient_id[0],"fold2"] = "val"
    with pytest.raises(LeakError, match="seen by a generator"): shift_singans.check_sources(groups, sources, SAMPLES, f)
    cuts, drawn = paper.Cuts(groups, rows, f), tmp_path/"drawn"
    drawn.mkdir()
    np.savez(drawn/"samples.npz", **SAMPLES)
    with pytest.raises(LeakError, match="seen by a generator"): paper.synthetic(new_run(tmp_path), cuts, sources, dict(samples=drawn))
    assert paper.synthetic(new_run(tmp_path, switches="loose_sources"), cuts, sources, dict(samples=drawn))            # the authors' way, on request

def test_arms_add_the_same_number_of_patches(tmp_path):
    groups, sources, f = cut_folder(tmp_path)
    n = shift_patches.samples_needed(groups["G3"].table, f)
    controls = shift_rows.control_patches(groups["G1"].subset(np.array(sources)), n, seed=0)
    rows = shift_rows.gather_rows(groups, f, SAMPLES, crops=1, controls=controls)
    ids = tuple(groups["G1"].table.patch_id.iloc[sources])
    kinds, n = rows.table.cls.to_numpy(), {}
    for arm in shift_rows.ARMS:
        at, balanced = shift_rows.train_rows(rows, arm, f.fold0, source_ids=ids)
        n[arm] = np.bincount(kinds[at])
        assert balanced == ("+" not in arm)
        assert rows.table.patient_id.iloc[at].map(f.fold0).dropna().eq("train").all()
    for arm in shift_rows.ARMS:
        filled = n["G3"][2] if arm == "G3+unweighted" else n[arm][1]
        if "+" in arm: assert n[arm][2] == filled and n[arm][1] == n["G3"][1] and n[arm][0] == n["G3"][0], arm
    def made(arm): return {g for g in rows.table.group.iloc[shift_rows.train_rows(rows, arm, f.fold0, source_ids=ids)[0]] if g.startswith("S")}
    assert [len(made(f"G3+singan{k}")) for k in (1,2,4)] == [1,2,4]
