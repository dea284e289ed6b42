"Sweeps as processes: rows side by side, workers killed, stages shared, other backends, many starts at once."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest

from mammo_nb.core import MammoError, ParameterError
from mammo_nb.report.tables import read_results, summarise
from mammo_nb.sweep import Submitit, dask_cluster, executor_of, main, read_sweep

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = '''seed:int = 0 # Seed
preset:str = "demo" # Size
protocol:str = "paper" # Protocol
data_dir:str = "" # Data
run_dir:str = "" # Folder
device:str = "cpu" # Device
only:str = "" # Stages
steps:int = 4 # Checkpoints of the fit
rate:float = 1. # A knob'''
BODY = '''from mammo_nb.params import check_params
P = check_params(globals(), stages=("data","fit"))
import os, time
import pandas as pd
from mammo_nb.core import read_json, rng, write_json
from mammo_nb.runs import Run
run = Run(P, paper="90_tiny")

def said(*words): # what really was done, kills or no kills
    with open(os.environ["TINY_LEDGER"], "a") as f: f.write(" ".join(map(str, words)) + "\\n")
def data(folder):
    said("data", "all"); time.sleep(1); write_json(folder/"x.json", rng(0, "data").normal(size=5).tolist())
def fit(folder, base, seed, rate, steps):
    f = folder/"state.json"; i, x = read_json(f) if f.exists() else (0, 0.)
    for i in range(i+1, steps+1):
        while i > 8 and os.path.exists(os.environ["TINY_LEDGER"] + ".hold"): time.sleep(.05)     # a test wants to meet it at work
        x += rate*float(rng(seed, "step", i).normal()); said("step", run.dir.name, i, os.getpid()); time.sleep(.4); write_json(f, [i, x])

base = run.do({0: run.job(data, name="data", group="data", shared=True)})[0]
done = run.do({0: run.job(fit, name="fit", group="fit", base=base, seed=seed, rate=rate, steps=steps)})[0]
value = read_json(done/"state.json")[1] + sum(read_json(base/"x.json"))
run.results(pd.DataFrame([dict(paper=run.paper, run=run.dir.name, seed=seed, data="phantom", preset=preset, protocol=protocol, scope="", model="m", arm="a", regime="", metric="auroc", positive="",
    value=value, lo=value-1, hi=value+1, n=9, n_patients=5, split="test")]))
run.finish()'''

def tiny(folder, body=BODY, parameters=PARAMETERS):
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags":["parameters"]}), nbformat.v4.new_code_cell(body)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec":{"name":"python3","display_name":"Python 3","language":"python"}}), folder/"90_tiny.ipynb")

def sweep_file(folder, text):
    tiny(folder); f = folder/"s.yaml"; f.write_text("folder: out\n" + text); return f

def env_of(folder): return os.environ | {"MAMMO_NB_CACHE":str(folder/"cache"), "TINY_LEDGER":str(folder/"ledger"), "PYTHONPATH":os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]), "OMP_NUM_THREADS":"1"}

def heard(): signal.signal(signal.SIGINT, signal.SIG_DFL)      # a worker of pytest-xdist ignores Ctrl-C, and so would its children

def start(file, *more, **kw):
    return subprocess.Popen([sys.executable, "-m", "mammo_nb.sweep", str(file), *more], cwd=ROOT, env=env_of(file.parent), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            preexec_fn=heard, **kw)

def ledger(folder): return [l.split() for l in (folder/"ledger").read_text().splitlines()] if (folder/"ledger").exists() else []

def until(condition, seconds=240):
    end = time.time()+seconds
    while time.time() < end:
        if (v := condition()): return v
        time.sleep(.05)
    raise AssertionError("waited in vain")

def of_sweep(folder): # kernels and stage workers of any row below the folder
    found = []
    for p in psutil.process_iter():
        try:
            if p.environ().get("MAMMO_NB_ROW","").startswith(str(folder)): found.append(p.pid)
        except (psutil.Error, OSError): pass
    return found

