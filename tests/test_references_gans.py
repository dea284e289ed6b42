"The trainer against textbook loops written from the papers, and against torchvision's jitter."
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as TF

from mammo_nb.core import rng, torch_rng
from mammo_nb.gans.dcgan import RECIPES
from mammo_nb.gans.losses import bce_d, bce_g, grad_penalty
from mammo_nb.gans.train import Game, Recipe, as_pixels, real_batch, train_epoch
from mammo_nb.gans import wgangp  # noqa: F401 - adds its recipe

SIZE, BATCH, N, EPOCHS = 16, 8, 36, 3      # 36 = 4 batches of 8 and one of 4


@pytest.fixture(scope="module")
def pixels(): return rng(0, "patches").integers(0, 256, (N, 3, SIZE, SIZE), dtype=np.uint8)


def ours(recipe, pixels, seed=5):
    game, data = Game(recipe, seed, "cpu"), as_pixels(pixels, SIZE)
    rows = []
    for epoch in range(EPOCHS): game.start_epoch(epoch); rows.append(train_epoch(game, data, epoch=epoch, sums={}))
    return game, rows


def batches_of(recipe, pixels, seed, epoch):
    "Real batches in the order of the run: one permutation an epoch, the small last batch kept."
    chance, data = torch_rng(seed, "real", epoch), as_pixels(pixels, SIZE)
    order = torch.randperm(N, generator=torch_rng(seed, "order", epoch))
    for k in range(0, N, BATCH): yield real_batch(data, order[k:k+BATCH], recipe, chance)


def same_weights(game, G, D, atol=2e-5):
    for net, want in ((game.G, G), (game.D, D)):
        for (k, a), b in zip(net.state_dict().items(), want.state_dict().values()):
            assert torch.allclose(a.float(), b.float(), atol=atol, rtol=1e-4), (k, (a-b).abs().max())


def textbook_dcgan(recipe, pixels, seed):
    "DCGAN written out: probabilities, separate losses, optimisers without options, torch's own schedule."
    G, D = recipe.nets(seed)
    og, od = (torch.optim.Adam(n.parameters(), lr=lr, betas=recipe.betas, foreach=False) for n, lr in ((G, recipe.lr_g), (D, recipe.lr_d)))
    sched = [torch.optim.lr_scheduler.StepLR(o, e or 10**9, recipe.decay) for o, e in ((og, recipe.decay_g), (od, recipe.decay_d))]
    log = lambda p: torch.log(p.double().clamp_min(1e-300)).mean
    for epoch in range(EPOCHS):
        noise, label = torch_rng(seed, "noise", epoch), torch_rng(seed, "label", epoch)
        fixed = torch.empty(1).uniform_(*recipe.labels, generator=torch_rng(seed, "epoch label", epoch))
        for real in batches_of(recipe, pixels, seed, epoch):
            b = len(real)
            fake = G(torch.randn(b, recipe.nz, generator=noise))
            t = (fixed.expand(b) if recipe.labels_per == "epoch" else torch.empty(b).uniform_(*recipe.labels, generator=label)).double()
            p, q = torch.sigmoid(D(real).double()), torch.sigmoid(D(fake.detach()).double())
            loss = -(t*p.log() + (1-t)*(1-p).log()).mean() - (1-q).log().mean()
            od.zero_grad(); loss.backward(); od.step()
            want = fixed.double() if recipe.labels_g else 1.
            q = torch.sigmoid(D(fake).double())
            loss_g = -(want*q.log() + (1-want)*(1-q).log()).mean()
            og.zero_grad(); loss_g.backward(); og.step()
        for s in sched: s.step()
    return G, D, loss.item(), loss_g.item()


@pytest.mark.parametrize("name, change", [
    ("sharing_dcgan", {}),
    ("thesis_dcgan", dict(decay=.5, decay_g=2, decay_d=1)),
])
def test_dcgan_equals_a_textbook_loop(name, change, pixels):
    recipe = RECIPES[name].small(size=SIZE, width=1/16, nz=6, batch=BATCH, **change)
    game, rows = ours(recipe, pixels)
    G, D, *_ = textbook_dcgan(recipe, pixels, seed=5)
    same_weights(game, G, D)
    assert all(set(r) == {"loss_d", "loss_g", "d_real", "d_fake"} for r in rows)


