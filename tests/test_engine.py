"The static step that a CUDA graph would hold is the plain loop; fast mode; graphs against eager on a GPU (written, needs a CUDA device)."
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from mock_cuda import mock_cuda

from mammo_nb.core import ParameterError, RunError, file_hash, rng, torch_rng
from mammo_nb.gans import wgangp  # noqa: F401 - adds its recipe
from mammo_nb.gans.dcgan import DCGAN, RECIPES
from mammo_nb.gans.diffusion import diffusers_version
from mammo_nb.gans.engine import has_bfloat16, pad_channels, waits
from mammo_nb.gans.losses import grad_penalty
from mammo_nb.gans.singan import SinGANFit, SinGANRecipe, to_tanh
from mammo_nb.gans.train import Game, as_pixels, train_epoch, train_gan

SMALL = dict(size=8, width=1/16, nz=4, batch=8)
KINDS = {
    "dcgan": RECIPES["sharing_dcgan"].small(**SMALL),
    "second batch, average": RECIPES["sharing_dcgan"].small(**SMALL, g_every=2, ema=.9, jitter=.05, labels_per="batch", real_range="unit"),
    "thesis": replace(RECIPES["thesis_dcgan"].small(**SMALL), decay_g=2, decay_d=1, decay=.5),
    "wgangp": RECIPES["sharing_wgangp"].small(**SMALL),
    "wgangp ahead": RECIPES["sharing_wgangp"].small(**SMALL, ahead=True),
    "wgangp half": RECIPES["sharing_wgangp"].small(**SMALL, half_penalty=True),
}
if diffusers_version(): KINDS["diffusion"] = RECIPES["ho_ddpm"].small(**SMALL, widths=(8, 16), layers=1, fold=2, ema=.9)
N = 30     # batches of 8, 8, 8, 6


def pixels(): return as_pixels(rng(0, "patches").integers(0, 256, (N, 2, 8, 8), dtype=np.uint8), 8)


def played(recipe, *, epochs=13, capture=None, device="cpu", mode="exact", graph=True):
    "A game after 52 steps."
    game = Game(recipe if graph else ungraphed(recipe), 1, device, mode=mode)
    if capture: game.engine.capture = lambda fn, generators, stream: capture(game, fn)
    means, data = [], pixels().to(device)
    for e in range(epochs): game.start_epoch(e); means.append(train_epoch(game, data, epoch=e))
    return game, means


def ungraphed(recipe):
    kind = type("Eager", (type(recipe),), {"graph": False})
    return kind(**{f: getattr(recipe, f) for f in recipe.__dataclass_fields__})


def state(game): return {f"{k}.{n}": v.detach().cpu().clone() for k, o in game.objects().items() if hasattr(o, "state_dict") and k[0] in "GDe" for n, v in o.state_dict().items()}


def places(game):
    "Where everything lies that a step reads or writes from one step to the next."
    kept = [game.data, game.clock, *([game.label] if hasattr(game, "label") else []), *([game.parts] if hasattr(game, "parts") else []), *([game.fakes] if hasattr(game, "fakes") else [])]
    for net in (game.G, game.D, game.ema): kept += [] if net is None else list(net.state_dict(keep_vars=True).values())
    for opt in filter(None, (game.opt_g, game.opt_d)): kept += [t for s in opt.state.values() for t in s.values() if torch.is_tensor(t)]
    return [t.data_ptr() for t in kept], {k: t.data_ptr() for k,t in game.sums.items()}


class Tape:
    "Stands for a CUDA graph: knows the Python state of its capture only, and fails when something it would touch has moved."
    def __init__(self, game, fn):
        self.game, self.fn, self.known = game, fn, dict(g_turn=game.g_turn, phase=game.phase)
        self.places, self.replays = None, 0
    def replay(self):
        if self.places is None: self.places = places(self.game)
        (now, sums), (then, old) = places(self.game), self.places
        assert now == then and old.items() <= sums.items(), "a tensor of the step was replaced, not filled"
        self.game.__dict__.update(self.known)
        self.fn(); self.replays += 1


