"Published numbers, gathered runs, claims and the HTML report: contracts that no single notebook can hold."
import base64, hashlib, html as htmllib, importlib, re, shutil, subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np, pandas as pd, pytest

from mammo_nb.core import DataError, ParameterError, RunError, rng, write_csv
from mammo_nb.metrics.answers import Answers
from mammo_nb.report.claims import CELL, Evidence, as_answers, claim, claims, contrasts, evidence, judge, published_value, verdict_table, why
from mammo_nb.report.figures import patch_grid, save_figure, sheet
from mammo_nb.report.html import Picture, Section, Table, banner_for, beside_html, render_report, write_report
from mammo_nb.report.tables import (COVERED, KEYS, PUBLISHED, RESULT_COLUMNS, beside, beside_table, coverage, gather, paper_record, papers, prevalence_check, published,
                                    published_table, read_results, summarise, to_markdown)

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ROOT.parent/"shared"/"papers"
read = lambda paper: (TEXTS/f"{paper}.txt").read_text()
needs_texts = pytest.mark.skipif(not TEXTS.is_dir(), reason="needs ../shared/papers")

# ---- published numbers

@needs_texts
def test_sharing_tables_equal_the_text_of_the_paper():
    "All 224 cells, in the order they are printed."
    printed = re.findall(r"(\d\.\d{3})\((\.\d{3})\)", read("04_sharing")); rows = []
    for t in ("table1","table2"):
        of_the_paper = set(published("04_sharing", t).arm)                # our control arms have labels too, and no published number
        df = published("04_sharing", t).set_index(["model","arm","regime","metric"])
        for model in ("cnn","swin"):
            for arm in [name for name in paper_record("04_sharing")["labels"]["arm"] if name in of_the_paper]:
                rows += [(f"{df.value[model,arm,r,m]:.3f}", f"{df.sd[model,arm,r,m]:.3f}"[1:]) for r in ("100","50") for m in ("accuracy","f1","auroc","auprc")]
    assert rows == printed and len(rows) == 224

@needs_texts
def test_size_study_table_equals_the_text():
    text = read("02_dcgan_size"); text = text[text.index("Table 3: Area"):][:900]
    printed = [float(v) for line in text.splitlines() for v in line.split("\t")[1:] if re.fullmatch(r"0\.\d+", v)]
    assert published("02_dcgan_size", "table3").value.tolist() == printed

@needs_texts
def test_annotation_shift_tables_equal_the_text():
    text = read("00_annotation_shift"); pm = r"(0\.\d{3}) (?:\\pm|±) (0\.\d{3})"
    one = text[text.index("Experiment\t\tOverall accuracy (Mean \\pm SD)\tROC-AUC per class"):text.index("Table 1. Mean classification")]
    t = published("00_annotation_shift", "table1"); order = [(a,m,p) for a in ("G1:G2:G3","G1","G2","G3") for m,p in (("accuracy",""),("auroc","Healthy"),("auroc","Malignant"),("auroc","Benign"))]
    at = t.set_index(["arm","metric","positive"]); assert [(f"{at.value[k]:.3f}", f"{at.sd[k]:.3f}") for k in order] == re.findall(pm, one)
    two = text[text.index("ROC-AUC: Malignant class (Mean"):text.index("Table 2. Results indicating")]
    t = published("00_annotation_shift", "table2"); assert [(f"{v:.3f}", f"{s:.3f}") for v,s in zip(t.value, t.sd)] == re.findall(pm, two)
    four = text[text.index("ROC-AUC (Mean \\pm SD) of the Malignant class"):text.index("Table 4. ROC-AUC")]
    assert published("00_annotation_shift", "table4").value.tolist() == [float(v) for v in re.findall(r"\t(0\.\d{3})", four)]

@needs_texts
def test_single_run_papers_equal_the_text():
    text = read("03_cgan_augmentation"); text = text[text.index("Train accuracy"):text.index("MODELS COMPARISON")]
    assert published("03_cgan_augmentation", "table1").value.tolist() == [float(v) for v in re.findall(r"\t(0\.\d+)", text)]
    text = read("01_contextual_gan"); text = text[text.index("Training Regime"):text.index("Table 1: Experimental")]
    t = published("01_contextual_gan", "table1"); assert t[t.metric=="auroc"].value.tolist() == [float(v) for v in re.findall(r"\t(0\.8\d\d|0\.79\d)\t", text)]

