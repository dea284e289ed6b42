"The contextual GAN: exact resume through the stages, one static step a stage, failures that say so, painting against an independent implementation."
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mammo_nb.core import DataError, RunError, WeightsError, file_hash, rng, torch_rng
from mammo_nb.gans import context
from mammo_nb.gans.context import DEMO, RECIPES, TASKS, ContextDiscriminator, ContextGenerator, edit
from mammo_nb.gans.engine import waits
from mammo_nb.gans.paint import Rule, edit_row, paint, painting_mask, synthesize
from mammo_nb.gans.share import load_generator
from mammo_nb.gans.train import Game, Training, train_epoch, train_gan

TINY = RECIPES["context_mass"].small(size=32, width=1/4, d_mult=1, batch=2, per_epoch=3, half=3, fade=6, epochs=5, lr_g=1e-3, lr_d=1e-3)
SWITCHED = replace(TINY, task="remove", d_channels=3, delta="dragan", gp_scalar="sum", spectral_g=True, benign=False, ema=.9)
LABELS = np.array([0]*5 + [1]*4 + [2]*7)


def pixels(size=32): return rng(0, "pixels").integers(0, 256, (len(LABELS), 2, size, size), dtype=np.uint8)


def train(folder, recipe=TINY, **kw):
    return train_gan(recipe, pixels(), **{**dict(labels=LABELS, folder=folder, seed=1, epochs=recipe.epochs, checkpoint_every_s=0), **kw})


def content(folder): return {p.relative_to(folder).as_posix(): file_hash(p) for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.suffix != ".lock"}


class Killed(BaseException): "Stands for a kill."


@pytest.mark.parametrize("recipe", [TINY, SWITCHED], ids=["default", "switched"])
def test_killed_in_every_stage_ends_with_the_same_bytes(recipe, tmp_path, monkeypatch):
    train(tmp_path/"whole", recipe)
    after, count = Training.after_batch, [0]
    def counted(self, batch, flag):
        after(self, batch, flag)
        count[0] += 1
        if count[0] in (2, 6, 11, 15): raise Killed       # half, fade, end of the fade, full; each in the middle or at the end of an epoch
    monkeypatch.setattr(Training, "after_batch", counted)
    kills = 0
    while True:
        try: train(tmp_path/"broken", recipe); break
        except Killed: kills += 1
    assert kills == 4 and content(tmp_path/"broken") == content(tmp_path/"whole")


@pytest.mark.parametrize("recipe", [TINY, SWITCHED], ids=["default", "switched"])
def test_snapshots_of_every_stage_work(recipe, tmp_path):
    for epochs, alpha in ((1, 0.), (2, .5), (4, 1.)):
        run = train(tmp_path/str(epochs), recipe, epochs=epochs)
        G = load_generator(run.snapshots[-1])
        assert float(G.alpha) == pytest.approx(alpha) and G.stage == "fade"
        L = edit(run.snapshots[-1], pixels()[:,0], seed=0)
        b = G.config["border"]
        assert np.isfinite(L).all() and np.abs(L).max() > 0
        inner = np.zeros(L.shape, bool); inner[:, b:-b, b:-b] = True
        assert (L[~inner] == 0).all()
        if alpha == 0: assert (L[:, 2:-2:2, 2:-2:2] == L[:, 3:-2:2, 3:-2:2]).all()     # still made at half the side
    assert {p.suffix for p in run.grids} == {".png"} and (run.history.collapsed.dropna() == 0).all()


def test_pictures_of_a_training_hold_no_patch(tmp_path):
    black = train(tmp_path, epochs=1)
    from PIL import Image
    grid = np.asarray(Image.open(black.grids[-1]))
    b = TINY.border
    for k in range(8): assert (grid[:b, k*32:k*32+32] == 128).all()     # a residual's border is 0; noise patches would show


def test_nan_stops_at_the_last_good_checkpoint(tmp_path, monkeypatch):
    good, calls = context.noise_penalty, [0]
    def broken(*args, **kw):
        calls[0] += 1
        return good(*args, **kw) * (float("nan") if calls[0] == 8 else 1)
    monkeypatch.setattr(context, "noise_penalty", broken)
    with pytest.raises(RunError, match="broke down in epoch 3.*checkpoint of epoch 2 is whole"): train(tmp_path)
    monkeypatch.undo()
    run = train(tmp_path)                                        # goes on from there and ends as if nothing had been
    train(tmp_path/"whole")
    assert run.history.equals(train(tmp_path/"whole").history)


