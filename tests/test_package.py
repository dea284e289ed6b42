"A generator handed on and taken in: the same patches on every way, and nothing foreign is run, half-read or half-written."
import io, json, os, pickle, subprocess, sys, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mammo_nb.core import DataError, LeakError, MammoError, ParameterError, RunError, WeightsError, read_json, rng, torch_rng, write_json
from mammo_nb.gans import adopt, folder, package
from mammo_nb.gans.adopt import Parcel, as_generator, import_generator, read_weights
from mammo_nb.gans.blocks import DCGANGenerator
from mammo_nb.gans.door import Bounds
from mammo_nb.gans.package import drawn_by, export_generator, export_run, main_export, main_import
from mammo_nb.gans.share import load_generator, patient_card, sample_generator, save_generator
from mammo_nb.gans.singan import SinGAN

ROOT = Path(__file__).resolve().parents[1]
LEAN = ("mammo_nb","fastai","fastcore","pandas","matplotlib","sklearn","timm","scipy","PIL","torchvision","tqdm","filelock","yaml","requests","huggingface_hub","pydicom") # what a package may not need

def lively(seed=0, **kw): return DCGANGenerator(**{**dict(nz=6, widths=(8,4), rng=torch_rng(seed, "G"), std=.3), **kw})

@pytest.fixture
def snapshot(tmp_path):
    "A generator of ours with a card that knows too much."
    card = patient_card([f"bcdr:{i}" for i in range(30)], datasets=["bcdr"], scope="masses", source=dict(data="phantoms of a test"), training=dict(epoch=12, patches=40, images_seen=480, seed=0), patch_id="bcdr:7/secret.dcm")
    return save_generator(tmp_path/"snapshots"/"epoch-00012", lively(), card=card)

@pytest.fixture
def parcel(snapshot, tmp_path): return export_generator(snapshot, tmp_path/"pkg", license="mit", check=False)

def stirred(net, scale=.3): # Other weights than those a network starts with, so that pictures are not flat
    g = torch_rng(1, "stir")
    with torch.no_grad():
        for p in net.parameters(): p.normal_(0, scale if p.dim() > 1 else .2, generator=g)
    return net

def small_pyramid():
    "A pyramid whose weights do not hang on what ran before, with a last layer strong enough to show."
    with torch.random.fork_rng():
        torch.manual_seed(0); net = SinGAN(((12,14), (16,18)), factor=.75, widths=(4,4), amps=(1., .5))
    with torch.no_grad():
        for g in net.G: [m for m in g.modules() if isinstance(m, torch.nn.Conv2d)][-1].weight.mul_(5)
    return net

def make(kind, folder):
    "One small generator of each kind the five papers have."
    if kind == "singan": return small_pyramid().save(folder, dict(patient_id="bcdr:1", image_hash="ab", recipe={"steps": 1}, seed=0))
    if kind == "dcgan": return save_generator(folder, lively())
    if kind == "wgangp": return save_generator(folder, lively(2), card=dict(training=dict(recipe=dict(penalty=10.)), value_range=[0.,1.]))
    if kind == "thesis": return save_generator(folder, lively(act="leaky", widths=(9,8,4)))
    if kind == "cgan":
        from mammo_nb.gans.cgan import CGANGenerator
        return save_generator(folder, stirred(CGANGenerator(nz=5, classes=2, emb=3, base=4, widths=(8,4), channels=1)))
    from mammo_nb.gans.context import RECIPES
    return save_generator(folder, stirred(RECIPES["context_mass"].small(size=64, width=.25).nets(0)[0], .1), card=dict(training=dict(recipe=dict(task="mass"))))

KINDS = ("dcgan","wgangp","thesis","singan","cgan","context")
ALONE = """
import importlib.util, json, sys
for m in {barred}: sys.modules[m] = None
import torch, numpy as np; torch.set_num_threads({threads})
def package(folder):
    spec = importlib.util.spec_from_file_location(folder.replace("/", "_"), folder + "/__init__.py"); g = importlib.util.module_from_spec(spec); sys.modules[spec.name] = g
    spec.loader.exec_module(g); return g
for k,(folder,n,more) in json.loads({jobs!r}).items(): np.save(f"{out}/{{k}}.npy", np.stack(package(folder).generate(folder + "/G.safetensors", n, seed=3, device="cpu", **more))[...,0])
assert "mammo_nb" not in sys.modules or sys.modules["mammo_nb"] is None
"""

