"""Run lessons with nbdev_test, each in a process of its own that starts with the libraries loaded.

    python tests/lessons.py --jobs 2 nbs/lib/*.ipynb

`nbdev_test` on many notebooks uses its workers again, so that what one lesson imports or sets would colour the next.
A process for each costs the loading of torch, pandas and the like, some three seconds of each lesson. Here one process loads the
libraries, nothing of mammo_nb, and is copied (fork) for each notebook; the copy calls `nbdev_test` and ends.
On other systems than Linux, where a copy with libraries loaded is not safe, each notebook gets a fresh process.
Ends with status 1 when a notebook fails; none is started after that.
"""
import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

# not fastai: it changes torch's own classes, and a lesson that does not import it must not see that
LIBRARIES = ("torch", "torchvision", "pandas", "scipy.stats", "sklearn.metrics", "matplotlib.pyplot", "pydicom", "PIL.Image",
             "pydantic", "safetensors.torch", "nbdev.test")

def load():
    "The libraries that most lessons import."
    for name in LIBRARIES:
        __import__(name)

def one(notebook):
    "In the copy: nbdev's own command on one notebook; never comes back."
    nbdev_test = sys.modules["nbdev.test"].nbdev_test
    status = 1
    try:
        nbdev_test(path=str(notebook), n_workers=0, do_print=True)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

def start(notebook):
    "The number of the process that runs this notebook."
    if sys.platform != "linux":
        command = Path(sys.executable).with_name("nbdev_test")
        return subprocess.Popen([command, "--path", notebook, "--n_workers", "0", "--do_print"]).pid
    child = os.fork()
    if child == 0:
        one(notebook)
    return child

def run(notebooks, jobs):
    "Runs the notebooks, at most `jobs` at once; -> those that failed."
    waiting, running, failed = list(notebooks), {}, []
    while running or (waiting and not failed):
        while waiting and not failed and len(running) < jobs:
            notebook = waiting.pop(0)
            running[start(notebook)] = (notebook, time.time())
        child, status = os.wait()
        notebook, began = running.pop(child)
        print(f"{notebook}: {time.time() - began:.0f} s", flush=True)
        if status:
            failed.append(notebook)
    return failed

def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("notebooks", nargs="+", type=Path)
    ask.add_argument("--jobs", type=int, default=2)
    said = ask.parse_args()
    missing = [str(n) for n in said.notebooks if not n.is_file()]
    if missing:
        sys.exit(f"no such notebook: {', '.join(missing)}")
    load()
    failed = run(said.notebooks, said.jobs)
    if failed:
        sys.exit(f"failed: {', '.join(map(str, failed))}")

if __name__ == "__main__":
    main()
