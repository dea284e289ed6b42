"The paper-03 networks against timm and torchvision, its preprocessing against OpenCV, its augmentation against SciPy, its search killed."
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from mammo_nb.clf.augment import patch_arrays
from mammo_nb.clf.keras import BODIES, DEMO_NETS, PaperAugment, keras_prepare
from mammo_nb.clf.search import search, search_cnn, suggest
from mammo_nb.clf.train import KERAS, build_classifier, fit_classifier, load_classifier, predict_proba
from mammo_nb.core import RunError, rng, torch_rng


def spots(n, seed):
    g = rng(seed, "spots"); px, y = g.integers(60, 140, (n,16,16)), np.arange(n) % 2
    px[y==1,4:9,4:9] += 60
    return patch_arrays(px.astype(np.uint8), target=y)

TRAIN, VALID = spots(24, 1), spots(16, 2)


# --- networks ---------------------------------------------------------------------------------------------------------------
def test_full_width_is_the_library_s_own_network():
    from timm.models.inception_resnet_v2 import InceptionResnetV2
    from torchvision.models import densenet169
    x = torch.rand(1, 3, 80, 80, generator=torch_rng(0, "x"))
    for kind, reference, eps in (("inceptionresnetv2", lambda: InceptionResnetV2(num_classes=2), 1e-3), ("densenet169", lambda: densenet169(num_classes=2), 1.001e-5)):
        ours, theirs = build_classifier(dict(kind=kind), seed=3).eval(), reference().eval()
        assert {k: v.shape for k,v in ours.body.state_dict().items()} == {k: v.shape for k,v in theirs.state_dict().items()}
        norms = [m for m in ours.body.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert norms and all(m.momentum == .01 and m.eps == eps for m in norms)
        theirs.load_state_dict(ours.body.state_dict())
        for m in theirs.modules():
            if isinstance(m, torch.nn.BatchNorm2d): m.eps = eps
        with torch.no_grad(): assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_vgg16_is_torchvision_s():
    from torchvision.models import vgg16
    with torch.device("meta"): want = vgg16(num_classes=2)
    got = build_classifier(dict(kind="vgg16", width=1/16)).body
    assert [k for k in want.state_dict()] == [k for k in got.state_dict()]
    shrunk = {k: [math.prod(a.shape)/math.prod(b.shape) for a,b in ((v, got.state_dict()[k]),)][0] for k,v in want.state_dict().items() if k.endswith("weight")}
    assert shrunk == {k: (16 if k in ("features.0.weight", "classifier.6.weight") else 256) for k in shrunk}


def test_keras_weights_and_norms():
    net = build_classifier(DEMO_NETS["inceptionresnetv2"], seed=1)
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d):
            fans = (m.in_channels + m.out_channels)*math.prod(m.kernel_size)
            assert m.weight.abs().max() <= math.sqrt(6/fans) and (m.weight.numel() < 500 or m.weight.abs().max() > .95*math.sqrt(6/fans))
    scales = [m.weight for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    fit_classifier(net, TRAIN, VALID, seed=1, recipe=KERAS, epochs=1, lr=1e-2)
    assert all((w == 1).all() for w in scales), "norms learn no scale"


@pytest.mark.parametrize("kind", list(BODIES))
def test_demonstration_nets_train_and_come_back(kind, tmp_path):
    net = build_classifier(DEMO_NETS[kind], seed=1)
    r = fit_classifier(net, TRAIN, VALID, seed=1, recipe=KERAS, epochs=2, lr=1e-3, folder=tmp_path, augment=PaperAugment(), bs=8)
    assert np.isfinite(r.history[["train_loss", "valid_loss"]].to_numpy()).all()
    p = predict_proba(net, VALID)
    assert p.shape == (16, 2) and np.array_equal(p, predict_proba(load_classifier(tmp_path), VALID))


# --- preprocessing ----------------------------------------------------------------------------------------------------------
def test_blur_and_resize_are_opencv_s():
    cv2 = pytest.importorskip("cv2")
    im = rng(0, "im").integers(0, 256, (3, 61, 47), dtype=np.uint8)
    blurred = np.stack([cv2.GaussianBlur(i, (5,5), 0) for i in im])
    assert np.array_equal(keras_prepare(im[:,:47], size=47), np.stack([cv2.GaussianBlur(np.ascontiguousarray(i[:47]), (5,5), 0) for i in im]))
    for size in (24, 96):
        ours, theirs = keras_prepare(im, size=size).astype(int), np.stack([cv2.resize(i, (size, size)) for i in blurred]).astype(int)
        assert np.abs(ours - theirs).max() <= 1 and (ours == theirs).mean() > .8
        area = np.stack([cv2.resize(i, (size, size), interpolation=cv2.INTER_AREA) for i in blurred]).astype(int)
        if size < 47: assert np.abs(keras_prepare(im, size=size, resize="area") - area).max() <= 1


# --- augmentation -----------------------------------------------------------------------------------------------------------
def test_affine_map_is_keras_s():
    "Keras: R·T·S·Z about the centre, SciPy's linear interpolation, nearest fill; then flips, then brightness."
    n, aug = 20, PaperAugment(shear=15.)
    x = torch.from_numpy(ndimage.gaussian_filter(rng(1, "im").random((6, n, n)), (0, 2, 2))).float()
    got, u = aug(x, torch_rng(7, "g")), torch.rand(6, 10, generator=torch_rng(7, "g")).double().numpy()
    for i in range(6):
        s = 2*u[i] - 1
        a, h, zx, zy, (tx, ty) = np.deg2rad(30*s[0]), np.deg2rad(15*s[1]), 1 + .2*s[2], 1 + .2*s[3], s[6:8]*.1*n
        R, S, Z = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]], [[1, -np.sin(h)], [0, np.cos(h)]], np.diag([zx, zy])
        M, t = R @ np.array(S) @ Z, R @ np.array([tx, ty])
        c = np.full(2, (n-1)/2)
        M, t = M[::-1,::-1], t[::-1]                      # SciPy counts rows first
        want = ndimage.affine_transform(x[i].double().numpy(), M, c - M @ c + t, order=1, mode="nearest")
        if u[i,4] < .5: want = want[:,::-1]
        if u[i,5] < .5: want = want[::-1]
        want = np.clip(want*(1 + .2*s[8]), 0, 1)
        assert np.abs(got[i].numpy() - want).max() < 2e-3


