"No stale result: one input of a paper changes, and what is taken up from before must be what a fresh run would compute."
import ast
import os
import shutil
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pydicom
import pytest
from PIL import Image

from mammo_nb.core import DataError, file_hash, hash_of, read_json, repo_root
from mammo_nb.data import trees
from mammo_nb.paper import settle
from mammo_nb.papers import cbis, context, sharing, sharing_centres, shift, size_setup
from mammo_nb.params import Params

NOTEBOOKS = sorted((repo_root()/"nbs").glob("0[0-4]_*.ipynb"))
SEEDS = dict(seed=5, split_seed=4, gan_seed=4, phantom_seed=4)
TINY = {
    "00": dict(patients=30, clf_epochs=1, singan_steps=1, boots=20, crops=1, size=32, sifid="embedded", departures=False),
    "01": dict(patients=24, gan_updates=2, synthetic=8, clf_samples=40, arms="baseline,decay50", boots=20),
    "02": dict(patients=16, sizes="100", modes="org,aug_gan", folds=1, gan_epochs=1, simulation_epochs=1, fid_n=12, clf_epochs=1, boots=20),
    "03": dict(patients=40, models="cnn", cgan_models="cnn", trials=1, updates=2, clf_epochs=1, boots=20),
    "04": dict(patients=24, scopes="masses", models="cnn", arms="none,bcdr_dcgan", regimes="50", gan_epochs=1, clf_epochs=1, boots=20)}
CHANGES = { # Paper -> parameter -> another value
    "00": SEEDS | dict(protocol="clean", switches="lr_constant", scaling="voi", healthy="matched", test_sets="rotating", singan="official", singan_steps=2, patients=36,
                       size=24, crops=0, clf_epochs=2, departures=True, boots=30, replicates=2, sources="rotated", mode="bf16"),
    "01": SEEDS | dict(protocol="clean", switches="subtractive_decay", tasks="mass", arms="baseline", scaling="voi", side_mm=60., min_tissue=.8, patients=30, train_share=.5, d_mult=3, gan_updates=3,
                       synthetic=6, clf_samples=60, boots=30, replicates=2, ablations="no_border", normal="beside", mode="bf16"),
    "02": SEEDS | dict(protocol="clean", switches="beta2_999", sizes="250", modes="org", folds=2, replicates=2, scaling="voi", side_mm=6., extractor="pixels", patients=20, imbalance=3, factor=2.,
                       tissue_per_image=6, gan_epochs=2, simulation_epochs=2, fid_n=14, clf_epochs=2, boots=30, mode="bf16"),
    "03": SEEDS | dict(protocol="clean", protocols="paper", models="cnn_tuned", cgan_models="cnn_tuned", image="full", scaling="voi", size=96, patients=48, updates=3, synthetic=9, trials=2, replicates=2,
                       arms="noise", search_trials=2, clf_epochs=2, lr=.01, augment=False, leak_test=False, boots=30, mode="bf16"),
    "04": SEEDS | dict(protocol="clean", switches="crop_faults", scopes="lesions", models="swin", arms="none,copies", regimes="100", scaling="voi", margin=30, patients=30, gan_epochs=2,
                       clf_epochs=2, boots=30, replicates=2, dp_epsilon=8., references=2, external="b", mode="bf16")}
FREE = dict(run_dir="where the run goes", only="which stages are done, not what they do", device="counts in every key as cpu, cuda or mps", show_real="what the page shows",
            label_rules="of real sets only; what they change are labels, which count in every key",
            preset="the published sizes cost days; they reach the jobs as the sizes that stand here one by one")
DATA = "data_dir: the data are changed in place below, file by file"
MM = "refused here, where the size of a pixel is not known (lesson 84d); what it changes are pixels, which count in every key"
REASONS = { # Paper -> parameter -> why it is not changed here
    "00": FREE | dict(data_dir=DATA, side_mm=MM, dataset="which sets are read", weights="test_replaced_weights_are_others", sifid="`inception` needs weights; computed anew in every run"),
    "01": FREE | dict(data_dir=DATA, dataset="which sets are read", weights="read by the same function as paper 00's"),
    "02": FREE | dict(data_dir=DATA, weights="of the measure only; by content as paper 00's", k_shrink="of real data only, where it is a size like the others"),
    "03": FREE | dict(data_dir=DATA, weights="by content as paper 00's", frozen="needs ImageNet's weights"),
    "04": FREE | dict(data_dir=DATA, margin_mm=MM, side_mm=MM, centres="of several real sets only", split_by="of real sets only", holdout="of real sets only", dp_key="test_the_secret_of_private_training_counts_by_content",
                      generator_b="test_a_replaced_generator_is_another", generator_c="as generator_b",
                      generators="test_shipped_generators_are_imported_and_said")}

def number(notebook): return notebook.stem[:2]