def test_bad_input_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"patches are \(32, 32\), the generator makes \(256, 256\)"): train(tmp_path, RECIPES["context_mass"])
    with pytest.raises(DataError, match="class of each patch.*context_labels"): train(tmp_path, labels=None)
    with pytest.raises(DataError, match="no malignant patch for the task 'mass'"): train(tmp_path, labels=np.maximum(LABELS, 1))
    with pytest.raises(DataError, match="no benign patch.*benign=False"): train(tmp_path, labels=np.where(LABELS == 1, 2, LABELS))
    with pytest.raises(DataError, match="labels must be whole numbers from 0"): train(tmp_path, labels=LABELS - 1)
    G = TINY.nets(0)[0]
    with pytest.raises(DataError, match="would invent detail"): edit(G, pixels(16)[:,0], seed=0)
    with pytest.raises(DataError, match="no patches to edit"): edit_row(G, np.zeros((64,64), np.uint8), [], task="mass", seed=0)
    with pytest.raises(DataError, match="finite"): painting_mask(np.full((8,8), np.nan), task="mass")


# ---- the step

class Tape:
    "A capture that runs the function again: what the step reads and writes must be the same tensors each time."
    def __init__(self, fn, generators, stream): self.fn, self.replays = fn, 0
    def replay(self): self.fn(); self.replays += 1


def played(recipe, capture=None, device="cpu", epochs=5, **kw):
    g = Game(recipe, 3, device, data=torch.from_numpy(pixels()), labels=torch.from_numpy(LABELS), **kw)
    if capture: g.engine.capture = capture
    graphs = 0
    for e in range(epochs):
        g.start_epoch(e); train_epoch(g, g.data, epoch=e)
        graphs += sum(s.graph is not None for s in g.engine.slots.values())
    return g, graphs


def state(g): return {**g.G.state_dict(), **{f"D.{k}": v for k,v in g.D.state_dict().items()}}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


LONG = replace(TINY, per_epoch=6, half=6, fade=6)


def test_static_step_is_the_plain_loop():
    (plain, none), (taped, graphs) = played(LONG, epochs=4), played(LONG, capture=Tape, epochs=4)
    assert none == 0 and graphs == 4 and same(state(plain), state(taped))            # captured anew in each stage


@pytest.mark.parametrize("recipe", [TINY, SWITCHED], ids=["default", "switched"])
def test_nothing_in_a_step_waits_for_the_device(recipe):
    g = Game(recipe, 0, "cpu", data=torch.from_numpy(pixels()), labels=torch.from_numpy(LABELS))
    for epoch in (0, 1, 3):
        g.start_epoch(epoch)
        rows = recipe.rows(len(LABELS), torch.from_numpy(LABELS), torch_rng(0, "order"))
        g.step(rows[0])
        assert waits(lambda: g.step(rows[1])) == []


def test_bfloat16_keeps_the_penalty():
    losses = {m: TINY.step_d(g, TINY.real(g, TINY.rows(len(LABELS), g.labels, torch_rng(0, "order"))[0]))
              for m in ("exact", "fast") for g in [Game(TINY, 0, "cpu", data=torch.from_numpy(pixels()), labels=torch.from_numpy(LABELS), mode=m)] if not g.start_epoch(3)}
    assert float(losses["fast"]["penalty"]) == pytest.approx(float(losses["exact"]["penalty"]), rel=1e-3)
    assert float(losses["fast"]["loss_d"]) == pytest.approx(float(losses["exact"]["loss_d"]), rel=.05)
    g, _ = played(TINY, mode="fast")
    assert all(torch.isfinite(v).all() for v in state(g).values())


def test_held_norm_is_pytorchs_norm():
    "One forward pass against torch.nn.utils.parametrizations.spectral_norm with the same vectors."
    ours = context.SNConv2d(3, 4, 3, 1, 1); ours.start(torch_rng(0, "u"))
    theirs = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv2d(3, 4, 3, 1, 1)).eval()
    with torch.no_grad():
        theirs.parametrizations.weight.original.copy_(ours.weight); theirs.bias.copy_(ours.bias)
        p = theirs.parametrizations.weight[0]; p._u.copy_(ours.u); p._v.copy_(ours.v)
    x = torch.randn(2, 3, 8, 8, generator=torch_rng(0, "x"))
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    for net in (ours, theirs): net(x).square().sum().backward()
    assert torch.allclose(ours.weight.grad, theirs.parametrizations.weight.original.grad, atol=1e-4)