@pytest.mark.parametrize("kind", KINDS)
def test_static_step_is_the_plain_loop(kind):
    plain, means = played(KINDS[kind])
    taped, again = played(KINDS[kind], capture=Tape)
    assert not plain.engine.slots and sum(s.graph.replays for s in taped.engine.slots.values() if s.graph) >= 20
    a, b = state(plain), state(taped)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(plain.rng[k].get_state(), taped.rng[k].get_state()) for k in plain.rng)
    assert means == again and int(plain.clock) == int(taped.clock) == 52


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_a_step_waits_for_the_device(kind):
    recipe = KINDS[kind]
    game, _ = played(recipe, epochs=3)
    for k in range(recipe.g_every): game.place(k); assert waits(lambda: game.step(torch.arange(8))) == []


def test_a_padded_step_is_captured_like_any_other():
    "Widths of 28 and 6 are no multiples of eight: padded, the step replays exactly and trains what the plain one trains, to the digits of float32."
    recipe, data = replace(KINDS["thesis"], widths_g=(28,), widths_d=(6,)), pixels()
    def padded(capture=None):
        game = Game(recipe, 1, "cpu")
        for net in (game.G, game.D): pad_channels(net)
        if capture: game.engine.capture = lambda fn, generators, stream: capture(game, fn)
        for e in range(3): game.start_epoch(e); train_epoch(game, data, epoch=e)
        return game
    eager, taped, (plain, _) = padded(), padded(Tape), played(recipe, epochs=3)
    a, b, c = state(eager), state(taped), state(plain)
    assert all(torch.equal(a[k], b[k]) for k in a) and any(s.graph for s in taped.engine.slots.values())
    assert a.keys() == c.keys() and all(torch.allclose(a[k], c[k], atol=2e-3) for k in a)
    eager.place(0)
    assert waits(lambda: eager.step(torch.arange(8))) == []


class Reading(DCGAN):
    "Reads a loss on the host in each step."
    def step_g(self, game, real):
        losses = super().step_g(game, real)
        return losses | {"read": losses["loss_g"]*0 + losses["loss_g"].item()}


def test_other_data_are_captured_anew():
    game, _ = played(KINDS["dcgan"], capture=Tape)
    other = pixels()
    game.start_epoch(13); train_epoch(game, other, epoch=13)
    assert game.data is other and all(not s.graph for s in game.engine.slots.values())


def test_a_step_that_reads_is_found():
    recipe = Reading(**{f: getattr(KINDS["dcgan"], f) for f in KINDS["dcgan"].__dataclass_fields__})
    game, _ = played(recipe, epochs=1)
    assert waits(lambda: game.step(torch.arange(8))) == ["_local_scalar_dense"]


@dataclass(frozen=True)
class Faded(DCGAN):
    "Uses every hook: own batches, labels, a further source of chance, a further network with its optimiser, a fade by the clock."
    chance = ("tilt",)
    def rows(self, n, labels, rng):
        of = [torch.where(labels == c)[0] for c in (0, 1)]
        return [of[i%2][torch.randint(len(of[i%2]), (self.batch,), generator=rng)] for i in range(5)]
    def real(self, game, rows): return super().real(game, rows) * (1 + .1*torch.randn((), generator=game.rng["tilt"]))
    def start_epoch(self, game, epoch):
        super().start_epoch(game, epoch)
        if not hasattr(game, "side"):
            game.side = torch.nn.Linear(1, 1); game.opt_side = torch.optim.SGD(game.side.parameters(), lr=.1, momentum=.9)
            with torch.no_grad(): [p.fill_(.5) for p in game.side.parameters()]
    def extra(self, game): return {"side": game.side, "opt_side": game.opt_side}
    def step_d(self, game, real):
        fade, mean = ((game.clock - 4)/6.).clamp(0, 1), game.labels[game.rows].float().mean()
        loss = (game.side(real.mean().view(1)) - fade - mean).square().sum()
        game.opt_side.zero_grad(); loss.backward(); game.opt_side.step()
        return super().step_d(game, real) | {"side": loss.detach(), "fade": fade, "mean": mean}


