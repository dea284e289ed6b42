"The requirement lists agree with each other and with what is installed."
import configparser, importlib.metadata, re, sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib", reason="tomllib is part of Python from 3.11 on")
ROOT = Path(__file__).resolve().parents[1]

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
    for extra in ("dicom", "privacy", "cluster", "dev"):
        assert as_set(p["optional-dependencies"][extra]) == as_set(s[f"{extra}_requirements"].split())
    assert p["name"] == s["lib_name"] and p["requires-python"].startswith(f">={s['min_python']}")

def test_constraints_satisfy_settings():
    s, pinned = settings(), pins()
    for r in map(Requirement, " ".join(s[k] for k in ("requirements","dicom_requirements","privacy_requirements","cluster_requirements","dev_requirements")).split()):
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
    assert "-c constraints.txt" in text and "-e .[dev,dicom,privacy,cluster]" in text and "python>=3.10,<3.14" in text

def test_installed_set_fits():
    bad = [f"{r.name} {importlib.metadata.version(r.name)}" for r in map(Requirement, settings()["requirements"].split())
           if not r.specifier.contains(importlib.metadata.version(r.name).split("+")[0])]
    assert not bad

def test_no_index_addresses():
    for f in ("settings.ini","pyproject.toml","constraints.txt","environment.yml","Makefile",".ci/run"):
        assert not re.search(r"index-url|find-links|https?://[^ ]*(simple|whl)", (ROOT/f).read_text()), f
