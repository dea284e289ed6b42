"A disk that fills up at every stage of a run: a typed error each time, and the same command goes on where it stopped, with the same bytes."
import os
import subprocess

import pytest
from test_stale import NOTEBOOKS, number, run_here, tables

from mammo_nb.core import MammoError
from mammo_nb.data.trees import phantom_tree

SHARING = next(p for p in NOTEBOOKS if number(p) == "04")


class Disk:
    "A disk in memory that can grow; only where this process may mount one."
    def __init__(self, at):
        self.at = at
        at.mkdir()

    def hold(self, kilobytes, remount=True):
        how = ["-o", f"remount,size={kilobytes}k"] if remount else ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs"]
        return subprocess.run(["mount", *how, str(self.at)], capture_output=True).returncode == 0

@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path/"disk")
    if not disk.hold(64, remount=False): pytest.skip("this process may not mount a small disk; stubs of full disks are in test_resume_gans.py and test_patches.py")
    yield disk
    subprocess.run(["umount", "-l", str(disk.at)], check=True)

def filled_and_grown(disk, work, sizes):
    "Do the work on a disk of each size until it is done: what was said on the way; anything but our own errors ends the test."
    said = []
    for kilobytes in sizes:
        disk.hold(kilobytes)
        try: return work(), said
        except MammoError as e: said.append(str(e).partition(": ")[2])
    raise AssertionError(f"not done at {kilobytes} kB: {said[-1]}")

@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_on_a_disk_that_fills_up(tmp_path, disk, monkeypatch):
    monkeypatch.setenv("MAMMO_NB_WORKERS", "1")
    monkeypatch.setenv("MAMMO_NB_CACHE", str(tmp_path))
    roomy = tmp_path/"roomy"
    roomy.mkdir()
    wanted = tables(run_here(SHARING, {}, tmp_path, roomy))
    cache = disk.at/"cache"
    cache.mkdir()
    (cache/"phantoms").symlink_to(roomy/"phantoms")
    run, said = filled_and_grown(disk, lambda: run_here(SHARING, {}, disk.at, cache), [int(96*1.35**k) for k in range(22)])
    places = {s.split("(")[0][-60:] for s in said}
    print(f"{len(said)} times full, {len(places)} different words: {sorted(places)}")
    assert len(said) >= 5 and all("disk is full" in s or "No space left" in s for s in said), said
    assert tables(run) == wanted and not list(disk.at.rglob("*.part*"))

@pytest.mark.slow
def test_phantoms_on_a_disk_that_fills_up(tmp_path, disk, monkeypatch):
    def draw(at):
        monkeypatch.setenv("MAMMO_NB_CACHE", str(at))
        tree = phantom_tree("folder", centre="a", n_patients=2, scale=.1)
        return {p.relative_to(tree).as_posix(): p.read_bytes() for p in sorted(tree.rglob("*")) if p.is_file()}
    wanted = draw(tmp_path/"roomy")
    found, said = filled_and_grown(disk, lambda: draw(disk.at), [96, 128, 200, 300, 500, 900, 2000, 4000])
    assert found == wanted and len(said) >= 2 and all("disk is full" in s or "No space left" in s for s in said), said
