"SinGAN: published resize, published loop, kill and resume, models side by side."
import copy, signal, subprocess, sys, textwrap, time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mammo_nb.core import rng, torch_rng
from mammo_nb.gans.singan import (SinGANFit, SinGANG, SinGANRecipe, StepAdam, fit_singans, g_steps, init_, make, SinGAND, resize, to_tanh)

from mock_cuda import mock_cuda, weightless

TINY = SinGANRecipe(steps=6, min_size=14, width=4, max_width=8)

def patches(k=2, n=20):
    y,x = np.mgrid[:n,:n]
    field = np.stack([100 + 100*np.exp(-((y-n/2-i)**2 + (x-n/2)**2)/30) + 15*rng(i,"t").normal(size=(n,n)) for i in range(k)])
    return field.clip(0,255).astype(np.uint8)

# ---- the resize, one output pixel at a time ----
def slow_line(line, n_out, scale):
    "Gather with an unsigned index: taps before the line get no weight, taps after it are mirrored."
    def k(t):
        t = abs(t)
        return 1.5*t**3 - 2.5*t**2 + 1 if t <= 1 else -.5*t**3 + 2.5*t**2 - 4*t + 2 if t <= 2 else 0.
    f, out = min(scale, 1.), []
    for i in range(n_out):
        c = (i+.5)/scale - .5
        taps = [(p, k(f*(c-p))) for p in range(max(0, int(c-4/f)-2), int(c+4/f)+4)]
        near = [p if p < len(line) else 2*len(line)-1-p for p,_ in taps]
        out.append(sum(w*line[q] for (_,w),q in zip(taps, near))/sum(w for _,w in taps))
    return np.array(out)

@pytest.mark.parametrize("n,scale", [(28,.8193), (25,1/.8193), (31,.45)])
def test_resize_is_the_published_one(n, scale):
    u8, out = rng(n,"im").integers(0, 256, (n,n), dtype=np.uint8), int(np.ceil(n*scale))
    x = to_tanh(u8[None])
    cut = (255*((x[0,0]+1)/2)).to(torch.uint8).numpy()
    ref = np.apply_along_axis(slow_line, 0, cut.astype(float), out, scale)
    ref = np.apply_along_axis(slow_line, 1, ref, out, scale)
    ref = ((torch.from_numpy(ref/255).float() - .5)*2).clamp(-1,1)
    got = resize(x, (out,out), scale=scale)[0,0]
    assert (got-ref).abs().max() < 1e-6
    levels = [(255*((v+1)/2)+1e-4).to(torch.uint8) for v in (got,ref)]
    assert torch.equal(*levels)

# ---- one scale by the published loop, written out ----
class BNCritic(nn.Module):
    "D as published: batch norm, one image a call."
    def __init__(self, net):
        super().__init__()
        layers = []
        for b in list(net.layers)[:-1]:
            bn = nn.BatchNorm2d(b[1].num_features); bn.weight.data.copy_(b[1].weight.data); bn.bias.data.copy_(b[1].bias.data)
            layers += [b[0], bn, nn.LeakyReLU(.2)]
        self.net = nn.Sequential(*layers, net.layers[-1])
    def forward(self, x): return self.net(x)

def published_step(G, D, opt_g, opt_d, real, noise, amp, prevs, mixes, z_rec, prev_rec, r):
    keep = torch.autograd._unsafe_preserve_version_counter     # what torch 1.4 did by itself
    for prev,mix in zip(prevs, mixes):
        D.zero_grad()
        (-D(real).mean()).backward()
        fake = G(amp*noise, prev)                               # our G adds `prev` to its noise itself
        D(fake.detach()).mean().backward()
        x = (mix*real + (1-mix)*fake.detach()).requires_grad_()
        g, = torch.autograd.grad(D(x), x, torch.ones_like(D(x)), create_graph=True)
        (((g.norm(2, dim=1)-1)**2).mean()*r.gp).backward()
        with keep(tuple(D.parameters())): opt_d.step()
    for _ in range(r.g_steps):
        G.zero_grad()
        (-D(fake).mean()).backward(retain_graph=True)
        (r.alpha*nn.functional.mse_loss(G(amp*z_rec, prev_rec), real)).backward(retain_graph=True)
        with keep(tuple(G.parameters())): opt_g.step()