def test_published_work_of_the_networks():
    "Multiply-adds of one patch at 256 and 128 px, papers_00_01_03.md part 2.2, without memory."
    def gflop(net, *inputs):
        with FlopCounterMode(display=False) as count: net(*inputs)
        return count.get_total_flops()/1e9
    with torch.device("meta"), torch.no_grad():
        x, half = torch.empty(1, 1, 256, 256), torch.empty(1, 1, 128, 128)
        G = ContextGenerator(progressive=False)
        assert gflop(G.draw, x, torch.empty(1, 12)) == pytest.approx(2.40, abs=.02)
        D = lambda **kw: ContextDiscriminator(progressive=False, **kw)
        assert gflop(D(), x) == pytest.approx(49.3, abs=.2) and gflop(D(width=64), x) == pytest.approx(12.4, abs=.1)
        assert gflop(D(size=128), half) == pytest.approx(9.95, abs=.05)


@pytest.mark.parametrize("stage", ["half", "fade", "full"])
def test_a_step_at_256_px(stage):
    recipe = replace(RECIPES["context_calc"], base=2, d_mult=1, batch=1, per_epoch=1, half=1, fade=1, epochs=3)
    g = Game(recipe, 0, "cpu", data=torch.from_numpy(rng(0, "big").integers(0, 256, (3, 1, 256, 256), dtype=np.uint8)), labels=torch.arange(3))
    g.start_epoch(["half", "fade", "full"].index(stage)); assert g.D.stage == stage
    g.step(recipe.rows(3, torch.arange(3), torch_rng(0, "order"))[0])
    assert all(torch.isfinite(v).all() for v in state(g).values())
    L = edit(g.G, g.data[:,0].numpy(), seed=0)
    assert (L[:, :10] == 0).all() and (L[:, :, -10:] == 0).all() and np.abs(L[:, 10:-10, 10:-10]).max() > 0


# ---- painting

def flooded(hot):
    "Largest 8-connected object by flood fill, in plain Python."
    left, best = set(map(tuple, np.argwhere(hot))), []
    while left:
        todo, part = [left.pop()], []
        while todo:
            y, x = todo.pop(); part.append((y, x))
            for q in [(y+a, x+b) for a in (-1,0,1) for b in (-1,0,1)]:
                if q in left: left.remove(q); todo.append(q)
        best = max(best, part, key=len)
    out = np.zeros(hot.shape, bool)
    for y, x in best: out[y, x] = True
    return out


def test_mask_against_plain_arithmetic():
    "Threshold, flood fill, growth by distance, and the Gaussian as a sum of weights."
    from scipy import ndimage
    s = 48; rule = Rule(min_share=.02, grow=15, blur=16)                     # 2.8 and 3 px at this side
    for seed in range(4):
        L = ndimage.gaussian_filter(rng(seed, "L").standard_normal((s,s)), 3).astype(np.float32); L = .15*L/L.std()
        for task, sign in (("mass", 1), ("remove", -1)):
            m, why, share = painting_mask(L, task=task, rule=rule)
            obj = flooded(sign*L > .1); assert share == obj.mean() and why == ""
            at = np.argwhere(obj); y, x = np.mgrid[:s,:s]
            grown = (np.square(y[...,None]-at[:,0]) + np.square(x[...,None]-at[:,1])).min(-1) <= (15*s/256)**2
            sd = 16*s/256; k = np.arange(-6, 7); w = np.exp(-k*k/(2*sd*sd)); w = np.outer(w, w)/w.sum()**2
            pad = np.pad(grown.astype(float), 6, mode="edge")
            blurred = sum(w[i,j]*pad[i:i+s,j:j+s] for i in range(13) for j in range(13))
            assert np.abs(m - blurred).max() < 1e-5


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [64, 256])
def test_outside_the_mask_every_byte_stays(task, size):
    from scipy import ndimage
    sign = TASKS[task].sign
    L = ndimage.gaussian_filter(rng(5, "L").standard_normal((6,size,size)), (0,size/12,size/12)); L = np.clip(sign*.3*L/L.std(), -1, 1).astype(np.float32)
    x = rng(5, "x").integers(0, 256, L.shape, dtype=np.uint8)
    p = paint(x, L, task=task, rule=Rule(min_share=.01))
    assert p.kept.all() and (p.pixels[p.mask == 0] == x[p.mask == 0]).all() and (p.mask == 0).any() and (p.pixels != x).any((1,2)).all()
    exact = np.clip(x.astype(float) + 127.5*L*p.mask, 0, 255)
    assert np.abs(p.pixels - exact).max() <= .5 + 1e-4
    none = paint(x, L, task=task, rule=Rule(threshold=2.)); assert not none.kept.any() and (none.pixels == x).all() and none.discards == {"nothing beyond the threshold": 6}