@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    "A package of each kind, and what their own code draws: in two processes, one that has torch, numpy and safetensors only, one with SciPy and Pillow for the painter."
    t, out = tmp_path_factory.mktemp("kinds"), {}
    np.save(t/"base.npy", rng(0, "base").integers(0, 256, (5,64,64), dtype=np.uint8))
    for k in KINDS:
        src = make(k, t/k/"epoch-00003")
        out[k] = (src, export_generator(src, t/k/"pkg", license="cc-by-4.0", check=False), dict(input_path=str(t/"base.npy"), what="residual") if k == "context" else {})
    jobs = {k: (str(P.folder), 5, more) for k,(_,P,more) in out.items()} | {"class 1": (str(out["cgan"][1].folder), 5, dict(label=1)), "painted": (str(out["context"][1].folder), 3, dict(input_path=str(t/"base.npy")))}
    for barred,names in ((LEAN, [*KINDS[:-1], "class 1"]), (tuple(m for m in LEAN if m not in ("scipy","PIL")), ["context","painted"])):
        code = ALONE.format(barred=barred, threads=torch.get_num_threads(), jobs=json.dumps({k: jobs[k] for k in names}), out=t)
        r = subprocess.run([sys.executable, "-I", "-B", "-c", code], cwd=t, capture_output=True, text=True, timeout=300)
        assert r.returncode == 0, r.stderr[-2000:]
    return out, {k: np.load(t/f"{k}.npy") for k in jobs}, np.load(t/"base.npy")

@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_draws_the_same_on_every_way(kind, packages, tmp_path):
    (src, P, more), alone = packages[0][kind], packages[1][kind]
    live = drawn_by(src, 5, 3, **more) if more else sample_generator(src, 5, seed=3)[0]
    assert live.std() > 1, "pictures that show something"
    assert np.array_equal(alone, live)
    for path in (P.folder, P.zip):
        back = import_generator(path, into=tmp_path/f"in{path.suffix}")
        assert np.array_equal(drawn_by(back, 5, 3, **more), live)
    assert as_generator(src) == [src]
    assert {p.suffix or p.name for p in P.folder.iterdir()} <= {".safetensors",".json",".py",".md",".txt",".png",".html","LICENSE"}
    told = "".join((P.folder/f).read_text() for f in ("README.md","PRIVACY.html","generator.json","metadata.json"))
    assert "bcdr:1" not in told and "image_hash" not in told and "/tmp" not in told

@pytest.mark.slow
def test_a_diffusion_package_names_its_library_and_draws_alone(tmp_path):
    "Some 15 CPU s: three times the library is imported, once without this package."
    pytest.importorskip("diffusers", reason="needs the extra `diffusion`")
    from mammo_nb.gans.diffusion import DiffusionGenerator
    small = dict(size=16, widths=(8, 16), layers=1, steps=(1000, 4), schedule="linear", fold=1, target="epsilon")
    src = save_generator(tmp_path/"epoch-00003", DiffusionGenerator(**small))
    P = export_generator(src, tmp_path/"pkg", license="mit", check=True)
    assert (P.folder/"requirements.txt").read_text().split()[-1].startswith("diffusers")
    assert "- diffusion" in (P.folder/"README.md").read_text() and "- gan\n" not in (P.folder/"README.md").read_text()

def test_a_pyramid_does_not_give_back_its_image(tmp_path):
    net = small_pyramid(); net.z_rec.normal_(generator=torch_rng(0, "z"))
    src = net.save(tmp_path/"a"); P = export_generator(src, tmp_path/"pkg", license="mit", check=False)
    kept = load_generator(P.folder)
    assert not kept.z_rec.any() and not np.array_equal(kept.reconstruct(), load_generator(src).reconstruct())
    assert "one image of one patient" in (P.folder/"README.md").read_text()

def test_conditional_package_knows_its_classes(packages):
    mixed, ones = packages[1]["cgan"], packages[1]["class 1"]
    assert np.array_equal(ones[1::2], mixed[1::2]) and not np.array_equal(ones[::2], mixed[::2])

