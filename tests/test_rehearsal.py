"""A dress rehearsal for CUDA on a machine without one: the GPU tests of the other files, whole trainings and the paper notebooks on the played device of
mock_cuda.py. Passing means: no mixed devices, no hidden wait, graphs that do what the eager loop does. It says nothing about cuDNN's numbers or speed."""
import contextlib
from dataclasses import replace

import nbformat
import numpy as np
import pytest
import torch

import test_cgan
import test_classifiers as clf
import test_context
import test_engine as engine
import test_keras_nets as nets
from conftest import ROOT
from mock_cuda import mock_cuda
from mammo_nb.clf.train import build_classifier, change, fit_classifier, load_classifier, predict_proba
from mammo_nb.gans.dcgan import RECIPES
from mammo_nb.gans.share import load_generator, sample_generator
from mammo_nb.gans.train import Game, train_epoch, train_gan


class Killed(BaseException): "Stands for a kill."

@pytest.fixture
def gpu():
    with mock_cuda() as machine: yield machine

def kill_after(saves):
    "A log that dies at the n-th checkpoint."
    count = [0]
    def log(**kw):
        count[0] += kw.get("stage") == "checkpoint"
        if count[0] == saves: count[0] += 1; raise Killed
    return log

def refused(word, fn):
    with pytest.raises((RuntimeError, TypeError), match=word): fn()

def as_(kind, recipe, **kw):
    "The same settings under another class of recipe."
    return kind(**{f: kw.get(f, getattr(recipe, f)) for f in recipe.__dataclass_fields__})


# ---- the played device refuses what CUDA refuses

def test_devices_do_not_mix(gpu):
    a, b = torch.zeros(3, device="cuda"), torch.ones(3)
    assert a.device == torch.device("cuda:0") != torch.device("cuda") and b.device.type == "cpu"
    refused("same device", lambda: a + b); refused("same device", lambda: torch.stack([a.sum(), b.sum()])); refused("numpy", lambda: a.numpy())
    refused("indices should be", lambda: b[a.long()])
    assert (a + b.sum()).is_cuda and a[torch.tensor([0])].is_cuda and a.to("cuda") is a and not a.cpu().is_cuda and a[1:].view(2).is_cuda
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)).to("cuda")
    net(torch.rand(2, 1, 5, 5, device="cuda")).square().mean().backward()
    assert all(t.is_cuda for t in net.state_dict().values()) and all(p.grad.is_cuda for p in net.parameters())

def test_chance_belongs_to_a_device(gpu):
    g, c = torch.Generator("cuda").manual_seed(3), torch.Generator().manual_seed(3)
    refused("generator", lambda: torch.randn(3, generator=c, device="cuda")); refused("generator", lambda: torch.randn(3, generator=g)); refused("wrong size", lambda: g.set_state(c.get_state()))
    x, state = torch.randn(3, generator=g, device="cuda"), g.get_state(); y = torch.randn(3, generator=g, device="cuda"); g.set_state(state)
    assert torch.equal(y, torch.randn(3, generator=g, device="cuda")) and not torch.equal(x, y) and state.numel() == 16
    torch.manual_seed(0); before = torch.rand(2); torch.manual_seed(0); torch.rand(2, device="cuda"); assert torch.equal(before, torch.rand(2))

def test_a_graph_knows_addresses_and_no_python(gpu):
    g, w, rate, python = torch.Generator("cuda"), torch.ones(3, device="cuda"), torch.tensor(1., device="cuda"), [10.]
    graph = torch.cuda.CUDAGraph(); graph.register_generator_state(g)
    with torch.cuda.graph(graph):
        out = w*2 + torch.rand(3, generator=g, device="cuda")
        w += rate*python[0]
    assert w.tolist() == [1]*3 and out.isnan().all()                                         # nothing was run
    g.manual_seed(5); rate.fill_(2.); python[0] = 99.
    graph.replay(); first = out.clone(); graph.replay()
    assert w.tolist() == [41]*3                                                              # the tensor is read anew, the number is frozen
    g.manual_seed(5)
    assert torch.equal(first, 2 + torch.rand(3, generator=g, device="cuda")) and torch.equal(out, 42 + torch.rand(3, generator=g, device="cuda"))
    del w
    refused("freed", graph.replay)

@pytest.mark.parametrize("name,step", {"wait": lambda x, g: x.sum().item(), "mask": lambda x, g: x[x > 0], "from the host": lambda x, g: x + torch.ones(3).to("cuda"),
                                       "to the host": lambda x, g: x.cpu(), "foreign chance": lambda x, g: torch.rand(3, generator=g, device="cuda")}.items())
