"""The five demos as committed evidence: `make evidence` runs them from a committed tree and puts page and notebook into `reports/`.

    python docs/evidence.py [PAPER …]

Each paper's notebook is run by papermill (phantoms, seed 0, demo size, two at a time) into `reports/demo/evidence/`. The executed
notebook, without progress lines, warnings, times and names of folders, becomes `reports/PAPER/notebook.ipynb`; its page becomes
`reports/PAPER/report.html`, or `demo.html` where that is a page of real data; the small tables that the page links to come with it, and
the picture of samples that the README shows (`reports/PAPER/samples.png`). All are made of phantoms only. A tree with changes is refused:
evidence is a commit's.
"""
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"tests"))
from keep_outputs import PRIVATE, text_of, unnumbered      # noqa: E402 - the rules of lessons
PAPERS = sorted(p.stem for p in (ROOT/"nbs").glob("0*.ipynb"))
WORK = Path("reports/demo/evidence")
LARGEST = 300_000     # characters of one output
SAMPLES = {"00_annotation_shift": "samples", "01_contextual_gan": "fig1_pairs", "02_dcgan_size": "fig15_samples",
           "03_cgan_augmentation": "fig5_samples", "04_sharing": "fig2_samples"}  # paper -> figure for the README
LARGEST_TABLE = 60_000 # characters of one table; a demo's are some 100,000 together


def changes() -> str:
    "What git finds changed in the tree."
    return subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def run(paper:str) -> Path: # The executed notebook
    "The demo of a paper, as a reader would run it."
    out = WORK/f"{paper}.ipynb"
    (ROOT/WORK).mkdir(parents=True, exist_ok=True)
    command = [Path(sys.executable).with_name("papermill"), f"nbs/{paper}.ipynb", out, "-p", "run_dir", WORK/paper]
    with open(ROOT/WORK/f"{paper}.log", "w") as log:
        subprocess.run([*command, "--no-progress-bar"], cwd=ROOT, stdout=log, stderr=log, check=True)
    return ROOT/out


def keep(output) -> bool:
    "Tables, pictures and values; no streams (progress, folders, warnings) and nothing that names this machine."
    return output.output_type != "stream" and not PRIVATE.search(text_of(output)) and len(str(output)) <= LARGEST


LINK = re.compile(r' <a class="csv" href="([\w./-]+\.csv)">CSV</a>')


def tables_kept(page:str, run:Path, place:Path, folder:str) -> str: # The page, its links leading to what was kept
    """The CSV files that a page links to, copied beside it where they are small; the link to another goes with its file.

    A page of phantoms is the only one that comes here. What an earlier call left in the folder and this page does not name is removed.
    """
    (place/folder).mkdir(exist_ok=True)
    kept = {}
    for link in LINK.findall(page):
        file = run/link
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if text and len(text) <= LARGEST_TABLE and not PRIVATE.search(text): kept[link] = (f"{folder}/{file.name}", text)
    for old in (place/folder).glob("*.csv"): old.unlink()
    for link, text in kept.values(): (place/link).write_text(text, encoding="utf-8")
    return LINK.sub(lambda found: found[0].replace(found[1], kept[found[1]][0]) if found[1] in kept else "", page)


def page_of(place:Path) -> tuple: # (file, name of the folder of its tables)
    "Where a demo's page goes: a page of real data that lies there stays, the demo's gets names of its own."
    there = place/"report.html"
    real = there.is_file() and "PHANTOM DATA" not in there.read_text(encoding="utf-8")
    return (place/"demo.html", "demo_tables") if real else (there, "tables")


def take(paper:str, executed:Path) -> None:
    "Notebook and page of a finished run into reports/."
    book = nbformat.read(executed, 4)
    for cell in book.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
        if cell.cell_type != "code": continue
        unnumbered(cell, [o for o in cell.outputs if keep(o)])
    book.cells = [c for c in book.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    book.metadata = {"kernelspec": book.metadata["kernelspec"]}
    place = ROOT/"reports"/paper
    place.mkdir(exist_ok=True)
    nbformat.write(book, place/"notebook.ipynb")
    page, folder = page_of(place)
    text = (ROOT/WORK/paper/"report.html").read_text(encoding="utf-8")
    page.write_text(tables_kept(text, ROOT/WORK/paper, place, folder), encoding="utf-8")
    if paper in SAMPLES: shutil.copyfile(ROOT/WORK/paper/"figures"/f"{SAMPLES[paper]}.png", place/"samples.png")
    print(f"{paper}: {(place/'notebook.ipynb').stat().st_size/1e6:.1f} MB, {page.name} {page.stat().st_size/1e6:.1f} MB")


def main(wanted:list) -> None:
    "Run and take the papers asked for, all when none is named."
    unknown = [p for p in wanted if p not in PAPERS]
    if unknown: sys.exit(f"{', '.join(unknown)}: no such paper; there are {', '.join(PAPERS)}")
    if changes(): sys.exit(f"commit first: evidence is taken from a committed tree\n{changes()}")
    with ThreadPoolExecutor(2) as both:
        asked = wanted or PAPERS
        done = list(both.map(run, asked))     # all before any is taken: a run would find a changed tree
    for paper, executed in zip(asked, done): take(paper, executed)


if __name__ == "__main__": main(sys.argv[1:])
