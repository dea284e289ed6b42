"Hostile packages by mutation: every way in gives a generator or a typed error, in bounded memory, and takes nothing from outside."
import json
import resource
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from mammo_nb.core import MammoError, WeightsError, rng, torch_rng
from mammo_nb.gans.adopt import import_generator
from mammo_nb.gans.blocks import DCGANGenerator
from mammo_nb.gans.fit import take_generator
from mammo_nb.gans.package import export_generator, main_import
from mammo_nb.gans.share import load_generator, patient_card, sample_generator, save_generator

SECRET = "a file of this machine that nobody handed over"
VALUES = [None, True, -1, 0, 1, 7, 10**9, 10**40, -.5, 1e300, "", "x", "../../etc", "\ud800", "a"*5000, [], [[]], [1, 1], [2, 1],
          [0, 1], ["x"], [None], [10**6]*9, [64]*40, {}, {"a": 1}, {"epoch": "x"}, {"kind": "dcgan", "nz": 10**5, "widths": [10**5]*3},
          {"kind": "singan", "shapes": [[9999, 9999]], "factor": .5, "widths": [4096]}, {"kind": "context", "size": 65536}]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A package of ours with what a package holds, and a secret beside it."
    home = tmp_path_factory.mktemp("door")
    G = DCGANGenerator(nz=6, widths=(8, 4), rng=torch_rng(0, "G"), std=.3)
    card = patient_card([f"bcdr:{i}" for i in range(9)], datasets=["bcdr"], scope="masses", source=dict(data="phantoms of a test"), training=dict(epoch=3, patches=9, seed=0))
    made = save_generator(home/"gan"/"snapshots"/"epoch-00003", G, card=card)
    package = export_generator(made, home/"pkg", license="mit", check=False)
    (home/"secret").write_text(SECRET)
    files = {f"pkg/{p.relative_to(package.folder)}": p.read_bytes() for p in package.folder.rglob("*") if p.is_file() and p.suffix != ".png"}
    return home, files


def places(value, path=()): # Every place in a JSON value
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for k,v in inner: yield from places(v, (*path, k))


def changed_json(text, g): # One to three values of a JSON file are replaced, removed or doubled
    told = json.loads(text)
    for _ in range(int(g.integers(1, 4))):
        path = list(places(told))[1:]
        *way, last = path[int(g.integers(len(path)))]
        at = told
        for k in way: at = at[k]
        if g.random() < .2: at.pop(last)
        else: at[last] = VALUES[int(g.integers(len(VALUES)))]
        if not isinstance(told, dict) or not told: break
    return json.dumps(told).encode()


def deep(g): return b'{"config": ' + b"["*int(g.integers(10, 10**5)) + b"}"


def flipped(data, g): # A few bytes changed, or cut off
    if g.random() < .3: return data[:int(g.integers(len(data)))]
    b = bytearray(data)
    for j in g.integers(min(len(b), 600), size=int(g.integers(1, 5))): b[j] ^= int(g.integers(1, 256))
    return bytes(b)


def other_head(data, g): # The list of tensors says something else
    n, = struct.unpack("<Q", data[:8])
    head = changed_json(data[8:8+n], g)
    length = int(g.choice([len(head), len(head)+8, 1 << 62, 0]))
    return struct.pack("<Q", length) + head + data[8+n:]


def huge_network(files, g): # Card and weights agree on a network of many GB, or one whose patches are
    config = [dict(kind="dcgan", nz=60000, widths=[60000, 60000], act="relu"), dict(kind="dcgan", nz=1, widths=[1]*14, act="relu"),
              dict(kind="cgan", nz=9, classes=60000, emb=60000, base=60, widths=[9, 9], kernel=4, channels=1),
              dict(kind="context", size=32768)][int(g.integers(4))]
    told = json.loads(files["pkg/generator.json"])
    files["pkg/generator.json"] = json.dumps(told | dict(config=config)).encode()


def mutate(files, g): # In place
    name = ["pkg/generator.json", "pkg/metadata.json"][int(g.random() < .2)]
    weights, way = files["pkg/G.safetensors"], int(g.integers(8))
    if way <= 3: files[name] = changed_json(files[name], g)
    if way == 4: files["pkg/G.safetensors"] = other_head(weights, g)
    if way == 5: huge_network(files, g)
    if way == 6: files[name] = flipped(files[name], g) if g.random() < .5 else deep(g)
    if way == 7: files["pkg/G.safetensors"] = flipped(weights, g)
    if g.random() < .2: files.pop("pkg/generator.json", None)       # as a medigan package, or bare weights
    if g.random() < .1: files[["../out", "/etc/x", "pkg/a\\b", "pkg/\n"][int(g.integers(4))]] = b"x"


def as_zip(path, files, g):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for k,v in files.items(): z.writestr(k, v)
        if g.random() < .1: z.writestr("pkg/zeros.bin", bytes(1 << 24))
    data = path.read_bytes()
    if g.random() < .3: path.write_bytes(flipped(data[::-1], g)[::-1])       # the list stands at the end
    return path


