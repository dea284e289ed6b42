"""Broken files: any byte flip, cut, wrong length or foreign content gives a typed error with path and reason, or a listed skip; never another exception, a hang, or
unbounded memory. The mutations run in a process of their own with a capped address space, so that a crash of a decoder would be seen too."""
import csv, io, os, re, resource, shutil, signal, subprocess, sys, tempfile, time, warnings, zipfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from mammo_nb.core import MammoError, repo_root
from mammo_nb.data.bcdr import bcdr_name, bcdr_outline
from mammo_nb.data.bmcd import bmcd_name
from mammo_nb.data.cbis import mask_boxes, parse_cbis_path
from mammo_nb.data.cesm import cesm_class, cesm_name, cesm_type, via_points
from mammo_nb.data.dmid import dmid_circle, dmid_type
from mammo_nb.data.embed import embed_boxes, stem_of
from mammo_nb.data.folder import parse_polygon
from mammo_nb.data.inbreast import inbreast_name, parse_point, roi_type
from mammo_nb.data.mias import circle_box
from mammo_nb.data.omidb import mark_box, mark_label, mark_type
from mammo_nb.data.rows import birads_of, class_by_birads, density_of, screening_view
from mammo_nb.data.rsna import rsna_flag
from mammo_nb.data.table import inside, label_of, number_of, outline_box, side_of, view_of, word

LIMIT_S, WALL_S = 5, 300 # One mutated file may take so much time of the processor, and of the clock where others use the machine too
SPARE = 1_200_000_000 # Bytes of address space above what the process has after its imports


# ---------------------------------------------------------------- small properties
anything = st.one_of(st.none(), st.text(max_size=60), st.floats(), st.integers(-10**12, 10**12), st.booleans())
number = st.floats(-1e6, 1e6)


@given(st.lists(st.tuples(st.floats(allow_nan=True), st.floats(allow_infinity=True)), max_size=8), st.integers(1,5000), st.integers(1,5000))
@settings(max_examples=300, deadline=None)
def test_outline_box_never_leaves_the_image(points, rows, cols):
    b = outline_box(points, rows=rows, cols=cols)
    if b is None: return
    x0,y0,x1,y1 = b
    assert 0<=x0<x1<=cols and 0<=y0<y1<=rows
    for x,y in points:
        if 0<=x<cols and 0<=y<rows: assert x0<=x<x1 and y0<=y<y1          # no point of the lesion inside the image is lost


@given(anything, anything, anything, anything, st.integers(1,5000), st.integers(1,5000))
@settings(max_examples=200, deadline=None)
def test_mark_box_never_leaves_the_image(a, b, c, d, rows, cols):
    box = mark_box(dict(X1=a,X2=b,Y1=c,Y2=d), rows=rows, cols=cols)
    assert box is None or (0<=box[0]<box[2]<=cols and 0<=box[1]<box[3]<=rows)


@given(anything)
@settings(max_examples=300, deadline=None)
def test_words_never_raise(x):
    assert view_of(x) in ("CC","MLO","other") and label_of(x) in ("benign","malignant","unknown")
    assert side_of(x) in ("L","R") or side_of(x)!=side_of(x)
    n = number_of(x, 1, 4); assert n!=n or 1<=n<=4
    t = word(x); roi_type(t); inbreast_name(t); bcdr_name(t); bcdr_outline(t, t); parse_polygon(t); parse_cbis_path(t); parse_point(t)
    mark_type({t:x}); assert mark_label({"BIOPSYWIDE":{"L":x,"left_opinion":x}}, "L", ["1"])[0] in ("benign","malignant","unknown")


@given(anything, st.dictionaries(st.sampled_from(["name","cx","cy","r","rx","ry","theta","x","y","width","height","all_points_x","all_points_y"]),
    st.one_of(anything, st.sampled_from(["polygon","ellipse","circle","rect","point"]), st.lists(anything, max_size=4)), max_size=8), st.integers(1,5000))
@settings(max_examples=300, deadline=None)
def test_words_and_shapes_of_the_newer_sets(x, shape, size):
    t = word(x)
    assert screening_view(x) in ("CC","MLO","other") and class_by_birads(birads_of(x)) in ("benign","malignant","unknown") and rsna_flag(t) in (True,False,None)
    d = density_of(x); assert d!=d or 1<=d<=4
    bmcd_name(t); dmid_type(t); dmid_circle(dict(x=x, y=t, radius=x), size)
    cesm_name(t); embed_boxes(t); stem_of(t); cesm_type([t]); assert cesm_class([t]) in ("normal","benign","malignant","unknown")
    box = outline_box(via_points(shape), rows=size, cols=size)
    assert box is None or (0<=box[0]<box[2]<=size and 0<=box[1]<box[3]<=size)