def test_hooks_survive_a_kill(tmp_path):
    class Killed(BaseException): pass
    recipe, labels = Faded(**{f: getattr(KINDS["dcgan"], f) for f in KINDS["dcgan"].__dataclass_fields__}), np.arange(N) % 2
    def train(name, log=None): return train_gan(recipe, pixels().numpy(), labels=labels, folder=tmp_path/name, epochs=4, checkpoint_every_s=0, log=log)
    whole, count = train("whole"), [0]
    def log(**kw):
        count[0] += kw["stage"] == "checkpoint"
        if count[0] in (3, 9, 14): count[0] += 1; raise Killed
    for _ in range(3):
        with pytest.raises(Killed): train("broken", log)
    assert train("broken").history.equals(whole.history)
    assert [file_hash(p) for p in sorted((tmp_path/"broken").rglob("*.safetensors"))] == [file_hash(p) for p in sorted((tmp_path/"whole").rglob("*.safetensors"))]
    assert np.allclose(whole.history["mean"], .4) and whole.history.fade.tolist() == pytest.approx([0, np.mean([1, 2, 3, 4, 5])/6, 1, 1])
    assert whole.history.images.tolist() == [40, 80, 120, 160]
    with pytest.raises(RunError, match="labels"): train_gan(recipe, pixels().numpy(), labels=1-labels, folder=tmp_path/"whole", epochs=4)


def test_modes_are_runs_of_their_own(tmp_path):
    run = train_gan(KINDS["wgangp"], pixels().numpy(), folder=tmp_path/"fast", epochs=3, mode="fast")
    with pytest.raises(RunError, match="mode: bf16 then, float32 now"): train_gan(KINDS["wgangp"], pixels().numpy(), folder=tmp_path/"fast", epochs=3)
    exact = train_gan(KINDS["wgangp"], pixels().numpy(), folder=tmp_path/"exact", epochs=3)
    assert np.allclose(run.history.penalty, exact.history.penalty, rtol=.05) and '"mode": "bf16"' in (run.snapshots[0]/"generator.json").read_text()
    with pytest.raises(ParameterError, match="did you mean 'exact'"): train_gan(KINDS["dcgan"], pixels().numpy(), folder=tmp_path/"x", mode="exakt")


def test_penalty_stays_float32_in_fast_mode():
    games = {m: Game(KINDS["wgangp"], 0, "cpu", mode=m) for m in ("exact", "fast")}
    x = torch.rand(2, 6, 1, 8, 8, generator=torch_rng(0, "x"))*2 - 1
    def penalty(g, m):
        with g.precise(): return grad_penalty(g.D, *x, torch_rng(0, "mix")).item()
    assert penalty(games["fast"], "fast") == pytest.approx(penalty(games["exact"], "exact"), rel=1e-5)


def test_half_penalty_belongs_to_bf16(tmp_path):
    "In float32 the switch changes nothing; in bf16 it changes the digits, is another run, goes on exactly, and replays exactly."
    def weights(kind, mode, **kw): return state(played(KINDS[kind], mode=mode, epochs=4, **kw)[0])
    def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)
    assert same(weights("wgangp half", "float32"), weights("wgangp", "float32"))
    half = weights("wgangp half", "bf16")
    assert same(half, weights("wgangp half", "bf16", capture=Tape))
    assert same(half, weights("wgangp", "bf16")) != has_bfloat16("cpu")
    class Killed(BaseException): pass
    def train(name, kind="wgangp half", log=None): return train_gan(KINDS[kind], pixels().numpy(), folder=tmp_path/name, epochs=3, mode="bf16", checkpoint_every_s=0, log=log)
    def kill(**kw):
        if kw["stage"] == "checkpoint" and (tmp_path/"broken"/"history.csv").exists(): raise Killed
    with pytest.raises(Killed): train("broken", log=kill)
    assert train("broken").history.equals(train("whole").history)
    with pytest.raises(RunError, match="half_penalty"): train("whole", "wgangp")