def test_painted_package(packages, tmp_path):
    "The package of the contextual generator paints exactly what the library paints."
    from mammo_nb.core import seed_of
    from mammo_nb.gans.context import edit
    from mammo_nb.gans.paint import paint
    (src, P, _), base = packages[0]["context"], packages[2]
    order = rng(3, "base patches", 0).permutation(5); p = paint(base[order], edit(src, base[order], seed=seed_of(3, "painted", 0, 0)), task="mass")
    assert p.kept.sum() >= 3, "this generator paints something"
    assert np.array_equal(packages[1]["painted"], p.pixels[p.kept][:3])
    with pytest.raises(ParameterError, match="base patches"): sample_generator(src, 2, seed=0)
    with pytest.raises(DataError, match="no base patches here"): drawn_by(src, 1, 0, input_path=str(tmp_path/"none"))

# ---- the card

def test_the_card_is_one_the_hub_reads(snapshot, tmp_path):
    from huggingface_hub import ModelCard
    import pandas as pd
    M = pd.DataFrame([dict(metric="fid", value=180.04, lo=170., hi=190., n_real=199, n_fake=199, extractor="inception"), dict(metric="kid", value=.1, n_real=199, n_fake=199, extractor="embedded")])
    P = export_generator(snapshot, tmp_path/"pkg", license="cc-by-nc-4.0", metrics=M, audit={"words": "Nothing seen.", "table": [dict(attack="distance", auc=.5)]}, check=False)
    card = ModelCard.load(P.folder/"README.md")
    assert card.data.license == "cc-by-nc-4.0" and card.data.library_name == "pytorch"
    fid, kid = card.data.eval_results
    assert (fid.metric_type, fid.metric_value) == ("fid", 180.04) and "n real 199" in fid.metric_name and "170 to 190" in fid.metric_name
    for head in ("Intended use","What it was trained on","Metrics","Privacy","Limits","Licence"): assert f"## {head}" in card.text
    entry, = read_json(P.folder/"metadata.json").values()
    assert entry["selection"]["performance"]["FID"] == 180.04 and entry["selection"]["performance"]["FID_no_images"] == 199 and entry["selection"]["license"] == "cc-by-nc-4.0"
    assert entry["execution"]["dependencies"] == (P.folder/"requirements.txt").read_text().split()

def test_members_leave_only_when_asked(snapshot, tmp_path):
    shut, told = (export_generator(snapshot, tmp_path/n, license="mit", members=m, check=False).card for n,m in (("shut",False), ("told",True)))
    assert "members" not in shut and "patients_hash" not in shut and shut["patients"] == 30 and len(told["members"]) == 30
    with pytest.raises(LeakError, match="1 of these patients"): folder.check_unseen(told, ["bcdr:7","inbreast:1"])
    with pytest.raises(LeakError, match="may have seen"): folder.check_unseen(shut, ["bcdr:999"])
    assert "inbreast" in folder.check_unseen(shut, ["inbreast:1"])

def test_run_folder(tmp_path, capsys):
    run = tmp_path/"run"
    for e in (2,3): save_generator(run/"checkpoints"/"gan-x-11"/"gan"/"snapshots"/f"epoch-{e:05d}", lively(e))
    make("singan", run/"checkpoints"/"singans-22"/"singan_16x18_00")
    write_json(run/"audits"/"x"/"audit.json", dict(words="Audit of this very generator.", table=[], summary="AUC 0.5"))
    write_json(run/"run.json", dict(paper="04_sharing", data="phantom", parameters={}, stages={"gan-x": dict(folder="gan-x-11"), "singans": dict(folder="singans-22"), "gone": dict(folder="gone-33")}))
    assert main_export([str(run), "--list"]) == 0 and "gan-x" in capsys.readouterr().out
    assert main_export([str(run), "--no-check"]) == 1 and "needs a licence" in capsys.readouterr().err and not (run/"packages").exists()
    assert main_export([str(run), "--license", "mit", "--no-check"]) == 0
    assert sorted(p.name for p in (run/"packages").iterdir()) == ["gan_x","gan_x.zip","singans_singan_16x18_00","singans_singan_16x18_00.zip"]
    readme = (run/"packages"/"gan_x"/"README.md").read_text()
    assert "Audit of this very generator." in readme and "phantoms" in readme and load_generator(run/"packages"/"gan_x").card["stream"] == "epoch-00003"
    assert main_import([str(run/"packages"/"gan_x.zip"), "--into", str(tmp_path/"back")]) == 0 and f"generator {tmp_path/'back'}" in capsys.readouterr().out
    assert [f.name for f in as_generator(run/"checkpoints"/"gan-x-11")] == ["epoch-00002","epoch-00003"]

