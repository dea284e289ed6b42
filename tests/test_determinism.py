"The same run in other surroundings: threads, order of hashes, locale, time zone, working folder, cache, rights of new files. The same bytes."
import hashlib
import os
import subprocess
import sys

import pytest

from mammo_nb.core import repo_root

TINY = dict(seed=1, patients=24, scopes="masses", models="cnn", arms="none,bcdr_dcgan", regimes="50", gan_epochs=2, clf_epochs=2, boots=40)
USUAL = dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MAMMO_NB_WORKERS="1", PYTHONHASHSEED="0", TZ="UTC", LC_ALL="C.UTF-8", LANG="C.UTF-8")
OTHERS = dict(threads=dict(OMP_NUM_THREADS="4", MKL_NUM_THREADS="4", MAMMO_NB_WORKERS="2"), hashes=dict(PYTHONHASHSEED="12345"), zone=dict(TZ="Pacific/Kiritimati"),
              language=dict(LC_ALL="POSIX", LANG="tr_TR.UTF-8", PYTHONUTF8="1"))

def ended(folder, surroundings, umask=0o022, **more):
    "A run in a process of its own, in a folder and with a cache of its own: file -> hash."
    folder.mkdir()
    given = [word for k,v in (TINY | more | dict(run_dir=folder/"run")).items() for word in ("-p", k, str(v))]
    command = [sys.executable, "-m", "papermill", str(repo_root()/"nbs"/"04_sharing.ipynb"), str(folder/"out.ipynb"), "--no-progress-bar", *given]
    env = os.environ | USUAL | surroundings | dict(MAMMO_NB_CACHE=str(folder/"cache"), PYTHONPATH=os.pathsep.join([str(repo_root()), os.environ.get("PYTHONPATH", "")]), MPLBACKEND="agg")
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, umask=umask)
    assert done.returncode == 0, done.stderr[-3000:]
    kept = [p for pattern in ("tables/*.csv", "*.csv", "*.csv.gz", "figures/*", "words.json") for p in (folder/"run").glob(pattern)]
    return {p.relative_to(folder/"run").as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}

@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_surroundings_change_no_byte(tmp_path):
    "All of them at once; where that changes a byte, each alone, to name the one."
    everything = {k: v for more in OTHERS.values() for k,v in more.items()}
    usual, other = ended(tmp_path/"usual", {}), ended(tmp_path/"other", everything, umask=0o077)
    assert len(usual) > 15 and usual.keys() == other.keys()
    differ = [f for f in usual if usual[f] != other[f]]
    print(f"{len(usual)} files, {len(differ)} differ with {', '.join(OTHERS)}, folder, cache and umask changed")
    alone = {name: [f for f,h in ended(tmp_path/name, more).items() if usual[f] != h] for name,more in OTHERS.items()} if differ else {}
    assert not differ, f"{differ}; alone: {alone}"

@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_a_run_on_a_gpu_has_the_same_bytes_in_turns_and_one_after_another(tmp_path):
    two = dict(device="cuda", arms="none,bcdr_dcgan,copies", clf_epochs=4)
    alone, turns = (ended(tmp_path/f"workers{n}", dict(MAMMO_NB_WORKERS=n), **two) for n in ("1", "8"))
    assert len(alone) > 15 and alone == turns
