"""The notebooks as a site: `python docs/site.py [FOLDER]` writes pages with outputs, a search and a reference, offline.

mistune (text) and Pygments (code) are here with Jupyter; the frame, the search over headings and the reference are these few lines.
nbconvert's exporter needed 0.6 s a notebook, longer than all of this takes. Quarto, mkdocs-jupyter and jupyter-book give more
(themes, formulas set in type) and ask for a tool, or a network, that `make` has not.
"""
import ast
import html
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import mistune
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parents[1]
SHELVES = {"1":"Settings and runs", "2":"Data", "3":"Measures", "4":"Generators", "5":"Classifiers", "6":"Reports and commands",
           "7":"Benchmarks", "8":"What one paper alone has"}
CODE = HtmlFormatter(cssclass="highlight")
PYTHON = PythonLexer()
TEXT = mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "url"])


@dataclass
class Book:
    "One notebook."
    path:Path # Where it lies
    title:str # First heading
    about:str # The line below it
    body:str # HTML
    heads:list # (id, heading)
    module:str # Exported module, or empty

    @property
    def page(self): return self.path.relative_to(ROOT/"nbs").with_suffix(".html").as_posix()

    @property
    def shelf(self): return SHELVES[self.path.name[0]] if self.path.parent != ROOT/"nbs" else "Papers and guides"


def slug(text:str) -> str: return re.sub(r"[^\w]+", "-", text.lower()).strip("-")


def with_ids(body:str) -> tuple: # HTML, [(id, heading)]
    "Every heading gets an id of its own words, in place of nbconvert's."
    heads, taken = [], set()
    def named(found):
        words = html.unescape(re.sub(r"<[^>]+>", "", found[2])).replace("¶", "").strip()
        key = slug(words) or "part"
        while key in taken: key += "-x"
        taken.add(key)
        heads.append((key, words))
        return f'<h{found[1]} id="{key}">{html.escape(words)} <a class="here" href="#{key}" aria-label="Link">#</a></h{found[1]}>'
    return re.sub(r"<h([1-4])[^>]*>(.*?)</h\1>", named, body, flags=re.S), heads


def shown(output:dict) -> str:
    "One output of a cell: its richest form."
    if output["output_type"] == "stream": return f'<pre>{html.escape("".join(output["text"]))}</pre>'
    data = {kind: "".join(v) if isinstance(v, list) else v for kind, v in output.get("data", {}).items()}
    if "text/html" in data: return data["text/html"]
    if "image/png" in data: return f'<img alt="Output of the cell above" src="data:image/png;base64,{data["image/png"].strip()}">'
    if "text/markdown" in data: return TEXT(data["text/markdown"])
    return f'<pre>{html.escape(data.get("text/plain", ""))}</pre>'


def cell_html(cell:dict) -> str:
    "One cell with its outputs."
    source = "".join(cell["source"])
    if cell["cell_type"] != "code": return TEXT(source)
    outputs = "".join(f'<div class="out">{shown(o)}</div>' for o in cell["outputs"])
    return highlight(source, PYTHON, CODE) + outputs


def cells_of(path:Path) -> list: # Cells of a notebook
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def with_outputs(path:Path) -> list: # Cells
    "A paper's notebook holds no outputs; its executed copy in reports/ does, and is shown while it has the same cells."
    cells, copy = cells_of(path), ROOT/"reports"/path.stem/"notebook.ipynb"
    if path.parent != ROOT/"nbs" or not copy.is_file(): return cells
    executed = cells_of(copy)
    return executed if [c["source"] for c in executed] == [c["source"] for c in cells] else cells