# ---- bad input: typed, and nothing left behind

def repacked(P, path, change): # The zip with other content: `change(files)` edits name -> bytes
    with zipfile.ZipFile(P.zip) as z: files = {n: z.read(n) for n in z.namelist()}
    change(files)
    with zipfile.ZipFile(path, "w") as z:
        for n,b in files.items(): z.writestr(n, b)
    return path

def card_with(files, **fields): files["pkg/generator.json"] = json.dumps({**json.loads(files["pkg/generator.json"]), **fields}).encode()

def no_licence(files):
    card = json.loads(files["pkg/generator.json"]); card.pop("license"); files["pkg/generator.json"] = json.dumps(card).encode()
    files["pkg/README.md"] = files["pkg/README.md"].replace(b"license: mit\n", b""); del files["pkg/LICENSE"]

def not_finite(files):
    from safetensors.torch import load, save
    s = load(files["pkg/G.safetensors"]); s["layers.0.weight"][0,0,0,0] = float("nan"); files["pkg/G.safetensors"] = save(s)
    card = json.loads(files["pkg/generator.json"]); card.pop("sha256"); files["pkg/generator.json"] = json.dumps(card).encode()

BAD = {
    "missing weights": (lambda f: f.pop("pkg/G.safetensors"), WeightsError, "G.safetensors is missing"),
    "truncated": (lambda f: f.update({"pkg/G.safetensors": f["pkg/G.safetensors"][:300]}), WeightsError, "cut off"),
    "other weights": (lambda f: f.update({"pkg/G.safetensors": f["pkg/G.safetensors"][:-1] + b"\x00"}), WeightsError, "not the weights"),
    "latent size": (lambda f: card_with(f, config=dict(kind="dcgan", nz=7, widths=[8,4], act="relu", slope=.2, channels=1)), WeightsError, "6×8×4×4, the network needs 7×8×4×4"),
    "kind": (lambda f: card_with(f, config=dict(kind="os_system")), WeightsError, "no kind of generator"),
    "module name": (lambda f: card_with(f, config=dict(kind="../../evil")), WeightsError, "no kind of generator"),
    "arguments": (lambda f: card_with(f, config=dict(kind="dcgan", depth=3)), WeightsError, "cannot be built"),
    "leads out": (lambda f: f.update({"../evil.py": b"x"}), WeightsError, "leads out of the package"),
    "absolute": (lambda f: f.update({"/etc/evil": b"x"}), WeightsError, "leads out of the package"),
    "licence": (no_licence, DataError, "carries no licence"),
    "nan": (not_finite, WeightsError, "not finite"),
    "no json": (lambda f: f.update({"pkg/generator.json": b"{"}), WeightsError, "no JSON"),
    "pickle beside": (lambda f: (f.pop("pkg/G.safetensors"), f.update({"pkg/G.pt": b"x"})), WeightsError, "is not opened"),
}
@pytest.mark.parametrize("what", BAD)
def test_bad_packages(what, parcel, tmp_path):
    change, error, words = BAD[what]
    bad = repacked(parcel, tmp_path/"bad.zip", change); before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=words): import_generator(bad, into=tmp_path/"out")
    assert sorted(tmp_path.rglob("*")) == before, "nothing was left behind"

def test_links_and_bombs(parcel, tmp_path, monkeypatch):
    link = zipfile.ZipInfo("pkg/link"); link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path/"l.zip", "w") as z: z.writestr(link, "/etc/passwd")
    with pytest.raises(WeightsError, match="an entry is a link"): Parcel(tmp_path/"l.zip")
    monkeypatch.setattr(adopt, "BOUNDS", Bounds(unpacked=10_000))
    with pytest.raises(WeightsError, match="is not opened"): import_generator(parcel.zip, into=tmp_path/"out")
    (tmp_path/"pkg"/"out.json").symlink_to("/etc/hostname")
    with pytest.raises(WeightsError, match="'out.json' is a link"): Parcel(tmp_path/"pkg")