def textbook_wgan(recipe, pixels, seed):
    "WGAN-GP written out; the penalty's gradient is taken patch by patch."
    G, D = recipe.nets(seed)
    og, od = (torch.optim.Adam(n.parameters(), lr=lr, betas=recipe.betas, foreach=False) for n, lr in ((G, recipe.lr_g), (D, recipe.lr_d)))
    critic_steps = g_steps = 0
    for epoch in range(EPOCHS):
        noise, mix = torch_rng(seed, "noise", epoch), torch_rng(seed, "mix", epoch)
        for real in batches_of(recipe, pixels, seed, epoch):
            b = len(real)
            fake = G(torch.randn(b, recipe.nz, generator=noise)).detach()
            eps, penalty = torch.rand(b, 1, 1, 1, generator=mix), 0.
            for i in range(b):
                x = (eps[i]*real[i] + (1-eps[i])*fake[i])[None].requires_grad_()
                g, = torch.autograd.grad(D(x).sum(), x, create_graph=True)
                penalty = penalty + (g.pow(2).sum().sqrt() - 1)**2 / b
            loss = D(fake).mean() - D(real).mean() + 10*penalty
            od.zero_grad(); loss.backward(); od.step(); critic_steps += 1
            if critic_steps % 5: continue
            loss_g = -D(G(torch.randn(b, recipe.nz, generator=noise))).mean()
            og.zero_grad(); loss_g.backward(); og.step(); g_steps += 1
    return G, D, critic_steps, g_steps


def test_wgangp_equals_a_textbook_loop(pixels):
    recipe = RECIPES["sharing_wgangp"].small(size=SIZE, width=1/16, nz=6, batch=BATCH)
    game, _ = ours(recipe, pixels)
    G, D, critic_steps, g_steps = textbook_wgan(recipe, pixels, seed=5)
    assert (critic_steps, g_steps) == (15, 3)
    same_weights(game, G, D)


def test_authors_second_batch_switch(pixels):
    "With `g_every=2` the generator is updated at every second batch, counted through the epochs."
    recipe = RECIPES["sharing_dcgan"].small(size=SIZE, width=1/16, nz=6, batch=BATCH, g_every=2)
    steps = []
    class Counting(type(recipe)):
        def step_g(self, game, real): steps.append(1); return super().step_g(game, real)
    ours(Counting(**asdict(recipe)), pixels)
    assert len(steps) == EPOCHS*5//2


def test_gan_loss_equals_torch_below_one():
    real, fake, t = torch.randn(50, generator=torch_rng(1, "a")), torch.randn(50, generator=torch_rng(1, "b")), torch.rand(50, generator=torch_rng(1, "c"))
    B = torch.nn.BCELoss()
    assert torch.allclose(bce_d(real, fake, target=t), B(real.sigmoid(), t) + B(fake.sigmoid(), torch.zeros(50)), atol=1e-6)
    assert torch.allclose(bce_g(fake, target=t), B(fake.sigmoid(), t), atol=1e-6)


def test_penalty_gradient_by_finite_differences():
    "Double backward of the penalty through a convolutional critic against central differences."
    D = RECIPES["sharing_wgangp"].small(size=8, width=1/16).nets(3)[1].double()
    with torch.no_grad(): [p.mul_(10) for p in D.parameters()]
    real, fake = (torch.randn(3, 1, 8, 8, generator=torch_rng(2, k)).double() for k in "rf")
    value = lambda: grad_penalty(D, real, fake, torch_rng(2, "mix"))
    value().backward()
    w, h = next(D.parameters()), 1e-5
    for index in ((0, 0, 2, 2), (1, 0, 3, 1), (2, 0, 4, 4)):
        with torch.no_grad(): w[index] += h
        up = value().item()
        with torch.no_grad(): w[index] -= 2*h
        down = value().item()
        with torch.no_grad(): w[index] += h
        assert math.isclose((up-down)/2/h, w.grad[index].item(), rel_tol=1e-4, abs_tol=1e-7)


def test_jitter_equals_torchvision():
    x = rng(3, "x").integers(0, 256, (6, 1, 12, 12), dtype=np.uint8)
    recipe = Recipe(size=12, flips=False, jitter=.05, real_range="unit")
    got = real_batch(torch.from_numpy(x), torch.arange(6), recipe, torch_rng(0, "j"))
    u = torch.rand(6, 5, generator=torch_rng(0, "j"))
    for i in range(6):
        one = torch.from_numpy(x[i]).float()/255
        want = TF.adjust_contrast(TF.adjust_brightness(one, 1 + .05*(2*u[i,3]-1).item()), 1 + .05*(2*u[i,4]-1).item())
        assert torch.allclose(got[i], want, atol=1e-6)


def test_training_views_exclude_the_centred_one(pixels):
    "View 0 is kept for measuring: pixels changed there change nothing in training."
    recipe = RECIPES["sharing_dcgan"].small(size=SIZE, width=1/16, nz=6, batch=BATCH)
    other = pixels.copy(); other[:, 0] = 255 - other[:, 0]
    a, b = ours(recipe, pixels)[1], ours(recipe, other)[1]
    assert a == b and a != ours(recipe, 255 - pixels)[1]
