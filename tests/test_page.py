"A paper's page from run folders alone, with sections a sixth paper could bring, and what a browser makes of it."
import html
import re
import shutil
import subprocess
import sys
import types

import pandas as pd
import pytest

from mammo_nb.core import ParameterError, RunError, read_json, write_csv, write_json
from mammo_nb.metrics.answers import Cell, Intervals, said, scores
from mammo_nb.params import Params
from mammo_nb.report import page as pages
from mammo_nb.report.claims import verdicts
from mammo_nb.report.figures import sheet
from mammo_nb.report.html import Section, Table, banner_for, render_report
from mammo_nb.report.overview import main
from mammo_nb.report.page import (LAYOUT, RunFolder, Shown, beside_section, curves_section, data_section, find_folders, gather_main,
                                  generators_section, leaks_section, mean_over, page, part, verdicts_section)
from mammo_nb.report.tables import papers, summarise
from mammo_nb.runs import RESULT_COLUMNS, Run


def run_folder(root, seed=0, paper="04_sharing", status="done", **parameters):
    "A run folder with one table that differs by seed and one that does not."
    d = root/f"phantom-paper-seed{seed}"
    given = dict(preset="demo", protocol="paper", seed=seed, data_dir="") | parameters
    write_json(d/"run.json", dict(layout=LAYOUT, paper=paper, data="phantom", parameters=given, resolved={}, skipped=[], commit="c",
                                  versions={}, device="cpu", mode="exact", started="", status=status, stages={}))
    write_csv(d/"tables"/"leaks.csv", pd.DataFrame(dict(protocol=["paper"], test=[10+seed])))
    write_csv(d/"tables"/"sizes.csv", pd.DataFrame(dict(size=[100,250], k=[8,20])))
    return d

SECTIONS = [part("Leaks", tables=(Shown("leaks"),)), part("Sizes", tables=("sizes",)), verdicts_section()]

def test_one_run_and_several_go_through_the_same_sections(tmp_path):
    runs = [RunFolder(run_folder(tmp_path, s)) for s in (0,1,2)]
    one, many = page(runs[0], SECTIONS), page(runs, SECTIONS)
    heads = [re.findall("<h2>(.*?)</h2>", p.read_text()) for p in (one, many)]
    assert heads[0][:2] == heads[1][:2] == ["Leaks","Sizes"]
    joined = pd.read_csv(many.parent/"tables"/"leaks.csv")
    assert joined.test.tolist() == [11] and joined.runs.tolist() == [3]
    assert (many.parent/"tables"/"sizes.csv").read_text() == (runs[0].path/"tables"/"sizes.csv").read_text(), "what is alike stays as it is"