def test_published_files_and_index_agree():
    assert {p.stem for p in PUBLISHED.glob("*.csv")} == set(papers()) | {"counts", "coverage"}
    for p, rec in papers().items():
        df = published(p); assert set(df.table) == set(rec["tables"]); assert not df.duplicated(["table",*KEYS]).any() and df.value.notna().all()
        share = df[df.metric.isin(["accuracy","f1","auroc","auprc","train_accuracy"]) & ~df.table.isin(["f1_gains","statements"])]; assert share.value.between(0, 1).all()
        for k in rec["tables"]:
            t = published_table(p, k); assert t.size >= len(published(p, k)); assert {"title","where","units","sd"} <= set(published(p, k).attrs)
            assert "|" in to_markdown(t)
        assert all("page" not in t["where"] for t in rec["tables"].values())          # the text at hand has no page numbers; none are made up

def test_counts_and_coverage_are_of_known_papers_and_things():
    for name in ("counts", "coverage"): assert set(pd.read_csv(PUBLISHED/f"{name}.csv").paper) <= set(papers())
    def there(name):
        module, _, thing = name.rpartition(".")
        return hasattr(importlib.import_module(module), thing)
    for p in papers():
        t = coverage(p)
        if not len(t): continue
        assert set(t.status) <= set(COVERED) and not t["item"].duplicated().any() and (t.reason[t.status != "yes"] != "").all()
        named = [w for where in t["where"] for w in where.split("; ") if w.startswith("mammo_nb.")]
        assert not [w for w in named if not there(w)], p                              # a renamed function is noticed
        assert (t["where"][t.status == "yes"] != "").all()                             # and a `yes` says where

def test_published_data_are_part_of_the_package():
    assert 'mammo_nb = ["published/*", "published/example/*", "shipped/*"]' in (ROOT/"pyproject.toml").read_text()

def test_only_the_headline_row_is_at_odds_with_its_table():
    bad = prevalence_check("04_sharing", "table1"); bad = bad[~bad.fits]
    assert bad[["model","arm","regime"]].values.tolist() == [["swin","bcdr_dcgan","50"]] and prevalence_check("04_sharing", "table2").fits.all()

# ---- our runs

def run_of(seed, *, preset="demo", data="phantom", shift=0.):
    t = pd.concat([published("04_sharing", k) for k in ("table1","table2")])
    rows = [t.assign(positive=p, value=t.value - .005*seed + shift) for p in ("healthy","lesion")]
    r = pd.concat(rows).assign(paper="04_sharing", run=f"s{seed}", seed=seed, data=data, preset=preset, protocol="paper", split="test", n=300, n_patients=40)
    return r.assign(lo=r.value-.03, hi=r.value+.03)[RESULT_COLUMNS]

def test_gather_over_seeds_and_layout(tmp_path):
    for s in (1,2,3): write_csv(tmp_path/"demo"/f"seed{s}"/"results.csv", run_of(s))
    write_csv(tmp_path/"paper"/"seed1"/"results.csv", run_of(1, preset="paper")); (tmp_path/"demo"/"seed9").mkdir()
    ours = gather(tmp_path); assert len(ours) == 2*2*224 and set(ours.regime) == {"100","50"}
    demo = ours[ours.preset=="demo"]; assert (demo.seeds==3).all() and demo.sd.to_numpy() == pytest.approx(np.full(448, .005))
    t = beside_table(demo, "04_sharing", "table1"); assert t.shape == (14,16) and t.iloc[0,0] == "0.942(.005)" and t.iloc[0,1].startswith("0.932 [")
    h = beside_html(demo[demo.positive=="healthy"], "04_sharing", "table2"); assert h.count("<tr") == 16
    assert read_results([tmp_path/"demo"/"seed1", tmp_path/"demo"/"seed9"]).attrs["missing"] == [str(tmp_path/"demo"/"seed9")]
    for kwargs in (dict(), ): pd.testing.assert_frame_equal(gather(tmp_path), ours)
    with pytest.raises(RunError, match="no such folder"): gather(tmp_path/"none")