def test_mutilated_zips_are_typed_errors(parcel, tmp_path):
    "80 cut or altered zips: the same patches or a typed error, never anything else."
    good, g, want = parcel.zip.read_bytes(), rng(0, "mutilate"), sample_generator(parcel.folder, 2, seed=0)[0]
    for i in range(80):
        b = bytearray(good)
        if i % 4 == 0: b = b[:int(g.integers(len(b)))]
        else:
            for j in g.integers(len(b), size=int(g.integers(1, 4))): b[j] ^= int(g.integers(1, 256))
        p = tmp_path/f"m{i}.zip"; p.write_bytes(bytes(b))
        try: out = import_generator(p, into=tmp_path/f"o{i}")
        except MammoError: assert not (tmp_path/f"o{i}").exists(); continue
        assert np.array_equal(sample_generator(out, 2, seed=0)[0], want)

def test_export_leaves_nothing_when_the_disk_is_full(snapshot, tmp_path, monkeypatch):
    def full(*a, **k): raise OSError(28, "No space left on device")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(package, "model_card", full)
    with pytest.raises(RunError, match="No space left"): export_generator(snapshot, tmp_path/"pkg", license="mit", check=False)
    assert sorted(tmp_path.rglob("*")) == before

def test_the_proof_can_fail(snapshot, tmp_path, monkeypatch):
    "An export whose code draws other patches is not written."
    real = package.package_code
    monkeypatch.setattr(package, "package_code", lambda G, doc: (real(G, doc)[0].replace('rng(seed, "sample", stream)', 'rng(seed, "other", stream)'), real(G, doc)[1]))
    with pytest.raises(RunError, match="its own code draw other patches"): export_generator(snapshot, tmp_path/"pkg", license="mit")
    assert not (tmp_path/"pkg").exists() and not (tmp_path/"pkg.zip").exists()

# ---- foreign weights

class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (os.system, (f"touch {self.path}",))

def foreign(G, **more): # State dict as the published package names it, with its unused layer
    return {k.replace("layers","main"): v for k,v in G.state_dict().items()} | {"embed_nn.0.weight": torch.zeros(6,1), "embed_nn.0.bias": torch.zeros(6)} | more

@pytest.mark.parametrize("how", ["torch.save","pickle","whole module"])
def test_code_is_never_unpickled(how, tmp_path):
    f, mark = tmp_path/"500.pt", tmp_path/"touched"
    if how == "pickle": f.write_bytes(pickle.dumps({"generator": Evil(mark)}))
    else: torch.save({"generator": Evil(mark)} if how == "torch.save" else lively(), f)
    with pytest.raises(WeightsError, match="needs code to be unpickled"): import_generator(f, into=tmp_path/"out", license="mit", arch="dcgan")
    assert not mark.exists() and not (tmp_path/"out").exists()

def medigan_zip(path, weights:bytes, mark, licence="MIT"):
    meta = {"00005_DCGAN_MMG_MASS_ROI": {"execution": {"package_name": "MMG", "model_name": "500", "extension": ".pt", "image_size": [16,16]},
            "selection": {"type": "DCGAN", "license": licence, "dataset": ["BCDR"]}, "description": {"title": "Masses", "provided_after_epoch": 500}}}
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("MMG/__init__.py", f"import os; os.system('touch {mark}')"); z.writestr("MMG/500.pt", weights); z.writestr("MMG/metadata.json", json.dumps(meta))
    return path

def test_a_medigan_package_without_wrap_around(tmp_path):
    "Trained on [0,1] like the published 00005: the range is found, and black stays black where a plain cast makes it white."
    class Unit(DCGANGenerator):
        def forward(self, z): return super().forward(z).clamp(-.03).mul(.9)
    G = Unit(nz=6, widths=(8,4), rng=torch_rng(0, "G"), std=.3).eval()
    raw = G(G.latents(64, rng(0, "z"))[0]).detach()
    assert (raw < 0).float().mean() > .2
    cast = ((raw*255).numpy().astype(np.int64) % 256).astype(np.uint8)                  # what a cast without clamp does
    assert (cast[raw.numpy() < -.004] > 200).all()
    assert adopt.range_of(G, "") == (0., 1.)
    from mammo_nb.gans.share import output_to_uint8
    assert (output_to_uint8(raw, value_range=(0,1))[raw.numpy() < 0] == 0).all()
    buf = io.BytesIO(); torch.save({"generator": foreign(lively()), "discriminator": {"main.0.weight": torch.zeros(4,1,6,6)}, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}}, buf)
    z = medigan_zip(tmp_path/"MMG.zip", buf.getvalue(), tmp_path/"touched")
    out = import_generator(z, into=tmp_path/"out")
    card = load_generator(out).card
    assert not (tmp_path/"touched").exists() and card["license"] == "MIT" and card["datasets"] == ["bcdr"] and card["value_range"] == [-1.,1.] and card["training"]["epoch"] == 500
    assert np.array_equal(load_generator(out)(*lively().latents(3, rng(0,"z"))), lively().eval()(*lively().latents(3, rng(0,"z"))).detach())
    assert sample_generator(as_generator(z), 4, seed=0)[0].shape == (4,16,16)
    with pytest.raises(LeakError, match="bcdr"): folder.check_unseen(card, ["bcdr:1"])

