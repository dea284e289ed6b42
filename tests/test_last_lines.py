"""Every paper's run ends with three numbers and the path of its page."""
import importlib
import re

import nbformat
import pytest

from mammo_nb.core import repo_root
from mammo_nb.runs import Number
from mammo_nb.report.tables import paper_record

PAPERS = ["00_annotation_shift", "01_contextual_gan", "02_dcgan_size", "03_cgan_augmentation", "04_sharing", "05_which_helps", "92_add_a_paper"]

def code_of(name): # Code cells of a paper's notebook
    cells = nbformat.read(repo_root()/"nbs"/f"{name}.ipynb", as_version=4).cells
    return [c.source.removeprefix("#| slow\n") for c in cells if c.cell_type == "code" and c.source]

@pytest.mark.parametrize("name", PAPERS)
def test_a_run_ends_with_three_numbers_and_its_page(name):
    cells = code_of(name)
    said = re.fullmatch(r"print\(run\.closing\((\w+)\.LAST_LINES, report\)\)", cells[-1])
    assert said, cells[-1]
    assert "report = page(" in cells[-2]
    module = importlib.import_module(page_module(name))
    assert len(module.LAST_LINES) == 3
    assert all(isinstance(n, Number) for n in module.LAST_LINES)

@pytest.mark.parametrize("name", PAPERS)
def test_the_numbers_are_of_tables_that_the_run_keeps(name):
    text = "\n".join(code_of(name))
    module = importlib.import_module(page_module(name))
    kept = set(re.findall(r"""run\.table\(["'](\w+)["']""", text)) | {"results"}
    assert {n.table for n in module.LAST_LINES} <= kept

def page_module(name): return paper_record(name)["page"]
