"The conditional GAN against a textbook loop, killed and resumed, told wrong labels, and sampled by class."
import contextlib
import json
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from mock_cuda import mock_cuda
from mammo_nb.core import ParameterError, RunError, rng, torch_rng
from mammo_nb.gans.cgan import CGAN, DIGITS_CGAN, digit_check, digits, sample_classes
from mammo_nb.gans.share import load_generator, sample_generator
from mammo_nb.gans.train import Game, RECIPES, real_batch, train_epoch, train_gan

TINY = CGAN().small(16, 1/32, nz=6, batch=8, batch_g=12, updates_epoch=3, epochs=3)
N = 40


@pytest.fixture(scope="module")
def pixels(): return rng(0, "patches").integers(0, 256, (N, 16, 16), dtype=np.uint8)

@pytest.fixture(scope="module")
def labels(): return (np.arange(N) % 3 == 0).astype(np.int64)

def weights(*nets): return torch.cat([p.detach().flatten().double() for n in nets for p in n.state_dict().values()])


def textbook(recipe, pixels, labels, seed):
    "Keras-GAN's loop written out in plain torch: `train_on_batch` on real, on generated, then the combined model."
    G, D = (n.double() for n in recipe.nets(seed))
    og, od = (torch.optim.Adam(n.parameters(), lr=2e-4*32, betas=(.5, .999), foreach=False) for n in (G, D))
    B, x, y = torch.nn.BCELoss(), torch.from_numpy(pixels)[:,None], torch.from_numpy(labels)
    prob = lambda *a: D(*a).double().sigmoid()
    for epoch in range(recipe.epochs):
        chance = {k: torch_rng(seed, k, epoch) for k in ("real", "noise", "label", "drop")}
        order = torch.randint(N, (recipe.updates_epoch*8,), generator=torch_rng(seed, "order", epoch))
        for k in range(recipe.updates_epoch):
            idx = order[8*k:8*k+8]
            imgs = real_batch(x, idx, recipe, chance["real"]).expand(-1, 3, -1, -1)
            if recipe.fakes == "predict": G.eval()
            with torch.no_grad(): gen = G.colour(torch.randn(8, 6, generator=chance["noise"]), y[idx])
            G.train()
            a = B(prob(imgs, y[idx], chance["drop"]), torch.ones(8).double())
            if recipe.d_steps == "two": od.zero_grad(); a.backward(); od.step()
            b = B(prob(gen, y[idx], chance["drop"]), torch.zeros(8).double())
            od.zero_grad(); (b if recipe.d_steps == "two" else (a + b)/2).backward(); od.step()
            said = torch.randint(2, (12,), generator=chance["label"])
            loss = B(prob(G.colour(torch.randn(12, 6, generator=chance["noise"]), said), said, chance["drop"]), torch.ones(12).double())
            og.zero_grad(); loss.backward(); og.step()
    return G, D


@pytest.mark.parametrize("change", [{}, dict(d_steps="mean", fakes="train"), dict(join="multiply", head="pool")], ids=["keras", "mean", "multiply"])
def test_cgan_equals_a_textbook_loop(change, pixels, labels):
    recipe = replace(TINY, **change)
    game = Game(recipe, 5, "cpu", data=torch.from_numpy(pixels)[:,None], labels=torch.from_numpy(labels))
    for net in (game.G, game.D): net.double()       # a bias before batch norm has a gradient of rounding errors only, which Adam makes a step of
    for epoch in range(recipe.epochs): game.start_epoch(epoch); rows = train_epoch(game, game.data, epoch=epoch, sums={})
    G, D = textbook(recipe, pixels, labels, 5)
    assert torch.allclose(weights(game.G, game.D), weights(G, D), atol=1e-6)
    assert set(rows) == {"loss_d", "loss_g", "d_real", "d_fake"}


def test_killed_and_resumed_ends_with_the_same_bytes(pixels, labels, tmp_path):
    class Killed(Exception): pass
    go = lambda name, log=None: train_gan(TINY, pixels, labels=labels, folder=tmp_path/name, seed=1, checkpoint_every_s=0, log=log)
    whole, saves = go("whole"), []
    def die(**kw):
        if kw.get("stage") == "checkpoint": saves.append(kw)
        if len(saves) == 5: raise Killed                   # within the second epoch
    with pytest.raises(Killed): go("killed", die)
    after = go("killed")
    assert [p.read_bytes() for s in after.snapshots for p in sorted(s.iterdir())] == [p.read_bytes() for s in whole.snapshots for p in sorted(s.iterdir())]
    assert after.history.equals(whole.history)
    with pytest.raises(RunError): train_gan(TINY, pixels, labels=1-labels, folder=tmp_path/"whole", seed=1)


