"Boxes never leave the image or lose the lesion; the patch cache survives kills, rivals, broken files and damage."
import os, signal, subprocess, sys, textwrap, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings, strategies as st
from PIL import Image

from mammo_nb.core import DataError, rng
from mammo_nb.data import boxes, patches
from mammo_nb.data.boxes import Box
from mammo_nb.data.table import make_data

ROOT = Path(__file__).resolve().parents[1]
FAST = settings(max_examples=200, deadline=None, derandomize=True)

# ---- boxes -------------------------------------------------------------------------------------------------------------------------

@st.composite
def image_and_lesion(draw, least=1, most=1200):
    "Image size and a lesion box inside it."
    rows, cols = draw(st.integers(least, most)), draw(st.integers(least, most))
    x0, y0 = draw(st.integers(0, cols-1)), draw(st.integers(0, rows-1))
    return rows, cols, Box(x0, y0, draw(st.integers(x0+1, cols)), draw(st.integers(y0+1, rows)))

def inside(b, rows, cols): return 0 <= b.x0 < b.x1 <= cols and 0 <= b.y0 < b.y1 <= rows

@FAST
@given(image_and_lesion(), st.floats(0, 200), st.floats(1, 400))
def test_square_stays_in_and_keeps_the_lesion(case, margin, min_side):
    rows, cols, b = case
    c = boxes.square_around(b, rows=rows, cols=cols, margin=margin, min_side=min_side)
    assert inside(c, rows, cols) and c.w == c.h
    want = boxes.wanted_side(b, margin=margin, min_side=min_side)
    assert c.w == min(want, rows, cols)
    if max(b.w, b.h) <= c.w: assert c.holds(b)
    else: assert (c.x0 <= b.x0 and c.x1 >= b.x1) or b.w > c.w or c.meets(b)
    room = [b.x0-c.x0, c.x1-b.x1, b.y0-c.y0, c.y1-b.y1]
    if c.w == want and c.x0 > 0 and c.y0 > 0 and c.x1 < cols and c.y1 < rows: assert min(room) >= int(margin)-1     # the margin is there on every side

@FAST
@given(image_and_lesion(), st.integers(0, 10**6), st.floats(0, 100), st.floats(0, 2), st.floats(0, 2))
def test_jitter_stays_in_and_keeps_the_lesion(case, seed, margin, spread, shift):
    rows, cols, b = case
    assume(max(b.w, b.h) <= min(rows, cols))
    c = boxes.jitter_square(b, rng=rng(seed, "test"), rows=rows, cols=cols, margin=margin, min_side=16, jitter=boxes.Jitter(zoom=(.2, spread), shift=shift))
    assert inside(c, rows, cols) and c.w == c.h and c.holds(b)

@FAST
@given(image_and_lesion(least=16), st.integers(0, 10**6), st.integers(1, 4))
def test_other_rules_stay_in(case, seed, zoom):
    rows, cols, b = case
    z = boxes.zoomed_box(b, rows=rows, cols=cols, zoom=zoom)
    assert inside(z, rows, cols) and z.holds(b)
    r = boxes.reference_square(b, rows=rows, cols=cols, rng=rng(seed, "test"))
    assert r is None or inside(r, rows, cols)
    s = boxes.swap_axes(b, rows=rows, cols=cols) if max(b.w, b.h) <= min(rows, cols) else None
    assert s is None or (inside(s, rows, cols) and (s.w, s.h) == (b.w, b.h))
    x, y = boxes.random_inside(b, rng=rng(seed, "test"), polygon=[(b.x0, b.y0), (b.x1, b.y0), (b.x0, b.y1)])
    assert b.x0 <= x < b.x1 and b.y0 <= y < b.y1

