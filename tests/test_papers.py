"Paper 04 as a process: refused parameters, same seed same tables, killed and resumed, any folder, left-out stages."
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("seed",1, "patients",24, "scopes","lesions", "models","cnn", "arms","none,bcdr_dcgan", "regimes","100", "gan_epochs",2, "clf_epochs",2, "boots",50)

def tables(run): return {p.relative_to(run).as_posix():p.read_bytes() for p in sorted([*(run/"tables").glob("*.csv"), run/"results.csv"])}

@pytest.mark.parametrize("paper", sorted(p.stem for p in (ROOT/"nbs").glob("0[0-4]_*.ipynb")))
@pytest.mark.parametrize("name,value,said", [("sead",1,"did you mean 'seed'"), ("seed","abc","must be int"), ("preset","papr","did you mean 'paper'"), ("data_dir","/nowhere/at/all","no such folder")])
def test_wrong_parameter_is_refused(papermill, tmp_path, paper, name, value, said):
    r = papermill(paper, tmp_path/"out.ipynb", name, value, "run_dir", tmp_path/"run", check=False)
    assert r.returncode != 0 and said in r.stderr and name in r.stderr
    assert not (tmp_path/"run").exists(), "nothing was begun"

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
    assert "PHANTOM DATA" in page and page.count("<script") == 1 and 'src="http' not in page and len(page) < 10_000_000

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
    assert (fast["mode"], exact["mode"]) == ("fast", "exact")
    assert not {s["folder"] for s in fast["stages"].values()} & {s["folder"] for s in exact["stages"].values()}
    assert re.search(r"Arithmetic.{0,200}fast", (tmp_path/"run"/"report.html").read_text(), re.S)
    r = papermill("04_sharing", tmp_path/"out.ipynb", *SMALL, "mode","fast", "run_dir", whole, check=False)
    assert r.returncode != 0 and "mode='exact'" in r.stderr

def test_left_out_stages_leave_the_rest_out(papermill, tmp_path):
    papermill("04_sharing", tmp_path/"out.ipynb", *SMALL, "only","data,patches,report", "gan_seed",7, "run_dir", tmp_path/"run")
    info = json.loads((tmp_path/"run"/"run.json").read_text())
    assert any(n.startswith("gan-") for n,_ in info["skipped"]) and any(n.startswith("clf-") for n,_ in info["skipped"])
    verdicts = pd.read_csv(tmp_path/"run"/"tables"/"claims.csv")
    assert set(verdicts.shown) == {"cannot tell (not run)"}

def test_a_folder_with_another_run_is_refused(whole, papermill, tmp_path):
    r = papermill("04_sharing", tmp_path/"out.ipynb", *SMALL[2:], "seed",2, "run_dir", whole, check=False)
    assert r.returncode != 0 and "seed=1" in r.stderr