@given(st.lists(st.sampled_from(["..",".","a","b c","/","\\","\0","~","C:","\n"]), max_size=8))
@settings(max_examples=300, deadline=None)
def test_paths_stay_inside(parts):
    root = Path(tempfile.gettempdir()).resolve()/"fuzz_root"
    p = inside(root, "/".join(parts))
    assert p is None or (p!=root and root in p.parents)


@given(st.integers(0,30), st.integers(0,30), st.integers(1,40), st.integers(1,40), st.integers(0,2**32-1))
@settings(max_examples=100, deadline=None)
def test_mask_box_is_the_rectangle(x, y, w, h, seed):
    m = np.zeros((90,80), np.uint8); m[y:y+h, x:x+w] = 255
    m[y:y+h, x:x+w][np.random.default_rng(seed).random((h,w))<.1] = 0      # small holes
    if not (m>0).any(): return
    ys, xs = np.nonzero(m)
    b = mask_boxes(m)[0]
    assert b[0]>=xs.min() and b[2]<=xs.max()+1 and b[1]>=ys.min() and b[3]<=ys.max()+1
    if w>4 and h>4: assert (b[2]-b[0])*(b[3]-b[1])>=.8*(np.ptp(xs)+1)*(np.ptp(ys)+1)


def test_circle_box_clips():
    assert circle_box((-50,5,10), rows=100, cols=100) is None and circle_box((5,5,0), rows=100, cols=100) is None


# ---------------------------------------------------------------- mutated files
def view(side, name, lesions=()):
    g = np.random.default_rng(len(lesions))
    x = np.zeros((104,80), np.float32); x[10:90,:50] = .3+.2*g.random((80,50))
    return SimpleNamespace(pixels=x, side=side, view=name, density=2, birads="5" if lesions else "1", spacing_mm=.28, bits=14, device="film", lesions=list(lesions))


def base_trees(root):
    "A tiny tree of each layout, some DICOMs compressed; (layout, folder, reader)."
    from mammo_nb.data import lookalike as a, lookalike2 as b, lookalike3 as c, lookalike4 as d, readers
    sq = lambda x,y,kind,label: dict(box=(x,y,x+14,y+16), polygon=[(x,y),(x+13,y),(x+13,y+15),(x,y+15)], type=kind, label=label)
    les = [sq(20,30,"mass","malignant"), sq(10,60,"calcification","benign")]
    women = [({"age":50}, [view(s, v, les if (s,i)!=("R",0) else []) for s in "LR" for v in ("CC","MLO")]) for i in range(2)]
    out = [("inbreast", a.write_inbreast(women, root/"inbreast", quirks=True)), ("bcdr", a.write_bcdr_tree(women, root/"bcdr", quirks=True)), ("folder", a.write_folder(women, root/"folder", quirks=True)),
           ("cbis", b.write_cbis(women[:1], root/"cbis", quirks=True)), ("cbis", b.write_cbis(women[:1], root/"kaggle", form="jpeg", quirks=True)), ("omidb", b.write_omidb(women, root/"omidb", quirks=True)),
           ("mias", b.write_mias(women[:1], root/"mias", quirks=True)), ("vindr", b.write_vindr(women, root/"vindr", quirks=True)),
           ("cmmd", c.write_cmmd(women, root/"cmmd", quirks=True)), ("cesm", c.write_cesm(women, root/"cesm", quirks=True)), ("rsna", c.write_rsna(women, root/"rsna", quirks=True)),
           ("embed", c.write_embed(women, root/"embed", quirks=True)), ("csaw", c.write_csaw(women, root/"csaw", quirks=True)),
           ("bmcd", d.write_bmcd(women, root/"bmcd", quirks=True)), ("dmid", d.write_dmid(women, root/"dmid", quirks=True))]
    if find_spec("openpyxl"):
        out += [("cesm", c.write_cesm(women, root/"workbook", suffix=".xlsx")), ("bmcd", d.write_bmcd(women, root/"bmcd_book", suffix=".xlsx")),
                ("dmid", d.write_dmid(women, root/"dmid_book", suffix=".xlsx"))]
    dicoms = sorted((root/"inbreast").rglob("*.dcm"))
    compress(dicoms[:3]); add_display(dicoms[3], dicoms[4])
    (root/"folder"/"patches.csv").write_text("path,patient_id,target,lesion_type,label\nimages/p0000_L_CC.png,1,lesion,mass,benign\nimages/p0000_R_CC.png,2,healthy,,\n")
    return [(l, p, readers.READERS[l]) for l,p in out]