def cells(notebook):
    "The parameters cell, the other code cells."
    code = [c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
    return code[0], code[1:]

@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=number)
def test_every_parameter_is_changed_or_has_a_reason(notebook):
    declared = {node.target.id for node in ast.parse(cells(notebook)[0]).body}
    changed, free = set(CHANGES[number(notebook)]), set(REASONS[number(notebook)])
    assert changed | free == declared and not changed & free

PAPERS = {"00": shift.PAPER, "01": context.PAPER, "02": size_setup.PAPER, "03": cbis.PAPER, "04": sharing.PAPER}
LATER = {"scaling": "heard when pictures are read", "ablations": "generators beside those of the run", "normal": "which images are cut", "side_mm": "what is cut", "external": "who is tested besides", "sources": "which lesions come first, where SinGANs are trained more than once", "mode": "counts in every key", "departures": "which rows are asked for",
         "replicates": "of papers 00, 01, 04: how often jobs are asked for", "dp_epsilon": "counts in the jobs of generators, test_paper_04.py", "references": "are jobs of their own, lesson 84"}

@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=number)
def test_every_change_reaches_the_settings(notebook):
    "Each value above is another one than the demo's, and does something: to sizes, decisions, seeds or the grid, or later."
    usual = {node.target.id: ast.literal_eval(node.value) for node in ast.parse(cells(notebook)[0]).body}
    def settings(**changes):
        s = settle(PAPERS[number(notebook)], Params(**usual | changes))
        return str((s.setup, s.protocol, s.seeds, s.grid.to_csv()))
    now = {k: v for k,v in CHANGES[number(notebook)].items() if k not in LATER}
    assert not {k for k,v in now.items() if settings(**{k: v}) == settings()}


# ---------------------------------------------------------------- the notebook in this process, without its pictures
DRAWN = ("figures.", ".figure(", "show(", "show_", "page(", "display(", "print(",
         "digit_run(")              # paper 03's rehearsal on public digits: a minute, and none of the data go in

def without_pictures(source):
    "The cell without what is only looked at: that would be most of the time."
    kept, tree = [], ast.parse(source)
    for statement in tree.body:
        drawn = not isinstance(statement, (ast.Import, ast.ImportFrom)) and any(w in ast.unparse(statement) for w in DRAWN)
        if not drawn: kept.append(statement)
        elif isinstance(statement, ast.Assign): kept.append(ast.Assign(statement.targets, ast.Constant(None), lineno=1))
    tree.body = kept
    return compile(ast.fix_missing_locations(tree), "cell", "exec")

def run_here(notebook, given, folder, cache):
    "The run and its folder."
    os.environ["MAMMO_NB_CACHE"] = str(cache)
    first, rest = cells(notebook)
    space = {"__name__": "a notebook"}
    exec(first, space)
    space.update(TINY[number(notebook)] | given | dict(run_dir=str(folder/"run"), device="cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for source in rest:
            try: exec(without_pictures(source), space)
            except DataError as e:                      # what these few patients do not allow is refused, resumed or fresh
                (folder/"run"/"words.json").write_text(str(e))
                break
    return folder/"run"

def tables(run): return {p.relative_to(run).as_posix(): p.read_bytes() for p in sorted([*run.glob("tables/*.csv"), *run.glob("*.csv"), *run.glob("*.csv.gz"), run/"words.json"]) if p.is_file()}

def content(folder):
    "Of a finished job, by its files; hidden ones and the time it took aside."
    return hash_of([(p.relative_to(folder).as_posix(), file_hash(p)) for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in ("done.json", "times.json") and p.name[0] != "."])

def jobs(run, cache):
    "Name -> (folder with the key in its name, content) of every job of a run."
    stages = {name: s["folder"] for name,s in read_json(run/"run.json")["stages"].items()}
    places = {name: next(p for p in (run/"checkpoints"/f, *cache.glob(f"stages/*/{f}")) if p.is_dir()) for name,f in stages.items()}
    return {name: (place.name, content(place)) for name,place in places.items()}

def patch_sets(cache): return {p.name: content(p) for p in (cache/"patches").glob("*") if p.is_dir()}


class Tried:
    "One changed input: what was taken up, or would be, beside what is computed afresh."
    def __init__(self, notebook, name, given, work, base, resume=False):
        "work: folder; base: its `Base`; resume: run with the old cache too, and compare every table"
        where, cache = work/name, work/name/"cache"
        cache.mkdir(parents=True)
        (cache/"phantoms").symlink_to(base.cache/"phantoms")
        before = tables(run_here(notebook, given, where/"resumed", base.cache)) if resume else {}
        fresh = run_here(notebook, given, where/"fresh", cache)
        old, new, cut, now = base.jobs, jobs(fresh, cache), patch_sets(cache), tables(fresh)
        known = [k for k in new if k in old]
        self.name, self.jobs, self.moved = name, len(new), sum(k not in old or old[k][0] != new[k][0] for k in new)
        self.stale = [k for k in known if old[k][0] == new[k][0] and old[k][1] != new[k][1]]        # one key, two contents
        self.stale += [k for k in cut if base.patches.get(k, cut[k]) != cut[k]] + [f for f in now if resume and before.get(f) != now[f]]
        self.same = sum(old[k][0] != new[k][0] and old[k][1] == new[k][1] for k in known)
        self.tables = sum(base.tables.get(f) != now[f] for f in now)
        shutil.rmtree(where)

    def __str__(self): return f"{self.name:20} {self.moved:3} of {self.jobs:3} jobs anew ({self.same} with the same result), {self.tables:2} tables differ, stale: {self.stale or 0}"

class Base:
    "The run that everything is compared with, and its cache."
    def __init__(self, notebook, work):
        self.cache = work/"cache"
        self.cache.mkdir()
        run = run_here(notebook, {}, work/"base", self.cache)
        assert read_json(run/"run.json")["status"] == "done", (run/"words.json").read_text()
        self.jobs, self.tables, self.patches = jobs(run, self.cache), tables(run), patch_sets(self.cache)


# ---------------------------------------------------------------- data that are changed in place
def in_place(path, write):
    "Change a file and set its time back, as tools that copy data do."
    then = os.stat(path)
    write(path)
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))