@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(20, 90), st.integers(20, 90), st.integers(0, 10**6), st.floats(0, 1))
def test_tissue_rules_keep_their_promise(rows, cols, seed, share):
    g = rng(seed, "test")
    mask = np.zeros((rows, cols), bool); mask[:, :max(1, int(share*cols))] = True
    mask &= g.random(mask.shape) < .98
    t, air = boxes.area_table(mask), boxes.area_table(~mask)
    count = lambda b, m: m[b.y0:b.y1, b.x0:b.x1].mean()                                    # by slicing, not by the area table
    lesion = Box(2, 3, 8, 9)
    if (c := boxes.context_box(t, rng=g, size=16, avoid=(lesion,))): assert inside(c, rows, cols) and count(c, mask) >= .9 and not c.meets(lesion)
    if (c := boxes.context_box(t, rng=g, size=16, box=lesion)): assert count(c, mask) >= .9 and c.meets(lesion)
    if (row := boxes.contiguous_row(t, rng=g, n=3, size=10)):
        assert all(count(b, mask) >= .9 and inside(b, rows, cols) for b in row) and [b.x0 for b in row[1:]] == [b.x1 for b in row[:-1]]
    around = lambda b: boxes.square_around(b, rows=rows, cols=cols, margin=3, min_side=8)
    if (b := boxes.place_box(air, (5, 4), rng=g, crop=around, avoid=(lesion,))): assert count(around(b), ~mask) <= .4 and not around(b).meets(lesion)
    else: assert all(count(around(Box(x, y, x+5, y+4)), ~mask) > .4 or around(Box(x, y, x+5, y+4)).meets(lesion) for x in range(cols-4) for y in range(rows-3))
    assert all(count(b, mask) >= .5 and not b.meets(lesion) for b in boxes.grid_boxes(t, side=7, avoid=(lesion,)))
    img = np.where(mask, g.integers(1, 255, mask.shape), 0).astype(np.uint8)
    for b in boxes.thesis_tissue(img, seed=seed, lesions=(lesion,), size=8, min_grey=5): assert count(b, mask) == 1 and not b.meets(lesion)

# ---- a small data set as files -----------------------------------------------------------------------------------------------------

def paint(path, breast, i, lesion):
    img = np.where(breast, 90+rng(0, "toy", i).normal(0, 12, breast.shape), 0).clip(0, 250).astype(np.uint8)
    if lesion: x, y = lesion; img[y:y+20, x:x+24] = 251
    Image.fromarray(img).save(path)

def toy(folder, n=6, rows=240, cols=200, name="toy", write=True):
    "n healthy and n sick half-ellipse breasts as PNG."
    folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
    yy, xx = np.mgrid[:rows, :cols]; breast = ((xx/(.75*cols))**2 + ((yy-rows/2)/(.46*rows))**2) < 1
    images, lesions = [], []
    for i in range(2*n):
        x, y = int(.2*cols)+i%20, int(.45*rows)
        if write: paint(folder/f"{i:03d}.png", breast, i, (x, y) if i >= n else None)
        images.append(dict(image_id=f"{name}:{i:03d}", patient_id=f"{name}:p{i//2}", path=str(folder/f"{i:03d}.png"), laterality="L", view="CC", rows=rows, cols=cols,
                           device="digital", normal=i < n, has_lesion=i >= n))
        if i >= n: lesions.append(dict(image_id=f"{name}:{i:03d}", lesion_id="1", x0=x, y0=y, x1=x+24, y1=y+20, lesion_type="mass", label="benign"))
    return make_data(name, images, lesions)

def plan_of(data, healthy=12): return patches.lesion_patches(data, scale=.25) + patches.healthy_patches(data, healthy, seed=0, scale=.25)

@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch): monkeypatch.setenv("MAMMO_NB_CACHE", str(tmp_path/"cache"))