def test_labels_reach_both_players(pixels, labels):
    "Other labels of the same patches lead elsewhere; the class moves what G makes and what D says."
    def run(y):
        game = Game(TINY, 5, "cpu", data=torch.from_numpy(pixels)[:,None], labels=torch.from_numpy(y))
        game.start_epoch(0); train_epoch(game, game.data, epoch=0, sums={})
        return game
    a, b = run(labels), run(1 - labels)
    assert not torch.equal(weights(a.D), weights(b.D))
    z, y = a.G.eval().latents(4, rng(0, "z"))
    assert not torch.allclose(a.G(z, y), a.G(z, 1-y)) and not torch.allclose(a.D(a.G.colour(z, y), y), a.D(a.G.colour(z, y), 1-y))


def test_samples_by_class(pixels, labels, tmp_path):
    run = train_gan(replace(TINY, snapshots="spread", epochs=6, updates_epoch=1), pixels, labels=labels, folder=tmp_path/"g", seed=1)
    assert len(run.snapshots) > 1
    x, t = sample_classes(run.snapshots, 22, seed=3)
    again, plain = sample_generator(run.snapshots, 22, seed=3)
    assert np.array_equal(x, again) and (t.label == plain.number % 2).all() and abs(t.label.sum() - 11) <= len(run.snapshots)
    one, t1 = sample_classes(run.snapshots[-1], 7, seed=3, label=1)
    both, t2 = sample_classes(run.snapshots[-1], 14, seed=3)
    assert np.array_equal(one, both[t2.label == 1]) and (t1.label == 1).all() and len(one) == 7
    assert x.dtype == np.uint8 and x.shape == (22, 16, 16) and sample_classes(run.snapshots[-1], 2, seed=3, size=24)[0].shape == (2, 24, 24)
    G = load_generator(run.snapshots[-1])
    assert G.config["classes"] == 2 and G.card["training"]["recipe"]["join"] == "concat"
    with pytest.raises(ParameterError, match="class 2"): sample_classes(run.snapshots[-1], 2, seed=3, label=2)


def test_unit_range_is_told_to_the_reader(pixels, labels, tmp_path):
    run = train_gan(replace(TINY, real_range="unit", epochs=1), pixels, labels=labels, folder=tmp_path/"g", seed=1)
    assert json.loads((run.snapshots[-1]/"generator.json").read_text())["value_range"] == [0., 1.]


def test_no_step_waits_for_the_device(pixels, labels):
    "What a CUDA graph could not capture, by the engine's own list."
    from mammo_nb.gans.engine import waits
    for change in ({}, dict(d_steps="mean", fakes="train"), dict(join="multiply", head="pool")):
        game = Game(replace(TINY, **change), 0, "cpu", data=torch.from_numpy(pixels)[:,None], labels=torch.from_numpy(labels))
        game.start_epoch(0); train_epoch(game, game.data, epoch=0, sums={}); game.place(0)
        assert waits(lambda: game.step(torch.arange(8))) == []


def refused_by_cudnn(refusals, pixels, labels):
    "Eight updates on the played device; the first captures end as cuDNN ended one on an H200 (gpu_measured.md)."
    said, left = [], [refusals]
    with mock_cuda():
        real = torch.cuda.graph
        @contextlib.contextmanager
        def graph(*args, **kw):
            with real(*args, **kw):
                yield
                left[0] -= 1
                if left[0] >= 0: raise RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR")
        with patch.object(torch.cuda, "graph", graph):
            data = torch.from_numpy(pixels)[:,None].to("cuda")
            game = Game(replace(TINY, updates_epoch=8), 5, "cuda", data=data, labels=torch.from_numpy(labels), log=lambda **kw: said.append(kw))
            game.start_epoch(0); means = train_epoch(game, data, epoch=0, sums={})
        return weights(game.G.cpu(), game.D.cpu()), means, said, [s.graph for s in game.engine.slots.values()]


def test_a_capture_that_cudnn_refuses_is_tried_once_more(pixels, labels):
    (whole, means, _, _), (once, again, said, graphs) = (refused_by_cudnn(k, pixels, labels) for k in (0, 1))
    assert torch.equal(whole, once) and means == again and not said and len(graphs) == 1 and graphs[0]
    twice, again, said, graphs = refused_by_cudnn(2, pixels, labels)
    assert torch.equal(whole, twice) and means == again and not graphs
    assert [(kw["event"], kw["why"]) for kw in said] == [("eager", "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR")]


@pytest.mark.slow
def test_shuffled_labels_are_not_learnt(tmp_path):
    "The same training told shuffled labels makes digits that the judge recognises no more often than by chance."
    x, y = digits(16)
    recipe = CGAN().small(16, 1/4, channels=1, classes=10).of_updates(600)
    run = train_gan(recipe, x, labels=rng(0, "shuffled").permutation(y), folder=tmp_path/"g", seed=0)
    seen = digit_check(run.snapshots[-1], seed=0)
    assert seen["lo"] <= .12 and seen["hi"] < .25


def test_registered():
    assert RECIPES["cbis_cgan"].epochs*RECIPES["cbis_cgan"].updates_epoch == 30_000 and RECIPES["digits_cgan"] is DIGITS_CGAN
    assert DIGITS_CGAN.epochs*DIGITS_CGAN.updates_epoch == 1000