def test_a_capture_refuses(gpu, name, step):
    x, g = torch.ones(3, device="cuda"), torch.Generator("cuda")
    with pytest.raises(RuntimeError, match="previous error") as e:
        with torch.cuda.graph(torch.cuda.CUDAGraph()): x.add_(1); step(x, g)
    assert isinstance(e.value.__context__, RuntimeError) and x.tolist() == [1]*3
    refused("Offset increment", lambda: torch.rand(3, device="cuda"))                        # CUDA's own generator is left as if captured


# ---- the GPU tests of the engine, the GANs and the classifiers

@pytest.mark.parametrize("kind", engine.KINDS)
def test_graph_equals_eager_over_50_steps(gpu, kind): engine.test_graph_equals_eager_over_50_steps(kind); assert gpu.replays > 20

@pytest.mark.parametrize("kind", engine.KINDS)
def test_no_sync_inside_captured_steps(gpu, kind): engine.test_no_sync_inside_captured_steps(kind)

@pytest.mark.parametrize("kind", engine.KINDS)
def test_fast_mode_trains(gpu, kind): engine.test_fast_mode_trains(kind)

def test_graphed_training_resumes_exactly(gpu, tmp_path): engine.test_graphed_training_resumes_exactly("exact", tmp_path); assert gpu.replays > 20

def test_uncapturable_step_falls_back_with_one_line(gpu, tmp_path): engine.test_uncapturable_step_falls_back_with_one_line(tmp_path)

@pytest.mark.parametrize("config", [clf.CNN, clf.SWIN], ids=["cnn", "swin"])
@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_replayed_steps_equal_eager_ones(gpu, config, optimiser): clf.test_replayed_steps_equal_eager_ones(config, optimiser); assert gpu.replays > 4

def test_singan_graph_equals_eager(gpu): engine.test_singan_graph_equals_eager(dict(d_steps=1, g_steps=1, restart=3)); assert gpu.replays == 20

@pytest.mark.slow
@pytest.mark.parametrize("kw", [{}, dict(restart=3), dict(z_rec="fixed"), dict(lr_drop=5, g_graph="recompute")])
def test_full_singan_graph_equals_eager(gpu, kw): engine.test_singan_graph_equals_eager(kw)

def test_context_graph_equals_eager_in_every_stage(gpu):
    (graphed, graphs), (eager, none) = (test_context.played(test_context.LONG, device="cuda", epochs=3, capture=c) for c in (None, lambda *a: (_ for _ in ()).throw(RuntimeError("no"))))
    assert graphs == 3 and none == 0 and gpu.replays == 9 and test_context.same(test_context.state(graphed), test_context.state(eager))

@pytest.mark.slow
def test_long_context_graph_equals_eager(gpu): test_context.test_graph_equals_eager_in_every_stage()

@pytest.mark.slow
def test_context_fast_mode(gpu): test_context.test_fast_mode_trains_on_a_gpu()

def cgan_played(graph, updates=18):
    recipe = replace(test_cgan.TINY, updates_epoch=updates)
    recipe = recipe if graph else as_(type("Eager", (type(recipe),), {"graph": False}), recipe)
    px = np.random.default_rng(0).integers(0, 256, (40, 1, 16, 16), dtype=np.uint8)
    g = Game(recipe, 5, "cuda", data=torch.from_numpy(px), labels=torch.arange(40) % 2)
    means = []
    for e in range(3): g.start_epoch(e); means.append(train_epoch(g, g.data, epoch=e))
    return engine.state(g), means

def test_cgan_graph_equals_eager_over_54_updates(gpu):
    (a, m), (b, n) = cgan_played(True), cgan_played(False)
    assert gpu.replays == 51 and m == n and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def test_a_step_that_fails_late_takes_the_earlier_graph_along(gpu):
    recipe = as_(engine.Reading, engine.KINDS["second batch, average"])      # reads in the generator's turn; the critic's own step is captured before
    (a, m), (b, n) = engine.played(recipe, device="cuda"), engine.played(recipe, device="cuda", graph=False)
    assert "_local_scalar_dense" in a.engine.why and not a.engine.slots
    x, y = engine.state(a), engine.state(b)
    assert all(torch.equal(x[k], y[k]) for k in x) and m == n
    assert torch.rand(2, device="cuda").is_cuda                                              # CUDA's own generator can be drawn from again

def test_private_training_runs(gpu, tmp_path):
    pytest.importorskip("opacus", reason="needs the extra `privacy` (opacus)")
    import test_dp
    test_dp.test_private_step_on_cuda(tmp_path)