def test_one_seed_twice_is_refused_unless_equal(tmp_path):
    for d in ("a","b"): write_csv(tmp_path/d/"results.csv", run_of(1))
    assert set(gather(tmp_path).seeds) == {1}
    write_csv(tmp_path/"b"/"results.csv", run_of(1, shift=.1))
    with pytest.raises(DataError, match="seed 1 has two values"): gather(tmp_path)

def test_results_of_another_version_are_named(tmp_path):
    write_csv(tmp_path/"results.csv", run_of(1).drop(columns="split"))
    with pytest.raises(RunError, match="lacks split"): gather(tmp_path)

def test_demo_and_paper_never_share_a_table():
    ours = summarise(pd.concat([run_of(1), run_of(1, preset="paper", shift=.1)]))
    with pytest.raises(DataError, match="choose one data set, preset"): beside(ours, "04_sharing", "table1")

# ---- claims

NOT_PRINTED = ("03.classic", "03.together")     # no table of paper 03 has synthetic images without classic augmentation

def test_every_claim_can_be_read_off_its_paper():
    assert "plain" not in set(published("03_cgan_augmentation").regime)
    for c in claims():
        if c.untested or c.id in NOT_PRINTED or not len(published(c.paper)): continue        # 05 is no paper's
        v = published_value(c); assert np.isfinite(v["value"]), c.id
        cells = published(c.paper); cells = cells[~cells.table.isin(["f1_gains","statements","appendix"])].drop_duplicates(CELL)
        used = contrasts(c, cells.reset_index(drop=True))[1]
        assert used or c.published is not None, f"{c.id} names no cell of its paper"
    assert published_value(claim("04.headline"))["value"] == pytest.approx(.146) and published_value(claim("01.decay50"))["value"] == pytest.approx(.017)
    assert published_value(claim("02.best")) == dict(value=pytest.approx(-.0008), holds=14, of=18)        # the thesis contradicts its own table

def test_verdicts_are_mirror_images():
    up, down = claim("04.headline"), claim("04.real"); assert up.margin == down.margin
    for i in range(500):
        g = rng(i, "mirror"); e, w = g.normal(0,.05), abs(g.normal(0,.05))
        verdict = judge(up, e, e-w, e+w); assert verdict.replace("gain", "loss") == judge(down, -e, -e-w, -e+w)
        if verdict.startswith("holds"): assert e-w > 0
        if verdict == "opposite": assert e+w < -up.margin
        if verdict == "no notable gain": assert -up.margin <= e+w < up.margin
        assert isinstance(why(up, Evidence(e, e-w, e+w, se=w/2, used=1, of=1), verdict, 9), str)

def test_not_run_is_not_told_apart_from_nothing(tmp_path):
    t = verdict_table(claims(), {}, data="phantom", preset="demo")
    assert set(t.shown) == {"cannot tell (not run)", "cannot tell (not testable)"} and t.p_holm.isna().all() and len(t) == len(claims())

def test_a_verdict_carries_its_data():
    e = Evidence(.1, .05, .2, .001, used=1, of=1)
    for data, preset in (("phantom","demo"), ("inbreast","paper")):
        row = verdict_table([claim("04.headline")], {"04.headline":e}, data=data, preset=preset).iloc[0]
        assert row.shown == f"holds ({data}, {preset})"

def test_claims_need_whole_strata():
    g = rng(0, "strata"); y = np.arange(120) % 2; who = np.arange(120)//3
    cell = lambda model, arm, regime, scope: dict(scope=scope, model=model, arm=arm, regime=regime, y=y, patients=who, p=1/(1+np.exp(-(2*y-1)-g.normal(size=120))))
    full = [cell(m, a, r, s) for s in ("lesions","masses") for m in ("cnn","swin") for r in ("100","50") for a in ("none","bcdr_wgangp","bcdr_dcgan","optimam_dcgan","both_a","both_b")]
    e = evidence(claim("04.swin"), as_answers(full)); assert (e.used, e.of, e.seeds) == (20,20,1) and e.lo <= e.estimate <= e.hi
    gap = [c for c in full if not (c["model"]=="cnn" and c["arm"]=="none" and c["regime"]=="50")]; assert evidence(claim("04.swin"), as_answers(gap)).used == 10
    two = as_answers(full); both = Answers.join(two.named(protocol="paper"), two.named(protocol="clean"))
    with pytest.raises(ParameterError, match="the same cell twice"): evidence(claim("04.headline"), both)

