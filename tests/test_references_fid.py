"FID, KID, precision and recall against torch-fidelity on the same features; Inception layers and resize rule against their originals."
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.spatial.distance import cdist

pytest.importorskip("torch_fidelity", reason="needs torch-fidelity, the reference")
from torch_fidelity import feature_extractor_inceptionv3 as tfi
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from mammo_nb.core import DataError, WeightsError, rng
from mammo_nb.metrics.features import (Inception, find_inception, features, load_inception, make_extractor, resize, texture_patches,
                                       INCEPTION_FILES)
from mammo_nb.metrics.fid import fid, fid_floor, fid_inf, generator_report, kid, kid_subsets, prdc, REPORT_COLUMNS
from mammo_nb.metrics.memory import closest_pairs, memory_report


def clouds(n, m, d, seed=0):
    "Two clouds with the falling spectrum that network features have."
    g = rng(seed, "clouds"); s = 1/np.sqrt(np.arange(1, d+1))
    return g.standard_normal((n, d))*s, g.standard_normal((m, d))*s*1.2 + .3*s


@pytest.mark.parametrize("n,m,d", [(400, 300, 48), (60, 90, 128), (90, 60, 128), (200, 40, 100)])
def test_fid_equals_torch_fidelity(n, m, d):
    real, fake = clouds(n, m, d)
    stats = [fid_features_to_statistics(torch.from_numpy(f)) for f in (real, fake)]
    theirs = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert fid(real, fake) == pytest.approx(theirs, rel=1e-6)
    assert fid(fake, real) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.slow
