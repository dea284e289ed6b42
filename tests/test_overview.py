"The page of all five papers and every committed page: what a reader in a hospital network relies on."
import html, json, re, shutil, subprocess, sys
from pathlib import Path

import pandas as pd, pytest

from mammo_nb.core import write_csv, write_json, write_text
from mammo_nb.report.claims import Evidence, claims, verdict_table
from mammo_nb.report.html import SCRIPT
from mammo_nb.report.overview import RUN_COLUMNS, build_page, collect, find_runs, groups, is_real, main, missing
from mammo_nb.report.tables import RESULT_COLUMNS, papers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"docs"))
import evidence      # noqa: E402 - docs/evidence.py
PAGES = sorted(ROOT.glob("reports/*.html")) + sorted(p for d in ROOT.glob("reports/*") if d.name not in ("demo","paper","local") for p in d.rglob("*.html"))

def run(root, paper="04_sharing", *, seed=0, data="phantom", preset="demo", protocol="paper", gain=.1, claim="04.headline", status="done", **knobs):
    "A run folder as a paper's notebook leaves it, with one claim tested."
    d = root/preset/paper/f"{data}-{protocol}-seed{seed}"
    write_json(d/"run.json", dict(paper=paper, data=data, status=status, seconds=10., device="cpu (1 threads)", commit="0"*40, finished=f"2026-11-21T00:00:0{seed}",
        stages={"s":dict(seconds=20., folder="x", reused=False)}, parameters=dict(seed=seed, preset=preset, protocol=protocol, data_dir="", run_dir="", device="auto", only="", **knobs)))
    if status == "done":
        row = dict(zip(RESULT_COLUMNS, [paper,d.name,seed,data,preset,protocol,"lesions","swin","none","50","f1","healthy",.5,.4,.6,20,9,"test"]))
        write_csv(d/"results.csv", pd.DataFrame([row]))
        write_csv(d/"tables"/"claims.csv", verdict_table(claims(paper), {claim:Evidence(gain, gain-.05, gain+.05, .01, how="bootstrap of 9 patients", used=1, of=1)}, data=data, preset=preset, protocol=protocol))
    return d

def test_what_differs_never_meets_in_one_mean(tmp_path):
    for s in (0,1): run(tmp_path, seed=s)
    run(tmp_path, seed=2, data="cbis"); run(tmp_path, seed=3, preset="paper"); run(tmp_path, seed=4, protocol="clean"); run(tmp_path, seed=5, clf_epochs=4); run(tmp_path, seed=6, status="interrupted")
    found = collect([tmp_path], tmp_path); got = groups(found)
    assert sorted((g["data"],g["preset"],g["protocol"],g["knobs"],sorted(g["runs"].seed)) for g in got) == [
        ("cbis","demo","paper","",[2]), ("phantom","demo","clean","",[4]), ("phantom","demo","paper","",[0,1]), ("phantom","demo","paper","clf_epochs=4",[5]), ("phantom","paper","paper","",[3])]
    assert got[0]["data"] == "cbis" and len(found["runs"]) == 7
    assert "1, 2" not in set(missing(found).query("paper=='04_sharing' and preset=='demo' and protocol=='paper'").seeds)

def test_every_claim_is_on_the_page_and_every_kind_of_data_is_marked(tmp_path):
    run(tmp_path); run(tmp_path, data="cbis", seed=1); build_page([tmp_path], tmp_path/"index.html")
    page = (tmp_path/"index.html").read_text(); text = " ".join(html.unescape(page).split())
    for c in claims(): assert c.text in text, c.id
    heads = [h for h in re.findall(r"<h2>([^<]*)</h2>", page) if h[:1] == "0"]
    assert len(heads) == len(papers()) + 1 and all("REAL DATA" in h or "PHANTOM DATA" in h or "not run" in h for h in heads)
    assert "EACH MARKED" in page and "REAL DATA: CBIS" in page
    for p in papers(): assert f"nbs/{p}.ipynb" in page, "the command for what is missing"

def test_collected_tables_hold_no_place_of_this_machine(tmp_path):
    (run(tmp_path)/"report.html").write_text("a page"); build_page([tmp_path], tmp_path/"index.html")
    for f in (tmp_path/"collected").glob("*.csv"): assert str(tmp_path) not in f.read_text()
    runs = pd.read_csv(tmp_path/"collected"/"runs.csv"); assert list(runs) == RUN_COLUMNS and runs.link[0].startswith("demo/04_sharing/")
    build_page([tmp_path], tmp_path/"elsewhere"/"index.html")
    assert ".." not in (tmp_path/"elsewhere"/"collected"/"runs.csv").read_text() and 'href=".' not in (tmp_path/"elsewhere"/"index.html").read_text()

def test_a_newer_run_of_the_same_name_wins(tmp_path):
    run(tmp_path/"a", gain=.1); new = run(tmp_path/"b", gain=.3)
    i = json.loads((new/"run.json").read_text()); write_json(new/"run.json", i | dict(finished="2027"))
    runs, where = find_runs([tmp_path], tmp_path); assert len(runs) == 1 and list(where.values()) == [new]
    assert build_page([tmp_path], tmp_path/"index.html")["verdicts"].query("id=='04.headline'").ours.tolist() == [.3]

def test_a_seed_counts_once(tmp_path):
    run(tmp_path/"a", seed=1, gain=.1); run(tmp_path/"a", seed=2, gain=.1)
    again = run(tmp_path/"b", seed=1, gain=.4); again.rename(again.parent/"another-name"); again = again.parent/"another-name"
    i = json.loads((again/"run.json").read_text()); write_json(again/"run.json", i | dict(finished="2027"))
    v = build_page([tmp_path], tmp_path/"index.html")["verdicts"].query("id=='04.headline'").iloc[0]
    assert (v.seeds, round(v.ours, 6)) == (2, .25)