def as_folder(path, files, g, secret):
    for k,v in files.items():
        f = path/Path(k).name
        f.parent.mkdir(parents=True, exist_ok=True)
        try: f.write_bytes(v)
        except OSError: pass                                               # a name this disk cannot hold
    target = [secret, secret.parent, Path("/etc"), Path("/dev/zero")][int(g.integers(4))]
    if g.random() < .3:
        link = path/["more.json", "G.safetensors", "generator.json", "sub"][int(g.integers(4))]
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    return path


def enter(i, home, files, tmp): # One hostile package through one of the three ways -> what happened
    g = rng(0, "hostile", i)
    files, tmp = dict(files), tmp/f"{i}"
    tmp.mkdir()
    mutate(files, g)
    way = ("zip", "folder", "handed over")[i % 3]
    if way == "zip": given = as_zip(tmp/"p.zip", files, g)
    else: given = as_folder(tmp/"p", files, g, home/"secret")
    if way == "handed over":
        for name in ("metadata.json", "__init__.py"): (given/name).unlink(missing_ok=True)
    try:
        if way == "handed over": take_generator(tmp/"out", path=given, patients=["a:1"])
        else: import_generator(given, into=tmp/"out", license="" if g.random() < .5 else "mit", arch="dcgan")
        got = "taken"
    except MammoError as e:
        got = type(e).__name__
        assert way == "handed over" or not (tmp/"out").exists(), "nothing was left behind"
    kept = [p for p in (tmp/"out").rglob("*") if p.is_file()]
    assert {p.name for p in kept} <= {"G.safetensors", "generator.json", "origin.json"}, kept
    assert not any(SECRET.encode() in p.read_bytes() for p in kept), "something came from outside"
    if got == "taken":
        for folder in {p.parent for p in kept if p.name == "G.safetensors"}: sample_generator(folder, 2, seed=0)
    shutil.rmtree(tmp)
    return f"{way}: {got}"


def attack(n, home, files, tmp):
    before, said = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
    for i in range(n):
        try: got = enter(i, home, files, tmp)
        except Exception as e: raise AssertionError(f"package {i}: untyped {type(e).__name__}: {e}") from e
        said[got] = said.get(got, 0) + 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{n} hostile packages: {dict(sorted(said.items()))}; memory grew by {grown:.0f} MB")
    assert grown < 500, f"memory grew by {grown:.0f} MB"
    assert sum(k.endswith("taken") for k in said) < len(said), "an attack that is never refused tests nothing"


@pytest.mark.filterwarnings("ignore")
def test_100_hostile_packages(home, tmp_path, monkeypatch):
    monkeypatch.setenv("MAMMO_NB_CACHE", str(tmp_path/"cache"))
    attack(100, *home, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_1000_hostile_packages(home, tmp_path, monkeypatch):
    monkeypatch.setenv("MAMMO_NB_CACHE", str(tmp_path/"cache"))
    attack(1000, *home, tmp_path)


def test_a_small_text_cannot_ask_for_gigabytes(tmp_path):
    "The 300 bytes that took 2.8 GB."
    config = dict(kind="dcgan", nz=100, widths=[8192, 8192, 2048], act="relu", slope=.2, channels=1)
    (tmp_path/"g").mkdir()
    (tmp_path/"g"/"generator.json").write_text(json.dumps(dict(config=config, license="mit")))
    shutil.copy(save_generator(tmp_path/"s", DCGANGenerator(nz=6, widths=(8, 4)))/"G.safetensors", tmp_path/"g")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for way in (lambda: import_generator(tmp_path/"g", into=tmp_path/"o"), lambda: take_generator(tmp_path/"t", path=tmp_path/"g", patients=[])):
        with pytest.raises(WeightsError, match="the network needs"): way()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024 < 60


def test_new_weights_under_the_old_name_are_noticed(tmp_path, monkeypatch):
    "Same folder, same name, same size: the import is made anew."
    from safetensors.torch import save_file
    monkeypatch.setenv("MAMMO_NB_CACHE", str(tmp_path/"cache"))
    got = []
    (tmp_path/"given").mkdir()
    for seed in (0, 1):
        G = DCGANGenerator(nz=6, widths=(8, 4), rng=torch_rng(seed, "G"), std=.3)
        save_file(dict(G.state_dict()), tmp_path/"given"/"weights.safetensors")
        got.append(import_generator(tmp_path/"given", license="mit", arch="dcgan", value_range=(-1, 1)))
        assert torch.equal(load_generator(got[-1]).layers[0].weight, G.layers[0].weight)
    assert got[0] != got[1]


def test_black_is_below_white(tmp_path, capsys):
    file = tmp_path/"w.safetensors"
    file.write_bytes((save_generator(tmp_path/"s", DCGANGenerator(nz=6, widths=(8, 4)))/"G.safetensors").read_bytes())
    assert main_import([str(file), "--into", str(tmp_path/"o"), "--license", "mit", "--arch", "dcgan", "--value-range", "1,1"]) == 1
    assert "is not below white" in capsys.readouterr().err
    with pytest.raises(MammoError, match="black below white"):
        import_generator(file, into=tmp_path/"o", license="mit", arch="dcgan", value_range=(1, 1))
    assert not (tmp_path/"o").exists()