def test_each_image_is_read_once_for_all_classes_views_and_sizes(tmp_path, monkeypatch):
    data, seen = toy(tmp_path/"d"), []
    read = patches.read_image
    monkeypatch.setattr(patches, "read_image", lambda p, **k: seen.append(p) or read(p, **k))
    sets = patches.extract(plan_of(data) + patches.lesion_patches(data, rule="zoom", zoom=2), size=(32, 48), views=3)
    assert sorted(seen) == sorted(set(data.images.path)) and {s: p.pixels.shape for s, p in sets.items()} == {32: (24, 3, 32, 32), 48: (24, 3, 48, 48)}
    patches.extract(plan_of(data) + patches.lesion_patches(data, rule="zoom", zoom=2), size=(32, 48), views=3)
    assert len(seen) == 12                                                                  # the second time from the cache

def test_pixels_are_the_mean_of_what_they_cover(tmp_path):
    "Area interpolation against a plain mean of 2 x 2 blocks, at the place the table names."
    data = toy(tmp_path/"d", n=2)
    ps = patches.extract(patches.lesion_patches(data, margin=0, min_side=64), size=32)
    for p, r in zip(ps.pixels, ps.table.itertuples()):
        img = np.asarray(Image.open(data.images.set_index("image_id").path[r.image_id])).astype(float)
        img = np.rint(img*255/img.max())                                                     # min-max of the whole image
        want = img[r.y0:r.y1, r.x0:r.x1].reshape(32, 2, 32, 2).mean((1, 3))
        assert r.side_px == 64 and np.abs(p[0]-want).max() <= .5+1e-3
        assert r.background == pytest.approx((img[r.y0:r.y1, r.x0:r.x1] <= 10).mean())

def test_key_is_content_not_place_or_date(tmp_path):
    a, b = toy(tmp_path/"a", n=2), toy(tmp_path/"b", n=2)
    for p in b.images.path: os.utime(p, (1, 1))
    key = lambda d, **k: patches.plan_key(plan_of(d), patches.source_hashes(d.images.path), **{**dict(sizes=(32,), views=1, seed=0), **k})
    assert key(a) == key(b)
    assert len({key(a), key(a, seed=1), key(a, views=2), key(a, sizes=(32, 64))}) == 4
    first = key(b)
    img = np.asarray(Image.open(b.images.path[0])).copy(); img[5, 5] ^= 1; Image.fromarray(img).save(b.images.path[0])
    assert key(b) != first

def test_order_of_plan_and_threads_change_nothing(tmp_path):
    data = toy(tmp_path/"d")
    a = patches.extract(plan_of(data), size=24, views=2, threads=1, folder=tmp_path/"one")
    b = patches.extract(plan_of(data), size=24, views=2, threads=8, block_mb=.001, folder=tmp_path/"two")
    np.testing.assert_array_equal(a.pixels, b.pixels); pd.testing.assert_frame_equal(a.table, b.table)
    plan = plan_of(data); plan.rows = plan.rows.sample(frac=1, random_state=0).reset_index(drop=True)
    c = patches.extract(plan, size=24, views=2, folder=tmp_path/"three")
    i = c.table.reset_index().set_index("patch_id")["index"].reindex(a.table.patch_id).to_numpy()
    np.testing.assert_array_equal(a.pixels, c.pixels[i])

# ---- kills, rivals, damage ---------------------------------------------------------------------------------------------------------

WORKER = textwrap.dedent("""
    import sys, time
    sys.path.insert(0, {tests!r})
    from test_patches import toy, plan_of
    from mammo_nb.data import patches
    read, log = patches.read_image, open({log!r}, "a")
    def slow(p, **k): log.write(p+"\\n"); log.flush(); time.sleep({wait}); return read(p, **k)
    patches.read_image = slow
    ps = patches.extract(plan_of(toy({folder!r}, write=False)), size=24, views=2, threads=1, block_mb=.001)
    print(len(ps), patches.hash_of(ps.pixels))
""")

def start(folder, log, wait):
    code = WORKER.format(tests=str(ROOT/"tests"), log=str(log), wait=wait, folder=str(folder))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS":"1"})

