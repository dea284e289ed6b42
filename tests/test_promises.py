"README says what each promise rests on; what it names is there."
import ast
import re

from mammo_nb.core import repo_root

def named():
    "Tests and lessons in the table of README.md."
    text = (repo_root()/"README.md").read_text(encoding="utf-8")
    table = text[text.index("## What each promise rests on"):].split("\n## ")[0]
    return re.findall(r"`(tests/\w+\.py)::(\w+)`", table), re.findall(r"lesson `([\w.]+)`", table)

def test_what_the_promises_rest_on_is_there():
    tests, lessons = named()
    there = {f: {n.name for n in ast.parse((repo_root()/f).read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)} for f,_ in tests}
    assert len(tests) > 12 and not [f"{f}::{name}" for f,name in tests if name not in there[f]]
    assert lessons and all((repo_root()/"nbs"/"lib"/f"{name}.ipynb").is_file() for name in lessons)
