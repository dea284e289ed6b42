"CMMD, CDD-CESM and BMCD as published: every name of the public lists of files is read, or left out with a reason. Needs ../shared/data/trees; pixels are made up."
import collections
import re
import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom.dataset import Dataset

from mammo_nb.core import repo_root
from mammo_nb.data.bmcd import read_bmcd
from mammo_nb.data.cesm import cesm_name, read_cesm
from mammo_nb.data.cmmd import read_cmmd
from mammo_nb.data.lookalike import write_dicom

TREES = repo_root().parent/"shared"/"data"/"trees"
pytestmark = [pytest.mark.data, pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(not TREES.is_dir(), reason="../shared/data/trees is not here")]
CODES = {"CC": "399162004", "MLO": "399368009"}
EMPTY = np.zeros((8, 6), np.uint8)
SECONDS = 6 # CPU seconds for 1,000 files


def names(listing, ending): return [line.strip()[2:] for line in (TREES/listing).read_text().splitlines() if line.strip().endswith(ending)]


def counted(data, words, kind): return int(data.skipped[data.skipped.reason.str.contains(words) & (data.skipped.kind == kind)]["count"].sum())


def timed(read, root):
    start = time.process_time()
    return read(root), time.process_time()-start


def mammogram(path, patient, side, view):
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator = CODES[view], "SCT"
    write_dicom(path, EMPTY, PatientID=patient, ImageLaterality=side, ViewPosition="", ViewCodeSequence=[code])


@pytest.fixture(scope="module")
def cmmd(tmp_path_factory):
    "The published names with headers made up: two files are the views of the breast with a row, four are both breasts."
    root = tmp_path_factory.mktemp("cmmd")
    table = pd.read_csv(TREES/"cmmd_label.csv", dtype=str, keep_default_na=False)
    table.to_csv(root/"CMMD_clinicaldata_revision.csv", index=False)
    sides = table.groupby("ID1").LeftRight.agg(list).to_dict()
    files = collections.defaultdict(list)
    for name in sorted(names("cmmd_tree.txt", ".dcm")): files[name.split("/")[1]].append(name)
    for patient, own in files.items():
        breasts = sides[patient] if len(own) == 2 else "LR"
        for name, (side, view) in zip(own, [(s, v) for s in breasts for v in CODES], strict=True): mammogram(root/name, patient, side, view)
    return root, table, files


def test_cmmd_name_by_name(cmmd):
    root, table, files = cmmd
    data, seconds = timed(read_cmmd, root)
    listed = sum(map(len, files.values()))
    assert (listed, len(table), len(files)) == (5202, 1872, 1775)
    assert len(data.images) == listed and {str(p) for p in data.images.path} == {str((root/n).resolve()) for own in files.values() for n in own}
    with_row = data.images.has_lesion.sum()
    assert with_row == 2*len(table) == 3744 and data.images.normal.sum() == 0
    assert counted(data, "nobody says it is healthy", "unknown") == listed-with_row == 1458
    assert not (data.skipped.kind == "skipped").any()                                       # every row has its pictures, every picture is in
    classes = data.images.quirks[data.images.has_lesion].str[1].str.extract(r"breast (\w+)")[0].value_counts().to_dict()
    assert classes == {"malignant": 2*1316, "benign": 2*556}
    assert seconds*1000/listed < SECONDS, f"{seconds*1000/listed:.1f} CPU s for 1,000 files"
    print(f"CMMD: {len(data.images)} of {listed} names read, {with_row} with a class; {seconds*1000/listed:.2f} CPU s for 1,000 files")