def test_fid_equals_torch_fidelity_at_inception_size():
    real, fake = clouds(300, 260, 2048)
    stats = [fid_features_to_statistics(torch.from_numpy(f)) for f in (real, fake)]
    assert fid(real, fake) == pytest.approx(fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"], rel=1e-6)


def test_kid_equals_torch_fidelity():
    real, fake = clouds(150, 150, 64)
    how = dict(kid_subsets=1, kid_subset_size=150, kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1,
               rng_seed=1, verbose=False)
    theirs = kid_features_to_metric(torch.from_numpy(real), torch.from_numpy(fake), **how)["kernel_inception_distance_mean"]
    assert kid(real, fake, seed=0, halves=10).value == pytest.approx(theirs, rel=1e-6)
    assert kid_subsets(real, fake, seed=0, size=150, subsets=1)[0] == pytest.approx(theirs, rel=1e-6)
    how.update(kid_subsets=300, kid_subset_size=80)
    theirs = kid_features_to_metric(torch.from_numpy(real), torch.from_numpy(fake), **how)
    mean, sd = kid_subsets(real, fake, seed=0, size=80, subsets=300)
    assert abs(mean - theirs["kernel_inception_distance_mean"]) < 4*sd/np.sqrt(300)
    assert sd == pytest.approx(theirs["kernel_inception_distance_std"], rel=.2)


def test_kid_is_unbiased():
    "Mean over 200 draws of equal distributions is within 3 standard errors of 0, where FID is far from it."
    v, f = zip(*[(kid(a, b, seed=0, halves=2).value, fid(a, b)) for a, b in (np.split(rng(i, "u").standard_normal((80, 24)), 2) for i in range(200))])
    assert abs(np.mean(v)) < 3*np.std(v)/np.sqrt(200)
    assert np.mean(f) > 5


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall_equal_torch_fidelity(k):
    real, fake = clouds(120, 120, 16)
    theirs = prc_features_to_metric(torch.from_numpy(fake), torch.from_numpy(real), prc_neighborhood=k, prc_batch_size=50, save_cpu_ram=False, verbose=False)
    ours = prdc(real, fake, seed=0, k=k, draws=10)
    assert ours["precision"].value == pytest.approx(theirs["precision"], abs=1e-6) and ours["recall"].value == pytest.approx(theirs["recall"], abs=1e-6)
    d, r = cdist(real, fake), np.sort(cdist(real, real), 1)[:, k]             # Naeem 2020, eq. 4 and 5, written out
    assert ours["density"].value == pytest.approx(sum((d[:, j] <= r).sum() for j in range(120))/k/120)
    assert ours["coverage"].value == pytest.approx(np.mean([(d[i] <= r[i]).any() for i in range(120)]))


def test_fid_inf_removes_the_bias():
    g = rng(0, "inf"); a, b = g.standard_normal((1200, 24)), g.standard_normal((1200, 24))
    assert abs(fid_inf(a, b, seed=0)) < fid(a, b)/2


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    "Inception with random weights: torch-fidelity's network, and the same tensors as a file for ours."
    path = tmp_path_factory.mktemp("weights")/"inception-2015-12-05.safetensors"
    gen = torch.Generator().manual_seed(0)
    state = {}
    for name, t in Inception().layers.state_dict().items():
        if not t.is_floating_point(): state[name] = t
        elif name.endswith("running_var"): state[name] = torch.rand(t.shape, generator=gen) + .5
        elif t.ndim == 4: state[name] = torch.randn(t.shape, generator=gen)*(2/t[0].numel())**.5
        elif name.endswith("bn.weight"): state[name] = torch.rand(t.shape, generator=gen) + .5
        else: state[name] = torch.randn(t.shape, generator=gen)*.1
    save_file(state, path)
    return path, state


def test_inception_layers_equal_torch_fidelity(random_inception, monkeypatch):
    path, state = random_inception
    theirs_state = {**state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    monkeypatch.setattr(tfi, "load_state_dict_from_url", lambda *a, **k: theirs_state)       # what the network would have sent
    theirs = tfi.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)
    x = texture_patches(2, seed=0, size=299)                                   # their size already: no resize takes part
    want = theirs(torch.from_numpy(x)[:, None].expand(-1, 3, -1, -1))[0].numpy()
    ex = make_extractor("inception", weights=str(path))
    got = features(x, ex)
    assert want.std() > 1e-3 and np.allclose(got, want, rtol=1e-4, atol=1e-5)
    assert ex.dim == 2048 and ex.size == 299 and features(texture_patches(2, seed=0), ex).shape == (2, 2048)


def test_extractor_hash_follows_the_weights(random_inception, tmp_path):
    path, state = random_inception
    other = dict(state); other["Conv2d_1a_3x3.conv.weight"] = state["Conv2d_1a_3x3.conv.weight"] + 1e-3
    save_file(other, tmp_path/"inception-2015-12-05.safetensors")
    a, b = make_extractor("inception", weights=str(path)), make_extractor("inception", weights=str(tmp_path))
    assert a.hash != b.hash and a.hash != make_extractor("inception", weights=str(path), rule="bilinear").hash


def test_weights_of_the_wrong_kind(tmp_path):
    with pytest.raises(WeightsError, match="are not there.*6726825d.*embedded"): find_inception(str(tmp_path))
    (tmp_path/INCEPTION_FILES[1]).write_bytes(b"\x80\x04 not it")
    with pytest.raises(WeightsError, match="not the published Inception file"): make_extractor("inception", weights=str(tmp_path))
    save_file({"a": torch.zeros(1)}, tmp_path/"net.safetensors")
    with pytest.raises(WeightsError, match="missing: not Inception"): load_inception(tmp_path/"net.safetensors")


def test_weights_of_the_hub_cache_are_found(random_inception, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("MAMMO_NB_CACHE", str(tmp_path/"cache"))
    with pytest.raises(WeightsError, match="checkpoints"): find_inception()
    target = tmp_path/"checkpoints"/INCEPTION_FILES[0]; target.parent.mkdir(); target.write_bytes(b"x")
    assert find_inception() == target


@pytest.mark.parametrize("size", [17, 64, 299])
def test_resize_clean_is_pil(size):
    x = texture_patches(2, seed=0, size=128)
    pil = np.stack([np.asarray(Image.fromarray(p.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)).clip(0, 255) for p in x])
    assert np.abs(resize(torch.from_numpy(x), size).numpy() - pil).max() < 5e-3


def test_report_is_whole_and_reproducible():
    emb = make_extractor("embedded"); real, fake = texture_patches(40, seed=0), texture_patches(30, seed=1)
    who = [f"p{i//4}" for i in range(40)]
    a, b = (generator_report(real, fake, extractor=emb, seed=3, groups=who) for _ in range(2))
    assert a.equals(b) and tuple(a.columns) == REPORT_COLUMNS and a.value.notna().all()
    assert {"kid", "kid_floor", "fid", "fid_floor", "fid_ratio", "precision", "recall", "density", "coverage"} <= set(a.metric)
    assert (a.extractor_hash == emb.hash).all() and (a.resize == "clean").all() and (a.n_real > 0).all() and (a.n_fake > 0).all()
    held = a.dropna(subset=["lo"])
    assert (held.lo <= held.value + 1e-12).all() and (held.value <= held.hi + 1e-12).all()


@pytest.mark.parametrize("real,fake,words", [
    (np.zeros((9, 8, 8)), texture_patches(9, seed=0, size=8), "uint8 patches"),
    (texture_patches(9, seed=0, size=8), texture_patches(1, seed=0, size=8), "1 fake patches"),
    (np.full((9, 3), np.nan), np.zeros((9, 3)), "NaN"),
    (np.zeros((9, 3)), np.zeros((9, 4)), "3 columns, fake 4"),
])
def test_report_refuses_bad_input(real, fake, words):
    with pytest.raises(DataError, match=words): generator_report(real, fake, extractor=make_extractor("embedded"), seed=0)


def test_constant_patches_have_numbers():
    "A collapsed generator is measured, not crashed on."
    emb, real = make_extractor("embedded"), texture_patches(24, seed=0)
    r = generator_report(real, np.full((24, 64, 64), 90, np.uint8), extractor=emb, seed=0).set_index("metric").value
    good = generator_report(real, texture_patches(24, seed=1), extractor=emb, seed=0).set_index("metric").value
    assert np.isfinite(r).all() and r.recall == 0 and r.fid > 5*good.fid and r.kid > good.kid


def test_floor_never_puts_a_patient_on_both_sides():
    real, fake = clouds(40, 40, 4)
    with pytest.raises(DataError, match="only 2 patients"): fid_floor(real, fake, seed=0, groups=["a"]*20 + ["b"]*20)


def test_planted_copies_are_found_and_the_innocent_are_not():
    train, held, new = (texture_patches(60, seed=s) for s in (0, 1, 2))
    mix = np.concatenate([new[:40], train[:20][:, ::-1]])                      # a third, upside down
    for name in ("pixels", "embedded"):
        e = make_extractor(name)
        guilty, innocent = (memory_report(f, train, held, extractor=e, seed=0, repeats=60).set_index("metric") for f in (mix, new))
        assert guilty.loc["memory_copies"].lo > .15 and innocent.loc["memory_copies"].lo < .03
    _, pairs = closest_pairs(mix, train, extractor=make_extractor("pixels"), n=20)
    assert set(pairs.fake) == set(range(40, 60)) and (pairs.fake - 40 == pairs.train).all() and set(pairs.flip) == {2}