def test_bare_weights(tmp_path):
    from safetensors.torch import save_file
    G = lively(); save_file(dict(G.state_dict()), tmp_path/"a.safetensors")
    out = import_generator(tmp_path/"a.safetensors", into=tmp_path/"out", license="CC0", arch="dcgan", value_range=(-1,1))
    assert load_generator(out).config == G.config
    for kw,error,words in ((dict(arch="dcgan"), DataError, "no licence"), (dict(license="x"), ParameterError, "name the architecture"), (dict(license="x", arch="dcgann"), ParameterError, "did you mean 'dcgan'"),
                           (dict(license="x", config=dict(kind="dcgan", nz=9, widths=[8,4], act="relu"), value_range=(-1,1)), WeightsError, "do not fit")):
        with pytest.raises(error, match=words): import_generator(tmp_path/"a.safetensors", into=tmp_path/"no", **kw)
    (tmp_path/"b.pt").write_bytes(b"not a file of torch"); (tmp_path/"c.safetensors").write_bytes((tmp_path/"a.safetensors").read_bytes()[:50])
    for n in "b.pt","c.safetensors":
        with pytest.raises(WeightsError, match="cut off|unpickled"): import_generator(tmp_path/n, into=tmp_path/"no", license="x", arch="dcgan")
    torch.save(foreign(lively(), **{"embed_nn.0.weight": torch.zeros(3,1)}), tmp_path/"cond.pt")
    with pytest.raises(WeightsError, match="is conditional"): import_generator(tmp_path/"cond.pt", into=tmp_path/"no", license="x", arch="dcgan")
    assert not (tmp_path/"no").exists()

def test_the_cache_keeps_an_import(snapshot, parcel, tmp_path, monkeypatch):
    monkeypatch.setenv("MAMMO_NB_CACHE", str(tmp_path/"cache"))
    a, = as_generator(parcel.zip); b, = as_generator(parcel.zip)
    assert a == b and a.parent == tmp_path/"cache"/"imported" and not [*a.parent.rglob("*.part*")]

# ---- medigan's own loader, in its own environment

LOADER = """
import json, sys, numpy as np
from medigan import Generators
mid = next(iter(json.load(open("config/global.json")))); g = Generators()
np.save("x.npy", np.stack(g.generate(mid, 40, save_images=False, seed=3))); g.generate(mid, 40, output_path="saved", save_images=True, seed=3)
assert not any(m.split(".")[0] == "mammo_nb" for m in sys.modules)
"""
HOW = "build one: python -m venv .cache/medigan; .cache/medigan/bin/pip install 'setuptools>=77,<81' medigan==1.0.0 torch safetensors; or set MAMMO_NB_MEDIGAN to its python"

@pytest.fixture(scope="session")
def medigan():
    "Python of an environment with medigan 1.0.0, which needs setuptools < 81 (torch of today needs >= 77)."
    for p in (os.environ.get("MAMMO_NB_MEDIGAN"), ROOT/".cache"/"medigan"/"bin"/"python"):
        if p and Path(p).exists():
            r = subprocess.run([str(p), "-c", "import medigan, torch, safetensors"], capture_output=True, text=True)
            return str(p) if not r.returncode else pytest.skip(f"{p} cannot import medigan: {r.stderr.strip().splitlines()[-1][:120]}")
    pytest.skip(f"no environment with medigan 1.0.0; {HOW}")