def climbed(device="cpu", capture=None, **kw):
    "A SinGAN fit of two images, all scales."
    images = to_tanh(rng(0, "images").integers(0, 256, (2, 20, 20), dtype=np.uint8), device)
    fit = SinGANFit(images, keys=["a", "b"], recipe=SinGANRecipe(steps=8, min_size=14, width=4, max_width=8, **kw), seed=0, merge_width=4)
    fit.engine.capture, graphs = capture or fit.engine.capture, 0
    while not fit.done():
        fit.begin()
        with fit.engine.ready(): [fit.advance() for _ in range(8)]
        graphs += sum(s.graph is not None for s in fit.engine.slots.values()); fit.finish()
    return fit, graphs


class Frozen:
    "As Tape, for SinGAN: the tensors of the live scale must not move."
    def __init__(self, fn, generators, stream): self.fn, self.places = fn, None
    def replay(self):
        L = self.fn.__closure__[0].cell_contents.__self__.live
        now = [t.data_ptr() for k in ("G", "D") for t in L[k].state_dict(keep_vars=True).values()] + [L[k].data_ptr() for k in ("z_rec", "acc", "real", "prev_rec", "amps")]
        now += [t.data_ptr() for k in ("opt_G", "opt_D") for s in L[k].state.values() for t in s.values()]
        assert self.places in (None, now); self.places = now
        self.fn()


@pytest.mark.parametrize("kw", [{}, dict(z_rec="fixed"), dict(restart=3), dict(lr_drop=5, g_graph="recompute")])
def test_static_singan_step_is_the_plain_loop(kw):
    (plain, _), (taped, graphs) = climbed(**kw), climbed(capture=Frozen, **kw)
    assert graphs >= 2
    for a, b in zip(plain.nets, taped.nets): assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_nothing_in_a_singan_step_waits_for_the_device():
    fit = SinGANFit(to_tanh(rng(0, "i").integers(0, 256, (1, 20, 20), dtype=np.uint8)), keys=["a"], recipe=SinGANRecipe(min_size=14, width=4), seed=0)
    fit.begin(); fit.advance()
    B = fit.live["block"]
    assert waits(lambda: fit.step_once(B["noise"][1:2], B["prev"][1], B["mix"][1])) == []


@pytest.mark.gpu
@pytest.mark.parametrize("kw", [{}, dict(restart=3)])
def test_singan_graph_equals_eager(kw):
    (graphed, graphs), (eager, none) = climbed("cuda", **kw), climbed("cuda", capture=lambda *a: (_ for _ in ()).throw(RuntimeError("no")), **kw)
    assert graphs >= 2 and none == 0
    for a, b in zip(graphed.nets, eager.nets): assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


# ---- on a GPU: written, never run on one in the session that wrote them

@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_graph_equals_eager_over_50_steps(kind):
    graphed, means = played(KINDS[kind], device="cuda")
    eager, again = played(KINDS[kind], device="cuda", graph=False)
    assert any(s.graph for s in graphed.engine.slots.values()), graphed.engine.why
    a, b = state(graphed), state(eager)
    assert all(torch.equal(a[k], b[k]) for k in a) and means == again
    assert all(torch.equal(graphed.rng[k].get_state(), eager.rng[k].get_state()) for k in eager.rng)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_no_sync_inside_captured_steps(kind):
    game, _ = played(KINDS[kind], device="cuda", epochs=12)
    order = torch.arange(8, device="cuda"); torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with game.engine.ready():
            for k in range(2*game.recipe.g_every): game.place(k); game.engine((8, game.recipe.pattern(game)), game.step, rows=order)
    finally: torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["exact"])
