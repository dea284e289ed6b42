"""Runs lessons in place and keeps what their cells show: `python tests/keep_outputs.py nbs/lib/34_metrics.delong.ipynb`.
Warnings, large outputs and outputs that name a folder or a memory address are dropped."""
import copy
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FLAGS = ("slow", "gpu", "data", "eval: false")
# a path from the root of a machine (/data/… is the example of the docs), or an address in memory
PRIVATE = re.compile(r"(?<![\w.:/…])/(?!data/)[A-Za-z]\w*/[.\w]|0x[0-9a-f]{6,}")
LARGEST = 60_000


def skipped(cell) -> bool:
    return any(re.match(rf"#\|\s*({'|'.join(FLAGS)})", line.strip()) for line in cell.source.splitlines())


def text_of(output) -> str:
    return output.get("text", "") or "".join(str(v) for k, v in output.get("data", {}).items() if k.startswith("text"))


def keep(output) -> bool:
    if output.output_type == "stream" and output.name == "stderr": return False
    if PRIVATE.search(text_of(output)) or len(str(output)) > LARGEST:
        print("  dropped an output of", len(str(output)), "characters that is large or names a folder or an address")
        return False
    return True


def unnumbered(cell, outputs):
    "Give a cell these outputs, without the counts of a session."
    cell.outputs, cell.execution_count = outputs, None
    for output in outputs:
        if output.output_type == "execute_result": output["execution_count"] = None


def run(path:Path):
    book = nbformat.read(path, 4)
    copied = copy.deepcopy(book)
    for cell in copied.cells:
        if cell.cell_type == "code" and skipped(cell): cell.source = "pass"
    os.environ.update(IN_TEST="1", MPLBACKEND="agg", OMP_NUM_THREADS="1")
    NotebookClient(copied, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell, done in zip(book.cells, copied.cells):
        if cell.cell_type != "code": continue
        unnumbered(cell, [o for o in done.outputs if keep(o)])
    nbformat.write(book, path)
    print(f"{path.name}: {sum(len(c.outputs) for c in book.cells if c.cell_type == 'code')} outputs, {path.stat().st_size} bytes")


if __name__ == "__main__":
    for name in sys.argv[1:]: run(Path(name).resolve())