# --- search -----------------------------------------------------------------------------------------------------------------
def test_a_killed_search_goes_on_with_what_it_would_have_tried(tmp_path):
    class Killed(Exception): pass
    f = lambda p, k: -abs(math.log10(p["lr"]) + 3) - p["dropout"]
    def die(p, k):
        if k == 12: raise Killed
        return f(p, k)
    whole = search(f, folder=tmp_path/"whole", n_trials=15, seed=4)
    with pytest.raises(Killed): search(die, folder=tmp_path/"killed", n_trials=15, seed=4)
    assert search(f, folder=tmp_path/"killed", n_trials=15, seed=4).trials.equals(whole.trials)
    assert [p.read_bytes() for p in sorted((tmp_path/"whole").glob("*.json"))] == [p.read_bytes() for p in sorted((tmp_path/"killed").glob("*.json"))]


def test_the_search_learns_from_its_trials():
    "Past the blind first ten, the next suggestion depends on the scores, not on the numbers tried alone."
    space = dict(lr=(1e-5, 1e-2))
    tried = [dict(number=i, params=dict(lr=10**(-5 + 3*(i % 20)/20)), score=None) for i in range(20)]
    up, down = ([{**t, "score": s*math.log10(t["params"]["lr"])} for t in tried] for s in (1, -1))
    high, low = (np.mean([math.log10(suggest(t, space=space, seed=s)["lr"]) for s in range(20)]) for t in (up, down))
    assert high > low + 1


def test_search_keeps_the_best_and_survives_what_cannot_learn(tmp_path):
    go = lambda n, lr: search_cnn(TRAIN, VALID, folder=tmp_path/f"{lr[1]:g}", n_trials=n, seed=1, config=dict(size=16, widths=(4,), hidden=4), epochs=1, space=dict(lr=lr))
    long, short = go(5, (1e-4, 1e-1)), go(2, (1e-4, 1e-1))
    assert short.trials.equals(long.trials[:2]) and load_classifier(short.folder) is not None
    with pytest.raises(RunError, match="trials broke down"): go(2, (1e30, 1e38))