# ---- trainings from end to end

@pytest.mark.parametrize("name", ["cgan", "wgangp"])
def test_killed_training_ends_with_the_same_bytes_and_its_generator_draws(gpu, tmp_path, name):
    px, how = {"cgan": (np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8), dict(labels=np.arange(40) % 2, epochs=3)),
               "wgangp": (engine.pixels().numpy(), dict(epochs=6))}[name]
    recipe = replace(test_cgan.TINY, updates_epoch=6) if name == "cgan" else replace(engine.KINDS["wgangp"], ema=.9)
    go = lambda folder, log=None: train_gan(recipe, px, folder=tmp_path/folder, seed=1, device="cuda", checkpoint_every_s=0, log=log, **how)
    whole = go("whole")
    with pytest.raises(Killed): go("killed", kill_after(9))
    again = go("killed")
    assert again.history.equals(whole.history) and [(s/"G.safetensors").read_bytes() for s in again.snapshots] == [(s/"G.safetensors").read_bytes() for s in whole.snapshots]
    assert gpu.replays > 5 and all(p.is_cuda for p in load_generator(whole.snapshots[-1], device="cuda").parameters())
    x, _ = sample_generator(whole.snapshots[-1], 5, seed=0, device="cuda", size=12)
    y, _ = sample_generator(whole.snapshots[-1], 5, seed=0, size=12)
    assert x.shape == (5, 12, 12) and np.abs(x.astype(int) - y).max() <= 1                    # latents are drawn on the CPU, so both devices draw the same patches

def test_killed_singans_end_with_the_same_pictures(gpu, tmp_path):
    from mammo_nb.gans.singan import SinGANRecipe, fit_singans
    recipe = SinGANRecipe(steps=5, min_size=14, width=4, max_width=8, d_steps=1, g_steps=1)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16), dtype=np.uint8)
    go = lambda name, log=None: fit_singans(images, recipe=recipe, folder=tmp_path/name, seed=0, device="cuda", merge_width=4, checkpoint_every_s=0, log=log)
    whole = go("whole")
    with pytest.raises(Killed): go("killed", kill_after(7))
    for a, b in zip(whole, go("killed")): assert np.array_equal(a.sample(2, seed=1), b.sample(2, seed=1)) and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert gpu.replays and all(p.is_cuda for n in whole for p in n.parameters())

NETS = {"cnn": clf.CNN, "swin": clf.SWIN, "fcn": clf.FCN}

@pytest.mark.parametrize("name,precision", [("cnn", "fp32"), ("cnn", "bf16"), ("fcn", "fp32"), ("swin", "fp32"), pytest.param("swin", "bf16", marks=pytest.mark.slow)])
def test_killed_classifier_ends_with_the_same_weights(gpu, tmp_path, name, precision):
    recipe = change(clf.SHARING, precision=precision)
    go = lambda folder, log=None: clf.fit(NETS[name], recipe, device="cuda", folder=tmp_path/folder, checkpoint_every_s=0, log=log)
    model, result = go("whole")
    with pytest.raises(Killed): go("killed", kill_after(2))
    again, resumed = go("killed")
    assert clf.same(model, again) and resumed.history.equals(result.history) and next(model.parameters()).is_cuda
    p = predict_proba(load_classifier(tmp_path/"whole", device="cuda"), clf.VALID)
    assert np.allclose(p, predict_proba(model, clf.VALID, device="cpu"), atol=1e-5)

def test_captured_classifiers_in_turns_equal_those_alone(gpu):
    together, alone = clf.in_turns_and_alone("cuda")
    assert all(clf.same(a, b) for a, b in zip(together, alone)) and gpu.replays

def test_shared_chance_is_refused(gpu, monkeypatch):
    monkeypatch.setattr("mammo_nb.gans.engine.Chance.turn", lambda self: contextlib.nullcontext())
    with pytest.raises(RuntimeError, match="two streams draw from one state"): clf.in_turns_and_alone("cuda")

@pytest.mark.parametrize("config", [clf.CNN, clf.FCN, dict(kind="resnet50_tuned", weights="none", depth="small", size=16), dict(kind="resnet50_tuned", weights="none", depth="small", size=32),
                                    dict(kind="resnet50", weights="none", depth="small", size=32, classes=2, norm="authors")], ids=lambda c: f"{c['kind']}{c['size']}")