def test_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    data = toy(tmp_path/"d")
    clean = patches.extract(plan_of(data), size=24, views=2, folder=tmp_path/"clean")
    log = tmp_path/"reads"
    p = start(tmp_path/"d", log, .3)
    for _ in range(600):
        if log.is_file() and len(log.read_text().splitlines()) >= 4: break
        time.sleep(.1)
    p.send_signal(signal.SIGKILL); p.wait()
    done = len(list((tmp_path/"cache"/"patches").glob("*/parts/0*.npz")))
    assert 3 <= done < 12 and not list((tmp_path/"cache"/"patches").glob("*/manifest.json"))
    before = len(log.read_text().splitlines())
    out, _ = start(tmp_path/"d", log, 0).communicate(timeout=120)
    again = patches.extract(plan_of(data), size=24, views=2)
    np.testing.assert_array_equal(again.pixels, clean.pixels); pd.testing.assert_frame_equal(again.table, clean.table)
    assert out.split()[0] == "18" and len(log.read_text().splitlines())-before == 12-done      # only what was missing was read
    assert not list((tmp_path/"cache"/"patches").glob("*/parts"))

def test_two_processes_share_one_extraction(tmp_path):
    data, log = toy(tmp_path/"d"), tmp_path/"reads"
    a, b = start(tmp_path/"d", log, .05), start(tmp_path/"d", log, .05)
    outs = [p.communicate(timeout=180)[0] for p in (a, b)]
    assert outs[0] == outs[1] and outs[0].startswith("18 ") and len(log.read_text().splitlines()) == 12

@pytest.mark.parametrize("harm", ["flip", "cut", "no table", "no manifest", "half a manifest"])
def test_damaged_cache_is_noticed_and_made_again(tmp_path, harm):
    data = toy(tmp_path/"d", n=2)
    good = np.array(patches.extract(plan_of(data), size=16).pixels)
    home, = (tmp_path/"cache"/"patches").glob("*/")
    px = home/"pixels_16.npy"; raw = bytearray(px.read_bytes())
    if harm == "flip": raw[-5] ^= 255; px.write_bytes(raw)
    if harm == "cut": px.write_bytes(raw[:-40])
    if harm == "no table": (home/"table.json").unlink()
    if harm == "no manifest": (home/"manifest.json").unlink()
    if harm == "half a manifest": (home/"manifest.json").write_text((home/"manifest.json").read_text()[:40])
    with pytest.raises(DataError, match="not a whole patch set"): patches.PatchSet.load(home, pixels="pixels_16.npy")
    np.testing.assert_array_equal(patches.extract(plan_of(data), size=16).pixels, good)

# ---- broken input ------------------------------------------------------------------------------------------------------------------