@pytest.fixture(scope="module")
def cesm(tmp_path_factory):
    "The published names; the workbook is not public here, so each picture gets a row, and every fifth low-energy one a circle."
    root, rows, regions = tmp_path_factory.mktemp("cesm"), [], []
    files = sorted(names("cddcesm_tree.txt", ".jpg"))
    for k, name in enumerate(files):
        (root/name).parent.mkdir(exist_ok=True)
        Image.fromarray(EMPTY).save(root/name)
        stem = name.split("/")[1][:-4]
        rows.append({"Image_name": stem+" "*(k%7 == 0), "Age": 50, "Breast density (ACR)": "C", "BIRADS": "1", "Findings": "Mass",
            "Pathology Classification/ Follow up": "Benign" if k%5 == 0 else "Normal"})
        if k%5 == 0: regions.append({"#filename": stem+" .jpg"*(k%2)+".jpg"*(1-k%2), "region_shape_attributes": '{"name":"circle","cx":3,"cy":3,"r":2}'})
    pd.DataFrame(rows).to_excel(root/"Radiology manual annotations.xlsx", sheet_name="all", index=False)
    pd.DataFrame(regions).to_csv(root/"Radiology_hand_drawn_segmentations_v2.csv", index=False)
    return root, files, regions


def test_cesm_name_by_name(cesm):
    root, files, regions = cesm
    data, seconds = timed(read_cesm, root)
    said = [cesm_name(f.split("/")[1]) for f in files]
    assert len(files) == 2006 and all(said) and len({who for who, *_ in said}) == 326       # every published name is understood
    low = [f for f, (_, _, kind, _) in zip(files, said) if kind == "dm"]
    assert len(low) == 1003 == len(data.images) and {str(p) for p in data.images.path} == {str((root/f).resolve()) for f in low}
    assert data.skipped.reason.str.contains("1003 subtracted pictures").any() and not (data.skipped.kind == "skipped").any()
    drawn = {re.sub(r"\s|\.jpg", "", r["#filename"]) for r in regions if "_DM_" in r["#filename"]}
    assert len(data.lesions) == len(drawn) and set(data.lesions.image_id.str.removeprefix("cesm:")) == {d.upper() for d in drawn}
    assert data.images.groupby(["laterality", "view"]).size().to_dict() == {("L","CC"): 255, ("L","MLO"): 255, ("R","CC"): 245, ("R","MLO"): 248}
    assert seconds*1000/len(files) < SECONDS
    print(f"CDD-CESM: {len(data.images)} low-energy names read, {len(files)-len(low)} subtracted listed, of {len(files)}; {seconds*1000/len(files):.2f} CPU s for 1,000 files")


@pytest.fixture(scope="module")
def bmcd(tmp_path_factory):
    "The published names; marks on every third view of a suspicious case, none on normal ones."
    root, files = tmp_path_factory.mktemp("bmcd"), [n for n in names("bmcd_tree.txt", "") if re.search(r"_cases/\d+/", n)]
    for k, name in enumerate(files):
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        if name.lower().endswith(".dcm"): write_dicom(root/name, np.zeros((64, 48), np.uint8), ImageLaterality="L")
        else:
            marks = np.zeros((64, 48), np.uint8)
            if "Suspicious" in name and k % 3 == 0: marks[20:28, 10:20] = 255
            Image.fromarray(marks).save(root/name, format="JPEG", quality=95)
    for case, rating in (("Normal_cases", 1), ("Suspicious_cases", 5)):
        rows = [[""]*3]*2 + [["Folder #", "BI-RADS", "BI-RADS categories for breast density"]] + [[n, rating, "b"] for n in range(1, 51)]
        pd.DataFrame(rows).to_csv(root/f"{case}.csv", index=False, header=False)
    return root, files


def test_bmcd_name_by_name(bmcd):
    root, files = bmcd
    data, seconds = timed(read_bmcd, root)
    assert len(files) == 800 and len(data.images) == 400 and data.images.patient_id.nunique() == 100
    assert counted(data, "misspelt name", "note") == 4 and not (data.skipped.kind == "skipped").any()
    marked = [n for k, n in enumerate(files) if "Suspicious" in n and k % 3 == 0 and not n.lower().endswith(".dcm")]
    assert len(data.lesions) == len(marked) and data.images.normal.sum() == 200
    assert seconds*1000/len(files) < SECONDS
    print(f"BMCD: {len(data.images)} views and as many pictures of marks read, of {len(files)} names; {seconds*1000/len(files):.2f} CPU s for 1,000 files")