def test_claim_finds_planted_truth_and_its_interval_is_paired():
    g = rng(0, "planted"); y = (g.random(240) < .5).astype(int); who = np.repeat(np.arange(60), 4); noise = g.normal(size=240)
    cell = lambda arm, gain: dict(scope="lesions", model="swin", arm=arm, regime="50", y=y, p=np.clip(.5 + gain*(y-.5) + .3*noise, 0, 1), patients=who)
    c = claim("04.headline"); good, same = (evidence(c, as_answers([cell("none",.2), cell("bcdr_dcgan",k)])) for k in (.6,.2))
    assert judge(c, good.estimate, good.lo, good.hi) == "holds" and (same.estimate, same.lo, same.hi) == (0,0,0) and same.unsure

# ---- figures and the page

def test_figures_are_the_same_bytes_again(tmp_path):
    def draw(name):
        fig, ax = sheet(size=(2,2)); patch_grid(ax, rng(0,"p").integers(0, 255, (4,8,8)).astype(np.uint8), cols=2, title="synthetic", kind="synthetic")
        return save_figure(fig, tmp_path/name, svg=True).read_bytes(), (tmp_path/name).with_suffix(".svg").read_bytes()
    a, b = draw("a.png"), draw("b.png"); assert a == b and b"2026" not in a[1] and b"Matplotlib" not in a[0]

class Page(HTMLParser):
    "Tags with attributes; raises on a tag closed out of order."
    VOID = {"meta","img","br","hr","link","input"}
    def __init__(self, text): super().__init__(); self.tags, self.open = [], []; self.feed(text); assert not self.open
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID: self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag

def allowed(text):
    "Does the page's content policy allow its own style and script, and nothing else?"
    policy = htmllib.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    parts = [re.search(f"<{tag}>(.*?)</{tag}>", text, re.S)[1] for tag in ("style","script")]
    hashes = ["sha256-" + base64.b64encode(hashlib.sha256(p.encode()).digest()).decode() for p in parts]
    return policy.startswith("default-src 'none';") and re.findall(r"sha256-[\w+/=]+", policy) == hashes and "unsafe" not in policy

@pytest.fixture(scope="module")
def page_parts():
    fig, ax = sheet(size=(3,2)); ax.plot([0,1]); ours = summarise(run_of(1))
    v = verdict_table(claims("04_sharing"), {"04.headline":Evidence(.1,.05,.2,.001,"t over 3 seeds",1,1,1,3)}, data="phantom", preset="demo")
    return [Section("Verdicts", "A **bold** word", verdicts=v), Section("Tables", tables=[Table(beside_html(ours, "04_sharing", "table1"), "Table 1"), Table(published_table("02_dcgan_size","table3"), "Table 3")]),
            Section("Pictures", figures=[Picture(fig, "A line", "n = 2"), Picture(fig, "Masses of patients", real=True)])]