def test_every_classifier_is_captured(gpu, config):
    "Those with a ResNet inside were not: they brought ImageNet's colours and the matrices of a smaller picture from the host in each step."
    said = []
    clf.fit(config, change(clf.SHARING), epochs=4, device="cuda", log=lambda **told: said.append(told))
    assert gpu.replays and not [told for told in said if told["stage"] == "engine"]

def test_engines_of_trainings_that_are_over_hold_no_graph(gpu, tmp_path):
    from mammo_nb.gans.engine import _living, no_collection
    old = set(_living)
    with no_collection():                                       # which would free them, some time; in bf16 a network holds itself
        train_gan(engine.KINDS["dcgan"], engine.pixels().numpy(), folder=tmp_path, epochs=2, device="cuda", mode="fast")
        steps_of("singan", tmp_path)
        clf.fit(clf.CNN, epochs=4, device="cuda")
        assert gpu.replays and not [e for e in set(_living) - old if any(slot.graph for slot in e.slots.values())]

def keras_fit(kind, **config):
    net = build_classifier({**nets.DEMO_NETS[kind], **config}, seed=1)
    return net, fit_classifier(net, nets.TRAIN, nets.VALID, seed=1, recipe=nets.KERAS, epochs=1, device="cuda", augment=nets.PaperAugment())

@pytest.mark.parametrize("kind", ["vgg16", "densenet169", "inceptionresnetv2"])
def test_keras_nets_train_with_the_paper_s_augmentation(gpu, kind):
    net, result = keras_fit(kind)
    assert np.isfinite(result.history.train_loss).all() and all(p.is_cuda for p in net.parameters())
    assert np.isfinite(predict_proba(net, nets.VALID)).all()

def test_keras_augmentation_of_batches(gpu):
    from mammo_nb.clf.augment import KerasAugment
    assert np.isfinite(clf.fit(clf.CNN, augment=KerasAugment(), device="cuda")[1].history.train_loss).all()

def test_frozen_features_and_heads_agree_with_the_cpu(gpu, tmp_path):
    from mammo_nb.clf.resnet import HeadJob, HeadRecipe, Preparation, ResNetClassifier, fit_heads, frozen_resnet, resnet_features
    px, net = np.random.default_rng(0).integers(0, 256, (24, 32, 32), dtype=np.uint8), frozen_resnet("none", depth="small")
    on = {d: resnet_features(px, net=net, prepare=Preparation(32, "imagenet"), folder=tmp_path/d, device=d) for d in ("cpu", "cuda")}
    assert np.allclose(on["cpu"], on["cuda"], atol=1e-4)
    y, jobs = np.arange(24) % 3, [HeadJob(f"h{i}", tuple(range(0, 12+3*i)), tuple(range(18, 24)), seed=i) for i in range(3)]
    a, b = (fit_heads(on["cpu"], y, jobs, recipe=HeadRecipe(epochs=3, bs=4), device=d) for d in ("cpu", "cuda"))
    assert all(np.allclose(h.weight, k.weight, atol=1e-4) for h, k in zip(a, b))
    model = ResNetClassifier("none", size=32, classes=3, depth="small", bn="train")
    from mammo_nb.clf.augment import patch_arrays
    r = fit_classifier(model, patch_arrays(px, target=y), patch_arrays(px[:9], target=y[:9]), seed=0, recipe=change(clf.SHARING, classes=("healthy", "benign", "malignant"), monitor="loss"), epochs=2, device="cuda")
    assert np.isfinite(r.history.train_loss).all()

def test_measurements_agree_with_the_cpu(gpu):
    from mammo_nb.metrics.features import features, make_extractor
    px = np.random.default_rng(0).integers(0, 256, (12, 40, 40), dtype=np.uint8)
    for name in ("embedded", "pixels"):
        ex = make_extractor(name)
        assert np.allclose(features(px, ex), features(px, ex, device="cuda"), atol=1e-4)


# ---- exact mode: the same bytes again

# From the documentation of torch.use_deterministic_algorithms (2.14): what is not reproducible on CUDA by itself, as aten operators of a training step.
UNSTEADY = ("convolution", "convolution_backward", "replication_pad1d_backward", "replication_pad2d_backward", "replication_pad3d_backward", "cumsum", "scatter_add", "scatter_add_", "gather_backward",
            "index_add", "index_add_", "index_select_backward", "repeat_interleave", "index_copy", "index_copy_", "index_put", "index_put_", "_index_put_impl_", "scatter", "scatter_", "scatter_reduce",
            "scatter_reduce_", "max_pool3d_with_indices_backward", "embedding_dense_backward", "avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward",
            "fractional_max_pool2d_backward", "fractional_max_pool3d_backward", "max_unpool2d", "max_unpool3d", "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward",
            "upsample_trilinear3d_backward", "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward", "nll_loss_forward", "nll_loss_backward", "nll_loss2d_forward", "nll_loss2d_backward",
            "_ctc_loss_backward", "_embedding_bag_backward", "put_", "histc", "bincount", "median", "grid_sampler_2d_backward", "grid_sampler_3d_backward")