def once(folder, killed=()):
    "Each step of each row was done once, but for at most one checkpoint interval a kill."
    steps = pd.DataFrame([l[1:3] for l in ledger(folder) if l[0] == "step"], columns=["row","step"])
    more = steps.value_counts(); more = more[more > 1]
    assert len(more) <= len(killed) and set(more.index.get_level_values("row")) <= set(killed), more

SERIAL = '''
import json, sys, nbformat
from pathlib import Path
cells = [c.source for c in nbformat.read(sys.argv[1], 4).cells]
for row in json.loads(Path(sys.argv[2]).read_text())["rows"]:
    ns = {"__name__":"__main__"}
    exec(cells[0], ns); ns.update(row["parameters"] | {"run_dir": f"{sys.argv[3]}/{row['id']}"}); exec(cells[1], ns)
'''

def test_twelve_rows_two_workers_two_kills(tmp_path):
    file = sweep_file(tmp_path, "workers: 2\nrows:\n  - {notebook: 90_tiny, seeds: 0-5, grid: {rate: [1, 2]}}\n")
    p = start(file)
    running = lambda: {l[1]:int(l[3]) for l in ledger(tmp_path) if l[0] == "step" and l[2] == "3"}
    one = until(lambda: next(iter(running()), None))
    note = json.loads((tmp_path/"out"/"rows"/one/"row.json").read_text())
    os.kill(note["pid"], signal.SIGKILL)                                       # the worker of one row
    two = until(lambda: next((r for r in running() if r != one and json.loads((tmp_path/"out"/"rows"/r/"row.json").read_text())["status"] == "running"), None))
    os.kill(running()[two], signal.SIGKILL)                                    # the kernel of another
    said, _ = p.communicate(timeout=500)
    assert p.returncode == 0, said
    table = pd.read_csv(tmp_path/"out"/"summary.csv").set_index("id")
    assert (table.state == "done").all() and len(table) == 12 and table.tries[one] == 2 and table.tries[two] == 2 and table.tries.sum() == 14
    assert sum(l[0] == "data" for l in ledger(tmp_path)) == 1, "the shared stage was computed once"
    once(tmp_path, killed=(one, two))
    assert not of_sweep(tmp_path/"out")
    serial = subprocess.run([sys.executable, "-c", SERIAL, str(tmp_path/"90_tiny.ipynb"), str(tmp_path/"out"/"plan.json"), str(tmp_path/"serial")], cwd=ROOT, capture_output=True, text=True,
                            env=env_of(tmp_path) | {"MAMMO_NB_CACHE":str(tmp_path/"cache2"), "TINY_LEDGER":str(tmp_path/"ledger2")})
    assert serial.returncode == 0, serial.stderr[-2000:]
    for run in (tmp_path/"serial").iterdir(): assert (run/"results.csv").read_bytes() == (tmp_path/"out"/"runs"/run.name/"results.csv").read_bytes()
    joined = pd.read_csv(tmp_path/"out"/"gathered.csv")
    for rate,part in joined.groupby("settings"):
        theirs = summarise(read_results([tmp_path/"serial"/r["id"] for r in json.loads((tmp_path/"out"/"plan.json").read_text())["rows"] if f"rate={r['parameters']['rate']}" == rate]))
        assert part.seeds.tolist() == [6] and part.value.tolist() == pytest.approx(theirs.value.tolist(), rel=1e-8) and part.hi.tolist() == pytest.approx(theirs.hi.tolist(), rel=1e-8)
    before = {f:f.stat().st_mtime_ns for f in (tmp_path/"out").rglob("*.ipynb")}
    again = subprocess.run([sys.executable, "-m", "mammo_nb.sweep", str(file)], cwd=ROOT, env=env_of(tmp_path), capture_output=True, text=True)
    assert again.returncode == 0 and "0 rows to do" in again.stdout and before == {f:f.stat().st_mtime_ns for f in (tmp_path/"out").rglob("*.ipynb")}

