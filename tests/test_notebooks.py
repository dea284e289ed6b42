"Contracts of nbs/ that no single notebook can check."
import ast, configparser, re
from pathlib import Path

import nbformat
import papermill as pm
import pytest
from keep_outputs import PRIVATE, text_of

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and not p.name.startswith(("_",".")))
PAPERS = [p for p in NOTEBOOKS if p.parent.name == "nbs" and re.match(r"0[0-5]_|92_", p.name)]
LIBRARY = [p for p in NOTEBOOKS if p.parent.name in ("lib", "papers")]
COMMON = {"seed":"int","preset":"str","protocol":"str","data_dir":"str","run_dir":"str","device":"str","only":"str"}
NETWORKS = {"mode":"str"}      # papers that train networks choose their arithmetic
name = lambda p: p.stem
read = lambda p: nbformat.read(p, 4)

@pytest.mark.parametrize("nb", NOTEBOOKS, ids=name)
def test_every_notebook(nb):
    n = read(nb); nbformat.validate(n)
    assert n.metadata.kernelspec.name == "python3"
    ids = [c.id for c in n.cells]; assert len(ids) == len(set(ids))
    title = n.cells[0]
    assert title.cell_type == "markdown" and re.match(r"^# [^\n]+\n\n> [^\n]+\s*$", title.source), "title and one-line subtitle, alone in their cell"
    text = "\n".join(c.source for c in n.cells)
    assert not re.search(r"/root/|/work/|/home/\w+/", text), "a machine path"
    assert not any("injected-parameters" in c.metadata.get("tags", []) for c in n.cells)

@pytest.mark.parametrize("nb", PAPERS, ids=name)
def test_paper_has_one_typed_parameters_cell(nb):
    n = read(nb)
    cells = [c for c in n.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    body = ast.parse(cells[0].source).body
    assert body and all(isinstance(b, ast.AnnAssign) for b in body), "each parameter is `name:type = default`"
    types = {b.target.id:ast.unparse(b.annotation) for b in body}
    assert (COMMON if nb.name.startswith("92") else COMMON | NETWORKS).items() <= types.items()
    lines = [l for l in cells[0].source.splitlines() if l.strip() and not l.startswith("#")]
    assert all("#" in l for l in lines), "each parameter has a comment"
    found = pm.inspect_notebook(nb)
    assert set(found) == set(types) and found["preset"]["default"] == '"demo"' and found["seed"]["default"] == "0"
    after = next(c for c in n.cells[n.cells.index(cells[0])+1:] if c.cell_type == "code")
    assert re.search(r"check_params\(globals\(\)|start\(\w+\.PAPER, globals\(\)\)", after.source), "the first cell after the parameters checks them"

@pytest.mark.parametrize("nb", PAPERS, ids=name)
def test_paper_exports_nothing_and_has_no_outputs(nb):
    for c in read(nb).cells:
        if c.cell_type == "code": assert not c.outputs and "#| export" not in c.source and "nbdev_export(" not in c.source

@pytest.mark.parametrize("nb", PAPERS, ids=name)
def test_paper_reads_as_a_page(nb):
    "At most four lines of code a cell, of at most 120 characters; a heading for the paper's own tables and figures."
    cells = read(nb).cells
    for c in cells:
        if c.cell_type != "code" or "parameters" in c.metadata.get("tags", []): continue
        lines = [l for l in c.source.splitlines() if l.strip() and not re.match(r"(from|import) |    \S.*import|#", l)]
        assert len(lines) <= 4, f"{len(lines)} lines: {lines[0]}"
        assert all(len(l) <= 120 for l in c.source.splitlines()), c.source
    heads = [l for c in cells if c.cell_type == "markdown" for l in c.source.splitlines() if l.startswith("## ")]
    assert any(re.search(r"Table|Figure", h) for h in heads), "no heading names a table or a figure of the paper"

@pytest.mark.parametrize("nb", LIBRARY, ids=name)
def test_outputs_show_no_place_of_this_machine(nb):
    for c in read(nb).cells:
        for o in c.get("outputs", []):
            assert not PRIVATE.search(text_of(o)), c.source[:80]

def test_names_are_unique():
    stems = [p.name for p in NOTEBOOKS]; assert len(stems) == len(set(stems))
    exps = [m[1] for p in NOTEBOOKS for c in read(p).cells if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", c.source, re.M))]
    assert len(exps) == len(set(exps)), "two notebooks export one module"

@pytest.mark.parametrize("nb", LIBRARY, ids=name)
def test_library_file_name_is_its_module(nb):
    exp = [m[1] for c in read(nb).cells if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", c.source, re.M))]
    assert exp == [re.sub(r"^\d+[a-z]?_", "", nb.stem)]

def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]

@pytest.mark.parametrize("nb", LIBRARY, ids=name)
def test_exported_functions_fit_on_a_screen_and_say_what_they_are(nb):
    for c in read(nb).cells:
        if c.cell_type != "code" or "#| export" not in c.source: continue
        for f in functions(ast.parse(c.source)):
            assert f.end_lineno - f.lineno < 60, f"{f.name} has {f.end_lineno-f.lineno+1} lines"
        for f in ast.parse(c.source).body:
            if isinstance(f, (ast.FunctionDef, ast.ClassDef)) and not f.name.startswith("_") and not f.decorator_list: assert ast.get_docstring(f), f"{f.name} has no docstring"

def test_outputs_are_small():
    for p in NOTEBOOKS: assert p.stat().st_size < 300_000, p.name

def test_settings_keep_tags():
    c = configparser.ConfigParser(); c.read(ROOT/"settings.ini")
    assert c["DEFAULT"]["allowed_cell_metadata_keys"] == "tags" and c["DEFAULT"]["update_pyproject"] == "False"