STEADY = {   # those of them that our steps run, and why they are reproducible all the same
    "convolution": "cudnn.deterministic is on in exact mode", "convolution_backward": "cudnn.deterministic is on in exact mode",
    "embedding_dense_backward": "batches up to 3072 labels take a kernel without atomics (Embedding.cu)",
    "nll_loss_forward": "(b, classes): sums in one block; the unsteady kernel is that of pictures, nll_loss2d", "nll_loss_backward": "(b, classes): one entry a row",
}

def steps_of(name, tmp_path):
    "A few training steps of one kind, in exact mode."
    if name in engine.KINDS: engine.played(engine.KINDS[name], device="cuda", epochs=1, graph=False)
    elif name == "cgan": cgan_played(False, updates=2)
    elif name == "context": test_context.played(replace(test_context.LONG, per_epoch=2, half=2, fade=2), device="cuda", epochs=3)
    elif name == "context, other readings": test_context.played(replace(test_context.SWITCHED, per_epoch=2, half=2, fade=2), device="cuda", epochs=3)
    elif name == "singan": engine.climbed("cuda", d_steps=1, g_steps=1)
    elif name == "private":
        pytest.importorskip("opacus", reason="needs the extra `privacy` (opacus)")
        import test_dp
        train_gan(test_dp.recipe("sharing_wgangp"), test_dp.patches(), labels=test_dp.dp.unit_codes(test_dp.PATIENTS), folder=tmp_path, epochs=1, device="cuda")
    elif name in NETS: clf.fit(NETS[name], epochs=1, device="cuda")
    else: keras_fit(name, **dict(size=224) if name == "vgg16" else {})      # the published side: other maps are pooled to 7x7 on the way

@pytest.mark.parametrize("name", [*engine.KINDS, "cgan", "context", "context, other readings", "singan", "private", "cnn", "swin", "fcn", "vgg16", "densenet169", "inceptionresnetv2"])
def test_exact_steps_run_no_unsteady_operator(gpu, tmp_path, name):
    steps_of(name, tmp_path)
    found = {k.split(".")[0] for k in gpu.ops if not k.endswith(" accumulate")}             # index_put that adds up sorts its indices first on CUDA
    assert "convolution" in found, "the step was seen"
    assert not (found & set(UNSTEADY)) - set(STEADY), "exact mode cannot promise the same bytes with these"


# ---- the papers

SMALLEST = {
    "00_annotation_shift": dict(patients=24, singan_steps=6, crops=1, clf_epochs=2),
    "01_contextual_gan": dict(patients=16, gan_updates=12, synthetic=4, clf_samples=40, tasks="mass,remove", arms="baseline,decay50"),
    "02_dcgan_size": dict(patients=24, sizes="100,250", modes="org,aug_gan", gan_epochs=6, simulation_epochs=6, fid_n=24, clf_epochs=2),
    "03_cgan_augmentation": dict(patients=40, models="cnn", cgan_models="cnn", trials=1, updates=10, clf_epochs=1),
    "04_sharing": dict(patients=24, scopes="lesions", arms="none,bcdr_dcgan,bcdr_wgangp", regimes="100", gan_epochs=8, clf_epochs=2),
}

@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("paper", SMALLEST)
def test_paper_notebook_on_cuda(gpu, paper, mode, cache, tmp_path, monkeypatch):
    import matplotlib; matplotlib.use("agg")
    monkeypatch.setenv("MAMMO_NB_CACHE", str(cache)); monkeypatch.chdir(tmp_path)
    cells = [c for c in nbformat.read(ROOT/"nbs"/f"{paper}.ipynb", 4).cells if c.cell_type == "code"]
    space = {"__name__": "__main__", "display": lambda *a, **kw: None}
    for c in cells:
        exec(compile(c.source, f"{paper} {c.id}", "exec"), space)
        if "parameters" in c.metadata.get("tags", []): space.update(SMALLEST[paper], seed=1, boots=40, device="cuda", mode=mode, run_dir=str(tmp_path/"run"))
    assert (tmp_path/"run"/"report.html").exists() and gpu.ops["convolution_backward.default"] > 100
