"Paper 04: as a process (refused parameters, same seed same tables, killed and resumed, any folder, left-out stages), and what its keys and parameters do."
import ast, json, os, re, signal, subprocess, sys, time, zipfile
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from test_stale import CHANGES

from mammo_nb import cli
from mammo_nb.archive import CRATE, archive
from mammo_nb.core import ParameterError, rng, write_json
from mammo_nb.data.patches import PatchSet, patch_table
from mammo_nb.paper import settle
from mammo_nb.papers import sharing as paper, sharing_patches
from mammo_nb.papers.sharing_rows import Counts
from mammo_nb.params import Params
from mammo_nb.runs import Run, job_key

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("seed",1, "patients",24, "scopes","lesions", "models","cnn", "arms","none,bcdr_dcgan", "regimes","100", "gan_epochs",2, "clf_epochs",2, "boots",50)

def tables(run): return {p.relative_to(run).as_posix():p.read_bytes() for p in sorted([*(run/"tables").glob("*.csv"), run/"results.csv"])}

@pytest.mark.parametrize("paper", sorted(p.stem for p in (ROOT/"nbs").glob("0[0-4]_*.ipynb")))
@pytest.mark.parametrize("name,value,said", [("sead",1,"did you mean 'seed'"), ("seed","abc","must be int"), ("preset","papr","did you mean 'paper'"), ("data_dir","/nowhere/at/all","no such folder")])
def test_wrong_parameter_is_refused(begin, tmp_path, paper, name, value, said):
    with pytest.raises(ParameterError, match=said) as e: begin(paper, **{"run_dir": str(tmp_path/"run"), name: value})
    assert name in str(e.value) and not (tmp_path/"run").exists(), "nothing was begun"

@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    "One uninterrupted small run, from a folder that is not the repository."
    d = tmp_path_factory.mktemp("whole")
    cmd = [sys.executable, "-m", "papermill", str(ROOT/"nbs"/"04_sharing.ipynb"), "out.ipynb", "--no-progress-bar", "-p", "run_dir", str(d/"run")]
    for k,v in zip(SMALL[::2], SMALL[1::2]): cmd += ["-p", k, str(v)]
    r = subprocess.run(cmd, cwd=d, env=os.environ | {"MAMMO_NB_CACHE":str(cache)}, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-3000:]
    return d/"run"

def test_run_folder_explains_itself(whole):
    info = json.loads((whole/"run.json").read_text())
    assert info["status"] == "done" and info["parameters"]["seed"] == 1 and info["versions"]["torch"] and info["data_hash"]
    for line in (whole/"steps.jsonl").read_text().splitlines(): json.loads(line)
    results = pd.read_csv(whole/"results.csv")
    assert set(results.arm) == {"none","bcdr_dcgan"} and (results.lo <= results.value).all() and (results.value <= results.hi).all()
    page = (whole/"report.html").read_text()
    assert "PHANTOM DATA" in page and page.count("<script") == page.count("<script>") == 1 and 'src="http' not in page and len(page) < 10_000_000
    for heading in ("What holds", "Table 1, ours beside published", "Curves", "Generators", "What the generators give away", "Data"): assert f"{heading}</h2>" in page, heading

@pytest.fixture(scope="module")
def packed(whole, cache, tmp_path_factory):
    "The run as one zip, in a folder that has nothing else."
    with pytest.MonkeyPatch.context() as here:
        here.setenv("MAMMO_NB_CACHE", str(cache))
        return archive(whole, tmp_path_factory.mktemp("elsewhere")/"run.zip", license="cc-by-4.0")

