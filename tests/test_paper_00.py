"Paper 00 as a whole: the notebook at demo size, its tables, its honesty; counts of the publication; bad data."
import json, os, subprocess, sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mammo_nb.core import DataError, LeakError, repo_root, rng
from mammo_nb.papers import shift as paper
from mammo_nb.report.tables import published

NOTEBOOK = repo_root()/"nbs"/"00_annotation_shift.ipynb"
TINY = dict(clf_epochs=3, singan_steps=1, boots=40, crops=1, size=32, sifid="embedded")

def params(**over):
    P = dict(seed=0, preset="demo", mode="exact", protocol="paper", switches="", data_dir="", test_sets="", healthy="", singan="", singan_steps=0, clf_epochs=0, patients=0, size=0, crops=-1, boots=0,
             weights="", split_seed=-1, gan_seed=-1, phantom_seed=0, scaling="minmax", dataset="", run_dir="", device="cpu", only="")
    return SimpleNamespace(**{**P, **over})

def test_every_published_cell_is_planned():
    want = published("00_annotation_shift")
    want = want[want.table.isin(["section4","table1","table2","table3","table4"])][["scope","model","arm","regime"]].drop_duplicates()
    have = set(map(tuple, paper.plan_cells().values))
    assert [tuple(r) for r in want.values if tuple(r) not in have] == []

def test_published_numbers_of_parameters_and_trainings():
    from mammo_nb.clf.resnet import start_head
    assert [sum(p.numel() for p in start_head(2048, c, seed=0)) for c in (3,1)] == [6147, 2049]
    assert 3*(len(paper.ARMS)+1) == 27
    R = paper.resolve(params(preset="paper"))
    h, s = R.setup.head, R.setup.singan
    assert (h.epochs, h.bs, h.lr, h.lr_every, h.lr_decay, h.betas, R.setup.weights, R.setup.size, s.steps, s.factor) == (100, 128, .01, 5, .1, (.9,.999), "imagenet_v2", 224, 30, .8)

@pytest.mark.slow
def test_cached_heads_equal_the_uncached_loop_on_resnet50(tmp_path):
    import torch
    from safetensors.torch import save_file
    from torchvision.models import resnet50
    from mammo_nb.clf.augment import patch_arrays
    from mammo_nb.clf.resnet import HeadJob, HeadRecipe, Preparation, ResNetClassifier, fit_heads, frozen_resnet, resnet_features
    from mammo_nb.clf.train import fit_classifier
    from mammo_nb.core import global_seed
    from mammo_nb.metrics.features import texture_patches
    with global_seed(0, "weights"): save_file(resnet50(weights=None).state_dict(), tmp_path/"resnet50.safetensors")
    weights, px, y = str(tmp_path/"resnet50.safetensors"), texture_patches(24, seed=0, size=64), np.arange(24) % 3
    model = ResNetClassifier(weights, size=64, seed=1)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 6147
    fit_classifier(model, patch_arrays(px[:15], y[:15]), patch_arrays(px[15:], y[15:]), seed=1, epochs=3, bs=6, optimiser="adam", lr=1e-2, momentum=.9, lr_decay=.1, lr_every=2,
                   sampling="balanced", monitor="loss", flips="", classes=("healthy","benign","malignant"))
    f = resnet_features(px, net=frozen_resnet(weights), prepare=Preparation(64), folder=tmp_path)
    head, = fit_heads(f, y, [HeadJob("h", tuple(range(15)), tuple(range(15,24)), seed=1)], recipe=HeadRecipe(epochs=3, bs=6, lr_every=2, valid="whole"))
    assert np.abs(head.weight - model.fc.weight.detach().numpy()).max() < 1e-5

@pytest.mark.parametrize("switch,field", [("lr_constant","lr_every"), ("keep_last","keep"), ("sampled_valid","valid")])
def test_a_switch_changes_one_thing(switch, field):
    a, b = paper.resolve(params()), paper.resolve(params(switches=switch))
    old, new = vars(a.setup.head), vars(b.setup.head)
    assert [k for k in old if old[k] != new[k]] == [field]

def test_the_notebook_knows_every_switch():
    source = NOTEBOOK.read_text()
    assert [k for k in paper.SWITCHES if f'\\"{k}\\"' not in source] == []

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
    assert len(claims) == 8 and claims.shown.str.contains("phantom, demo").all()
    assert pd.read_csv(out/"tables"/"leak_check.csv").shared.sum() == 0
    page = (out/"report.html").read_text()
    assert "PHANTOM DATA" in page and "random weights" in page and "http://" not in page and 'src="https://' not in page
    # the same run again in another folder: stages are reused, tables equal to the byte
    again, out2 = run_notebook(tmp_path, "b", seed=1)
    assert again.returncode == 0
    for f in ("tables/predictions.csv", "tables/sifid.csv", "tables/departures.csv", "tables/confound.csv"): assert (out/f).read_bytes() == (out2/f).read_bytes(), f
    one, two = (json.loads((o/"run.json").read_text())["stages"]["singans"] for o in (out, out2))
    assert two["reused"] or one["folder"] != two["folder"]                                 # reused, unless the code itself changed between the two

def test_a_misspelt_parameter_ends_the_notebook_before_anything_is_loaded(tmp_path):
    done, out = run_notebook(tmp_path, "x", sead=1)
    assert done.returncode == 1 and "did you mean 'seed'?" in done.stderr and not out.exists()