def add_display(one, two):
    "A window, padding and rescaling in one file, a VOI table in another."
    import pydicom
    from pydicom.dataset import Dataset
    ds = pydicom.dcmread(one)
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction, ds.RescaleSlope, ds.RescaleIntercept, ds.PixelPaddingValue, ds.PixelPaddingRangeLimit = [4000,3000], [5000,4000], "SIGMOID", 1, 0, 0, 5
    for k in ("PixelPaddingValue","PixelPaddingRangeLimit"): ds[k].VR = "US"
    ds.save_as(one)
    lut = Dataset(); lut.LUTDescriptor = [4096,0,12]; lut.LUTData = np.arange(4096,dtype="<u2").tobytes(); lut["LUTData"].VR, lut["LUTDescriptor"].VR = "OW", "US"
    ds = pydicom.dcmread(two); ds.VOILUTSequence = [lut]; ds.save_as(two)


def compress(paths):
    import pydicom
    from pydicom.uid import RLELossless
    ds = pydicom.dcmread(paths[0]); ds.compress(RLELossless); ds.save_as(paths[0], enforce_file_format=True)
    try: import gdcm
    except ImportError: return
    for p,kind in zip(paths[1:], (gdcm.TransferSyntax.JPEGLosslessProcess14_1, gdcm.TransferSyntax.JPEG2000Lossless)):
        r = gdcm.ImageReader(); r.SetFileName(str(p)); r.Read()
        c = gdcm.ImageChangeTransferSyntax(); c.SetTransferSyntax(gdcm.TransferSyntax(kind)); c.SetInput(r.GetImage()); c.Change()
        w = gdcm.ImageWriter(); w.SetFileName(str(p)); w.SetFile(r.GetFile()); w.SetImage(c.GetOutput()); w.Write()


def mutate(b, g, others):
    "One fault: flipped bits, cut, repeated or removed block, a wrong length, zeros, foreign content, hostile text."
    b, n, kind = bytearray(b), len(b), g.integers(0,10)
    at = int(g.integers(0, max(1,min(n, 2000) if g.random()<.6 else n)))       # headers come first and matter most
    if kind<=2:
        for _ in range(int(g.integers(1,6))): b[min(n-1,int(at+g.integers(0,64)))] ^= 1<<int(g.integers(0,8))
    elif kind==3: b = b[:at]
    elif kind==4: b[at:at] = b[at:at+int(g.integers(1,400))]
    elif kind==5: del b[at:at+int(g.integers(1,400))]
    elif kind==6: b[at:at+4] = [b"\xff\xff\xff\xff", b"\xfe\xff\xff\x7f", b"\0\0\0\0", b"\xff\xff\xff\x7f"][int(g.integers(0,4))]
    elif kind==7: b[at:at+200] = bytes(min(200,max(0,n-at)))
    elif kind==8 and others: b = bytearray(others[int(g.integers(0,len(others)))].read_bytes())
    else:
        words = [b"../../../etc/passwd", b"-1", b"1e308", b"nan", b"\"", b";", b",", b"<!ENTITY x \"y\">", b"[[[[", b"\xc3\x28", b"999999999999999999999", b"null", b"\n", b"{}"]
        b[at:at] = words[int(g.integers(0,len(words)))]*int(g.choice([1,1,1,50,5000]))
    return bytes(b)


WORDS = dict(zip("0123456789", "null eins deux tres quattro 五 six sieben VIII nine".split()))


def swap(rows, g):
    "Two columns change places, their names stay."
    a, b = g.integers(0, len(rows[0]), 2)
    for r in rows[1:]:
        if max(a,b)<len(r): r[a], r[b] = r[b], r[a]


def share(rows, g):
    "A column gets one value in every row: one id for all images, one woman, one side."
    k = int(g.integers(0, len(rows[0])))
    for r in rows[1:]:
        if k<len(r): r[k] = rows[1][k] if k<len(rows[1]) else ""


def spell(rows, g):
    "The numbers of a column as words, as Roman numerals, with signs between thousands or a comma for the point."
    k, kind = int(g.integers(0, len(rows[0]))), int(g.integers(0, 3))
    for r in rows[1:]:
        if k<len(r): r[k] = ["".join(WORDS.get(c, c) for c in r[k]), r[k].replace(".", ","), re.sub(r"(\d)(\d{3})\b", r"\1,\2", r[k])][kind]


def blank(rows, g):
    "A third of a column's cells are empty, another third come in another case with blanks around."
    k = int(g.integers(0, len(rows[0])))
    for r in rows[1:]:
        if k<len(r): r[k] = ["", f" {r[k].swapcase()} ", r[k]][int(g.integers(0, 3))]


ENCODINGS = ("utf-16", "utf-8-sig", "latin-1", "cp1251", "cp037", "utf-7")