def test_an_archive_serves_in_another_folder_with_another_cache(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("MAMMO_NB_CACHE", str(tmp_path/"cache"))
    monkeypatch.chdir(tmp_path)
    place = packed.parent
    assert (cli.main(["report", str(packed)]), cli.main(["gather", str(packed)])) == (0, 0)
    assert cli.main(["export", str(packed), "--license", "cc-by-4.0", "--no-check"]) == 0
    assert "Szafranowska" in (place/"run.html").read_text() and "Swin" in (place/"run_gathered"/"report.html").read_text()
    assert [f.name for f in place.rglob("G.safetensors")] == ["G.safetensors"] and len(list((place/"run_packages").glob("*.zip"))) == 1

def test_an_archive_is_read_by_the_rocrate_library(packed, tmp_path):
    rocrate = pytest.importorskip("rocrate.rocrate", reason="needs the extra dev")
    with zipfile.ZipFile(packed) as z: z.extractall(tmp_path)
    run = tmp_path/"run"
    crate = rocrate.ROCrate(run)
    files = {e.id for e in crate.get_entities() if e.type == "File"}
    assert files == {f.relative_to(run).as_posix() for f in run.rglob("*") if f.is_file()} - {CRATE}
    action, info = crate.get("#run"), json.loads((run/"run.json").read_text())
    assert {e.id for e in action["result"]} == files and action["instrument"]["version"] == info["versions"]["mammo_nb"]
    assert {e["name"]: e["value"] for e in action["object"]}["seed"] == 1 and crate.root_dataset["license"]["name"] == "cc-by-4.0"

def test_asked_again_nothing_is_done_twice(whole, papermill, tmp_path):
    before, t = tables(whole), json.loads((whole/"run.json").read_text())["stages"]
    papermill("04_sharing", tmp_path/"out.ipynb", *SMALL, "run_dir", whole)
    after = json.loads((whole/"run.json").read_text())["stages"]
    assert after.keys() == t.keys() and all(s["reused"] for s in after.values()) and tables(whole) == before

def test_killed_and_resumed_run_ends_with_the_same_bytes(whole, cache, tmp_path):
    env = os.environ | {"MAMMO_NB_CACHE":str(tmp_path/"cache")}
    os.makedirs(tmp_path/"cache"); os.symlink(cache/"phantoms", tmp_path/"cache"/"phantoms")     # the phantoms need not be drawn again
    cmd = [sys.executable, "-m", "papermill", str(ROOT/"nbs"/"04_sharing.ipynb"), str(tmp_path/"out.ipynb"), "--no-progress-bar", "-p", "run_dir", str(tmp_path/"run")]
    for k,v in zip(SMALL[::2], SMALL[1::2]): cmd += ["-p", k, str(v)]
    for event in ("gan-", "clf-"):
        p = subprocess.Popen(cmd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        log, end = tmp_path/"run"/"steps.jsonl", time.time()+300
        while time.time() < end and p.poll() is None:
            if log.exists() and any(f'"stage": "{event}' in l and '"start"' in l for l in log.read_text().splitlines()): break
            time.sleep(.1)
        assert p.poll() is None, "the run ended before it could be killed"
        os.killpg(p.pid, signal.SIGKILL); p.wait()
    r = subprocess.run(cmd, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-3000:]
    one, two = tables(whole), tables(tmp_path/"run")
    drop_run = lambda b: b.replace(b"phantom-paper-seed1", b"run")
    assert one.keys() == two.keys() and all(drop_run(one[k]) == drop_run(two[k]) for k in one)

def test_fast_arithmetic_is_stated_and_never_taken_for_exact(whole, papermill, tmp_path):
    papermill("04_sharing", tmp_path/"out.ipynb", *SMALL, "mode","fast", "run_dir", tmp_path/"run")
    fast, exact = (json.loads((r/"run.json").read_text()) for r in (tmp_path/"run", whole))
    assert (fast["mode"], exact["mode"]) == ("bf16", "float32")
    assert not {s["folder"] for s in fast["stages"].values()} & {s["folder"] for s in exact["stages"].values()}
    assert re.search(r"Arithmetic.{0,200}bf16", (tmp_path/"run"/"report.html").read_text(), re.S)
    r = papermill("04_sharing", tmp_path/"out.ipynb", *SMALL, "mode","fast", "run_dir", whole, check=False)
    assert r.returncode != 0 and "mode='float32'" in r.stderr

def test_left_out_stages_leave_the_rest_out(papermill, tmp_path):
    papermill("04_sharing", tmp_path/"out.ipynb", *SMALL, "only","data,patches,report", "gan_seed",7, "run_dir", tmp_path/"run")
    info = json.loads((tmp_path/"run"/"run.json").read_text())
    assert any(n.startswith("gan-") for n,_ in info["skipped"]) and any(n.startswith("clf-") for n,_ in info["skipped"])
    verdicts = pd.read_csv(tmp_path/"run"/"tables"/"claims.csv")
    assert set(verdicts.verdict) == {"cannot tell"} and verdicts.shown.str.contains("not run|not testable").all()

def test_a_folder_with_another_run_is_refused(whole, papermill, tmp_path):
    r = papermill("04_sharing", tmp_path/"out.ipynb", *SMALL[2:], "seed",2, "run_dir", whole, check=False)
    assert r.returncode != 0 and "seed=1" in r.stderr


# ---------------------------------------------------------------- what a job's key knows, without any training
def declared():
    "The parameters of the notebook as they stand there."
    cell = next(c for c in nbformat.read(ROOT/"nbs"/"04_sharing.ipynb", 4).cells if "parameters" in c.metadata.get("tags", []))
    return {node.target.id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}

def toy(name, lesions, healthy, views=2):
    "Small patches of made-up patients."
    rows = [dict(patch_id=f"{name}:{i}", patient_id=f"{name}:p{i//2}", target=int(i < lesions), label="normal", dataset=name) for i in range(lesions+healthy)]
    pixels = rng(0, name).integers(0, 255, (len(rows), views, 8, 8)).astype(np.uint8)
    return PatchSet(pixels, patch_table(rows))

A = dict(train=toy("a", 20, 30), val=toy("v", 6, 6), test=toy("t", 6, 6))
B = {scope: toy(f"b {scope}", 12, 0) for scope in paper.SCOPES}
C = toy("c", 10, 0)
HELD = toy("h", 8, 0)

def jobs_of(tmp_path, *, a=A, b=B, **changes):
    "Every job of a run on the toys, by name."
    params = Params(**declared() | dict(run_dir=str(tmp_path/f"run{len(list(tmp_path.iterdir()))}"), device="cpu") | changes)
    settled = settle(paper.PAPER, params)
    run = Run(params, paper=paper.PAPER.name, **vars(settled))
    def at(ps): return {size: ps for size in run.setup.sizes}
    cuts = paper.Cuts({s: sharing_patches.Cut({size: a for size in run.setup.sizes}, Counts(16, 12, 8), None, None) for s in run.grid.scope.unique()},
                      {("b", s): at(ps) for s,ps in b.items()} | {("c", "masses"): at(C)})
    stages = {}
    for k in paper.plan_generators(run.grid):
        stages[k] = tmp_path/f"gan-{'-'.join(k)}-key"
        write_json(stages[k]/"done.json", {})
    drawn = {k: at(toy(f"drawn {k}", 12, 0, 1)) for k in stages}
    held = {k: HELD for k in stages if paper.GENERATORS[k[0]][0] not in paper.handed_over(params)}
    found = [*paper.audits(run, cuts, {k: stages[k] for k in held}, held).values(), *paper.references(run, cuts, held).values()]
    away = dict.fromkeys(paper.SCOPES, HELD) if run.params.external else {}
    for s in paper.replicates(run):
        found += [*paper.generators(run, cuts, s).values(), *paper.draws(run, cuts, stages, s).values(), *paper.classifiers(run, cuts, drawn, s, external=away).values()]
    return run, {j.name: j for j in found}

def keys_of(tmp_path, **changes):
    run, jobs = jobs_of(tmp_path, **changes)
    return {name: job_key(j, "cpu", run.params.mode) for name,j in jobs.items()}

SOME = dict(arms="none,bcdr_dcgan,bcdr_real", scopes="masses", models="cnn", regimes="50")

def differ(a, b, *begins):
    "The jobs that changed are those whose names begin so, and all of these changed."
    changed = {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}
    assert changed == {name for name in a.keys() | b.keys() if name.startswith(begins)}, changed

def test_keys_are_the_same_twice(tmp_path):
    assert keys_of(tmp_path, **SOME) == keys_of(tmp_path, **SOME)

def test_gan_seed_counts_in_draws_of_an_imported_generator(tmp_path):
    "It did not: another gan_seed was answered with the patches of the seed before."
    (tmp_path/"theirs").mkdir()
    given = SOME | dict(generator_b=str(tmp_path/"theirs"))
    differ(keys_of(tmp_path, **given), keys_of(tmp_path, **given, gan_seed=1), "draw-")
    differ(keys_of(tmp_path, **SOME), keys_of(tmp_path, **SOME, gan_seed=1), "gan-", "draw-", "audit-")

def test_a_replaced_generator_is_another(tmp_path):
    (tmp_path/"theirs").mkdir()
    (tmp_path/"theirs"/"G.bin").write_bytes(b"old")
    given = SOME | dict(generator_b=str(tmp_path/"theirs"))
    before = keys_of(tmp_path, **given)
    (tmp_path/"theirs"/"G.bin").write_bytes(b"new")
    differ(before, keys_of(tmp_path, **given), "import-")

def test_shipped_generators_are_imported_and_said(tmp_path):
    "`generators=shipped` trains nothing, takes each package by its content, and run.json says so."
    run, jobs = jobs_of(tmp_path, **SOME | dict(arms="none,bcdr_dcgan,bcdr_wgangp,optimam_dcgan", generators="shipped"))
    assert not [n for n in jobs if n.startswith(("gan-", "audit-"))]
    taken = {n: j.given["path"] for n,j in jobs.items() if n.startswith("import-")}
    assert {n.split("-")[1]: p.stem for n,p in taken.items()} == paper.PACKAGES and all(p.is_file() for p in taken.values())
    told = json.loads((run.dir/"run.json").read_text())["handed_over"]
    assert set(told) == set(paper.PACKAGES) and all("phantoms" in said for said in told.values())
    run, _ = jobs_of(tmp_path, **SOME)
    assert json.loads((run.dir/"run.json").read_text())["handed_over"] == {}

def test_the_secret_of_private_training_counts_by_content(tmp_path):
    "A key file with other words in the same place: another generator."
    secret = tmp_path/"secret"
    secret.write_text("one")
    private = SOME | dict(dp_epsilon=8., dp_key=str(secret))
    before = keys_of(tmp_path, **private)
    secret.write_text("two")
    differ(before, keys_of(tmp_path, **private), "gan-")
    differ(before, keys_of(tmp_path, **SOME), "gan-")

def relabelled(ps):
    ps = ps.subset(np.arange(len(ps)))
    ps.table.loc[0, "label"] = "benign"
    return ps

def repainted(ps):
    pixels = np.array(ps.pixels)
    pixels[0,-1,0,0] ^= 1
    return PatchSet(pixels, ps.table)

@pytest.mark.parametrize("edit", [relabelled, repainted])
def test_labels_and_all_views_count(tmp_path, edit):
    before = keys_of(tmp_path, **SOME)
    differ(before, keys_of(tmp_path, **SOME, a=A | dict(train=edit(A["train"]))), "clf-")
    differ(before, keys_of(tmp_path, **SOME, a=A | dict(test=edit(A["test"]))), "clf-")
    theirs = keys_of(tmp_path, **SOME, b=B | dict(masses=edit(B["masses"])))
    differ(before, theirs, "gan-", "audit-", "clf-masses-cnn-50-bcdr_real")

def test_switches_reach_what_they_name(tmp_path):
    before = keys_of(tmp_path, **SOME)
    for switch in ("eval_after_first_val", "sampler_skips_synthetic", "exp_logit_score", "same_half"):
        differ(before, keys_of(tmp_path, **SOME, switches=switch), "clf-")
    for switch in ("g_every_second_batch", "real_in_unit_range"): differ(before, keys_of(tmp_path, **SOME, switches=switch), "gan-")

def test_a_left_out_generator_leaves_its_rows_out(tmp_path):
    run, _ = jobs_of(tmp_path, **SOME)
    cuts = paper.Cuts({"masses": sharing_patches.Cut({32: A}, Counts(16, 12, 8), None, None)}, {("b", "masses"): {32: B["masses"]}})
    jobs = paper.classifiers(run, cuts, {("bcdr_dcgan", "masses"): None})
    assert {c.arm for c,j in jobs.items() if j.given["added"] is None} == {"bcdr_dcgan"}


def test_replicates_leave_the_first_as_it_was(tmp_path):
    one, three = keys_of(tmp_path, **SOME), keys_of(tmp_path, **SOME, replicates=3)
    trained = [n for n in three if n.startswith("gan-")]
    assert {n: three[n] for n in trained if n in one} == {n: one[n] for n in one if n.startswith("gan-")} and len(trained) == 3
    assert len({three[n] for n in trained}) == 3 and len([n for n in three if n.startswith("clf-")]) == 3*len([n for n in one if n.startswith("clf-")])

def test_arms_train_on_the_same_side_whatever_the_classifier(tmp_path):
    _, jobs = jobs_of(tmp_path, **SOME | dict(models="cnn,swin", arms="none,bcdr_dcgan,copies"))
    sides = {len(ps.pixels[0,0]) for j in jobs.values() if j.name.startswith("clf-") for ps in [*j.given["sets"].values(), *j.given["added"].values()]}
    networks = {j.given["how"].network["kind"]: j.given["how"].network["size"] for j in jobs.values() if j.name.startswith("clf-")}
    assert sides == {8} and networks == dict(cnn=32, swin=64)

# ---------------------------------------------------------------- every parameter does something
OTHER = CHANGES["04"] | dict(preset="paper", holdout=.2)              # all parameters are listed in test_stale.py

def what_is_done(tmp_path, monkeypatch, **changes):
    "Settings, keys, and what the loaders are asked for."
    asked = []
    def ask(*given, **more):
        asked.append((given, {k: v for k,v in more.items() if k != "fresh"}, str(more.get("fresh"))))
        return ({c: None for c in "abc"}, "words")
    for name in ("phantom_centres", "real_centres", "kept_from"): monkeypatch.setattr(paper, name, ask)
    monkeypatch.setattr(paper, "phantom_centres", lambda *g, **m: ask(*g, **m)[0])
    run, jobs = jobs_of(tmp_path, **SOME | changes)
    paper.load(run)
    keys = {name: job_key(j, "cpu", run.params.mode) for name,j in jobs.items()}
    return str((run.setup, run.protocol, run.seeds, run.grid.to_csv(), keys, asked))

def test_every_parameter_has_an_effect(tmp_path, monkeypatch):
    (tmp_path/"theirs").mkdir()
    (tmp_path/"secret").write_text("secret")
    real, private = dict(data_dir=str(tmp_path)), dict(dp_epsilon=8.)
    tried = {k: ({}, v) for k,v in OTHER.items()} | dict(
        data_dir=({}, str(tmp_path)), centres=(real, "a=x,b=y,c=z"), split_by=(real, "image"), dp_key=(private, str(tmp_path/"secret")),
        generators=({}, "shipped"), generator_b=({}, str(tmp_path/"theirs")), generator_c=(dict(arms="optimam_dcgan"), str(tmp_path/"theirs")))
    for name,(base,value) in tried.items():
        free = {k: "" for k in SOME if k == name}           # the small grid must not hide it
        assert what_is_done(tmp_path, monkeypatch, **free, **base) != what_is_done(tmp_path, monkeypatch, **base, **{name: value}), f"{name} does nothing"

def test_contradictions_are_refused():
    for changes,said in ((dict(centres="a=x"), "phantoms have their roles"), (dict(split_by="image"), "phantoms have patients"), (dict(dp_key="x"), "does nothing"),
                         (dict(dp_epsilon=1., mode="fast"), "float32 only"), (dict(generator_c="/no/such/thing"), "generator_c")):
        with pytest.raises(ParameterError, match=said): settle(paper.PAPER, Params(**declared() | changes))