# ---- data that cannot be used, and data that has to be ----
def folder_set(root, n=24, lesion_box=(10,10,50,50), labels=("benign","malignant"), normals=6):
    from PIL import Image
    from mammo_nb.data.table import make_data
    ims, les = [], []
    for i in range(n+normals):
        img = np.where(np.arange(160)[None] < 120, 60 + 20*rng(i,"t").normal(size=(200,160)), 0).clip(0,255).astype(np.uint8); img[0,0] = 255
        Image.fromarray(img).save(root/f"{i}.png")
        ims.append(dict(image_id=f"t:{i}", patient_id=f"t:p{i}", path=str(root/f"{i}.png"), has_lesion=i < n, normal=i >= n, laterality="L", view="CC", rows=200, cols=160, device="film" if i%2 else "digital"))
        if i < n: les.append(dict(image_id=f"t:{i}", lesion_id="1", **dict(zip(("x0","y0","x1","y1"), lesion_box)), lesion_type="mass", label=labels[i%4 == 0]))
    return make_data("t", ims, les)

def setup(**kw): return SimpleNamespace(mode="exact", setup=replace(paper.PRESETS["demo"], size=32, crops=1), protocol=paper.Protocol(**kw), scale=.25, seeds=dict(seed=0, split=0, gan=0, phantom=0))

def test_a_lesion_at_the_border_is_cut_at_every_zoom(tmp_path):
    groups = paper.cut_groups([folder_set(tmp_path, lesion_box=(0,0,30,40))], setup())
    assert [len(groups[g]) for g in paper.ZOOMS] == [24]*3
    assert groups["G3"].table.loc[0,["x0","y0","x1","y1"]].tolist() == [0,0,60,80]         # clipped at the border, off centre, as in the paper

def test_a_box_larger_than_the_image_is_the_image():
    from mammo_nb.data.boxes import as_box, zoomed_box
    assert zoomed_box(as_box((-50,-50,400,400), rows=200, cols=160), rows=200, cols=160, zoom=3) == (0,0,160,200)

def test_healthy_windows_keep_clear_of_lesions(tmp_path):
    data = folder_set(tmp_path)
    groups = paper.cut_groups([data], setup())
    t = groups["healthy"].table.merge(data.lesions[["image_id","x0","y0","x1","y1"]], on="image_id", suffixes=("","_l"))
    meets = (t.x0 < t.x1_l) & (t.x0_l < t.x1) & (t.y0 < t.y1_l) & (t.y0_l < t.y1)
    assert len(t) and not meets.any()

def test_one_class_and_ready_patches_are_refused(tmp_path):
    with pytest.raises(DataError, match="no malignant lesion"): paper.check_sets([folder_set(tmp_path, labels=("benign","benign"))])
    from mammo_nb.data.table import make_data
    ready = make_data("r", [], [], patches=pd.DataFrame([dict(patch_id="a", patient_id="r:1", path="x.png", target=1, label="benign", dataset="r")]))
    with pytest.raises(DataError, match="no tissue around them"): paper.check_sets([ready])

def test_a_source_that_tests_is_a_leak(tmp_path):
    R = setup(); groups = paper.cut_groups([folder_set(tmp_path, n=30)], R)
    sources, _ = paper.pick_sources(groups["G1"], R.setup.singan, seed=0)
    f = paper.make_folds(groups, sources, R)
    assert set(f.loc[groups["G1"].table.patient_id.iloc[sources]].to_numpy().ravel()) == {"train"}
    images, table = paper.singan_images(groups, sources, R)
    samples = {f"{z}-{k}": rng(k,z).integers(0,255,(40,32,32),dtype=np.uint8) for z in ("G1","G3") for k in range(4)}
    paper.check_sources(groups, table, samples, f, R)
    f.loc[table.patient_id[0],"fold2"] = "val"
    with pytest.raises(LeakError, match="seen by a generator"): paper.check_sources(groups, table, samples, f, R)
    paper.check_sources(groups, table, samples, f, setup(loose_sources=True))                # the authors' way, on request

def test_arms_add_the_same_number_of_patches(tmp_path):
    R = setup(); groups = paper.cut_groups([folder_set(tmp_path, n=30)], R)
    sources, _ = paper.pick_sources(groups["G1"], R.setup.singan, seed=0)
    f = paper.make_folds(groups, sources, R)
    samples = {f"{z}-{k}": rng(k,z).integers(0,255,(40,32,32),dtype=np.uint8) for z in ("G1","G3") for k in range(4)}
    T = paper.gather_rows(groups, f, samples, R); ids = groups["G1"].table.patch_id.iloc[sources].tolist()
    cls, n = T.table.cls.to_numpy(), {}
    for arm in paper.ARMS:
        rows, balanced = paper.train_rows(T, arm, f.fold0, healthy=("healthy",)*3, source_ids=ids)
        n[arm] = np.bincount(cls[rows]); assert balanced == ("+" not in arm)
        assert T.table.patient_id.iloc[rows].map(f.fold0).dropna().eq("train").all()
    for arm in paper.ARMS:
        if "+" in arm: assert n[arm][1] == n[arm][2] and n[arm][0] == n["G3"][0]
    made = lambda a: [g for g in T.table.group.iloc[paper.train_rows(T, a, f.fold0, healthy=("healthy",)*3, source_ids=ids)[0]] if g.startswith("S")]
    assert [len(set(made(f"G3+singan{k}"))) for k in (1,2,4)] == [1,2,4]