def read_book(path:Path) -> Book:
    "A notebook with its outputs as they were committed."
    cells = with_outputs(path)
    sources = ["".join(c["source"]) for c in cells]
    module = next((m[1] for s in sources if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", s, re.M))), "")
    kept = [c for c, s in zip(cells[1:], sources[1:]) if not re.match(r"\s*#\|\s*(default_exp|hide)", s)]
    first, body = sources[0].splitlines(), "\n".join(map(cell_html, kept))
    body, heads = with_ids(re.sub(r'href="([^":]+)\.ipynb(#[^"]*)?"', r'href="\1.html\2"', body))
    about = next((l[1:].strip() for l in first if l.startswith(">")), "")
    return Book(path, first[0].lstrip("# "), about, body, heads, module)


def signature(node:ast.AST, lines:list) -> str:
    "A definition up to its docstring, comments (docments) included; of a class also its fields."
    if isinstance(node, ast.ClassDef):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        return "\n".join([lines[node.lineno-1], *(l for f in fields for l in lines[f.lineno-1:f.end_lineno])])
    end = node.body[0].lineno - 1
    return "\n".join(lines[node.lineno-1:max(end, node.lineno)])


def module_reference(module:str) -> tuple: # HTML, [(id, name)]
    "Public functions and classes of a module with parameters and meaning, read from the source; nothing is imported."
    text = (ROOT/"mammo_nb"/Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
    lines, rows, heads = text.splitlines(), [], []
    for node in ast.parse(text).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"): continue
        key = f"{module}.{node.name}"
        heads.append((key, node.name))
        said = html.escape(ast.get_docstring(node) or "")
        rows.append(f'<h3 id="{key}"><code>{node.name}</code></h3><p>{said}</p>'
                    + highlight(signature(node, lines), PYTHON, CODE))
    return "\n".join(rows), heads


def reference(books:list) -> Book:
    "All modules on one page."
    parts, heads = [], []
    for book in (b for b in books if b.module):
        body, names = module_reference(book.module)
        parts.append(f'<h2 id="{book.module}">mammo_nb.{book.module} <small><a href="{book.page}">lesson</a></small></h2>{body}')
        heads += [(book.module, f"mammo_nb.{book.module}"), *names]
    about = "Every public name: what it takes, in which unit, and what it gives. From the comments beside the parameters."
    return Book(ROOT/"nbs"/"reference.ipynb", "Reference", about, "\n".join(parts), heads, "")


REPORTS = {"report.html": "report", "demo.html": "demo on phantoms"}


def reports(books:list, out:Path) -> Book:
    "The committed reports, each beside the notebook that writes it and the lessons of its paper."
    shutil.copytree(ROOT/"reports", out/"reports", ignore=shutil.ignore_patterns("demo", "paper", "local"), dirs_exist_ok=True)
    rows = ['<li><a href="reports/index.html">All papers on one page</a></li>']
    for book in books:
        place = ROOT/"reports"/book.path.stem
        there = {name: words for name, words in REPORTS.items() if (place/name).is_file()}
        if not there: continue
        own = [b for b in books if b.path.name.startswith(f"8{book.path.name[1]}")]
        lessons = ", ".join(f'<a href="{b.page}">{html.escape(b.title)}</a>' for b in own)
        links = " · ".join(f'<a href="reports/{book.path.stem}/{name}">{words}</a>' for name, words in there.items())
        rows.append(f'<li>{html.escape(book.title)}: {links}, written by <a href="{book.page}">its notebook</a>. '
                    f'Tables and figures are made in: {lessons}</li>')
    about = "What was committed of the runs, and where each table comes from"
    return Book(ROOT/"nbs"/"reports.ipynb", "Reports", about, f"<ul>{''.join(rows)}</ul>", [], "")


FRAME = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title} – mammo_nb</title>
<link rel="stylesheet" href="{up}site.css"></head><body data-up="{up}">
<nav aria-label="Pages"><a class="home" href="{up}index.html">mammo_nb</a>
<input type="search" placeholder="Search headings and names" aria-label="Search headings and names"><ul id="found"></ul>
{menu}</nav><main><h1>{title}</h1><p class="about">{about}</p>{body}</main>
<script src="{up}search.js"></script></body></html>
"""
STYLE = """:root{color-scheme:light dark;--page:#fff;--ink:#1b1f24;--soft:#59636e;--line:#d8dee4;--tint:#f6f8fa;--accent:#0b5cad}
@media(prefers-color-scheme:dark){:root{--page:#15191e;--ink:#e6eaee;--soft:#a2abb5;--line:#363e47;--tint:#1e242b;
--accent:#7ab8f5}main img{background:#fff}}
*{box-sizing:border-box}body{margin:0;display:grid;grid-template-columns:18rem minmax(0,1fr);background:var(--page);
color:var(--ink);font:16px/1.6 system-ui,sans-serif}nav{position:sticky;top:0;height:100vh;overflow:auto;padding:1rem;
background:var(--tint);border-right:1px solid var(--line);font-size:.86rem}nav a{color:inherit;text-decoration:none;display:block;
padding:.08rem 0}nav a:hover,nav a[aria-current]{color:var(--accent)}.home{font-weight:700;font-size:1.05rem}
nav summary{font-weight:600;margin-top:.6rem;cursor:pointer}nav ul{list-style:none;padding:0;margin:.2rem 0}
nav input{width:100%;font:inherit;padding:.3rem .5rem;border:1px solid var(--line);border-radius:6px;margin:.6rem 0 0;
background:var(--page);color:var(--ink)}#found small{color:var(--soft);display:block}
main{padding:1.5rem 2rem 5rem;max-width:62rem}h1{margin:.2rem 0}.about{color:var(--soft);font-size:1.08rem;margin-top:0}
h2{border-top:1px solid var(--line);padding-top:1rem;margin-top:2.4rem}h2 small{font-weight:400;font-size:.8rem}
.here{opacity:0;font-weight:400}h2:hover .here,h3:hover .here,.here:focus{opacity:1}a{color:var(--accent)}
pre{font:.84rem/1.45 ui-monospace,Menlo,Consolas,monospace;overflow-x:auto;margin:.4rem 0}
code{font:.88em ui-monospace,Menlo,Consolas,monospace}.highlight{background:var(--tint);border:1px solid var(--line);
border-radius:6px;padding:.2rem .8rem;overflow-x:auto}.out{border-left:3px solid var(--line);
padding-left:.8rem;margin:.3rem 0;overflow-x:auto}img{max-width:100%;height:auto}
table{border-collapse:collapse;font-size:.84rem}th,td{border-bottom:1px solid var(--line);padding:.25rem .6rem;text-align:left}
@media(max-width:800px){body{display:block}nav{position:static;height:auto;max-height:45vh}main{padding:1rem}}
@media print{nav,.here{display:none}body{display:block}.highlight,pre{white-space:pre-wrap}}
"""
SEARCH = """
const field = document.querySelector('nav input'), list = document.getElementById('found'), up = document.body.dataset.up;
field.addEventListener('input', () => {
  const words = field.value.toLowerCase().split(/\\s+/).filter(Boolean);
  const hits = words.length ? heads.filter(h => words.every(w => (h[0] + ' ' + h[1]).toLowerCase().includes(w))) : [];
  list.replaceChildren(...hits.slice(0, 40).map(h => {
    const row = document.createElement('li'), link = document.createElement('a'), where = document.createElement('small');
    link.href = up + h[2];
    link.textContent = h[0];
    where.textContent = h[1];
    link.append(where);
    row.append(link);
    return row;
  }));
});
"""


def menu(books:list, at:Book) -> str:
    "The list of pages, by shelf."
    up, shelves = "../"*at.page.count("/"), {}
    for book in books: shelves.setdefault(book.shelf, []).append(book)
    def link(book):
        now = ' aria-current="page"' if book is at else ""
        return f'<li><a href="{up}{book.page}"{now}>{html.escape(book.title)}</a></li>'
    return "".join(f"<details{' open' if at in held else ''}><summary>{name}</summary><ul>{''.join(map(link, held))}</ul></details>"
                   for name, held in shelves.items())


def build(out:Path, paths:list=None) -> list: # Pages written
    "The whole site, or that of these notebooks."
    paths = paths or [*sorted((ROOT/"nbs").glob("*.ipynb")), *sorted((ROOT/"nbs"/"lib").glob("*.ipynb")),
                      *sorted((ROOT/"nbs"/"papers").glob("*.ipynb"))]
    books = [read_book(p) for p in paths]
    books.sort(key=lambda b: b.path.stem != "index")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    pages = [*books, reference(books), reports(books, out)]
    for book in pages:
        target = out/book.page
        target.parent.mkdir(parents=True, exist_ok=True)
        up = "../"*book.page.count("/")
        target.write_text(FRAME.format(title=html.escape(book.title), about=html.escape(book.about), body=book.body, up=up,
                                       menu=menu(pages, book)), encoding="utf-8")
    heads = [(b.title, b.about, b.page) for b in pages] + [(t, b.title, f"{b.page}#{key}") for b in pages for key, t in b.heads]
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    (out/"site.css").write_text(f"{light}\n@media(prefers-color-scheme:dark){{{dark}}}\n{STYLE}", encoding="utf-8")
    (out/"search.js").write_text(f"const heads = {json.dumps(heads, ensure_ascii=False)};{SEARCH}", encoding="utf-8")
    return [out/b.page for b in pages]


if __name__ == "__main__":
    made = build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT/"_site").resolve())
    print(f"{len(made)} pages; open {made[0]}")