def test_graphed_training_resumes_exactly(mode, tmp_path):
    class Killed(BaseException): pass
    def train(name, log=None): return train_gan(KINDS["wgangp ahead"], pixels().numpy(), folder=tmp_path/name, epochs=12, device="cuda", mode=mode, checkpoint_every_s=0, log=log)
    whole, count = train("whole"), [0]
    def log(**kw):
        count[0] += kw["stage"] == "checkpoint"
        if count[0] == 31: raise Killed
    with pytest.raises(Killed): train("broken", log)
    assert train("broken").history.equals(whole.history)


def in_turns_and_alone(folder, device):
    "Weights of trainings that took turns, and of the same ones alone."
    def training(name, seed): return train_gan.steps(KINDS[name], pixels().numpy(), folder=folder/f"{name}{seed}", epochs=4, seed=seed, device=device)
    works = [training(name, seed) for name, seed in ALL_AT_ONCE]
    while any([next(work, None) is None and work.gi_frame for work in works]): pass
    for name, seed in ALL_AT_ONCE: train_gan(KINDS[name], pixels().numpy(), folder=folder/"alone"/f"{name}{seed}", epochs=4, seed=seed, device=device)
    def last(place): return file_hash(max(place.glob("snapshots/*/G.safetensors")))
    return [[last(place/f"{name}{seed}") for name, seed in ALL_AT_ONCE] for place in (folder, folder/"alone")]


ALL_AT_ONCE = (("second batch, average", 0), ("second batch, average", 1), ("wgangp ahead", 0))


def test_captured_trainings_in_turns_equal_those_alone(tmp_path):
    with mock_cuda():
        turns, alone = in_turns_and_alone(tmp_path, "cuda")
    assert turns == alone and len({*turns}) == 3


@pytest.mark.gpu
def test_trainings_in_turns_equal_those_alone_on_a_gpu(tmp_path):
    turns, alone = in_turns_and_alone(tmp_path, "cuda")
    assert turns == alone and len({*turns}) == 3


@pytest.mark.gpu
def test_uncapturable_step_falls_back_with_one_line(tmp_path):
    said = []
    recipe = Reading(**{f: getattr(KINDS["dcgan"], f) for f in KINDS["dcgan"].__dataclass_fields__})
    run = train_gan(recipe, pixels().numpy(), folder=tmp_path, epochs=6, device="cuda", log=lambda **kw: said.append(kw))
    assert len([kw for kw in said if kw.get("event") == "eager"]) == 1 and len(run.history) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_fast_mode_trains(kind):
    game, means = played(KINDS[kind], device="cuda", mode="fast")
    assert all(np.isfinite(list(m.values())).all() for m in means) and any(s.graph for s in game.engine.slots.values()), game.engine.why


# ---- the benchmark notebook

def test_benchmarks_run_and_say_what_they_stand_on(papermill, tmp_path):
    import pandas as pd
    r = papermill("90_benchmarks", tmp_path/"out.ipynb", "run_dir", tmp_path/"run", "device", "cpu", "only", "device,gans,metrics", "rounds", 1, "steps", 1, "size", 16, "batch", 4)
    assert r.returncode == 0
    rows = pd.read_csv(tmp_path/"run"/"results.csv")
    assert set(rows.section) == {"device", "GANs", "metrics"} and (rows.value.dropna() > 0).all()
    assert {"exact", "fast", "textbook"} <= set(rows[rows.item == "sharing_wgangp"].variant)
    page = (tmp_path/"run"/"report.html").read_text()
    assert "NOISE AND PHANTOMS" in page and "Load at the start" in page
    assert not (tmp_path/"run"/"benchmarks").exists()