def other_label(tree, layout, asked):
    "Two lesions swap benign and malignant: the table keeps its size."
    words = [("benign", "malignant"), ("BENIGN", "MALIGNANT"), ("Benign", "Malignant"), ("Benign", "Malign")]
    for path in sorted(p for p in tree.rglob("*") if p.suffix in (".csv", ".txt", ".json")):
        lines = path.read_text().splitlines(keepends=True)
        for b,m in words:
            i, j = (next((n for n,line in enumerate(lines) if w in line and o not in line), None) for w,o in ((b, m), (m, b)))
            if i is None or j is None: continue
            lines[i], lines[j] = lines[i].replace(b, m), lines[j].replace(m, b)
            return in_place(path, lambda p: p.write_text("".join(lines)))

def darker(path):
    "A picture whose lower part is one grey value darker, where it is not air."
    def less(pixels):
        pixels = pixels.copy()
        pixels[len(pixels)//4:] -= (pixels[len(pixels)//4:] > 40).astype(pixels.dtype)
        return pixels
    if path.suffix != ".dcm": return Image.fromarray(less(np.array(Image.open(path)))).save(path)
    picture = pydicom.dcmread(path)
    picture.PixelData = less(picture.pixel_array).tobytes()
    picture.save_as(path)

def other_pixels(tree, layout, asked):
    pictures = sorted(p for p in tree.rglob("*") if p.suffix.lower() in (".png", ".tif", ".dcm") and "mask" not in p.name)
    for path in pictures[::3]: in_place(path, darker)

def other_patients(tree, layout, asked):
    "Other patients under the same names in the same place."
    drawn = DRAW(layout, **{**asked, "seed": 9})
    shutil.rmtree(tree)
    shutil.copytree(drawn, tree)

EDITS = [other_label, other_pixels, other_patients]
DRAW = trees.phantom_tree

class Data:
    "The folders that papers read: copies of phantom trees, which can be edited where they lie."
    def __init__(self, work): self.work, self.read = work/"data", {}

    def tree(self, layout, **asked):
        made = DRAW(layout, **asked).resolve()
        copy = self.work/made.parent.name/made.name
        if not copy.exists(): shutil.copytree(made, copy)
        self.read.setdefault(copy, (made, layout, asked))
        return copy

    def edit(self, change):
        for copy,(_,layout,asked) in self.read.items(): change(copy, layout, asked)

    def restore(self):
        for copy,(made,*_) in self.read.items():
            shutil.rmtree(copy)
            shutil.copytree(made, copy)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=number)
def test_one_changed_input_is_never_answered_by_an_old_result(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("MAMMO_NB_WORKERS", "1")
    monkeypatch.setenv("MAMMO_NB_CACHE", str(tmp_path))
    data, tried = Data(tmp_path), []
    monkeypatch.setattr(trees, "phantom_tree", data.tree)
    monkeypatch.setattr(sharing_centres, "phantom_tree", data.tree)
    base = Base(notebook, tmp_path)
    def attempt(name, given, **more):
        tried.append(Tried(notebook, name, given, tmp_path, base, **more))
        print(number(notebook), tried[-1], flush=True)
    attempt("nothing", {}, resume=True)
    for change in EDITS:
        data.edit(change)
        attempt(change.__name__, {}, resume=True)
        data.restore()
    for name,value in CHANGES[number(notebook)].items(): attempt(name, {name: value})
    assert not tried[0].moved and all(t.moved for t in tried[1:1+len(EDITS)])
    assert not [str(t) for t in tried if t.stale]