def test_sweep_killed_whole_then_asked_again(tmp_path):
    file = sweep_file(tmp_path, "workers: 2\nrows:\n  - {notebook: 90_tiny, seeds: [0, 1], parameters: {steps: 12}}\n"); hold = tmp_path/"ledger.hold"; hold.touch()
    p = start(file, start_new_session=True)
    until(lambda: len({l[1] for l in ledger(tmp_path) if l[0] == "step" and int(l[2]) >= 2}) == 2)
    os.kill(p.pid, signal.SIGKILL); p.wait()
    until(lambda: not of_sweep(tmp_path/"out"), 20)                            # rows and kernels end with it
    p = start(file)
    until(lambda: len({l[1] for l in ledger(tmp_path) if l[0] == "step" and int(l[2]) >= 6}) == 2)
    p.send_signal(signal.SIGINT); said, _ = p.communicate(timeout=240)
    assert p.returncode == 130 and "interrupted" in said and not until(lambda: not of_sweep(tmp_path/"out"), 20) is None
    hold.unlink(); p = start(file); said, _ = p.communicate(timeout=300)
    assert p.returncode == 0 and "begun" in said, said
    steps = pd.Series([(l[1],l[2]) for l in ledger(tmp_path) if l[0] == "step"]).value_counts()
    assert len(steps) == 24 and steps.sum() <= 24+4, "two stops of two rows cost at most one interval each"

STAGE = '''
import os, signal, sys, time
from mammo_nb.core import read_json, write_json
from mammo_nb.params import Params
from mammo_nb.runs import Run
def count(folder):
    f = folder/"n.json"; start = read_json(f) if f.exists() else 0
    for i in range(start+1, 7):
        open(os.environ["TINY_LEDGER"], "a").write(f"{sys.argv[2]} {i}\\n"); time.sleep(.3); write_json(f, i)
        if i == 3 and sys.argv[2] == "first": os.kill(os.getpid(), signal.SIGKILL)
P = Params(seed=1, preset="demo", protocol="paper", data_dir="", run_dir=sys.argv[1], device="cpu", mode="exact", only="")
run = Run(P, paper="90_stage")
run.do({0: run.job(count, name="count", group="data", shared=True)})
'''

def test_second_run_waits_for_a_shared_stage_and_takes_over_from_a_killed_first(tmp_path):
    go = lambda name: subprocess.Popen([sys.executable, "-c", STAGE, str(tmp_path/name), name], env=env_of(tmp_path), cwd=ROOT)
    first = go("first"); until(lambda: ledger(tmp_path)); second = go("second")
    assert first.wait(60) == -signal.SIGKILL and second.wait(60) == 0
    assert ledger(tmp_path) == [["first","1"],["first","2"],["first","3"],["second","4"],["second","5"],["second","6"]]

def test_sample_sweeps_can_be_planned():
    files = sorted((ROOT/"sweeps").glob("*.yaml")); assert files
    for f in files:
        s = read_sweep(f); assert len({r.id for r in s.rows}) == len(s.rows) > 0, f.name

def test_wrong_sweep_file_ends_with_one_line(tmp_path):
    p = start(sweep_file(tmp_path, "rows:\n  - {notebook: 90_tiny, parameters: {rat: 2}}\n")); said, _ = p.communicate(timeout=240)
    assert p.returncode == 2 and "did you mean 'rate'" in said and "Traceback" not in said and not (tmp_path/"out").exists()

@pytest.mark.parametrize("text,said", [
    (b'rows:\n  - {notebook: 04_sharing, seeds: "9-0"}\n', "are no seeds"),
    (b'rows:\n  - {notebook: 04_sharing, seeds: "0-99999999"}\n', "are no seeds"),
    (b"name: \xe4\nrows:\n  - {notebook: 04_sharing}\n", "is not UTF-8"),
    (b"rows:\n  - notebook: 00_annotation_shift\n    parameters: {patients: 6}\n    parameters: {patients: 9}\n", "'parameters' stands twice"),
    (b"rows:\n  - {notebook: 04_sharing, seeds: [4294967296]}\n", "4294967296 is not possible"),
    (b"rows:\n  - {notebook: 04_sharing, parameters: {preset: demmo}}\n", "did you mean 'demo'"),
    (b"rows:\n  - {notebook: 04_sharing, grid: {protocol: [papr]}}\n", "did you mean 'paper'"),
    (b"name: ..\nrows:\n  - {notebook: 04_sharing}\n", "is no name"),
    (b"name: [a]\nrows:\n  - {notebook: 04_sharing}\n", "name: \\['a'\\] is no str"),
    (b"rows:\n  - {notebook: 04_sharing, parameters: [1]}\n", "is no dict"),
    (b"rows:\n  - {notebook: 04_sharing, seeds: 0-9, parameters: {seed: 1}}\n", "seed stands twice"),
    (b"rows:\n  - {notebook: 04_sharing, seeds: 0-9999}\n  - {notebook: 04_sharing, seeds: 10000-10009}\n", "more than 10,000 runs"),
    (b"a\x00b", "no YAML"), (b"- 1\n", "a sweep is a mapping"), (b"", "a sweep is a mapping"), (b"1: 2\n", "1 is no name")])
