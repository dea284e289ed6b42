"The package imports and runs where a common CUDA image holds only fastai, papermill, pydicom and mistune (and their needs) besides."
import importlib.metadata as meta, json, os, re, subprocess, sys, textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMAGE = """torch torchvision triton numpy scipy pandas matplotlib seaborn pillow scikit-learn scikit-image statsmodels timm safetensors
    huggingface-hub tqdm filelock jinja2 pyyaml packaging psutil joblib h5py imageio tifffile requests rich typer pytest pytest-timeout numba einops
    sympy networkx fsspec setuptools wheel pip hypothesis
    tabulate xarray pyarrow transformers tensorboard torchmetrics pytorch-lightning lxml opencv-python-headless accelerate regex""".split()       # of the image's packages, those this project could touch
NOTEBOOKS = sorted(ROOT.glob("nbs/0[0-4]_*.ipynb")) + [ROOT/"nbs"/"90_benchmarks.ipynb"]
ADDED = ["fastai", "papermill", "pydicom", "mistune"]
NEVER = ("torch_fidelity", "optuna", "opacus", "diffusers", "dask", "distributed", "dask_jobqueue", "submitit", "nbdev", "execnb", "jupytext", "jupyterlab",
         "nbconvert", "ipykernel", "IPython", "pylibjpeg", "gdcm")
HEAVY = ("spacy", "thinc", "blis", "cymem", "preshed", "murmurhash", "srsly")     # fastai's for text, 57 MiB of wheels: not carried to a GPU machine, so not to be imported


def plain(name): return re.sub(r"[-_.]+", "-", name).lower()


def needs(names):
    "These packages and all they require, extras left out."
    todo, seen = [plain(n) for n in names], set()
    while todo:
        if (n := todo.pop()) in seen: continue
        seen.add(n)
        try: required = meta.requires(n) or []
        except meta.PackageNotFoundError: continue
        todo += [plain(re.match(r"[\w.-]+", r)[0]) for r in required if "extra ==" not in r]
    return seen


def blocked():
    "Top modules of every installed package that is not in that environment."
    there = needs(IMAGE + ADDED) | {"mammo-nb"}
    return sorted({m for m, owners in meta.packages_distributions().items() if not {plain(o) for o in owners} & there} | set(NEVER + HEAVY))


SCRIPT = textwrap.dedent("""
    import ast, importlib, importlib.abc, json, pkgutil, runpy, sys, tempfile
    from pathlib import Path
    names = set(json.load(sys.stdin))
    class Absent(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in names: raise ModuleNotFoundError(f"No module named '{name}'", name=name)
    sys.meta_path.insert(0, Absent())
    import numpy as np, mammo_nb
    wrong = []
    for m in sorted(m.name for m in pkgutil.walk_packages(mammo_nb.__path__, "mammo_nb.")):
        try: importlib.import_module(m)
        except ModuleNotFoundError as e: wrong.append(f"{m}: {e}")
    if wrong: sys.exit("\\n".join(wrong))
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook
    for path in sys.argv[2:]:
        nb, ns = parameterize_notebook(load_notebook_node(path), dict(run_dir=tempfile.mkdtemp()), kernel_name="python3", language="python"), {}
        for c in (c for c in nb.cells if c.cell_type == "code"):
            tags, tree = c.metadata.get("tags", []), ast.parse(c.source)
            if not {"parameters", "injected-parameters"} & set(tags) and not any(w in c.source for w in ("check_params(globals()", ".PAPER, globals())")):
                tree.body = [s for s in tree.body if isinstance(s, (ast.Import, ast.ImportFrom))]
            exec(compile(tree, path, "exec"), ns)
        print(Path(path).stem, (ns["P"] if "P" in ns else ns["run"].params).run_dir != "")
    sys.argv[1:] = [sys.argv[1]]
    try: runpy.run_module("mammo_nb.data.doctor", run_name="__main__", alter_sys=True)
    except SystemExit as e: print("doctor", e.code)
    from mammo_nb.clf.augment import patch_arrays
    from mammo_nb.clf.train import build_classifier, fit_classifier
    from mammo_nb.core import rng
    from mammo_nb.gans.dcgan import RECIPES
    from mammo_nb.gans.share import sample_generator
    from mammo_nb.gans.train import train_gan
    d, x = Path(tempfile.mkdtemp()), rng(0, "x").integers(0, 256, (24, 1, 16, 16), dtype=np.uint8)
    run = train_gan(RECIPES["sharing_dcgan"].small(size=16, width=1/16, nz=4, batch=8), x, folder=d/"gan", epochs=2)
    made = sample_generator(run.snapshots, 6, seed=0)
    patches = patch_arrays(np.concatenate([x, made[0][:,None]]), target=np.arange(30) % 2)
    model = build_classifier(dict(kind="cnn", size=16, widths=(4,8), hidden=8, dropout=.5), seed=0)
    fit = fit_classifier(model, patches, patches, seed=0, epochs=2, folder=d/"clf")
    print(len(run.history), len(fit.history))
""")


def test_the_list_blocks_what_it_should():
    names, there = blocked(), needs(IMAGE + ADDED)
    assert set(NEVER) <= set(names) and not {"torch", "fastai", "pydicom", "papermill", "mammo_nb", "timm", "nbformat"} & set(names)
    assert {"fastcore", "nbclient", "torch", "spacy"} <= there and set(HEAVY) <= set(names)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    "What the script prints in that environment, line by line."
    d = tmp_path_factory.mktemp("minimal"); (d/"nothing").mkdir()
    r = subprocess.run([sys.executable, "-c", SCRIPT, str(d/"nothing"), *map(str, NOTEBOOKS)], input=json.dumps(blocked()), capture_output=True, text=True, timeout=300, cwd=d,
                       env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep), "MAMMO_NB_CACHE": str(d), "OMP_NUM_THREADS": "1"})
    assert r.returncode == 0, r.stderr[-3000:]
    return r.stdout.splitlines()


def test_every_module_imports_and_a_gan_trains(said): assert said[-1] == "2 2"


def test_every_notebook_checks_its_parameters_and_finds_its_imports(said):
    assert len(NOTEBOOKS) == 6 and [f"{p.stem} True" for p in NOTEBOOKS] == [l for l in said if l.endswith(" True")]


def test_the_doctor_answers_without_its_console_command(said): assert "doctor 1" in said