HARM = dict(empty=lambda b: b"", cut=lambda b: b[:len(b)//2], text=lambda b: b"not an image", dicom=lambda b: b"\0"*128+b"DICM"+b[:50], flipped=lambda b: b[:30]+bytes(255-c for c in b[30:90])+b[90:])

def spoil(data, every, start=0):
    "Break every n-th file another way; the paths."
    bad = []
    for k, p in enumerate(data.images.path[start::every]):
        kind = [*HARM, "gone"][k % (len(HARM)+1)]
        if kind == "gone": Path(p).unlink()
        else: Path(p).write_bytes(HARM[kind](Path(p).read_bytes()))
        bad.append(p)
    return bad

def test_every_broken_file_is_listed_and_the_rest_is_cut(tmp_path):
    data = toy(tmp_path/"d", n=12)
    bad = spoil(data, 4)
    ps = patches.extract(plan_of(data), size=16)
    listed = {f.split(" [")[0] for f in ps.skipped.file}
    assert listed == set(bad) and ps.skipped.reason.str.len().min() > 5
    assert len(ps) == 24-int(ps.skipped["count"].sum()) == 18

def test_nothing_readable_is_a_typed_error(tmp_path):
    data = toy(tmp_path/"d", n=1); spoil(data, 1)
    with pytest.raises(DataError, match="no patch could be cut"): patches.extract(plan_of(data, 2), size=16)

def test_lesion_of_another_image_is_a_listed_skip(tmp_path):
    data = toy(tmp_path/"d", n=2)
    data.lesions.loc[0, ["x0", "x1"]] = [500., 540.]                                          # a mask that lies outside its image
    ps = patches.extract(patches.lesion_patches(data, scale=.25), size=16)
    assert len(ps) == 1 and "outside the image" in ps.skipped.reason[0]

def test_full_disk_loses_nothing_finished(tmp_path, monkeypatch):
    import errno
    from mammo_nb.core import RunError
    data, n = toy(tmp_path/"d"), []
    real = np.savez
    def full(*a, **k):
        n.append(1)
        if len(n) > 5: raise OSError(errno.ENOSPC, "No space left on device")
        return real(*a, **k)
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(RunError, match="disk is full"): patches.extract(plan_of(data), size=16, threads=1, block_mb=.0001)
    assert len(list((tmp_path/"cache"/"patches").glob("*/parts/*.npz"))) == 5
    monkeypatch.setattr(np, "savez", real)
    assert len(patches.extract(plan_of(data), size=16, threads=1, block_mb=.0001)) == 18

# ---- fair classes ------------------------------------------------------------------------------------------------------------------

def test_healthy_patches_have_the_lesions_sizes_and_little_air(tmp_path):
    data = toy(tmp_path/"d", n=8)
    ps = patches.extract(plan_of(data, 40), size=32, views=4)
    t = ps.table
    assert set(t.side_px[t.target == 0]) == set(t.side_px[t.target == 1]) == {54}              # 24 + 2 * 15
    assert (t.background[t.target == 0] <= .4).all() and t.dataset.eq("toy").all()
    air = (ps.pixels[ps.y == 0] <= 10).mean((2, 3))
    assert air.max() < .46                                                                     # jittered views too; the edge blurs when it is shrunk

# ---- slow and real ----------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_thousand_files_five_percent_broken(tmp_path):
    data = toy(tmp_path/"d", n=500)
    bad = spoil(data, 20)
    ps = patches.extract(plan_of(data, 1000), size=64)
    assert len(bad) == 50 and {f.split(" [")[0] for f in ps.skipped.file} == set(bad)
    assert len(ps)+int(ps.skipped["count"].sum()) == 1500

@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    code = ("import sys, resource; sys.path.insert(0,{t!r}); from test_patches import plan_of, toy; from mammo_nb.data import patches\n"
            "d=toy({f!r}, n={n}, rows=1200, cols=1000, write=False); patches.extract(plan_of(d,8*{n}), size=128, views=4, threads=2, block_mb=4)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    def peak(n):
        toy(tmp_path/f"d{n}", n=n, rows=1200, cols=1000)
        return int(subprocess.run([sys.executable, "-c", code.format(t=str(ROOT/"tests"), f=str(tmp_path/f"d{n}"), n=n)], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()[-1])
    small, large = peak(5), peak(100)
    assert large-small < 60_000, (small, large)                                                # kB; the 900 patches alone are 59 MB on disk

@pytest.mark.data
def test_real_masses_become_patches_with_the_labels_of_the_tables(tmp_path):
    from mammo_nb.data.readers import read_any
    data = read_any(ROOT.parent/"shared"/"data")
    masses = next(d for d in data.values() if d.patches is not None)
    ps = patches.extract(patches.ready_patches(masses), size=128)
    assert ps.pixels.shape == (1698, 1, 128, 128) and not len(ps.skipped)
    csv = pd.read_csv(ROOT.parent/"shared"/"data"/"cbis_mass_patches"/"labels.csv")
    assert ps.table.label.value_counts().to_dict() == {"benign":914, "malignant":784} and ps.table.patient_id.nunique() == 892 == csv.patient_id.nunique()
    first = np.asarray(Image.open(masses.patches.path[0]))
    np.testing.assert_array_equal(ps.pixels[0, 0], first)                                      # 128 px files are taken as they are