def test_what_cannot_be_meant_is_refused_before_anything_runs(tmp_path, text, said):
    (tmp_path/"s.yaml").write_bytes(text)
    with pytest.raises(ParameterError, match=said): read_sweep(tmp_path/"s.yaml", folder=str(tmp_path/"out"))
    assert main([str(tmp_path/"s.yaml"), "--dry-run"]) == 2 and not (tmp_path/"out").exists()

@pytest.mark.slow
def test_dask_rows_survive_the_loss_of_a_worker(tmp_path):
    pytest.importorskip("distributed")
    p = start(sweep_file(tmp_path, "backend: dask\nworkers: 2\nrows:\n  - {notebook: 90_tiny, seeds: 0-2}\n"))
    row, kernel = until(lambda: next(((l[1], int(l[3])) for l in ledger(tmp_path) if l[0] == "step" and l[2] == "2"), None))
    worker = psutil.Process(json.loads((tmp_path/"out"/"rows"/row/"row.json").read_text())["pid"]).parent()
    assert worker.pid != p.pid; worker.kill()
    said, _ = p.communicate(timeout=300)
    assert p.returncode == 0, said
    once(tmp_path, killed=(row, *[l[1] for l in ledger(tmp_path) if l[0] == "step"])); assert not of_sweep(tmp_path/"out")

@pytest.mark.slow
def test_dask_jobqueue_as_local_jobs(tmp_path):
    pytest.importorskip("dask_jobqueue")
    p = start(sweep_file(tmp_path, "backend: dask\nworkers: 1\ncluster: {jobqueue: LocalCluster, options: {cores: 1, memory: 2GB, processes: 1}}\nrows:\n  - {notebook: 90_tiny, seeds: [0]}\n"))
    said, _ = p.communicate(timeout=300); assert p.returncode == 0, said

def test_slurm_job_script_carries_the_options(tmp_path):
    pytest.importorskip("dask_jobqueue")
    c = dask_cluster(dict(jobqueue="SLURMCluster", options=dict(cores=4, memory="8GB", queue="gpu", walltime="04:00:00", job_extra_directives=["--gres=gpu:1"])), workers=0, folder=tmp_path)
    try: script = c.job_script()
    finally: c.close()
    assert "#SBATCH -p gpu" in script and "--gres=gpu:1" in script and "-t 04:00:00" in script
    c = dask_cluster(read_sweep(ROOT/"sweeps"/"slurm_dask.yaml").cluster, workers=0, folder=tmp_path)
    try: script = c.job_script()
    finally: c.close()
    assert "--cpus-per-task=8" in script and "-t 12:00:00" in script
    with pytest.raises(MammoError, match="no 'SlurmCluster'"): dask_cluster(dict(jobqueue="SlurmCluster"), workers=1, folder=tmp_path)

@pytest.mark.slow
def test_submitit_rows_survive_a_killed_job(tmp_path):
    pytest.importorskip("submitit")
    p = start(sweep_file(tmp_path, "backend: submitit\nworkers: 2\ncluster: {executor: local, options: {timeout_min: 10}}\nrows:\n  - {notebook: 90_tiny, seeds: 0-2}\n"))
    row = until(lambda: next((l[1] for l in ledger(tmp_path) if l[0] == "step" and l[2] == "2"), None))
    job = psutil.Process(json.loads((tmp_path/"out"/"rows"/row/"row.json").read_text())["pid"]).parent()
    assert job.pid != p.pid; job.kill()
    said, _ = p.communicate(timeout=300); assert p.returncode == 0, said
    once(tmp_path, killed=(row,)); assert not of_sweep(tmp_path/"out")