def test_set_does_not_depend_on_batches_and_counts_all(tmp_path):
    G = train(tmp_path).snapshots[-1]
    x = pixels()[:,0]
    low = Rule(threshold=.001, min_share=.05)
    a, src, lost = synthesize(G, x, 10, task="mass", seed=2, rule=low, rounds=3)
    b, again, _ = synthesize(load_generator(G), x, 10, task="mass", seed=2, rule=low, rounds=3)
    assert (a.pixels == b.pixels).all() and src.equals(again) and len(a) == len(src) <= 10
    assert np.abs(edit(G, x, seed=0, bs=3) - edit(G, x, seed=0)).max() < 1e-5
    full, told, lost = synthesize(G, x, 10_000, task="mass", seed=2, rule=low, rounds=3)
    assert len(full) + sum(lost.values()) == 3*len(x) and set(told["round"]) <= {0, 1, 2}


def test_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(WeightsError): edit(tmp_path, pixels()[:,0], seed=0)


# ---- learning, and its control

def judged(labels, seed):
    "AUC of a judge who knows no network (brightest square against its surroundings), edited against unedited patches, after training with these labels."
    from scipy import ndimage
    from mammo_nb.metrics.auc import auc
    def toys(n, disc, chance, s=32):
        x = ndimage.gaussian_filter(chance.standard_normal((n,s,s)), (0,2,2)); x = 80 + 20*x/x.std()
        (y, xx), (cy, cx) = np.mgrid[:s,:s], chance.uniform(.4, .6, (2,n,1,1))*s
        return (x + disc*70/(1 + np.exp(np.hypot(y-cy, xx-cx) - s/6))).clip(0, 255).astype(np.uint8)
    def judge(x):
        f = x.astype(float); mean = lambda k: ndimage.uniform_filter(f, (0, 32//k, 32//k))
        return (mean(4) - mean(2))[:, 8:-8, 8:-8].max((1,2))
    recipe = RECIPES["context_mass"].small(**{**DEMO, "size": 32, "width": .25, "d_mult": 4, "progressive": False, "lr_g": 5e-4})
    x = np.concatenate([toys(60, True, rng(seed, "m")), toys(60, False, rng(seed, "b"))//2, toys(60, False, rng(seed, "n"))])
    g = Game(recipe, seed, "cpu", channels_last=True, data=torch.from_numpy(x)[:,None], labels=torch.from_numpy(labels))
    for e in range(recipe.epochs): g.start_epoch(e); train_epoch(g, g.data, epoch=e)
    new = toys(40, False, rng(9, "new"))
    return auc(np.repeat([0,1], 40), np.r_[judge(new), judge((new + 127.5*edit(g.G, new, seed=0)).clip(0, 255))])


@pytest.mark.slow
def test_lesions_come_from_the_labels():
    "Three seeds learn the disc; with the classes shuffled there is nothing to learn, so the median must stay lower."
    true = np.repeat([0,1,2], 60)
    real = [judged(true, seed) for seed in range(3)]
    null = [judged(rng(seed, "shuffle").permutation(true), seed) for seed in range(3)]
    assert np.median(real) > .65 and np.median(real) > np.median(null) + .1, (real, null)


# ---- on a GPU: written, never run on one in the session that wrote them

@pytest.mark.gpu
def test_graph_equals_eager_in_every_stage():
    graphed, graphs = played(LONG, device="cuda", epochs=6)
    eager, none = played(replace(LONG), device="cuda", epochs=6, capture=lambda *a: (_ for _ in ()).throw(RuntimeError("no")))
    assert graphs == 6 and none == 0 and same(state(graphed), state(eager))


@pytest.mark.gpu
def test_fast_mode_trains_on_a_gpu():
    g, graphs = played(LONG, device="cuda", epochs=6, mode="fast")
    assert graphs == 6 and all(torch.isfinite(v).all() for v in state(g).values()), g.engine.why
