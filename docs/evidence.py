"""The five demos as committed evidence: `make evidence` runs them from a committed tree and puts page and notebook into `reports/`.

    python docs/evidence.py [PAPER …]

Each paper's notebook is run by papermill (phantoms, seed 0, demo size, two at a time) into `reports/demo/evidence/`. The executed
notebook, without progress lines, warnings, times and names of folders, becomes `reports/PAPER/notebook.ipynb`; its page becomes
`reports/PAPER/report.html`, or `demo.html` where that is a page of several runs. Both are made of phantoms only. A tree with changes is refused: evidence is a commit's.
"""
import re
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


def without_tables(page:str) -> str:
    "A page without its links to the CSV files of the run, which are not committed."
    return re.sub(r'<a [^>]*href="(?:tables/)?[\w.]+\.csv"[^>]*>[^<]*</a>', "", page)


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
    page = place/("demo.html" if (place/"tables").is_dir() else "report.html")      # a page of several runs has its tables beside it
    page.write_text(without_tables((ROOT/WORK/paper/"report.html").read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{paper}: {(place/'notebook.ipynb').stat().st_size/1e6:.1f} MB, {page.name} {page.stat().st_size/1e6:.1f} MB")


def main(wanted:list) -> None:
    "Run and take the papers asked for, all when none is named."
    unknown = [p for p in wanted if p not in PAPERS]
    if unknown: sys.exit(f"{', '.join(unknown)}: no such paper; there are {', '.join(PAPERS)}")
    if changes(): sys.exit(f"commit first: evidence is taken from a committed tree\n{changes()}")
    with ThreadPoolExecutor(2) as both:
        asked = wanted or PAPERS
        for paper, executed in zip(asked, both.map(run, asked)): take(paper, executed)


if __name__ == "__main__": main(sys.argv[1:])