@pytest.mark.parametrize("scale", [0,1])
def test_steps_equal_the_published_loop(scale):
    r = SinGANRecipe(steps=3, min_size=14, width=6, max_width=6)
    fit = SinGANFit(to_tanh(patches(1)), keys=["a"], recipe=r, seed=3)
    while fit.scale < scale:
        fit.begin(); [fit.advance() for _ in range(r.steps)]; fit.finish()
    fit.begin(); fit.draw_block(0)
    L,B = fit.live, fit.live["block"]
    for k in "GD": L[k].double()
    fit.adam()
    for box in (L,B):
        for k,v in box.items():
            if isinstance(v, torch.Tensor): box[k] = v.double()
    torch.set_default_dtype(torch.float64)
    try:
        G,D = copy.deepcopy(L["G"]), BNCritic(copy.deepcopy(L["D"]))
        for m in (G,D): m.requires_grad_(True)
        opt_g,opt_d = (torch.optim.Adam(m.parameters(), lr=r.lr, betas=(r.beta1,.999)) for m in (G,D))
        for s in range(3):
            z_rec = B["z_rec"][s:s+1] if scale == 0 else torch.zeros_like(L["real"])
            published_step(G, D, opt_g, opt_d, L["real"], B["noise"][s:s+1], L["amp"][0], [p[None] for p in B["prev"][s]], B["mix"][s,:,0], z_rec, L["prev_rec"], r)
            fit.advance()
        def same(ours, published):     # biases before a batch norm have no gradient but rounding, which Adam magnifies: they change nothing
            for (k,v),w in zip(ours.named_parameters(), published.parameters()):
                if not k.endswith("0.bias"): assert torch.allclose(v, w, rtol=1e-7, atol=1e-9), k
        same(L["G"], G); same(L["D"], D)
        x = B["prev"][0,0][None]
        assert torch.allclose(L["G"](x, x), G(x, x), rtol=1e-7, atol=1e-9)
    finally: torch.set_default_dtype(torch.float32)

def test_adversarial_gradient_reaches_G_in_every_step():
    G,D = init_(SinGANG(6), torch_rng(1,"g")), init_(SinGAND(6), torch_rng(1,"d"))
    z, blank = torch.randn(2,1,16,16, generator=torch_rng(0,"z")), torch.zeros(2,1,16,16)
    for how in ("reuse","recompute"):
        moved = []
        class Watch(StepAdam):
            def step(self): moved.append(sum(p.grad.abs().sum().item() for p in self.weights if p.grad is not None)); return super().step()
        with torch.no_grad(): pair = make(G, z, blank)
        g_steps(G, D, Watch(G, lr=1e-3, beta1=.5), pair=pair, z=z, prev=blank, real=blank[:1], recipe=SinGANRecipe(alpha=0., g_graph=how))
        assert len(moved) == 3 and min(moved) > 0

def test_many_models_in_one_call_equal_one_by_one(tmp_path):
    images, recipe = patches(3), SinGANRecipe(steps=2, min_size=14, width=4, max_width=8, eight_bit=False)    # 8 bits magnify rounding
    apart = fit_singans(images, recipe=recipe, folder=tmp_path/"apart", seed=0, device="cpu", merge_width=0)
    joint = fit_singans(images, recipe=recipe, folder=tmp_path/"joint", seed=0, device="cpu", merge_width=8)
    for a,b in zip(apart, joint):
        assert np.allclose(a.amps, b.amps, rtol=1e-3)
        far = np.abs(a.sample(2, seed=0).astype(int) - b.sample(2, seed=0))
        assert far.mean() < 1.5 and far.max() <= 8                     # Adam's first steps have full size whatever the gradient, so rounding grows

class Asked(TorchDispatchMode):
    "Operators that are asked for the gradient of a weight they do not have: CUDA's kernels fail there, the CPU's do not."
    def __init__(self):
        super().__init__()
        self.seen, self.found = 0, []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += "batch_norm_backward" in func.__name__
        if weightless(func, args, kwargs or {}): self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))

def test_no_kernel_is_asked_for_the_gradient_of_a_missing_weight():
    fit = SinGANFit(to_tanh(patches(2)), keys=["a", "b"], recipe=TINY, seed=0, merge_width=4)
    with Asked() as asked:
        fit.begin()
        fit.advance()
    assert asked.seen > 20 and asked.found == []
    x, stat = torch.randn(2,3,4,4), torch.ones(3)
    backward = lambda mask: torch.ops.aten.native_batch_norm_backward(x, x, None, None, None, stat, stat, True, 1e-5, mask)
    with Asked() as asked:
        backward([True]*3)
        backward([True,False,False])
    assert len(asked.found) == 1                                  # the planted one
    with mock_cuda():
        x, stat = x.cuda(), stat.cuda()
        with pytest.raises(RuntimeError, match="does not have a device"): backward([True]*3)
        backward([True,False,False])

# ---- stop and go on ----
class Stop(Exception): pass

