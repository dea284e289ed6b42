"Differentially private training: gradients really are clipped and noised patient by patient, the account agrees with one kept independently, a killed run goes on exactly."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import gammaln, logsumexp

pytest.importorskip("opacus", reason="needs the extra `privacy` (opacus)")
from mammo_nb.core import ParameterError, file_hash, read_json, rng, torch_rng
from mammo_nb.gans import dp
from mammo_nb.gans.dcgan import DCGAN
from mammo_nb.gans.train import RECIPES, Game
from mammo_nb.gans.wgangp import WGANGP

PATIENTS = np.repeat(np.arange(12), 2)
SMALL = dict(size=8, width=1/16, nz=4, batch=6, snapshots="last")

def recipe(name="sharing_dcgan", epsilon=8., epochs=3, **kw): return dp.make_private(RECIPES[name].small(**SMALL), PATIENTS, epsilon=epsilon, epochs=epochs, delta=1e-3, **kw)
def patches(): return rng(0, "patches").integers(0, 256, (24, 2, 8, 8), dtype=np.uint8)
def game(r):
    g = Game(r, 0, "cpu", data=torch.from_numpy(patches()), labels=torch.from_numpy(dp.unit_codes(PATIENTS)))
    g.start_epoch(0)
    return g

def rdp_epsilon(q, sigma, steps, delta):
    "Independent account: Rényi divergence of the sampled Gaussian at whole orders (Mironov 2019, section 3.3), converted as in Canonne 2020, proposition 12."
    best = math.inf
    for a in range(2, 256):
        k = np.arange(a+1)
        log_binom = gammaln(a+1) - gammaln(k+1) - gammaln(a-k+1)
        rdp = steps*logsumexp(log_binom + k*np.log(q) + (a-k)*np.log1p(-q) + (k*k-k)/(2*sigma**2))/(a-1)
        best = min(best, rdp + np.log1p(-1/a) - (np.log(delta) + np.log(a))/(a-1))
    return best

@pytest.mark.parametrize("q,sigma,steps,delta", [(.01, 1., 1000, 1e-5), (.1, 1.5, 300, 1e-4), (.4, 4., 200, 1e-3), (.05, .7, 50, 1e-4)])
def test_epsilon_agrees_with_an_independent_account(q, sigma, steps, delta):
    ours, theirs = dp.epsilon_of(sigma, q, steps, delta), rdp_epsilon(q, sigma, steps, delta)
    assert ours == pytest.approx(theirs, rel=.03) and ours <= theirs*1.001          # ours may also use broken orders

def test_epsilon_is_not_below_a_numerical_one():
    "Opacus' PRV accountant finds nearly the true epsilon; the Rényi figure on the card is an upper bound."
    from opacus.accountants import PRVAccountant
    a = PRVAccountant(); a.history = [(1.5, .1, 300)]
    assert a.get_epsilon(delta=1e-4) <= dp.epsilon_of(1.5, .1, 300, 1e-4)

@pytest.mark.parametrize("epsilon", [1., 8., 60.])
def test_noise_meets_the_budget(epsilon):
    r = recipe(epsilon=epsilon)
    assert .95*epsilon <= dp.spent(r, 3) <= epsilon < dp.spent(replace(r, noise=.9*r.noise), 3)

@pytest.mark.parametrize("name", ["sharing_dcgan", "sharing_wgangp"])
def test_one_patient_moves_a_step_by_the_clip_at_most(name):
    "The sum of gradients with and without each patient in turn, noise off; losses blown up so that every gradient must be clipped."
    r = replace(recipe(name), noise=1e-12, clip=.01)
    g = game(r); got = []
    g.private.original_optimizer.step = lambda: got.append(torch.cat([p.grad.flatten() for p in g.D.parameters()])*r.batch)
    state = {k: v.get_state() for k,v in g.rng.items()}
    real = torch.from_numpy(patches()[:6,:1]).float()/127.5 - 1
    fake, extra = real.flip(0), torch.linspace(.2, .8, 6).view(6,1,1,1)
    def loss(p, x, y, e): # the recipe's own loss, larger
        if name == "sharing_dcgan": return 100*(torch.nn.functional.softplus(-dp.score(g.D, p, x)) + torch.nn.functional.softplus(dp.score(g.D, p, y)))
        slope = torch.func.grad(lambda v: dp.score(g.D, p, v))(e*x + (1-e)*y)
        return 100*(dp.score(g.D, p, y) - dp.score(g.D, p, x) + 10*((slope.square().sum() + 1e-12).sqrt() - 1).square())
    def step(rows):
        for k,v in state.items(): g.rng[k].set_state(v)
        return g.descend_private(loss, real[rows], fake[rows], extra[rows])
    told = step(list(range(6)))
    assert told["clipped"] == pytest.approx(1.)
    for i in range(6):
        step([j for j in range(6) if j != i])
        moved = (got[0] - got[-1]).norm().item()
        assert .0099 < moved <= .01 + 1e-6, f"patient {i} moves the sum by {moved}"

