"What is in mammo_nb/ is what the notebooks export, and clean changes nothing."
import filecmp, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

def tree(d, pattern): return sorted(p.relative_to(d) for p in d.rglob(pattern) if "__pycache__" not in p.parts and ".ipynb_checkpoints" not in p.parts)

def test_export_and_clean_change_nothing(tmp_path):
    for name in ("nbs","mammo_nb"): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns("__pycache__",".ipynb_checkpoints"))
    for name in ("settings.ini","pyproject.toml","README.md"): shutil.copy(ROOT/name, tmp_path/name)
    for tool in ("nbdev_export","nbdev_clean"):
        r = subprocess.run([BIN/tool], cwd=tmp_path, capture_output=True, text=True)
        assert r.returncode == 0, r.stdout + r.stderr
    for d, pattern in (("nbs","*.ipynb"), ("mammo_nb","*.py")):
        assert tree(ROOT/d, pattern) == tree(tmp_path/d, pattern)
        _, changed, missing = filecmp.cmpfiles(ROOT/d, tmp_path/d, map(str, tree(ROOT/d, pattern)), shallow=False)
        assert not changed and not missing, f"run nbdev_export and nbdev_clean: {changed + missing}"