def test_page_is_offline_accessible_and_labelled(tmp_path, page_parts):
    out = write_report(tmp_path/"report.html", title="T", subtitle="S", banner=banner_for("phantom","demo"), sections=page_parts, meta={"commit":"abc","versions":{"torch":"2"}})
    text = out.read_text(); page = Page(text); names = [t for t,_ in page.tags]
    assert not {"link","iframe","object","embed","base","form"} & set(names) and names.count("script") == 1
    assert allowed(text), "the browser would refuse the page's own style or script"
    for tag, a in page.tags:
        for k in ("src","href","srcset","data","poster","action","background"): assert not re.match(r"\s*(\w+:)?//", a.get(k) or ""), (tag, a)
        assert not any(k.startswith("on") for k in a)
    style = text[text.index("<style>"):text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert all(a.get("alt") for t,a in page.tags if t=="img") and names.count("h1") == 1 and names.count("img") == 1
    assert dict(page.tags[0][1])["lang"] == "en" and any(a.get("name")=="viewport" for t,a in page.tags if t=="meta")
    ids = [a["id"] for _,a in page.tags if "id" in a]; assert len(ids) == len(set(ids)) and {a["href"][1:] for t,a in page.tags if t=="a"} <= set(ids)
    assert "PHANTOM DATA – DEMO SIZE" in re.search("<title>(.*?)</title>", text)[1]
    assert text.count('<span class="tag warn">PHANTOM DATA – DEMO SIZE</span>') == 4              # two tables, two pictures
    assert "holds (phantom, demo)" in text and "Masses of patients" in text and out.stat().st_size < 10_000_000
    again = write_report(tmp_path/"again.html", title="T", subtitle="S", banner=banner_for("phantom","demo"), sections=page_parts, meta={"commit":"abc","versions":{"torch":"2"}})
    assert again.read_bytes() == out.read_bytes()

def test_nothing_given_to_a_page_becomes_code():
    bad = '"><script>alert(1)</script><img src=x onerror=alert(1)> {{ 7*7 }} </style>'; fig, ax = sheet(size=(1,1))
    frame = pd.DataFrame({bad:[bad]}, index=[bad]); v = verdict_table([claim("04.real")], {"04.real":Evidence(0.,-.1,.1,.5,bad,1,1)}, data=bad, preset="demo")
    text = render_report(title=bad, subtitle=bad, banner=bad, meta={bad:bad, "d":{bad:bad}},
                         sections=[Section(bad, bad + "\n\n- " + bad + "\n\n[x](javascript:alert(1)) [y](//evil.example/x)", tables=[frame, Table(frame, bad, bad)], figures=[Picture(fig, bad, bad)], verdicts=v)])
    page = Page(text); names = [t for t,_ in page.tags]
    assert names.count("script") == 1 and allowed(text), "no script but the page's own"
    assert names.count("img") == 1 and "49" not in re.sub(r"base64,\S+", "", text[text.index("</style>"):text.index("<script>")])
    assert not any(k.startswith("on") for _,a in page.tags for k in a) and not any("javascript" in (a.get("href") or "") or (a.get("href") or "").startswith("//") for _,a in page.tags)
    assert text.count("</style>") == 1

def test_real_pixels_stay_out_unless_asked(page_parts):
    hidden, shown = (render_report(title="t", banner=banner_for("INbreast","paper"), sections=page_parts, show_real=s) for s in (False, True))
    assert hidden.count("data:image/png") == 1 and shown.count("data:image/png") == 2 and "banner real" in hidden

@pytest.mark.parametrize("data,preset,tone", [("phantom","demo","warn"), ("phantom","paper","warn"), ("INbreast","demo","warn"), ("INbreast","paper","real"), ("real","paper","real")])
def test_banner_tells_phantom_demo_and_real_apart(data, preset, tone):
    text = render_report(title="t", banner=banner_for(data, preset), sections=[]); assert f'class="banner {tone}"' in text
    assert ("PHANTOM" in text) == (data=="phantom") and ("DEMO" in text) == (preset=="demo")

@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_a_phone_in_a_real_browser(tmp_path, page_parts, width):
    "Nothing but the inside of a scrolling table is wider than the window."
    text = render_report(title="A rather long title for a narrow window", subtitle="S", banner=banner_for("phantom","demo"), sections=page_parts, meta={"parameters":{"seed":1}})
    probe = f'<body><iframe id="f" width="{width}" height="900" srcdoc="{htmllib.escape(text)}" onload="document.title=this.contentDocument.documentElement.scrollWidth"></iframe></body>'
    (tmp_path/"probe.html").write_text(f"<!doctype html><meta charset=utf-8>{probe}")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --virtual-time-budget=4000 --dump-dom"
    r = subprocess.run(["chromium", *flags.split(), f"--user-data-dir={tmp_path/'profile'}", f"file://{tmp_path/'probe.html'}"], capture_output=True, text=True, timeout=120)
    assert int(re.search(r"<title>(\d+)</title>", r.stdout)[1]) <= width