def test_medigan_loader_draws_the_same(medigan, snapshot, parcel, tmp_path):
    (tmp_path/"m"/"config").mkdir(parents=True)
    (tmp_path/"m"/"pkg.zip").write_bytes(parcel.zip.read_bytes()); (tmp_path/"m"/"config"/"global.json").write_text((parcel.folder/"metadata.json").read_text())
    env = {k: v for k,v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    r = subprocess.run([medigan, "-c", LOADER], cwd=tmp_path/"m", env=env, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr[-2000:]
    want = sample_generator(snapshot, 40, seed=3)[0]
    assert np.array_equal(np.load(tmp_path/"m"/"x.npy")[...,0], want)
    saved = sorted((tmp_path/"m"/"saved").iterdir(), key=lambda p: p.name.split("_")[2])
    assert len(saved) == 40 and np.array_equal(np.stack([np.asarray(Image.open(p)) for p in saved]), want), "batches of 32 go on, none is repeated"

# ---- other kinds, other cards

@pytest.mark.parametrize("kind", ["singan","cgan"])
def test_bare_weights_of_any_kind(kind, packages, tmp_path):
    "With all of `config`, a bare state dict of any kind of ours is read."
    src, P, _ = packages[0][kind]
    out = import_generator(P.folder/"G.safetensors", into=tmp_path/"out", license="x", config=load_generator(src).config, value_range=(-1,1))
    a, b = load_generator(out), load_generator(P.folder)
    assert a.config == b.config and all(torch.equal(v, b.state_dict()[k]) for k,v in a.state_dict().items())

def test_a_real_audit_goes_into_the_card(snapshot, tmp_path):
    from mammo_nb.data.patches import PatchSet, patch_table
    from mammo_nb.gans.privacy import audit, no_audit
    def patches(first): # Two patches of each of 30 patients
        x = rng(0, "patches", first).integers(0, 256, (60,1,16,16), dtype=np.uint8)
        return PatchSet(x, patch_table([dict(patch_id=f"{first}:{i}", patient_id=f"bcdr:{first + i//2}", image_id=f"{first}:{i}", target=1) for i in range(60)]))
    A = audit(snapshot, patches(0), patches(100), seed=0, n=64, boots=50, extractors=("pixels",))
    P = export_generator(snapshot, tmp_path/"pkg", license="mit", audit=A, check=False)
    readme = (P.folder/"README.md").read_text()
    assert A.words.strip()[:80] in readme and "No privacy audit" not in readme and "bcdr:1" not in readme
    assert next(iter(read_json(P.folder/"metadata.json").values()))["selection"]["privacy_preservation"] == A.summary
    A.save(tmp_path/"audit"); assert export_generator(snapshot, tmp_path/"pkg2", license="mit", audit=tmp_path/"audit", check=False).card == P.card
    assert no_audit("no held-out patients").words.strip()[:40] in (export_generator(snapshot, tmp_path/"pkg3", license="mit", audit=no_audit("no held-out patients"), check=False).folder/"README.md").read_text()

def test_private_training_is_told(tmp_path):
    told = dict(mechanism="DP-SGD on the discriminator (Opacus)", unit="patient", units=30, epsilon=7.9, delta=1e-4, noise_multiplier=1.1, sample_rate=.1, clip=1., steps=100, accountant="rdp", seed_public=True)
    P = export_generator(save_generator(tmp_path/"e", lively(), card=dict(privacy=told)), tmp_path/"pkg", license="mit", check=False)
    assert "ε = 7.90" in (P.folder/"README.md").read_text()

def test_own_licence_and_console_errors(snapshot, tmp_path, capsys):
    (tmp_path/"terms.txt").write_text("Ask Centre B.")
    assert main_export([str(snapshot), "--out", str(tmp_path/"p"), "--license", "centre-b-1", "--no-check"]) == 1
    assert main_export([str(snapshot), "--out", str(tmp_path/"p"), "--license", "centre-b-1", "--license-file", str(tmp_path/"terms.txt"), "--no-check"]) == 0
    pkg = tmp_path/"p"/"epoch_00012"
    assert "Ask Centre B." in (pkg/"LICENSE").read_text() and "license: other\nlicense_name: centre-b-1\nlicense_link: LICENSE" in (pkg/"README.md").read_text()
    assert main_import([str(pkg), "--into", str(tmp_path/"in"), "--value-range", "1"]) == 1 and main_import([str(pkg), "--into", str(tmp_path/"in"), "--config", "{"]) == 1
    assert main_export([str(tmp_path/"terms.txt"), "--license", "mit"]) == 1 and main_export([str(tmp_path/"p"/"nothing"), "--license", "mit"]) == 1
    err = capsys.readouterr().err
    for words in ("no pair of numbers", "is no JSON", "'centre-b-1' is not known here", "no folder"): assert words in err, words
    assert "Traceback" not in err and not (tmp_path/"in").exists()
