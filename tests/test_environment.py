"The requirement lists agree with each other and with what is installed."
import configparser, importlib.metadata, os, re, shutil, subprocess, sys, zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib", reason="tomllib is part of Python from 3.11 on")
ROOT = Path(__file__).resolve().parents[1]

EXTRAS = ("notebooks", "dicom", "privacy", "diffusion", "cluster", "dev")

def settings():
    c = configparser.ConfigParser(); c.read(ROOT/"settings.ini"); return c["DEFAULT"]

def project(): return tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]

def as_set(lines): return {(canonicalize_name(r.name), str(r.specifier)) for r in map(Requirement, lines)}

def pins():
    "name -> list of (version, marker) of constraints.txt"
    out = {}
    for line in (ROOT/"constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            r = Requirement(line); out.setdefault(canonicalize_name(r.name), []).append((str(r.specifier), r.marker))
    return out

def test_pyproject_repeats_settings():
    s, p = settings(), project()
    assert as_set(p["dependencies"]) == as_set(s["requirements"].split())
    for extra in EXTRAS:
        assert as_set(p["optional-dependencies"][extra]) == as_set(s[f"{extra}_requirements"].split())
    assert p["name"] == s["lib_name"] and p["requires-python"].startswith(f">={s['min_python']}")

def test_nbdev_reads_the_options_of_settings():
    "[tool.nbdev] repeats nbdev's options in settings.ini, in TOML's types: true for True, a list of words for the metadata keys."
    said, read = settings(), tomllib.loads((ROOT/"pyproject.toml").read_text())["tool"]["nbdev"]
    words = {k: " ".join(v) if isinstance(v, list) else str(v) for k,v in read.items()}
    assert words == {k: said[k] for k in words}
    ours = {"lib_path", "nbs_path", "doc_path", "recursive", "tst_flags", "allowed_cell_metadata_keys", "put_version_in_init", "cell_timeout"}
    assert ours <= words.keys()

@pytest.mark.parametrize("typed", [["nbdev_test", "--path", "nbs/lib/12_keys.ipynb", "--n_workers", "0", "--do_print"], ["nbdev_export", "--help"],
                                   ["nbdev_clean", "--fname", "nbs/lib/12_keys.ipynb", "--disp"]])
def test_nbdev_commands_take_what_the_readme_shows(typed):
    done = subprocess.run([Path(sys.executable).with_name(typed[0]), *typed[1:]], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    assert typed[0] != "nbdev_test" or "Success." in done.stdout and "Completed" in done.stdout

def test_constraints_satisfy_settings():
    s, pinned = settings(), pins()
    for r in map(Requirement, " ".join([s["requirements"], *(s[f"{extra}_requirements"] for extra in EXTRAS)]).split()):
        versions = pinned[canonicalize_name(r.name)]
        assert versions and all(spec.startswith("==") for spec,_ in versions)
        assert all(r.specifier.contains(spec[2:].split("+")[0]) for spec,_ in versions), (r, versions)

@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_one_pin_for_each_python(python):
    env = {"python_version":python, "python_full_version":python+".9", "sys_platform":"linux", "platform_machine":"x86_64", "implementation_name":"cpython",
           "platform_python_implementation":"CPython", "os_name":"posix", "platform_system":"Linux", "extra":""}
    for r in map(Requirement, settings()["requirements"].split()):
        fit = [v for v,m in pins()[canonicalize_name(r.name)] if m is None or m.evaluate(env)]
        assert len(fit) == 1, (r.name, python, fit)

def test_conda_file_uses_the_same_lists():
    text = (ROOT/"environment.yml").read_text()
    assert "-c constraints.txt" in text and "-e .[dev,notebooks,dicom,privacy,cluster]" in text and "python>=3.10,<3.14" in text

def test_installed_set_fits():
    bad = [f"{r.name} {importlib.metadata.version(r.name)}" for r in map(Requirement, settings()["requirements"].split())
           if not r.specifier.contains(importlib.metadata.version(r.name).split("+")[0])]
    assert not bad

def test_no_index_addresses():
    for f in ("settings.ini","pyproject.toml","constraints.txt","environment.yml","Makefile",".ci/run"):
        assert not re.search(r"index-url|find-links|https?://[^ ]*(simple|whl)", (ROOT/f).read_text()), f

CARRIED = ("nbs/*.ipynb", "nbs/lib/*.ipynb", "nbs/papers/*.ipynb", "cards/*.md", "sweeps/*.yaml")

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel of this tree, built without network, unpacked outside the repository."
    place = tmp_path_factory.mktemp("wheel")
    for name in ("mammo_nb", "nbs", "cards", "sweeps"):
        shutil.copytree(ROOT/name, place/"tree"/name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT/name, place/"tree"/name)
    build = [sys.executable, "-m", "pip", "wheel", str(place/"tree"), "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(place)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    zipfile.ZipFile(next(place.glob("*.whl"))).extractall(place/"site")
    return place/"site"

def test_wheel_carries_notebooks_cards_sweeps_and_published_data(wheel):
    for pattern in CARRIED:
        here = {p.relative_to(ROOT): p.read_bytes() for p in ROOT.glob(pattern)}
        assert here and here == {p.relative_to(wheel/"mammo_nb"/"carried"): p.read_bytes() for p in (wheel/"mammo_nb"/"carried").glob(pattern)}
    for folder in ("published", "shipped"):
        here = {p.relative_to(ROOT): p.read_bytes() for p in (ROOT/"mammo_nb"/folder).rglob("*") if p.is_file()}
        assert here and here == {p.relative_to(wheel): p.read_bytes() for p in (wheel/"mammo_nb"/folder).rglob("*") if p.is_file()}

def test_workplace_from_a_wheel_alone(wheel, tmp_path):
    "Outside the repository, with nothing but the wheel: a folder laid out, a parameter refused in one line."
    env = os.environ | dict(PYTHONPATH=str(wheel), MAMMO_NB_CACHE=str(tmp_path/"cache"))
    code = ("import os, sys, mammo_nb, mammo_nb.cli as c; from mammo_nb.core import repo_root; print(mammo_nb.__file__); assert c.main(['init', 'study']) == 0;"
            "os.chdir('study/cards'); print(repo_root()); sys.exit(c.main(['run', '04_sharing', '-p', 'sead', '1']))")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().count("\n") == 0 and "did you mean 'seed'?" in done.stderr, done.stderr
    assert done.stdout.splitlines()[0].startswith(str(wheel)) and done.stdout.splitlines()[-1] == str(tmp_path/"study")

def test_every_console_command_is_one_word_of_mammo():
    from mammo_nb.cli import COMMANDS
    scripts = project()["scripts"]
    assert scripts["mammo"] == "mammo_nb.cli:main"
    for name, target in scripts.items():
        if name.startswith("nbdev_"): continue           # nbdev's own, see above
        word = name.removeprefix("mammo_")
        assert name == "mammo" or word in COMMANDS
        assert target == "mammo_nb.cli:main" or not COMMANDS[word].target, f"{name} goes past mammo"

def test_a_closed_pipe_ends_quietly():
    code = "import sys, mammo_nb.cli as c; sys.exit(c.main(['-h']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141 and not done.stderr, done.stderr