@pytest.mark.parametrize("at,merge", [(3,0), (9,4), (17,0)])
def test_stopped_and_resumed_equals_unbroken(tmp_path, at, merge):
    images, kw = patches(2, 16), dict(recipe=SinGANRecipe(steps=4, min_size=14, width=4, max_width=4, restart=3), seed=1, device="cpu", merge_width=merge)
    whole = fit_singans(images, folder=tmp_path/"whole", **kw)
    seen = []
    def stop(**fields):
        if fields["stage"] == "singan":
            seen.append(1)
            if len(seen) == at: raise Stop
    with pytest.raises(Stop): fit_singans(images, folder=tmp_path/"cut", log=stop, checkpoint_every_s=0, **kw)
    again = fit_singans(images, folder=tmp_path/"cut", checkpoint_every_s=0, **kw)
    for f in ("singan_16x16_00/G.safetensors", "singan_16x16_01/G.safetensors", "singan_16x16_00/generator.json", "history_16x16.json"):
        assert (tmp_path/"whole"/f).read_bytes() == (tmp_path/"cut"/f).read_bytes(), f
    assert sorted(p.name for p in (tmp_path/"cut").glob("singan_*-*")) == []          # checkpoints are gone
    assert np.array_equal(again[0].sample(2, seed=0), whole[0].sample(2, seed=0))

def in_turns_and_alone(folder, device):
    "Bytes of SinGANs that took turns, a step each, and of the same ones alone."
    def how(place, seed): return dict(recipe=SinGANRecipe(steps=6, min_size=14, width=4, max_width=4), folder=folder/place/str(seed), seed=seed, device=device)
    works = [fit_singans.steps(patches(2, 16), **how("turns", seed)) for seed in range(3)]
    while any([next(work, None) is None and work.gi_frame for work in works]): pass
    for seed in range(3): fit_singans(patches(2, 16), **how("alone", seed))
    return [[(folder/place/str(seed)/"singan_16x16_01"/"G.safetensors").read_bytes() for seed in range(3)] for place in ("turns", "alone")]

def test_singans_in_turns_equal_those_alone(tmp_path):
    turns, alone = in_turns_and_alone(tmp_path/"cpu", "cpu")
    assert turns == alone and len({*turns}) == 3
    with mock_cuda(): turns, alone = in_turns_and_alone(tmp_path/"cuda", "cuda")
    assert turns == alone and len({*turns}) == 3

@pytest.mark.gpu
def test_singans_in_turns_equal_those_alone_on_a_gpu(tmp_path):
    turns, alone = in_turns_and_alone(tmp_path, "cuda")
    assert turns == alone and len({*turns}) == 3

def test_a_closed_training_goes_on_where_it_was(tmp_path):
    how = dict(recipe=SinGANRecipe(steps=4, min_size=14, width=4, max_width=4), seed=1, device="cpu")
    fit_singans(patches(1, 16), folder=tmp_path/"whole", **how)
    work = fit_singans.steps(patches(1, 16), folder=tmp_path/"cut", **how)
    for _ in range(3): next(work)
    work.close()                                                   # as when another training fails
    assert list((tmp_path/"cut").glob("singan_*-00000003.json"))
    said = []
    fit_singans(patches(1, 16), folder=tmp_path/"cut", log=lambda **told: said.append(told), **how)
    assert said[0]["step"] == 4 and (tmp_path/"cut"/"history_16x16.json").exists()
    whole, cut = (tmp_path/name/"singan_16x16_00"/"G.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()

def test_killed_and_resumed_equals_unbroken(tmp_path):
    code = textwrap.dedent("""
        import sys, numpy as np, torch; torch.set_num_threads(1)
        from pathlib import Path
        from mammo_nb.gans.singan import SinGANRecipe, fit_singans
        images = np.load(sys.argv[1])
        fit_singans(images, recipe=SinGANRecipe(steps=6, min_size=14, width=4, max_width=4), folder=Path(sys.argv[2]), seed=1, device="cpu", checkpoint_every_s=0)
    """)
    np.save(tmp_path/"images.npy", patches(1, 18))
    cut = subprocess.Popen([sys.executable, "-c", code, str(tmp_path/"images.npy"), str(tmp_path/"cut")])
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    try:
        kw = dict(recipe=SinGANRecipe(steps=6, min_size=14, width=4, max_width=4), seed=1, device="cpu")
        fit_singans(patches(1, 18), folder=tmp_path/"whole", **kw)
        while cut.poll() is None and not list((tmp_path/"cut").glob("singan_*-0000000[5-9].json")): time.sleep(.01)
        cut.send_signal(signal.SIGKILL); cut.wait()
        assert list((tmp_path/"cut").glob("singan_*-*.json"))          # it was killed on the way
        fit_singans(patches(1, 18), folder=tmp_path/"cut", **kw)
    finally: torch.set_num_threads(threads)
    for f in ("singan_18x18_00/G.safetensors", "history_18x18.json"):
        assert (tmp_path/"whole"/f).read_bytes() == (tmp_path/"cut"/f).read_bytes(), f

def test_training_leaves_the_global_generators_alone(tmp_path):
    before = torch.random.get_rng_state()
    fit_singans(patches(1, 16), recipe=SinGANRecipe(steps=1, min_size=14, width=4), folder=tmp_path, seed=0, device="cpu")
    assert torch.equal(before, torch.random.get_rng_state())