@pytest.mark.slow
@pytest.mark.parametrize("backend", ["backend: dask", "backend: submitit\ncluster: {executor: local}"], ids=["dask","submitit"])
def test_interrupted_elsewhere_leaves_nothing_running(tmp_path, backend):
    p = start(sweep_file(tmp_path, f"{backend}\nworkers: 1\nrows:\n  - {{notebook: 90_tiny, seeds: [0, 1], parameters: {{steps: 300}}}}\n"))
    until(lambda: any(l[0] == "step" for l in ledger(tmp_path)))
    p.send_signal(signal.SIGINT); said, _ = p.communicate(timeout=120)
    assert p.returncode == 130 and "interrupted" in said, said
    until(lambda: not of_sweep(tmp_path/"out"), 30)

SLURM = r'''#!PYTHON
"A stand-in for Slurm on one machine: sbatch, srun, sacct, scancel and scontrol by the name it is called."
import os, signal, subprocess, sys
from pathlib import Path
me, state = Path(sys.argv[0]).name, Path(os.environ["STAND_IN"])
def ids(): return sorted(int(p.stem) for p in state.glob("*.state"))
if me == "sbatch":
    job = max([*ids(), 0]) + 1
    (state/f"{job}.state").write_text("PENDING")
    if not os.fork():
        os.setsid()
        for fd in (0, 1, 2): os.dup2(os.open(os.devnull, os.O_RDWR), fd)
        env = os.environ | dict(SLURM_JOB_ID=str(job), SLURM_JOBID=str(job), SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1", SLURM_NODEID="0", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_JOB_NODELIST="here")
        for start in range(5):
            p = subprocess.Popen(["bash", sys.argv[-1]], env=env | dict(SLURM_RESTART_COUNT=str(start)), start_new_session=True)
            (state/f"{job}.pid").write_text(str(p.pid))
            (state/f"{job}.state").write_text("RUNNING")
            code = p.wait()
            again = state/f"{job}.requeue"
            if not (again.exists() or code in (-9, 137)): break        # asked for, or its node was lost
            again.unlink(missing_ok=True)
            (state/f"{job}.restarts").write_text(str(start+1))
            (state/f"{job}.state").write_text("PENDING")
        (state/f"{job}.state").write_text("COMPLETED" if code == 0 else "FAILED")
        os._exit(0)
    print("Submitted batch job", job)
elif me == "srun":
    at = next(i for i,a in enumerate(sys.argv) if "python" in a.rpartition("/")[2])
    os.execv(sys.argv[at], sys.argv[at:])
elif me == "sacct": print("JobID|State|NodeList\n" + "\n".join(f"{j}|{(state/f'{j}.state').read_text()}|here" for j in ids()))
elif me == "scontrol": (state/f"{sys.argv[2]}.requeue").touch()
elif me == "scancel":
    for job in sys.argv[1:]:
        if job.isdigit(): os.killpg(int((state/f"{job}.pid").read_text()), signal.SIGTERM)
'''