def test_a_page_needs_nothing_but_what_a_run_writes(tmp_path):
    "A real Run, written by its own functions, moved to another place and read back there."
    given = dict(seed=3, preset="demo", protocol="paper", data_dir="", run_dir=str(tmp_path/"run"), device="cpu", mode="exact", only="", show_real=False)
    run = Run(Params(**given), paper="04_sharing", resolved=dict(protocol=dict(lr=.1), seeds=dict(seed=3)))
    rows = [dict(patch_id=str(i), patient_id=str(i//2)) for i in range(24)]
    y = [i % 2 for i in range(24)]
    told = {Cell("lesions","swin",arm,"50"): said(pd.DataFrame(rows), y, [abs(v-d) for v in y]) for arm,d in (("none",.4),("bcdr_dcgan",.1))}
    answers = run.answers(told)
    run.results(scores(answers, [("f1","healthy"),("auroc","healthy")], Intervals(20)))
    run.table("claims", verdicts("04_sharing", answers, data=run.data, preset="demo", protocol="paper"))
    fig, ax = sheet(size=(2,2)); ax.plot([1,0]); run.figure("losses", fig, alt="Losses that fall", caption="Two epochs.", real=True)
    run.words("data", "Source: <phantoms>."); run.table("leaks", pd.DataFrame(dict(protocol=["paper"], test=[12]))); run.finish()
    moved = (tmp_path/"run").rename(tmp_path/"elsewhere")
    sections = [verdicts_section(), beside_section("table1"), curves_section(), generators_section("losses"), leaks_section(), data_section(probe=None, tables=("leaks",))]
    text = page(moved, sections).read_text()
    assert re.findall("<h2>(.*?)</h2>", text)[:5] == ["What holds","Where the variation comes from","Table 1, ours beside published","Curves","Generators"]
    assert text.count("<img") == 3 and "Source: &lt;phantoms&gt;." in text and str(tmp_path) not in text and "elsewhere" not in text
    assert 'href="tables/leaks.csv"' in text and (moved/"tables"/"leaks.csv").is_file() and "Rerun with seed 3" in text

def test_old_folders_are_refused_and_nothing_is_written(tmp_path, capsys):
    d = run_folder(tmp_path); info = read_json(d/"run.json"); del info["layout"]; write_json(d/"run.json", info)
    with pytest.raises(RunError, match="another version"): page(d, SECTIONS)
    assert main(["--page", str(tmp_path)]) == 1 and gather_main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("another version of this package") == 2 and not list(tmp_path.rglob("*.html"))

def test_a_sixth_paper_needs_only_an_entry(tmp_path, monkeypatch):
    module = types.ModuleType("mammo_nb_sixth_page"); module.SECTIONS = SECTIONS[:2]; monkeypatch.setitem(sys.modules, "mammo_nb_sixth_page", module)
    record = papers()["04_sharing"] | dict(page="mammo_nb_sixth_page"); monkeypatch.setattr(pages, "paper_record", lambda paper: record)
    monkeypatch.setattr(pages, "fixed_rules", lambda paper: "of no published claims")
    for s in (0,1): run_folder(tmp_path, s, paper="05_sixth")
    assert gather_main([str(tmp_path), "--note", "Two seeds."]) == 0
    assert "Two seeds." in (tmp_path/"gathered"/"report.html").read_text() and main(["--page", str(tmp_path)]) == 0
    assert len(list(tmp_path.rglob("report.html"))) == 3
    monkeypatch.setattr(pages, "paper_record", lambda paper: {k:v for k,v in record.items() if k != "page"})
    with pytest.raises(ParameterError, match="has no page"): pages.sections_of("05_sixth")

def test_every_paper_names_its_page(): assert all(rec["page"].startswith("mammo_nb.papers.") for rec in papers().values())

def test_unfinished_runs_and_other_settings_never_join(tmp_path):
    run_folder(tmp_path, 0); run_folder(tmp_path, 1, status="interrupted")
    with pytest.warns(UserWarning, match="left out"): assert [r.seed for r in find_folders([tmp_path])] == [0]
    run_folder(tmp_path, 2, protocol="clean")
    with pytest.warns(UserWarning), pytest.raises(RunError, match="differ in protocol \\(clean, paper\\)"): find_folders([tmp_path])

def test_joined_intervals_are_of_the_runs_and_stay_within_bounds():
    frames = [pd.DataFrame(dict(scope=["a"], auroc=[v], lo=[0.], hi=[1.])) for v in (.9, .99, 1.)]
    t = mean_over(frames).iloc[0]
    assert .7 < t.lo < t.auroc < t.hi == 1.
    gains = [pd.DataFrame(dict(metric=["auroc"], arm=["x"], value=[v], lo=[0.], hi=[1.])) for v in (.01, .02, .03)]
    assert mean_over(gains).lo[0] < 0, "a difference may lie below zero"

def test_shares_end_at_one_and_differences_do_not_end_at_zero():
    row = dict.fromkeys(RESULT_COLUMNS, "") | dict(metric="auroc", arm="gan", n=1, n_patients=1, lo=None, hi=None)
    rows = [row | dict(seed=s, value=v) for s,v in enumerate((.9,.99,1.))] + [row | dict(arm="gan-org", seed=s, value=v) for s,v in enumerate((.01,.02,.03))]
    t = summarise(pd.DataFrame(rows)).set_index("arm")
    assert t.hi["gan"] == 1 and t.lo["gan-org"] < 0

@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("script,name", [("", "3"), ("d.querySelector('th').click()", "1")])
def test_a_browser_runs_the_page_s_own_script_and_no_other(tmp_path, script, name):
    "A click sorts the table; an injected script, an inline handler and a foreign picture do nothing under the page's policy."
    text = render_report(title="t", banner=banner_for("phantom","demo"), sections=[Section("s", tables=[Table(pd.DataFrame(dict(k=[3,1,20])), index=False)])])
    bad = '<script>document.title="hacked"</script><img src="x" onerror="document.title=\'hacked\'">'
    text = text.replace("</main>", bad + "</main>")
    does = f"const d=this.contentDocument; {script}; document.title=d.title+d.querySelector('td').textContent"
    frame = f'<iframe srcdoc="{html.escape(text)}" onload="{html.escape(does)}"></iframe>'
    (tmp_path/"probe.html").write_text(f"<!doctype html><meta charset=utf-8><body>{frame}</body>")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --virtual-time-budget=4000 --dump-dom"
    r = subprocess.run(["chromium", *flags.split(), f"--user-data-dir={tmp_path/'profile'}", f"file://{tmp_path/'probe.html'}"], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", r.stdout)[1]
    assert "hacked" not in title and title.endswith(name), title
