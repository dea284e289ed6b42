"Shared fixtures: a private cache, the repository, the real data where they are."
import json, os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent/"shared"/"data"

LONG = ("test_paper_", "test_sweep", "test_rehearsal", "test_stale")   # whole notebooks in processes

def pytest_collection_modifyitems(config, items):
    import torch
    marked = config.getoption("-m")
    if "gpu" not in marked: items.sort(key=lambda i: not i.path.name.startswith(LONG))   # long files first: at the end no core waits for another
    for i in items:
        if i.get_closest_marker("slow") and "slow" not in marked: i.add_marker(pytest.mark.skip(reason="slow: run with pytest -m slow"))
        if i.get_closest_marker("data") and not SHARED.is_dir(): i.add_marker(pytest.mark.skip(reason="needs ../shared/data"))
        if i.get_closest_marker("gpu") and not torch.cuda.is_available(): i.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    "A cache folder for processes that tests start, kept over the session and shared by its workers: phantoms are made once."
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)/"cache"
    shared.mkdir(exist_ok=True)
    return shared

@pytest.fixture
def papermill(cache):
    "Run a paper notebook as a person would: papermill in a process of its own, from any folder. -> CompletedProcess"
    def run(paper, out, *args, cwd=ROOT, timeout=600, check=True):
        cmd = [sys.executable, "-m", "papermill", str(ROOT/"nbs"/f"{paper}.ipynb"), str(out), "--no-progress-bar"]
        for k,v in zip(args[::2], args[1::2]): cmd += ["-p", k, str(v)]
        env = os.environ | {"MAMMO_NB_CACHE":str(cache), "MPLBACKEND":"agg"}
        r = subprocess.run(cmd, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
        assert not check or r.returncode == 0, r.stderr[-3000:]
        return r
    return run

@pytest.fixture
def begin():
    "The first cells of a paper notebook in this process: its parameters, these values over them (as papermill lays them), the check. -> Run"
    def begun(paper, **given):
        cells = [c for c in json.loads((ROOT/"nbs"/f"{paper}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
        at = next(i for i,c in enumerate(cells) if "parameters" in c["metadata"].get("tags", []))
        place = {}
        exec("".join(cells[at]["source"]), place)
        place |= given
        exec("".join(cells[at+1]["source"]), place)
        return place["run"]
    return begun