@pytest.mark.slow
def test_slurm_rehearsal_one_node_lost_one_job_preempted(tmp_path, monkeypatch):
    "A stand-in sbatch: the job of one row is killed and put back into the queue, another is asked to make way (SIGUSR2); both end as if nothing had been."
    pytest.importorskip("submitit")
    (tmp_path/"bin").mkdir(); (tmp_path/"state").mkdir()
    for name in ("sbatch", "srun", "sacct", "scontrol", "scancel"):
        (tmp_path/"bin"/name).write_text(SLURM.replace("PYTHON", sys.executable)); (tmp_path/"bin"/name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path/'bin'}{os.pathsep}{os.environ['PATH']}"); monkeypatch.setenv("STAND_IN", str(tmp_path/"state"))
    file = sweep_file(tmp_path, "backend: submitit\nworkers: 2\ncluster: {executor: slurm, options: {timeout_min: 10}}\nrows:\n  - {notebook: 90_tiny, seeds: 0-2}\n")
    p = start(file)
    def job_of(row): # Its process group, found by whom the row's process belongs to
        pid = json.loads((tmp_path/"out"/"rows"/row/"row.json").read_text())["pid"]
        return os.getpgid(psutil.Process(pid).ppid())
    running = lambda: [l[1] for l in ledger(tmp_path) if l[0] == "step" and l[2] == "2"]
    lost = until(lambda: next(iter(running()), None)); os.killpg(job_of(lost), signal.SIGKILL)
    asked = until(lambda: next((r for r in running() if r != lost), None))
    worker = psutil.Process(json.loads((tmp_path/"out"/"rows"/asked/"row.json").read_text())["pid"]).parent(); worker.send_signal(signal.SIGUSR2)
    said, _ = p.communicate(timeout=500); assert p.returncode == 0, said
    table = pd.read_csv(tmp_path/"out"/"summary.csv").set_index("id")
    assert (table.state == "done").all() and len(table) == 3 and table.tries[lost] == 2 and table.tries[asked] == 2
    restarts = sorted(int(f.read_text()) for f in (tmp_path/"state").glob("*.restarts"))
    assert restarts == [1, 1] and {f.read_text() for f in (tmp_path/"state").glob("*.state")} == {"COMPLETED"}
    once(tmp_path, killed=(lost, asked)); assert not of_sweep(tmp_path/"out")

def test_submitit_without_slurm_says_so(tmp_path):
    pytest.importorskip("submitit")
    s = read_sweep(sweep_file(tmp_path, "backend: submitit\ncluster: {executor: slurm}\nrows:\n  - {notebook: 90_tiny}\n"))
    if not any((Path(d)/"srun").exists() for d in os.get_exec_path()):
        with pytest.raises(MammoError, match="executor: local"):
            with executor_of(s, 1): pass
    options = read_sweep(ROOT/"sweeps"/"slurm_submitit.yaml").cluster["options"]
    Submitit(dict(executor="local", options=options), workers=1, folder=tmp_path).shutdown()          # submitit knows every name of the sample
    with pytest.raises(MammoError, match="slurm_partitio"): Submitit(dict(executor="local", options=dict(slurm_partitio="gpu")), workers=1, folder=tmp_path)

@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_starts_eight_at_a_time(tmp_path):
    tiny(tmp_path, body="print(seed)", parameters='seed:int = 0 # Seed\nrun_dir:str = "" # Folder')
    (tmp_path/"s.yaml").write_text("folder: out\nworkers: 8\nretries: 0\nrows:\n  - {notebook: 90_tiny, seeds: 0-99}\n")
    p = start(tmp_path/"s.yaml"); said, _ = p.communicate(timeout=3000)
    assert p.returncode == 0, said[-3000:]
    table = pd.read_csv(tmp_path/"out"/"summary.csv"); assert (table.state == "done").sum() == 100 and (table.tries == 1).all()

@pytest.mark.slow
def test_paper_04_two_seeds_share_their_generators(tmp_path):
    (tmp_path/"s.yaml").write_text("folder: out\nworkers: 2\nrows:\n  - notebook: 04_sharing\n    seeds: [0, 1]\n    parameters: {patients: 24, scopes: lesions, models: cnn, arms: [none, bcdr_dcgan], regimes: 100, gan_epochs: 2, clf_epochs: 2, boots: 50}\n")
    p = start(tmp_path/"s.yaml"); said, _ = p.communicate(timeout=1200); assert p.returncode == 0, said[-3000:]
    infos = [json.loads(f.read_text()) for f in (tmp_path/"out"/"runs").glob("*/run.json")]
    shared = [{n:s for n,s in i["stages"].items() if s["shared"]} for i in infos]
    assert shared[0].keys() == shared[1].keys() and shared[0], "the same shared stages"
    assert all(a["folder"] == b["folder"] and a["reused"]+b["reused"] >= 1 for a,b in ((shared[0][n], shared[1][n]) for n in shared[0])), "each done by one of the two"
    assert (pd.read_csv(tmp_path/"out"/"gathered.csv").seeds == 2).any()