def test_two_users_of_one_folder_name_never_meet_in_one_mean(tmp_path):
    for user, seed, gain in (("a", 0, .1), ("b", 0, .3), ("b", 1, .3)):
        folder = run(tmp_path/user, seed=seed, data="cbis", gain=gain); info = json.loads((folder/"run.json").read_text())
        write_json(folder/"run.json", info | dict(data_files=user*8))
    found = collect([tmp_path], tmp_path); groups_of = groups(found)
    assert sorted(g["data"] for g in groups_of) == ["cbis (aaaaaaaa)", "cbis (bbbbbbbb)"] and len(found["runs"]) == 3
    assert {g["data"][6]: len(g["runs"]) for g in groups_of} == dict(a=1, b=2)
    assert sorted(found["results"].run.unique()) == sorted(found["runs"].run)
    build_page([tmp_path/"a"], tmp_path/"index.html"); shutil.rmtree(tmp_path/"a"); found = collect([tmp_path], tmp_path)   # one of them is only kept
    assert sorted(found["runs"].data) == ["cbis (aaaaaaaa)", "cbis (bbbbbbbb)", "cbis (bbbbbbbb)"] and len(groups(found)) == 2
    build_page([tmp_path], tmp_path/"index.html"); assert sorted(collect([tmp_path], tmp_path)["runs"].run) == sorted(found["runs"].run)

def test_a_damaged_run_costs_no_other(tmp_path):
    run(tmp_path); bad = run(tmp_path, seed=1); (bad/"run.json").write_text('{"paper": "04_sha')
    with pytest.warns(UserWarning, match="left out"): runs, _ = find_runs([tmp_path], tmp_path)
    assert list(runs.seed) == [0]

def test_command_line_refuses_a_missing_folder(tmp_path, capsys):
    assert main([str(tmp_path/"nowhere"), "--out", str(tmp_path/"i.html")]) == 1 and "no such folder" in capsys.readouterr().err
    assert not (tmp_path/"i.html").exists()

def test_words_for_data(): assert [is_real(d) for d in ("phantom","phantoms","cbis","data")] == [False, False, True, True]

# ---- pages that are committed

def test_evidence_keeps_the_small_tables_a_page_links_to(tmp_path):
    "A link to a kept table leads to it; the link to a large table, or to one that names a folder of this machine, goes with it; what was kept before goes."
    run, place = tmp_path/"run", tmp_path/"place"
    for name, text in dict(small="a,b\n1,2\n", large="a\n" + "1\n"*evidence.LARGEST_TABLE, private="a\n/ho" + "me/x/y\n").items(): write_text(run/"tables"/f"{name}.csv", text)
    write_text(place/"tables"/"old.csv", "a\n")
    links = "".join(f'<p> <a class="csv" href="tables/{name}.csv">CSV</a></p>' for name in ("small", "large", "private", "gone"))
    page = evidence.tables_kept(links, run, place, "tables")
    assert [f.name for f in (place/"tables").iterdir()] == ["small.csv"] and page.count("<a ") == 1 and 'href="tables/small.csv"' in page
    assert 'href="demo_tables/small.csv"' in evidence.tables_kept(links, run, place, "demo_tables")

def test_evidence_of_a_demo_leaves_a_page_of_real_data(tmp_path):
    "In a fresh clone the demo of paper 03 was once written over the page of its real runs."
    places = {p: evidence.page_of(ROOT/"reports"/p) for p in evidence.PAPERS}
    assert {p: page.name for p, (page, _) in places.items()} == {p: "demo.html" if p.startswith("03") else "report.html" for p in evidence.PAPERS}
    assert {folder for page, folder in places.values() if page.name == "demo.html"} == {"demo_tables"} and evidence.page_of(tmp_path) == (tmp_path/"report.html", "tables")

@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT/"reports")))
def test_committed_page_is_whole_small_and_asks_the_network_for_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size <= 10_000_000
    asked = re.sub(r'<a href="https://(?:doi\.org|arxiv\.org)/[^"]*" rel="noopener noreferrer">', "", text)   # a link to a paper asks nobody until it is clicked
    assert not re.search(r"""(?:src|href|action|data)\s*=\s*["']?\s*(?:https?:)?//""", asked) and "url(http" not in text and "@import" not in text
    if "<script" in text: assert text.count("<script") == 1 and f"<script>{SCRIPT}</script>" in text and "Content-Security-Policy" in text
    images = re.findall(r"<img [^>]*>", text); assert all(re.search(r'alt="[^"]{10,}"', i) for i in images)
    assert 'name="viewport"' in text and "@media print" in text and 'class="banner' in text
    for link in re.findall(r'href="([^"#][^"]*)"', asked): assert (page.parent/link).exists(), link

@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT/"reports")))
def test_committed_page_in_a_browser(page, tmp_path):
    "No console error, nothing wider than a phone, by a real browser."
    chrome = shutil.which("chromium") or shutil.which("google-chrome")
    if not chrome: pytest.skip("no chromium on this machine")
    shot = tmp_path/"s.png"
    out = subprocess.run([chrome, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
                          "--hide-scrollbars", f"--user-data-dir={tmp_path/'u'}", f"--screenshot={shot}", "--window-size=500,1200", page.as_uri()], capture_output=True, text=True, timeout=120)
    from PIL import Image
    assert shot.exists(), out.stderr[-500:]
    x = Image.open(shot).convert("L"); assert x.size == (500, 1200) and x.getextrema()[0] < 100
