"Readers against look-alike trees of phantoms: what was written is what is read, faults are listed, and nothing depends on the file system."
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mammo_nb.core import DataError, hash_of, repo_root
from mammo_nb.data import lookalike, lookalike2, phantom
from mammo_nb.data.trees import LAYOUTS
from mammo_nb.data.bcdr import read_bcdr
from mammo_nb.data.cbis import read_cbis, read_cbis_tables
from mammo_nb.data.folder import read_folder
from mammo_nb.data.inbreast import read_inbreast
from mammo_nb.data.mias import read_mias
from mammo_nb.data.omidb import read_omidb
from mammo_nb.data.pixels import area_resize, breast_mask, breast_side, pectoral_cut, read_image
from mammo_nb.data.readers import READERS, find_datasets, read_any
from mammo_nb.data.table import box_iou

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SHARED = repo_root().parent/"shared"/"data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
SCALE = .08
BOX = ["x0","y0","x1","y1"]


@pytest.fixture(scope="session")
def patients():
    "Phantom patients of each centre, small; centre b has film and digital ones."
    return {c: list(phantom.phantom_patients(16 if c=="b" else 10, style=c, seed=3, scale=SCALE)) for c in "abc"}


@pytest.fixture(scope="session")
def trees(patients, tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    pairs = dict(inbreast="a", bcdr="b", folder="c")
    return {(l,q): LAYOUTS[l](patients[c], root/f"{l}{q}", seed=0, quirks=q) for l,c in pairs.items() for q in (False,True)}


def truth(patients):
    "The phantom's lesions by (patient number, side, view)."
    return {(i,v.side,v.view): v.lesions for i,(_,views) in enumerate(patients) for v in views}


def check_round_trip(data, patients, order):
    "Every phantom lesion is in the table with its box, and nothing else is."
    want = truth(patients)
    index = {p:i for i,p in enumerate(order)}
    got = {}
    for r in data.lesions.itertuples(): got.setdefault((index[r.patient_id],r.laterality,r.view), []).append(r)
    for key,lesions in want.items():
        boxes = [(l["type"], tuple(int(v) for v in l["box"])) for l in lesions]
        rows = [(r.lesion_type, (r.x0,r.y0,r.x1,r.y1)) for r in got.get(key,[])]
        assert len(rows)==len(boxes), (key, rows, boxes)
        for kind,b in boxes: assert any(k==kind and max(abs(np.subtract(b,r)))<=1.5 for k,r in rows), (key, b, rows)
    assert sum(map(len,want.values()))==len(data.lesions)
    views = {(index[r.patient_id],r.laterality,r.view): r for r in data.images.itertuples()}
    assert set(views)==set(want)
    assert all(views[k].has_lesion==bool(l) for k,l in want.items())


def test_inbreast_round_trip(trees, patients):
    data = read_inbreast(trees["inbreast",False])
    order = [f"inbreast:{hash_of('inbreast',0,i)}" for i in range(10)]
    check_round_trip(data, patients["a"], order)
    views = [v for _,vs in patients["a"] for v in vs]
    assert data.images.density.tolist()==[float(v.density) for v in views]
    assert (data.images.spacing_mm-views[0].spacing_mm).abs().max()<1e-6
    malignant = {r.image_id: r.label for r in data.lesions.itertuples()}
    assert set(malignant.values())<={"benign","malignant"}
    x = read_image(data.images.path[0]); v = views[0]
    assert x.shape==v.pixels.shape and np.corrcoef(x.ravel().astype(float), v.pixels.ravel())[0,1]>.999


def test_bcdr_round_trip(trees, patients):
    data = read_bcdr(trees["bcdr",False])
    check_round_trip(data, patients["b"], [f"bcdr:{9001+i}" for i in range(16)])
    film = {f"bcdr:{9001+i}" for i,(_,vs) in enumerate(patients["b"]) if vs[0].device=="film"}
    assert set(data.images.patient_id[data.images.device=="film"])==film
    want = {l["label"] for _,vs in patients["b"] for v in vs for l in v.lesions}
    assert set(data.lesions.label)==want


def test_folder_round_trip(trees, patients):
    data = read_folder(trees["folder",False])
    check_round_trip(data, patients["c"], [f"{data.name}:p{i:04d}" for i in range(10)])
    labels = sorted(l["label"] for _,vs in patients["c"] for v in vs for l in v.lesions)
    assert sorted(data.lesions.label)==labels


@pytest.mark.parametrize("layout", ["inbreast","bcdr","folder"])
def test_faults_are_listed_and_harm_nothing(trees, layout):
    "A tree with every known fault holds the lesions of the clean tree; each fault leaves a line; strict stops."
    clean, faulty = (next(iter(read_any(trees[layout,q]).values())) for q in (False,True))
    assert len(clean.skipped[clean.skipped.kind=="skipped"])==0
    assert len(faulty.skipped)>=3
    key = lambda d: {(r.image_id.split(":",1)[1], r.lesion_type, r.x0, r.y0, r.x1, r.y1) for r in d.lesions.itertuples()}
    lost = key(clean)-key(faulty)
    if layout=="bcdr":                                               # a lesion with two classes is left out, a lost flag changes a type
        assert len(lost)<=6 and faulty.skipped.reason.str.contains("not on disk").any()
    else: assert not lost
    with pytest.raises(DataError, match="strict=True"): read_any(trees[layout,True], strict=True)


def test_bcdr_conflicting_classes_are_dropped(tmp_path, patients):
    "The same film in F01 and F03 with opposite classes: no lesion, and the image is no source of healthy patches."
    p, views = next((p,vs) for p,vs in patients["c"] if sum(bool(v.lesions) for v in vs)==2)
    lookalike.write_bcdr([(p,views)], tmp_path, subset="F01"); lookalike.write_bcdr([(p,views)], tmp_path, subset="F03")
    n = len(read_bcdr(tmp_path).lesions)
    f = lookalike.bcdr_folder(tmp_path,"F03")/"bcdr_f03_outlines.csv"
    swap = {" Malign":" Benign"," Benign":" Malign"}
    df = pd.read_csv(f, dtype=str, keep_default_na=False); df["classification"] = df.classification.map(lambda c: swap[c]); df.to_csv(f, index=False)
    data = read_bcdr(tmp_path)
    assert n==sum(len(v.lesions) for v in views) and len(data.lesions)==0
    assert data.images.has_lesion.sum()==2 and not data.images.normal[data.images.has_lesion].any()
    assert data.images.patient_id.nunique()==1


def test_same_table_from_a_copy(trees, tmp_path):
    "Copied in another order under another name: the same rows, apart from the paths."
    src = trees["inbreast",True]
    for p in sorted(src.rglob("*"), reverse=True):
        if p.is_file(): (tmp_path/"deep"/p.relative_to(src).parent).mkdir(parents=True, exist_ok=True); shutil.copy(p, tmp_path/"deep"/p.relative_to(src))
    a, b = read_inbreast(src), read_inbreast(tmp_path)
    pd.testing.assert_frame_equal(a.images.drop(columns="path"), b.images.drop(columns="path"))
    pd.testing.assert_frame_equal(a.lesions.drop(columns="path"), b.lesions.drop(columns="path"))


def test_find_and_read_several(trees, tmp_path):
    for l in ("inbreast","bcdr","folder"): os.symlink(trees[l,False], tmp_path/l)
    assert set(find_datasets(tmp_path))=={"inbreast","bcdr","folder"}
    assert find_datasets(tmp_path)["folder"]==tmp_path/"folder"
    assert set(read_any(tmp_path, ["bcdr"]))=={"bcdr"}


# ---------------------------------------------------------------- CBIS-DDSM, OMI-DB, mini-MIAS
@pytest.mark.parametrize("form", ["classic","descriptive","jpeg"])
def test_cbis_round_trip(tmp_path, patients, form):
    "Boxes come back from the masks in every folder form, classes from the tables, with all faults on."
    data = read_cbis(lookalike2.write_cbis(patients["a"], tmp_path, form=form, quirks=True))
    want = truth(patients["a"])
    assert len(data.lesions)==sum(map(len,want.values()))==len(data.patches)
    for r in data.lesions.itertuples():
        i = int(r.patient_id[-5:])-90001
        near = max((box_iou((r.x0,r.y0,r.x1,r.y1), l["box"]), l["label"]==r.label) for l in want[i,r.laterality,r.view])
        assert near[0]>.7 and near[1], (r, near)
    assert data.images.has_lesion.all() and not data.images.normal.any()
    for x in (read_image(p) for p in data.patches.path[:3]): assert min(x.shape)>3


def test_cbis_masses_only_and_all_parts(tmp_path, patients):
    root = lookalike2.write_cbis(patients["a"], tmp_path)
    mass = read_cbis(root, kinds=("mass",))
    assert set(mass.lesions.lesion_type) <= {"mass","distortion","asymmetry"} and len(mass.lesions)<len(read_cbis(root).lesions)
    f = Path(mass.lesions.mask_path[0]); import pydicom
    ds = pydicom.dcmread(f); x = ds.pixel_array.copy(); x[:15,-15:] = 255; ds.PixelData = x.tobytes(); ds.save_as(f)
    assert len(read_cbis(root, kinds=("mass",), parts="all").lesions)==len(mass.lesions)+1      # the planted second part
    assert len(read_cbis(root, kinds=("mass",)).lesions)==len(mass.lesions)


def test_omidb_round_trip(tmp_path, patients):
    data = read_omidb(lookalike2.write_omidb(patients["c"], tmp_path))
    order = {p: int(p[-5:])-90000 for p in data.images.patient_id}
    want = truth(patients["c"])
    assert len(data.lesions)==sum(map(len,want.values()))
    for r in data.lesions.itertuples():
        l = want[order[r.patient_id],r.laterality,r.view][int(r.lesion_id)-1]
        assert (r.x0,r.y0,r.x1,r.y1)==tuple(l["box"]) and r.lesion_type==l["type"]
    malignant = {p for p,i in order.items() if any(l["label"]=="malignant" for k,ls in want.items() if k[0]==i for l in ls)}
    assert set(data.lesions.patient_id[data.lesions.label=="malignant"])==malignant
    assert set(data.images.patient_id[data.images.normal])=={p for p,i in order.items() if not any(ls for k,ls in want.items() if k[0]==i)}


def test_omidb_agrees_with_the_omidb_package(tmp_path, patients):
    "The public package reads the same tree and finds the same marks."
    omidb = pytest.importorskip("omidb", reason="omidb (optional reference) is not installed")
    root = lookalike2.write_omidb(patients["c"][:4], tmp_path)
    ours = read_omidb(root)
    boxes = set()
    for client in omidb.DB(root/"data", root/"images"):
        for ep in client.episodes:
            for study in ep.studies or []:
                for series in study.series:
                    for im in series.images: boxes |= {(im.id, m.boundingBox.x1, m.boundingBox.y1, m.boundingBox.x2, m.boundingBox.y2) for m in im.marks}
    assert boxes=={(r.image_id[6:], r.x0, r.y0, r.x1, r.y1) for r in ours.lesions.itertuples()}


def test_mias_round_trip(tmp_path, patients):
    data = read_mias(lookalike2.write_mias(patients["b"], tmp_path))
    want = {(i,s): ls for (i,s,v),ls in truth(patients["b"]).items() if v=="MLO"}
    assert len(data.images)==len(want) and len(data.lesions)==sum(map(len,want.values()))
    for r in data.images.itertuples(): assert r.has_lesion==bool(want[int(r.patient_id[-3:])-1, r.laterality])
    for r in data.lesions.itertuples():                               # the circle lies on the lesion: bottom-left origin turned over
        h = patients["b"][int(r.patient_id[-3:])-1][1][0].pixels.shape
        cy = (r.y0+r.y1)/2*h[0]/1024
        assert any(abs(cy-(l["box"][1]+l["box"][3])/2)<3 for l in want[int(r.patient_id[-3:])-1, r.laterality])


@shared
@pytest.mark.data
def test_real_cbis_tables():
    "Rows, patients, images and pathology of the real tables; every path parses [data_formats 5.1, 5.5]."
    t = read_cbis_tables(SHARED/"cbis_csv")
    assert len(t)==3568 and t.patient_id.nunique()==1566 and t.full.nunique()==3103
    path = t.groupby(["kind","split"]).pathology.value_counts().unstack()[["BENIGN","BENIGN_WITHOUT_CALLBACK","MALIGNANT"]]
    assert path.values.tolist()==[[130,67,129],[528,474,544],[194,37,147],[577,104,637]]
    several = t.groupby(["kind","split","full"])["abnormality id"].nunique()
    assert (several>1).groupby(level=[0,1]).sum().tolist()==[37,185,13,58]
    assert int((t.groupby("full").pathology.nunique()>1).sum())==19
    views = t.groupby(["patient_id","left or right breast","image view"]).kind.nunique()
    assert int((views>1).sum())==71
    assert not find_datasets(SHARED/"cbis_csv")                        # tables without pictures are no data set


def test_doctor_exit_codes(trees, tmp_path, capsys):
    from mammo_nb.data.doctor import main
    for l in ("inbreast","bcdr","folder"): assert main([str(trees[l,True]), "--check", "2"])==0
    out = capsys.readouterr().out
    assert "published    410   <- differs" in out and "outline saved twice" in out and "papermill nbs/04" in out
    assert main([str(tmp_path)])==1


# ---------------------------------------------------------------- normal only where somebody says so
def own_folder(root, images, lesions=None, shape=(120,90)):
    "A plain folder: text of images.csv and lesions.csv, and a picture for each name ending in .png."
    root.mkdir(parents=True, exist_ok=True)
    (root/"images.csv").write_text(images)
    if lesions is not None: (root/"lesions.csv").write_text(lesions)
    for k,name in enumerate(sorted(set(re.findall(r"[\w-]+\.png", images)))):
        Image.fromarray(np.random.default_rng(k).integers(60, 120, shape).astype(np.uint8)).save(root/name)
    return root


@pytest.mark.parametrize("row", ["7", "a12", "A12.png", "A12 b", "", "A13"])
def test_a_lesion_row_without_its_image_leaves_nothing_normal(tmp_path, row):
    "A spreadsheet, another case, a blank: the row finds no image, so a missing row proves nothing; what is said aloud stays."
    root = own_folder(tmp_path/"f", "image_id,patient_id,path,normal\n007,1,a.png,\nA12,2,b.png,\nz,3,c.png,1\n", f"image_id,x0,y0,x1,y1\n{row},10,10,40,40\n")
    data = read_folder(root)
    assert data.images.normal.tolist()==[False,False,True] and not data.images.has_lesion.any()
    left = data.skipped[data.skipped.kind=="unknown"]
    assert left["count"].sum()==2 and data.summary()["health_unknown"]==2


@pytest.mark.parametrize("words,normal", [("1",True),("Yes",True),("ja",True),("abnormal",False),("nein",False),("no finding",False),("0",False),("unknown",False),("maybe",False),("cancer",False)])
def test_the_word_in_the_column_normal(tmp_path, words, normal):
    data = read_folder(own_folder(tmp_path/"f", f"image_id,patient_id,path,Normal\na,1,a.png,{words}\nb,2,b.png,1\n", "image_id,x0,y0,x1,y1\nb,1,1,9,9\n"))
    assert data.images.normal.tolist()==[normal,False] and data.images.has_lesion.tolist()==[False,True]
    assert bool((data.skipped.kind=="unknown").any())==(not normal)


@pytest.mark.parametrize("column,value", [("label","malignant"),("Pathology","carcinoma"),("birads","4"),("birads","BI-RADS 5"),("birads","0"),("diagnosis","see report"),("cancer","1")])
def test_another_column_speaks_against_it(tmp_path, column, value):
    text = f"image_id,patient_id,path,{column}\na,1,a.png,{value}\nb,2,b.png,\nc,3,c.png,\n"
    data = read_folder(own_folder(tmp_path/"f", text, "image_id,x0,y0,x1,y1\nc,1,1,9,9\n"))
    assert data.images.normal.tolist()==[False,True,False]


def test_an_empty_lesion_table_proves_nothing(tmp_path):
    data = read_folder(own_folder(tmp_path/"f", "image_id,patient_id,path\na,1,a.png\n", "image_id,x0,y0,x1,y1\n"))
    assert not data.images.normal.any()


@pytest.mark.parametrize("harm", ["", "file lost", "side unknown"])
def test_the_other_view_of_a_breast_with_a_lesion(tmp_path, harm):
    "Not normal unless its own rating says 1; the other breast is."
    side = "" if harm=="side unknown" else "L"
    root = own_folder(tmp_path/"f", f"image_id,patient_id,path,laterality,birads\ncc,1,a.png,{side},\nmlo,1,b.png,{side},\nrated,1,c.png,{side},1\nright,1,d.png,R,\nother,2,e.png,L,\n", "image_id,x0,y0,x1,y1\ncc,5,5,40,40\n")
    if harm=="file lost": (root/"a.png").unlink()
    im = read_folder(root).images.set_index("image_id").normal
    assert not im["f:mlo"] and im["f:rated"] and im["f:other"] and im["f:right"]==(harm!="side unknown")


def test_no_healthy_rule_uses_an_unknown_image(tmp_path):
    "Neither do places beside lesions: not on an unknown image, not where the place of a lesion is lost."
    from mammo_nb.data.patches import healthy_patches, tissue_patches
    root = own_folder(tmp_path/"f", "image_id,patient_id,path,normal\na,1,a.png,maybe\nb,2,b.png,\nc,3,c.png,\n", "image_id,x0,y0,x1,y1\nb,1,1,9,9\nc,,,,\n")
    data = read_folder(root)
    assert set(healthy_patches(data, 6, seed=0, images="all", side="fixed").rows.image_id)=={f"{data.name}:b"}
    for rule in ("thesis","context","row","grid"): assert set(tissue_patches(data, rule=rule, slots=2).rows.image_id)=={f"{data.name}:b"}


def test_patches_called_healthy_and_malignant_are_refused(tmp_path):
    own_folder(tmp_path/"f", "image_id,patient_id,path\na,1,a.png\n")
    (tmp_path/"f"/"patches.csv").write_text("patch_id,path,patient_id,target,lesion_type,label\n1,a.png,1,healthy,,malignant\n2,a.png,1,normal,mass,\n3,a.png,1,0,,\n4,a.png,1,abnormal,,\n")
    data = read_folder(tmp_path/"f")
    assert data.patches.patch_id.tolist()==["f:3"]
    assert data.skipped.reason.str.contains("called healthy and has").sum()==2


@pytest.mark.parametrize("field", ["ACR","Bi-Rads"])
def test_inbreast_without_a_rating_is_not_normal(trees, tmp_path, field):
    root = shutil.copytree(trees["inbreast",False], tmp_path/"in")
    df = pd.read_csv(root/"INbreast.csv", sep=";", dtype=str); before = read_inbreast(root).images.normal.sum()
    df[field] = ""; df.to_csv(root/"INbreast.csv", sep=";", index=False)
    assert before>0 and read_inbreast(root).images.normal.sum()==(0 if field=="Bi-Rads" else before)


def test_inbreast_table_without_the_image_is_not_normal(trees, tmp_path):
    root = shutil.copytree(trees["inbreast",False], tmp_path/"in")
    df = pd.read_csv(root/"INbreast.csv", sep=";", dtype=str); df.iloc[:0].to_csv(root/"INbreast.csv", sep=";", index=False)
    data = read_inbreast(root)
    assert len(data.images)==40 and not data.images.normal.any()
    for x in (root/"AllXML").iterdir(): x.rename(x.with_suffix(".XML"))
    assert len(read_inbreast(root).lesions)==len(data.lesions)>0


@pytest.mark.parametrize("harm", ["gone","broken","renamed","blank name"])
def test_bcdr_marks_the_breast_by_the_table(trees, tmp_path, harm):
    "The outline table names a lesion; whatever happened to the picture, no image of that breast is normal."
    root = shutil.copytree(trees["bcdr",False], tmp_path/"bc")
    table = next(root.rglob("bcdr_d01_outlines.csv")); df = pd.read_csv(table, dtype=str, keep_default_na=False)
    file = table.parent/df.image_filename[0].strip(); who, side = f"bcdr:{df.patient_id[0]}", file.stem.split("_")[-1][0]
    df = df[df.image_filename==df.image_filename[0]]                       # the only outline that is left
    if harm=="gone": file.unlink()
    if harm=="broken": file.write_bytes(file.read_bytes()[:50])
    if harm=="renamed": file.rename(file.with_name("picture.tif"))
    if harm=="blank name": df = df.assign(image_filename="")
    df.to_csv(table, index=False)
    im = read_bcdr(root).images
    assert not im.normal[(im.patient_id==who) & (im.laterality==side)].any()
    assert im.normal[im.patient_id!=who].any()


OPINIONS = [dict(ASSESSMENT=dict(left_opinion="OM")), dict(INTERVALCANCER=dict(right_opinion="OU")), dict(SURGERY=dict(L={"1":dict(Opinion="H5")})), dict(BIOPSYFINE=dict(R={"2":dict(Opinion="C2")})),
    dict(BIOPSYWIDE=dict(L={"1":dict(Opinion="B3")})), dict(CLINICAL=dict(left_opinion="Suspicious")), dict(LESION=dict(L={"1":{}})), dict(IntervalCancerDateOfDiagnosis="2013-01-01")]


@pytest.mark.parametrize("event", OPINIONS, ids=lambda e: next(iter(e)))
def test_omidb_record_that_is_not_normal(tmp_path, patients, event):
    normal = [p for p in patients["c"] if not any(v.lesions for v in p[1])][:1]
    root = lookalike2.write_omidb(normal, tmp_path)
    assert read_omidb(root).images.normal.all()
    f = next(root.rglob("nbss_*.json")); nbss = json.loads(f.read_text())
    nbss["10000"] |= event; f.write_text(json.dumps(nbss))
    assert not read_omidb(root).images.normal.any()
    f.write_text(json.dumps({"ClientID":"demd90000"}))
    assert not read_omidb(root).images.normal.any()


def test_mias_line_that_is_not_understood(tmp_path, patients):
    root = lookalike2.write_mias(patients["c"][:4], tmp_path); f = root/"Info.txt"
    ref = read_mias(root).images.image_id[read_mias(root).images.normal].iloc[0].split(":")[1]
    f.write_text(f.read_text().replace("\n\nNOTES", f"\n{ref} G SPICULATED M 500 500 40\n\nNOTES"))
    im = read_mias(root).images.set_index("image_id")
    assert not im.normal[f"mias:{ref}"] and im.normal.any()
    f.write_text(f.read_text().lower().replace("information","x"))
    assert read_mias(root).images.normal.sum()==im.normal.sum()


def test_four_pictures_of_the_right_names_are_not_normal(tmp_path):
    from mammo_nb.data.folder import FOUR_VIEWS, read_four_views
    for n in FOUR_VIEWS: Image.fromarray(np.random.default_rng(0).integers(0,255,(90,60)).astype(np.uint8)).save(tmp_path/n)
    assert not read_four_views(tmp_path).images.normal.any()


# ---------------------------------------------------------------- numbers and pictures that mean something else
@pytest.mark.parametrize("cells,box", [
    ('"1,020","1,200","1,800","2,100"', None), ("0.2,0.3,0.5,0.6", None), ("0,0,1,1", None), ("0.1,0.1,1,1", None), ("300,400,200,100", None), ("ten,20,30,40", None),
    ('"1,020.0","1,200.0","1,800.0","2,100.0"', (1020,1200,1800,2100)), ("1 020,1 200,1 800,2 100", (1020,1200,1800,2100)), ("10.5,20.5,30.5,40.5", (10,20,31,41)), ("10,20,11,21", (10,20,11,21))])
def test_numbers_of_a_box(tmp_path, cells, box):
    root = own_folder(tmp_path/"f", "image_id,patient_id,path\na,1,a.png\n", f"image_id,x0,y0,x1,y1\na,{cells}\n", shape=(2200,1900))
    data = read_folder(root)
    got = [tuple(r) for r in data.lesions[BOX].astype(int).to_numpy()]
    assert got==([box] if box else []) and data.images.has_lesion.all() and not data.images.normal.any()
    if box is None: assert data.skipped.reason.str.contains("has no box inside its image: ").any()


@pytest.mark.parametrize("outline,words", [("0.1,0.1 0.4,0.1 0.4,0.5", "fractions"), ("[[1,2],[3,4]]", "cannot be read"), ("900,900 950,900 950,950", "outside")])
def test_outlines_that_are_none(tmp_path, outline, words):
    data = read_folder(own_folder(tmp_path/"f", "image_id,patient_id,path\na,1,a.png\n", f'image_id,polygon\na,"{outline}"\n'))
    assert len(data.lesions)==0 and data.skipped.reason.str.contains(words).any()


NEWER = ("cmmd","cesm","rsna","embed","csaw","bmcd")


def number(patient_id): return int(re.search(r"(\d+)$", patient_id)[1])-9001


@pytest.fixture(scope="module")
def mixed(patients):
    "Women with a cancer and women without any lesion."
    every = [pair for c in "abc" for pair in patients[c]]
    sick = [pair for pair in every if any(l["label"]=="malignant" for v in pair[1] for l in v.lesions)]
    well = [pair for pair in every if not any(v.lesions for v in pair[1])]
    assert len(sick)>2 and len(well)>2
    return [*sick[:4], *well[:4]]


@pytest.mark.parametrize("layout", NEWER)
def test_no_cancer_is_normal_in_the_newer_sets(layout, mixed, tmp_path):
    "Whatever is wrong with the tables: a breast with a cancer has no normal image, and every box holds the middle of a lesion of the phantom."
    want = truth(mixed)
    sick = {(i,side) for (i,side,_),lesions in want.items() for l in lesions if l["label"]=="malignant"}
    for quirks in (False,True):
        data = READERS[layout](LAYOUTS[layout](mixed, tmp_path/f"{quirks}", quirks=quirks), strict=not quirks)      # a stated rule is no fault
        normal = {(number(r.patient_id), r.laterality) for r in data.images[data.images.normal].itertuples()}
        assert not normal & sick and bool(normal)==(layout!="cmmd") and not (data.images.normal & data.images.has_lesion).any()
        if quirks: continue
        for r in data.lesions.itertuples():
            lesions = want[number(r.patient_id), r.laterality, r.view]
            assert any(r.x0<=(l["box"][0]+l["box"][2])/2<=r.x1 and r.y0<=(l["box"][1]+l["box"][3])/2<=r.y1 for l in lesions), (r.image_id, lesions)
        if layout in ("cesm","embed"): assert len(data.lesions)==sum(map(len, want.values()))


def flat(side, view, lesions):
    x = np.full((60,40), .4, np.float32)
    return SimpleNamespace(pixels=x, side=side, view=view, density=2, birads="5" if lesions else "1", spacing_mm=.3, bits=12, device="digital", lesions=lesions)


@pytest.mark.parametrize("layout", ["vindr", *NEWER, "dmid"])
def test_a_lost_or_garbled_row_makes_no_cancer_normal(layout, tmp_path):
    "Each row of each table is lost once, and each of its ids misspelt once: no image of the breast with the cancer becomes normal."
    mass = dict(box=(10,12,20,24), polygon=[(10,12),(19,12),(19,23),(10,23)], type="mass", label="malignant")
    women = [({"age":50}, [flat(s, v, [mass] if (s,v)==("L","CC") else []) for s in "LR" for v in ("CC","MLO")])]
    root, tried = LAYOUTS[layout](women, tmp_path/layout), 0
    whole = READERS[layout](root).images
    sick = whole.patient_id[whole.has_lesion].iloc[0]
    for path in sorted(root.rglob("*.csv")):
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        ids = [c for c in table.columns if re.search(r"(?i)id|anon|name|acc", c)]
        wrong = [table.drop(k) for k in table.index] + [table.assign(**{c: table[c].mask(table.index==k, "x7")}) for k in table.index for c in ids[:3]]
        for mutant in wrong:
            mutant.to_csv(path, index=False)
            try: images = READERS[layout](root).images
            except DataError: continue                                        # nothing is left to read, and that is said
            tried += 1
            ill = images[(images.patient_id==sick) & (images.laterality=="L")]
            assert not ill.normal.any(), (path.name, ill[["image_id","normal"]])
        table.to_csv(path, index=False)
    assert tried>1 and READERS[layout](root).images.equals(whole)


def test_fractions_in_the_other_layouts(trees, tmp_path, patients):
    "Marks of OMI-DB, outlines of INbreast and BCDR in shares of the image give no box and are listed."
    root = lookalike2.write_omidb(patients["c"][:4], tmp_path/"omi"); n = len(read_omidb(root).lesions)
    for f in root.rglob("imagedb_*.json"): f.write_text(re.sub(r'"([XY][12])": "(\d+)"', lambda m: f'"{m[1]}": "{int(m[2])/1000}"', f.read_text()))
    assert n>0 and len(read_omidb(root).lesions)==0
    root = shutil.copytree(trees["bcdr",False], tmp_path/"bc")
    for f in root.rglob("*_outlines.csv"):
        df = pd.read_csv(f, dtype=str, keep_default_na=False)
        for c in ("lw_x_points","lw_y_points"): df[c] = df[c].map(lambda t: " "+" ".join(str(float(v)/1000) for v in t.split()))
        df.to_csv(f, index=False)
    data = read_bcdr(root)
    assert len(data.lesions)==0 and data.skipped.reason.str.contains("fractions").any() and data.images.normal.any()


PICTURES = dict(slope=dict(RescaleSlope="-1", RescaleIntercept="4095"), slope_half=dict(RescaleSlope="-0.5", RescaleIntercept="3000"), monochrome1=dict(PhotometricInterpretation="MONOCHROME1"),
    inverse=dict(PresentationLUTShape="INVERSE"), monochrome1_inverse=dict(PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE"))


@pytest.mark.parametrize("tags", PICTURES, ids=str)
@pytest.mark.parametrize("scaling", ["minmax","voi","none"])
def test_falling_grey_is_turned(tmp_path, tags, scaling):
    g = np.tile(np.arange(0,4096,65,dtype=np.uint16), (40,1))
    lookalike.write_dicom(tmp_path/"a.dcm", 4095-g, BitsStored=12, **PICTURES[tags])
    x = read_image(tmp_path/"a.dcm", scaling=scaling).astype(float)
    assert np.corrcoef(x.ravel(), g.ravel())[0,1]>.99
    lookalike.write_dicom(tmp_path/"b.dcm", g, BitsStored=12, **{**PICTURES["slope"], **PICTURES["monochrome1"]})
    assert np.corrcoef(read_image(tmp_path/"b.dcm", scaling=scaling).astype(float).ravel(), g.ravel())[0,1]>.99


@pytest.mark.parametrize("key", ["ModalityLUTSequence","VOILUTSequence"])
def test_a_table_that_goes_down_is_turned(tmp_path, key):
    from pydicom.dataset import Dataset
    g = np.tile(np.arange(64,dtype=np.uint16), (40,1))
    lut = Dataset(); lut.LUTDescriptor, lut.LUTData, lut.ModalityLUTType = [64,0,16], list(range(63,-1,-1)), "US"
    if key=="VOILUTSequence": del lut.ModalityLUTType
    lut["LUTDescriptor"].VR = lut["LUTData"].VR = "US"
    lookalike.write_dicom(tmp_path/"a.dcm", 63-g, BitsStored=12, **{key:[lut]})
    for scaling in ("minmax","voi"): assert np.corrcoef(read_image(tmp_path/"a.dcm", scaling=scaling).astype(float).ravel(), g.ravel())[0,1]>.99, scaling


@pytest.mark.parametrize("orientation", range(1,9))
@pytest.mark.parametrize("form", ["jpg","png","tif"])
def test_exif_turns_every_format_alike(tmp_path, form, orientation):
    from mammo_nb.data.pixels import read_header
    x = np.zeros((24,40), np.uint8); x[:8,:12] = 200; x[16:,30:] = 100
    exif = Image.Exif(); exif[0x0112] = orientation
    Image.fromarray(x).save(tmp_path/f"a.{form}", exif=exif)
    y, head = read_image(tmp_path/f"a.{form}", scaling="none"), read_header(tmp_path/f"a.{form}")
    turned = dict(enumerate([x, x[:,::-1], x[::-1,::-1], x[::-1], x.T, np.rot90(x,-1), x[::-1,::-1].T, np.rot90(x)], 1))[orientation]
    assert y.shape==turned.shape==(head["rows"],head["cols"]) and abs(y.astype(int)-turned).mean()<3


def test_several_pictures_in_one_file_are_refused(tmp_path):
    from mammo_nb.data.pixels import read_header
    g = np.tile(np.arange(0,4000,100,dtype=np.uint16), (30,1))
    lookalike.write_dicom(tmp_path/"v.dcm", np.tile(g,(3,1)), BitsStored=12, NumberOfFrames=3, Rows=30)
    lookalike.write_dicom(tmp_path/"one.dcm", g, BitsStored=12, NumberOfFrames=1)
    pages = [Image.fromarray(np.uint8(g//16))]*3
    pages[0].save(tmp_path/"p.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path/"thumb.tif", save_all=True, append_images=[pages[0].resize((10,8))])
    lookalike.write_dicom(tmp_path/"c.dcm", np.uint8(g//16), PhotometricInterpretation="PALETTE COLOR")
    for f in ("v.dcm","p.tif","c.dcm"):
        for read in (read_header, read_image):
            with pytest.raises(DataError, match="frames|more than one|colour"): read(tmp_path/f)
    for f in ("one.dcm","thumb.tif"): assert read_image(tmp_path/f).shape==(30,40)


# ---------------------------------------------------------------- masks and ids of a plain folder
def mask_folder(root, masks, rows, header="image_id,lesion_type,label,mask_path,mask_value"):
    own_folder(root, "image_id,patient_id,path\na,1,a.png\nb,2,b.png\n", header+"\n"+"\n".join(rows)+"\n", shape=(100,80))
    for name,x in masks.items(): Image.fromarray(x).save(root/name)
    return read_folder(root)


def box_mask(*boxes, values=(255,), shape=(100,80)):
    m = np.zeros(shape, np.uint8)
    for (x0,y0,x1,y1),v in zip(boxes, values): m[y0:y1,x0:x1] = v
    return m


def test_masks_give_boxes(tmp_path):
    "Binary, several files a lesion, one value a lesion by column or by id, lossy."
    two = box_mask((5,10,25,40),(40,50,70,90), values=(1,2))
    data = mask_folder(tmp_path/"m", dict(**{"one.png":box_mask((10,20,30,50)), "more.png":box_mask((50,60,70,80)), "two.png":two, "lossy.jpg":box_mask((16,24,48,72))}),
        ["a,mass,benign,one.png,", "a,calcification,benign,one.png;more.png,", "b,mass,benign,two.png,1", "b,mass,malignant,two.png,2", "b,mass,benign,lossy.jpg,"])
    got = data.lesions.sort_values("lesion_id")[["label",*BOX]].values.tolist()
    assert got[:4]==[["benign",10,20,30,50],["benign",10,20,70,80],["benign",5,10,25,40],["malignant",40,50,70,90]]
    assert np.abs(np.subtract(got[4][1:], (16,24,48,72))).max()<=1
    assert data.lesions.mask_path.notna().all() and data.skipped.reason.str.contains("2 parts").any()
    ids = mask_folder(tmp_path/"i", {"two.png":two}, ["b,2,mass,two.png","b,1,mass,two.png"], header="image_id,lesion_id,lesion_type,mask_path")
    assert ids.lesions.set_index("lesion_id").x0.to_dict()=={"1":5,"2":40}


@pytest.mark.parametrize("row,mask,words", [
    ("a,mass,benign,gone.png,", None, "mask file 'gone.png' is missing"), ("a,mass,benign,../m.png,", None, "is missing"), ("a,mass,benign,m.png,", box_mask((1,1,9,9), shape=(50,40)), "mask is 50 x 40, its image 100 x 80"),
    ("a,mass,benign,m.png,", box_mask(), "one value only"), ("a,mass,benign,m.png,", box_mask((1,1,9,9),(20,20,40,40), values=(1,2)), "mask holds the values 1, 2"),
    ("a,mass,benign,a.png,", None, "the picture itself"), ("a,mass,benign,m.png,", box_mask((1,1,9,9))+3, "no background of 0")])
def test_masks_that_are_none(tmp_path, row, mask, words):
    "Refused with the sizes or names; the image is neither normal nor a source of tissue beside its lesion."
    data = mask_folder(tmp_path/"m", {} if mask is None else {"m.png":mask}, [row])
    assert len(data.lesions)==0 and data.skipped.reason.str.contains(words, regex=False).any()
    assert data.images.has_lesion.tolist()==[True,False] and "lesion without a box" in data.images.quirks[0]


def test_mask_beside_its_box_is_noted(tmp_path):
    data = mask_folder(tmp_path/"m", {"m.png":box_mask((50,60,70,80))}, ["a,1,1,20,20,m.png"], header="image_id,x0,y0,x1,y1,mask_path")
    assert data.lesions[BOX].values.tolist()==[[1,1,20,20]] and data.skipped.reason.str.contains("do not overlap").any()


def test_image_ids_that_patients_share(tmp_path):
    from mammo_nb.data.splits import split_patients
    rows = [(p,i) for p in "pqrs" for i in "12"]
    images = "image_id,patient_id,path\n"+"".join(f"{i},{p},{p}{i}.png\n" for p,i in rows)
    own_folder(tmp_path/"f", images, "image_id,patient_id,x0,y0,x1,y1,label\n"+"".join(f"1,{p},5,5,30,30,benign\n" for p in "pqr")+"1,,5,5,30,30,benign\n")
    data = read_folder(tmp_path/"f")
    assert data.images.image_id.tolist()==[f"f:{p}/{i}" for p,i in rows] and len(data.lesions)==3
    assert data.skipped.reason.str.contains("several patients").sum()==2          # the note, and the row without a patient
    assert not data.images.normal.any()                                           # that row could be anybody's
    (tmp_path/"f"/"patches.csv").write_text("path,patient_id,image_id,target\n"+"".join(f"{p}{i}.png,{p},{i},lesion\n" for p,i in rows))
    cut = read_folder(tmp_path/"f").patches
    assert cut.groupby("image_id").patient_id.nunique().max()==1 and cut.image_id.nunique()==8


# ---------------------------------------------------------------- the doctor, and folders nobody may enter
def doctor(root):
    from mammo_nb.data.doctor import examine, report_text
    e = examine(root, check=3)
    return e, report_text(e)


def test_doctor_offers_only_what_runs(tmp_path):
    "Calcifications only, no normal image, two women, cut patches: each paper says what it lacks and how many there are."
    def folder(name, n, kind, label, extra=0):
        rows = [f"i{k},p{k},{k}.png" for k in range(n+extra)]
        return own_folder(tmp_path/name, "image_id,patient_id,path\n"+"\n".join(rows)+"\n", "image_id,x0,y0,x1,y1,lesion_type,label\n"+"".join(f"i{k},10,10,60,60,{kind},{label(k)}\n" for k in range(n)))
    both = lambda k: ("benign","malignant")[k%2]
    runs = lambda root: dict(zip(*[doctor(root)[0]["papers"][c] for c in ("paper","runs")]))
    calc = folder("calc", 12, "calcification", both, 4)
    assert runs(calc)=={"00":True,"01":True,"02":False,"03":False,"04":False,"05":True}
    assert "masses (found 0)" in doctor(calc)[1]
    ill = folder("ill", 12, "mass", both)
    assert runs(ill)=={"00":True,"01":False,"02":True,"03":True,"04":False,"05":True} and "known to be free of lesions" in doctor(ill)[1]
    full = folder("full", 12, "mass", both, 6)
    e, text = doctor(full)
    assert e["papers"].runs.all() and e["usable"] and text.count("AUROC differences from about")+text.count("nothing: ")==6
    assert "-p task malignant" in doctor(ill)[1] and "-p task" not in text
    two = folder("two", 2, "mass", both)
    e, text = doctor(two)
    assert not e["usable"] and text.endswith("not usable") and "runs:" not in text


def test_doctor_into_a_closed_pipe(tmp_path):
    "`mammo_doctor DIR | head -1` ends without a traceback."
    own_folder(tmp_path/"f", "image_id,patient_id,path\na,1,a.png\n")
    code = f"from mammo_nb.data.doctor import main; import sys; sys.exit(main([{str(tmp_path)!r}]))"
    p = subprocess.Popen([sys.executable,"-c",code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=repo_root())
    p.stdout.close()
    assert p.wait(timeout=120)==1 and b"Traceback" not in p.stderr.read()


def test_doctor_names_the_folder_absolutely(tmp_path, monkeypatch):
    own_folder(tmp_path/"mine", "image_id,patient_id,path\n"+"".join(f"i{k},p{k},{k}.png\n" for k in range(18)), "image_id,x0,y0,x1,y1,lesion_type,label\n"+"".join(f"i{k},9,9,60,60,mass,{'bm'[k%2]}\n" for k in range(12)))
    monkeypatch.chdir(tmp_path)
    assert f"-p data_dir {tmp_path.resolve()/'mine'}" in doctor("mine")[1]


def test_doctor_sees_doubles_labels_and_spacing(tmp_path):
    root = tmp_path/"f"; root.mkdir()
    for k in range(4): Image.fromarray(np.random.default_rng(k//2).integers(0,255,(64,64)).astype(np.uint8)).save(root/f"{k}.png")
    (root/"patches.csv").write_text("path,patient_id,target,lesion_type,label\n0.png,1,lesion,mass,benign\n1.png,2,lesion,mass,malignant\n2.png,3,lesion,mass,dunno\n3.png,3,healthy,,\n")
    e, text = doctor(root)
    assert "4 files hold a picture" in text and "2 of them are called benign and malignant" in text and "2 of them belong to several patients" in text
    assert "benign patches" in text and "malignant patches" in text and "label 'dunno' read as unknown" in text
    own_folder(tmp_path/"g", "image_id,patient_id,path,spacing_mm\na,1,a.png,0.07\nb,2,b.png,0.2\n")
    assert "9 to 26 mm" in doctor(tmp_path/"g")[1]


@pytest.mark.skipif(not hasattr(os,"geteuid") or os.geteuid()!=0, reason="only root may become nobody")
def test_closed_folder_is_passed_over_and_said(tmp_path):
    "A folder that the user may not enter, as lost+found at the root of a disk."
    own_folder(tmp_path/"mine", "image_id,patient_id,path\na,1,a.png\n"); (tmp_path/"lost+found").mkdir(mode=0o700)
    code = f"""
import os, warnings; warnings.simplefilter('always')
from mammo_nb.data.doctor import main
from mammo_nb.data.readers import find_datasets
import contextlib, io
with contextlib.redirect_stdout(io.StringIO()): main([{str(tmp_path)!r}])        # what is imported late is imported now
os.seteuid(65534)
print(sorted(find_datasets({str(tmp_path)!r}))); main([{str(tmp_path)!r}])
"""
    for p in (tmp_path, *tmp_path.parents):
        if p.stat().st_uid==0 and p!=Path("/"): p.chmod(p.stat().st_mode | 0o055)
    out = subprocess.run([sys.executable,"-c",code], capture_output=True, text=True, cwd=repo_root())
    assert out.stdout.startswith("['mine']") and "cannot be entered" in out.stdout and "cannot be entered" in out.stderr, out.stdout+out.stderr


def test_loops_of_links_are_passed_over(tmp_path):
    own_folder(tmp_path/"mine", "image_id,patient_id,path\na,1,a.png\nb,2,loop.dcm\n")
    os.symlink("b", tmp_path/"a"); os.symlink("a", tmp_path/"b"); os.symlink("..", tmp_path/"mine"/"up"); os.symlink("loop.dcm", tmp_path/"mine"/"loop.dcm")
    assert set(find_datasets(tmp_path))=={"mine"}
    assert len(read_any(tmp_path)["mine"].images)==1
    from mammo_nb.data.doctor import main
    assert main([str(tmp_path)])==1


@pytest.mark.parametrize("said,label", [("Benign","benign"),("benign without callback","benign"),("BENIGN_WITHOUT_CALLBACK","benign"),("non-malignant","benign"),("carcinoma","malignant"),("Bösartig","malignant"),("not malignant","benign"),("suspicious","unknown"),("0","unknown"),("no","unknown")])
def test_words_of_a_class(tmp_path, said, label):
    data = read_folder(own_folder(tmp_path/"f", "image_id,patient_id,path\na,1,a.png\n", f"image_id,x0,y0,x1,y1,lesion_type,label\na,1,1,30,30,mass,{said}\n"))
    assert data.lesions.label.tolist()==[label]
    assert data.skipped.reason.str.contains("read as unknown").any()==(label=="unknown")


# ---------------------------------------------------------------- the breast on film
def scanned(v, g, base, sd):
    "A view as a scanned film: base and grain, brighter to one side, a scanner's border, tape and a lead letter."
    m = v.mask; h,w = m.shape; far = slice(w-int(w*.22),w) if v.side=="L" else slice(0,int(w*.22))
    im = np.where(m, base+(1-base/255)*np.clip(v.pixels,0,1)*255, base+np.linspace(0,6,w)[None]) + sd*g.standard_normal(m.shape)
    b = max(2,h//60); rim = np.zeros_like(m); rim[:b] = rim[-b:] = True
    rim[:,-b:] |= v.side=="L"; rim[:,:b] |= v.side=="R"
    tape = np.zeros_like(m); tape[int(h*.85):int(h*.95),far] = True
    im[rim&~m], im[tape&~m] = 235, 200
    letter = np.zeros_like(m); letter[int(h*.05):int(h*.05)+h//25,far] = g.random((h//25,far.stop-far.start))>.4
    im[letter&~m] = 225
    return im.clip(0,255).astype(np.uint8)


def test_breast_mask_on_films_and_digital_views():
    "Mean Dice 0.96 and worst 0.92 at least, whatever the film base, and on digital views too."
    g = np.random.default_rng(0); dice = lambda a,b: 2*(a&b).sum()/(a.sum()+b.sum())
    found = {}
    for c,n in (("a",3),("b",10),("c",3)):
        for plan,vs in phantom.phantom_patients(n, style=c, seed=1, scale=.2):
            for v in vs:
                found.setdefault(v.device,[]).append(dice(breast_mask((np.clip(v.pixels,0,1)*255).round().astype(np.uint8)), v.mask))
                for base,sd in ((5,2),(17,4),(35,6),(55,8)) if v.device=="film" else (): found.setdefault(base,[]).append(dice(breast_mask(scanned(v,g,base,sd)), v.mask))
    assert all(np.mean(d)>=.96 and min(d)>=.92 for d in found.values()), {k:(np.mean(d),min(d)) for k,d in found.items()}


@pytest.mark.parametrize("shape", [(1,1),(3,50),(64,48),(700,9)])
def test_breast_mask_of_odd_pictures(shape):
    for x in (np.zeros(shape,np.uint8), np.full(shape,255,np.uint8), np.random.default_rng(0).integers(0,256,shape).astype(np.uint8)):
        m = breast_mask(x); assert m.shape==shape and m.dtype==bool
    assert not breast_mask(np.zeros(shape,np.uint8)).any()


# ---------------------------------------------------------------- pixels
SYNTAXES = dict(raw="1.2.840.10008.1.2.1", rle="1.2.840.10008.1.2.5", jpeg_lossless="1.2.840.10008.1.2.4.70", jpeg_ls="1.2.840.10008.1.2.4.80", jpeg2000="1.2.840.10008.1.2.4.90")


def recompress(src, dst, syntax):
    "The same DICOM in another transfer syntax, by GDCM."
    gdcm = pytest.importorskip("gdcm", reason="python-gdcm (extra `dicom`) is not installed")
    r = gdcm.ImageReader(); r.SetFileName(str(src)); assert r.Read()
    c = gdcm.ImageChangeTransferSyntax(); c.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax))); c.SetInput(r.GetImage()); assert c.Change()
    w = gdcm.ImageWriter(); w.SetFileName(str(dst)); w.SetFile(r.GetFile()); w.SetImage(c.GetOutput()); assert w.Write()
    return dst


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("bits", [8,12,14,16])
def test_decoders_agree(tmp_path, syntax, bits):
    "Raw, RLE, JPEG lossless, JPEG-LS and JPEG 2000 of one picture hold the same values."
    x = np.random.default_rng(0).integers(0, 2**bits, (48,40)).astype(np.uint8 if bits==8 else np.uint16); x[0,:2] = 0, 2**bits-1
    lookalike.write_dicom(tmp_path/"raw.dcm", x, BitsStored=bits)
    f = tmp_path/"raw.dcm" if syntax=="raw" else recompress(tmp_path/"raw.dcm", tmp_path/"c.dcm", SYNTAXES[syntax])
    assert np.array_equal(read_image(f, scaling="none"), x)
    assert np.array_equal(read_image(f), np.rint(x.astype(np.float32)*np.float32(255/(2**bits-1))).astype(np.uint8))


def test_missing_decoder_names_the_extra(tmp_path, monkeypatch):
    "Without its plugins a compressed file is refused with the name of the extra that brings them."
    import pydicom
    lookalike.write_dicom(tmp_path/"raw.dcm", np.arange(64,dtype=np.uint16).reshape(8,8))
    f = recompress(tmp_path/"raw.dcm", tmp_path/"j.dcm", SYNTAXES["jpeg_lossless"])
    dec = pydicom.pixels.get_decoder(SYNTAXES["jpeg_lossless"])
    monkeypatch.setattr(dec, "_available", {}); monkeypatch.setattr(dec, "_unavailable", {"gdcm":("gdcm>=3.0.10",)})
    with pytest.raises(DataError, match=r"mammo_nb\[dicom\]"): read_image(f)


def voi_lut(first, values, bits):
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence
    lut = Dataset(); lut.LUTDescriptor = [len(values), first, bits]; lut.LUTData = np.asarray(values, "<u2").tobytes(); lut["LUTData"].VR = "OW"
    return Sequence([lut])


@pytest.mark.parametrize("case", ["LINEAR","LINEAR_EXACT","SIGMOID","table","slope"])
def test_voi_agrees_with_pydicom(tmp_path, case):
    "Window functions, VOI tables and rescaling give what pydicom's own functions give, up to the final scaling to 8 bit."
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
    x = np.random.default_rng(2).integers(0, 2**12, (40,50)).astype(np.uint16); x[0,:2] = 0, 4095
    tags = dict(WindowCenter=[2100,9], WindowWidth=[900,9], VOILUTFunction=case if case.isupper() else "LINEAR")
    if case=="table": tags = dict(VOILUTSequence=voi_lut(500, (np.linspace(0,1,3000)**2*1023).astype(int), 10))
    if case=="slope": tags |= dict(RescaleSlope=2, RescaleIntercept=-100)
    f = lookalike.write_dicom(tmp_path/"v.dcm", x, BitsStored=12, **tags)
    ds = pydicom.dcmread(f)
    want = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds).astype(float)
    want = (want-want.min())/(want.max()-want.min())*255
    assert abs(read_image(f, scaling="voi")-want).max()<=.51
    assert not np.array_equal(read_image(f), read_image(f, scaling="voi"))


def test_area_resize_is_cv2_inter_area():
    cv2 = pytest.importorskip("cv2", reason="opencv is only a reference here")
    g = np.random.default_rng(1)
    for (h,w),(m,n) in [((61,83),(17,29)), ((128,128),(64,64)), ((40,30),(128,128)), ((33,90),(50,45))]:
        x = g.integers(0,256,(h,w)).astype(np.uint8)
        ours, theirs = area_resize(x,(m,n)).astype(int), cv2.resize(x,(n,m),interpolation=cv2.INTER_AREA).astype(int)
        assert abs(ours-theirs).max()<=1
        f = cv2.resize(x.astype(np.float32),(n,m),interpolation=cv2.INTER_AREA)
        if m<=h and n<=w: assert abs(area_resize(x.astype(np.float32),(m,n))-f).max()<1e-2


def test_absurd_sizes_cost_no_memory(tmp_path):
    "DICOM and TIFF headers that claim gigapixels are refused with the address space capped at a little more than Python needs."
    from PIL import Image
    import struct
    lookalike.write_dicom(tmp_path/"a.dcm", np.arange(64,dtype=np.uint16).reshape(8,8))
    raw = (tmp_path/"a.dcm").read_bytes()
    for tag in (0x10,0x11): raw = raw.replace(struct.pack("<HH2sHH",0x28,tag,b"US",2,8), struct.pack("<HH2sHH",0x28,tag,b"US",2,65000))
    (tmp_path/"a.dcm").write_bytes(raw)
    Image.fromarray(np.zeros((8,8),np.uint8)).save(tmp_path/"t.png")
    png = bytearray((tmp_path/"t.png").read_bytes()); png[16:24] = struct.pack(">II",65000,65000)
    import zlib; png[29:33] = struct.pack(">I", zlib.crc32(bytes(png[12:29]))); (tmp_path/"t.png").write_bytes(bytes(png))
    code = f"""
import resource
from mammo_nb.core import DataError
from mammo_nb.data.pixels import read_image, read_header
used = int(open('/proc/self/statm').read().split()[0])*4096
resource.setrlimit(resource.RLIMIT_AS, (used+300_000_000,)*2)
for f in ('a.dcm','t.png'):
    for fn in (read_image, read_header):
        try: fn({str(tmp_path)!r}+'/'+f); print('read')
        except DataError as e: print('refused', e)
"""
    out = subprocess.run([sys.executable,"-c",code], capture_output=True, text=True, cwd=repo_root())
    assert out.stdout.count("refused")==4, out.stdout+out.stderr


# ---------------------------------------------------------------- cache of trees
def test_killed_build_leaves_no_half_tree(tmp_path):
    "`kill -9` while a tree is written: the next call builds it whole."
    env = dict(os.environ, MAMMO_NB_CACHE=str(tmp_path), OMP_NUM_THREADS="1")
    code = f"from mammo_nb.data.trees import phantom_tree; print(phantom_tree('folder', centre='c', n_patients=%d, scale={SCALE}, seed=5))"
    p = subprocess.Popen([sys.executable,"-c",code%200], env=env, cwd=repo_root())
    for _ in range(600):
        if any(tmp_path.rglob("*.png")): break
        time.sleep(.05)
    p.send_signal(signal.SIGKILL); p.wait()
    assert [d for d in (tmp_path/"phantoms").glob("*/*") if d.is_dir() and not d.name.startswith(".")]==[]
    out = subprocess.run([sys.executable,"-c",code%2], env=env, capture_output=True, text=True, cwd=repo_root())
    assert len(read_folder(out.stdout.strip()).images)==8, out.stderr


# ---------------------------------------------------------------- real files, where they are
@shared
@pytest.mark.data
def test_real_patches_and_exam():
    data = read_any(SHARED)
    cut = data["cbis_mass_patches"].patches
    assert (len(cut), cut.patient_id.nunique(), cut.image_id.nunique())==(1698, 892, 1592)
    t = pd.concat([pd.read_csv(SHARED/"cbis_csv"/f"mass_case_description_{s}_set.csv") for s in ("train","test")])
    label = {(r["patient_id"], r["image file path"].split("/")[2].rsplit(".",1)[1], str(r["abnormality id"])): r["pathology"] for _,r in t.iterrows()}
    assert all(label[r.patient_id[5:], r.image_id[5:], r.lesion_id]==r.label_raw for r in cut.itertuples())
    exam = data["nyu_density_exam"].images
    assert exam.normal.all() and len(exam)==4
    for r in exam.itertuples():
        x = read_image(r.path)
        assert breast_side(x)=="L" and (r.quirks==["mirrored"])==(r.laterality=="R")
        m = breast_mask(x); assert .1<m.mean()<.7
        if r.view=="MLO": p = pectoral_cut(x, 'L'); assert .01<(p&m).sum()/m.sum()<.35


# ---------------------------------------------------------------- OPTIMAM's release in two sheets
def as_sheets(data, root):
    "The pictures of an OMI-DB tree as the release of the thesis has them: batches beside two sheets."
    one = lambda r: (r.patient_id.split(":")[1], r.study_id, r.image_id.split(":")[1])
    images, lesions, by = ["BatchID,ClientID,StudyIUID,ImageSOPIUID,Manufacturer,ManufacturersModelName"], ["ClientID,ImageSOPIUID,LesionID,Status,X1,X2,Y1,Y2,Mass"], {}
    for r in data.images.itertuples():
        client, study, sop = by[r.image_id] = one(r)
        to = root/"1"/client/str(study)
        to.mkdir(parents=True, exist_ok=True)
        shutil.copy(r.path, to/f"{sop}.dcm")
        images.append(f'1,{client},{study},{sop},"HOLOGIC, Inc.",Lorad Selenia')
    for l in data.lesions.itertuples():
        client, _, sop = by[l.image_id]
        lesions.append(f"{client},{sop},{l.lesion_id},{'B5' if l.label == 'malignant' else 'B2'},{l.x0},{l.x1},{l.y0},{l.y1},1")
    for name,lines in (("Images", images), ("Lesions", lesions)): (root/f"{name}.csv").write_text("\n".join(lines) + "\n")

def test_optimam_is_found_by_data_dir(tmp_path):
    "The thesis' reader was a function that no data_dir reached; a sheet called Images.csv was taken for the plain layout."
    women = [phantom.phantom_patient(i, style="c", scale=.05) for i in range(6)]
    as_sheets(read_omidb(LAYOUTS["omidb"](women, tmp_path/"json")), tmp_path/"sheets")
    assert find_datasets(tmp_path) == dict(omidb=tmp_path/"json", optimam=tmp_path/"sheets")
    both, keys = read_any(tmp_path), ["image_id","x0","y0","x1","y1","label"]
    a, b = (both[n].lesions[keys].sort_values(keys[:3]).reset_index(drop=True) for n in ("omidb","optimam"))
    assert len(a) > 2 and a.equals(b) and both["omidb"].images.normal.sum() == both["optimam"].images.normal.sum() > 0
    with pytest.raises(DataError, match="no image passes the filters"): read_any(tmp_path, ["optimam"], rules=dict(optimam=dict(model="Selenia Dimensions")))