def mutate_table(b, g):
    "A table that is whole and wrong: swapped columns, shared ids, numbers as words, blanks, another encoding or separator."
    text = b.decode("utf-8", "replace")
    sep = ";" if text[:200].count(";")>text[:200].count(",") else ","
    rows = list(csv.reader(io.StringIO(text), delimiter=sep))
    kind = int(g.integers(0, 6))
    if len(rows)<2 or kind==4: return text.encode(ENCODINGS[int(g.integers(0, len(ENCODINGS)))], "replace")
    if kind<4: (swap, share, spell, blank)[kind](rows, g)
    out = io.StringIO(); csv.writer(out, delimiter="\t" if kind==5 else sep).writerows(rows)
    return out.getvalue().encode()


def mutate_workbook(b, g):
    "A workbook that unpacks, one part of it changed."
    parts = {}
    with zipfile.ZipFile(io.BytesIO(b)) as z: parts = {n: z.read(n) for n in z.namelist()}
    name = sorted(parts)[int(g.integers(0, len(parts)))]
    parts[name] = mutate(parts[name], g, [])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for n,content in parts.items(): z.writestr(n, content)
    return out.getvalue()


def mutant(p, whole, g, everything):
    if p.suffix==".csv" and g.random()<.5: return mutate_table(whole, g)
    if p.suffix==".xlsx" and g.random()<.7: return mutate_workbook(whole, g)
    return mutate(whole, g, everything)


def run(n, seed):
    "n mutations; prints every one that ends in anything but a table, a typed error or a listed skip; returns how many."
    from mammo_nb.data.pixels import read_image
    warnings.simplefilter("ignore")
    root = Path(tempfile.mkdtemp()); os.environ["MAMMO_NB_CACHE"] = str(root/"cache")
    trees = base_trees(root)
    files = {i: sorted(p for p in t[1].rglob("*") if p.is_file()) for i,t in enumerate(trees)}
    base = {i: t[2](t[1]) for i,t in enumerate(trees)}
    everything = [p for f in files.values() for p in f]
    used = int(Path("/proc/self/statm").read_text().split()[0])*4096
    resource.setrlimit(resource.RLIMIT_AS, (used+SPARE, used+SPARE))
    def late(*_): raise TimeoutError(f"more than {LIMIT_S} CPU s, or {WALL_S} s")
    for one in (signal.SIGPROF, signal.SIGALRM): signal.signal(one, late)
    g, bad, ends = np.random.default_rng(seed), 0, dict(read=0, refused=0)
    for k in range(n):
        i = int(g.integers(0,len(trees))); layout, tree, reader = trees[i]
        by_kind = {}
        for p in files[i]: by_kind.setdefault(p.suffix.lower(), []).append(p)                 # tables and pictures get the same share
        group = by_kind[sorted(by_kind)[int(g.integers(0,len(by_kind)))]]
        p = group[int(g.integers(0,len(group)))]; whole = p.read_bytes()
        p.write_bytes(mutant(p, whole, g, everything))
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S); signal.alarm(WALL_S); began = time.process_time()
        try:
            data = reader(tree); ends["read"] += 1
            if len(data.images)<len(base[i].images) and data.skipped.equals(base[i].skipped): bad += 1; print(f"#{k} {layout} {p.name}: images lost in silence")
        except MammoError as e:
            ends["refused"] += 1
            if not e.what or not e.where: bad += 1; print(f"#{k} {layout} {p.name}: error without path or reason: {e}")
        except Exception as e: bad += 1; print(f"#{k} {layout} {p}: reader raised {type(e).__name__}: {str(e)[:200]}"); trace(e)
        if re.search(r"\.(dcm|png|tif|jpg|pgm)$", p.name):
            for scaling in ("minmax","voi"):
                try: x = read_image(p, scaling=scaling); assert x.ndim==2 and x.dtype==np.uint8
                except MammoError as e: assert str(p) in str(e)
                except Exception as e: bad += 1; print(f"#{k} {layout} {p}: read_image raised {type(e).__name__}: {str(e)[:200]}"); trace(e)
        signal.setitimer(signal.ITIMER_PROF, 0); signal.alarm(0); p.write_bytes(whole)
        if time.process_time()-began>LIMIT_S: bad += 1; print(f"#{k} {layout} {p.name}: hung, and something swallowed the alarm")
    shutil.rmtree(root)
    print(ends, "bad:", bad)
    return bad


def trace(e):
    import traceback
    print("".join(traceback.format_tb(e.__traceback__)[-3:]))


def fuzz(n, seed):
    out = subprocess.run([sys.executable, __file__, str(n), str(seed)], capture_output=True, text=True, cwd=repo_root(), env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert out.returncode==0, (out.stdout+out.stderr)[-4000:]
    return out.stdout


def test_300_mutations():
    assert "bad: 0" in fuzz(300, 0)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_10000_mutations():
    for seed in range(1,11): assert "bad: 0" in fuzz(1000, seed)


if __name__ == "__main__":
    sys.exit(min(1, run(int(sys.argv[1]), int(sys.argv[2]))))