@pytest.mark.parametrize("name", ["sharing_dcgan", "sharing_wgangp"])
def test_what_the_steps_really_clip(name):
    "Per-patient gradients inside step_d of the recipes, read off the optimiser: none counts for more than the clip, and patch by patch they are plain autograd's."
    r = replace(recipe(name), noise=1e-12, clip=1e-3)
    g = game(r); seen = []
    real_step = g.private.step
    def spy(*a):
        norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in g.D.parameters()]).norm(dim=0)
        real_step(*a); seen.append((norms, torch.cat([p.grad.flatten() for p in g.D.parameters()]).norm()*r.batch))
    g.private.step = spy
    rows = torch.tensor([0, 5, 7, 22])
    r.step_d(g, r.real(g, rows))
    (norms, total), = seen
    assert len(norms) == 4 and (norms > 1e-3).all() and total <= 4e-3*1.001

def test_noise_has_the_promised_size():
    r = replace(recipe(), noise=3., clip=.5)
    g = game(r); got = []
    g.private.original_optimizer.step = lambda: got.append(torch.cat([p.grad.flatten() for p in g.D.parameters()])*r.batch)
    for _ in range(40): r.step_d(g, r.real(g, torch.zeros(0, dtype=torch.long)))     # nobody was drawn: the noise alone
    x = torch.stack(got)
    assert x.std().item() == pytest.approx(1.5, rel=.02) and abs(x.mean().item()) < .02
    assert torch.corrcoef(x[:2])[0,1].abs() < .1

def test_sampling_is_poisson_over_patients():
    r = recipe()
    rows = [b for e in range(200) for b in r.rows(24, torch.from_numpy(dp.unit_codes(PATIENTS)), torch_rng(0, "order", e))]
    sizes = np.array([len(b) for b in rows])
    assert len(rows) == 200*r.steps_epoch and sizes.mean() == pytest.approx(6, rel=.05) and sizes.var() == pytest.approx(12*.5*.5, rel=.2)
    assert all(len(set(PATIENTS[b.numpy()])) == len(b) for b in rows)
    with pytest.raises(ParameterError, match="made for 12 patients"): r.rows(24, None, torch_rng(0, "order"))

def content(d): return {p.relative_to(d).as_posix():file_hash(p) for p in sorted(d.rglob("*")) if p.is_file() and p.suffix != ".lock"}

@pytest.mark.parametrize("name", ["sharing_dcgan", "sharing_wgangp"])
def test_stopped_private_training_goes_on_exactly_with_its_account(tmp_path, name):
    r = recipe(name)
    class Stop(Exception): pass
    whole = dp.train_private(r, patches(), PATIENTS, epochs=3, folder=tmp_path/"a", seed=1, checkpoint_every_s=0)
    def stop(**kw):
        if kw.get("stage") == "checkpoint" and kw.get("step", 0) >= 10002: raise Stop
    with pytest.raises(Stop): dp.train_private(r, patches(), PATIENTS, epochs=3, folder=tmp_path/"b", seed=1, checkpoint_every_s=0, log=stop)
    dp.train_private(r, patches(), PATIENTS, epochs=3, folder=tmp_path/"b", seed=1, checkpoint_every_s=0)
    assert content(tmp_path/"a") == content(tmp_path/"b")
    step, = (tmp_path/"a").glob("checkpoint-*.json")
    account = dict(dict(read_json(step)["state"]["dict"])["extra_account"]["dict"])
    assert account["history"]["list"][0]["tuple"] == [r.noise, r.rate, 3*r.steps_epoch]
    card = read_json(whole.snapshots[-1]/"generator.json")["privacy"]
    assert card["steps"] == 3*r.steps_epoch and card["epsilon"] <= 8 and card["unit"] == "patient" and card["seed_public"] and "not this file" in dp.privacy_words(card)

def test_key_changes_chance_and_is_not_told(tmp_path):
    (tmp_path/"key").write_text("only we know")
    open_, secret = recipe(), recipe(key=str(tmp_path/"key"))
    units = torch.from_numpy(dp.unit_codes(PATIENTS))
    draw = lambda r: [b.tolist() for b in r.rows(24, units, torch_rng(0, "order", 0))]
    assert draw(open_) != draw(secret) == draw(secret)
    assert game(open_).rng["dp"].initial_seed() != game(secret).rng["dp"].initial_seed()
    assert not dp.privacy_card(secret, 3)["seed_public"]
    (tmp_path/"key").unlink()
    with pytest.raises(ParameterError, match="no such file"): draw(secret)

@pytest.mark.parametrize("change,said", [(dict(epsilon=0), "above 0"), (dict(delta=.5), "between 0 and 1/12"), (dict(unit="breast"), "is no unit")])
def test_wrong_budgets_are_refused(change, said):
    with pytest.raises(ParameterError, match=said): dp.make_private(RECIPES["sharing_dcgan"], PATIENTS, **(dict(epsilon=1., epochs=2, delta=1e-3) | change))
    with pytest.raises(ParameterError, match="more than 8"): dp.train_private(recipe(), patches(), PATIENTS, epochs=100, folder="/nowhere")

def test_missing_opacus_is_named(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(Exception, match="mammo_nb\\[privacy\\]"): dp.make_private(RECIPES["sharing_dcgan"], PATIENTS, epsilon=1., epochs=2)

@pytest.mark.gpu
def test_private_step_on_cuda(tmp_path):
    t = dp.train_private(recipe(), patches(), PATIENTS, epochs=3, folder=tmp_path, seed=1, device="cuda")
    assert np.isfinite(t.history.loss_d).all()
