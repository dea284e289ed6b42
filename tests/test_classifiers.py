"What no cell of the classifier notebooks can show: kills, damage, independent loops, and the shape of patch sets."
import json, os, subprocess, sys, weakref
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from mammo_nb.clf import swin, train as T
from mammo_nb.clf.augment import PatchLoader, join, patch_arrays, training_mix
from mammo_nb.gans.engine import Engine
from mammo_nb.clf.train import SHARING, THESIS, build_classifier, change, fit_classifier, load_classifier, predict_proba
from mammo_nb.core import DataError, ParameterError, RunError, WeightsError, global_seed, kernels, rng

CNN = dict(kind="cnn", size=16, widths=(4,8), hidden=8, dropout=.5)
SWIN = dict(kind="swin", size=16, patch=4, embed=8, depths=(2,2), heads=(2,2), window=2, drop_path=.3)
FCN = dict(kind="fcn", size=16, widths=(4,8))

def spots(n, seed, views=3):
    g = rng(seed, "spots"); px, y = g.integers(60, 140, (n,views,16,16)), np.arange(n) % 2
    px[y==1,:,4:9,4:9] += 60
    return patch_arrays(px.astype(np.uint8), target=y)

TRAIN, VALID = spots(37, 1), spots(20, 2)       # 37 = 3 x 12 + 1: a last batch of one

def fit(config, recipe=SHARING, *, train=TRAIN, valid=VALID, seed=1, **kw):
    model = build_classifier(config, seed=seed)
    return model, fit_classifier(model, train, valid, seed=seed, recipe=recipe, **{"epochs": 3, "lr": .01, **kw})

def same(a, b): return all(torch.equal(x, y) for x,y in zip(a.state_dict().values(), b.state_dict().values()))

# --- in turns ------------------------------------------------------------------------------------------------------------
AT_ONCE = ((CNN, 1), (CNN, 2), (SWIN, 1))       # dropout and skipped blocks draw from torch's common chance

def in_turns_and_alone(device):
    "Classifiers that took turns, a batch each, and the same ones alone."
    how = dict(recipe=SHARING, epochs=4, lr=.01, device=device)
    together, alone = ([build_classifier(config, seed=seed) for config, seed in AT_ONCE] for _ in range(2))
    works = [fit_classifier.steps(model, TRAIN, VALID, seed=seed, **how) for model, (_, seed) in zip(together, AT_ONCE)]
    while any([next(work, None) is None and work.gi_frame for work in works]): pass
    for model, (_, seed) in zip(alone, AT_ONCE): fit_classifier(model, TRAIN, VALID, seed=seed, **how)
    return together, alone

@pytest.mark.gpu
def test_classifiers_in_turns_equal_those_alone_on_a_gpu():
    with kernels("tf32"): together, alone = in_turns_and_alone("cuda")
    assert all(same(a, b) for a, b in zip(together, alone))

def test_classifiers_in_turns_equal_those_alone():
    together, alone = in_turns_and_alone("cpu")
    assert all(same(a, b) for a, b in zip(together, alone)) and not same(*together[:2])

# --- against an independent loop -----------------------------------------------------------------------------------------
def plain_loop(config, recipe, seed, optimiser, schedule=None):
    "The textbook loop in plain torch; only the order of the patches is shared."
    model = build_classifier(config, seed=seed); c = model.config
    opt = optimiser(model.parameters()); sched = schedule(opt) if schedule else None
    form = dict(size=c["size"], channels=c["channels"], value_range=c["value_range"])
    loader, rows = PatchLoader(TRAIN, bs=recipe.bs, train=True, seed=seed, **form), []
    xv = torch.cat([x for x,_ in PatchLoader(VALID, bs=7, **form)]); yv = torch.from_numpy(VALID.target)
    loss_of = lambda o,y: torch.nn.BCEWithLogitsLoss()(o.squeeze(1), y.float()) if c["classes"] == 1 else torch.nn.CrossEntropyLoss()(o, y)
    for epoch in range(recipe.epochs):
        loader.epoch = epoch; model.train()
        with global_seed(seed, "dropout", epoch):
            for x,y in loader: opt.zero_grad(); loss_of(model(x), y).backward(); opt.step()
        if sched: sched.step()
        model.eval()
        with torch.no_grad(): rows.append(loss_of(model(xv), yv).item())
    return rows

@pytest.mark.parametrize("config,recipe,optimiser,schedule", [
    (CNN, change(SHARING, epochs=3, lr=.01), lambda p: torch.optim.SGD(p, lr=.01, momentum=.9), None),
    (SWIN, change(SHARING, epochs=2, lr=.01), lambda p: torch.optim.SGD(p, lr=.01, momentum=.9), None),
    (FCN, change(THESIS, epochs=3, bs=12, lr=.001, weight_decay=1.), lambda p: torch.optim.Adam(p, lr=.001, weight_decay=1.), lambda o: torch.optim.lr_scheduler.ExponentialLR(o, .95))],
    ids=["cnn", "swin", "fcn"])
def test_learner_equals_a_plain_loop(config, recipe, optimiser, schedule):
    _, r = fit(config, recipe, epochs=recipe.epochs, lr=recipe.lr)
    assert np.allclose(r.history.valid_loss, plain_loop(config, recipe, 1, optimiser, schedule), rtol=2e-4)

def test_scores_are_those_of_the_metrics_module():
    from mammo_nb.metrics.auc import binary_scores
    model, r = fit(CNN)
    p = predict_proba(model, VALID)
    for positive in ("healthy", "lesion"):
        ours = binary_scores(VALID.target, p[:,1], positive=positive)
        for m in ("auprc", "auroc", "f1", "accuracy"):
            assert T.valid_score(VALID.target, p, monitor=m, positive=("healthy","lesion").index(positive)) == pytest.approx(ours[m], abs=1e-12)
    assert r.best_score == pytest.approx(binary_scores(VALID.target, p[:,1], positive="healthy")["auprc"])

# --- kills and damage ------------------------------------------------------------------------------------------------------
KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
from test_classifiers import CNN, SWIN, fit
def child(folder, config, die):
    "A training in a process of its own that kills itself at `die` = (what, epoch or call)."
    if pid := os.fork(): return os.waitpid(pid, 0)[1]
    seen = []
    def kill(): os.kill(os.getpid(), signal.SIGKILL)
    def log(**kw): seen.append(kw); (die[0] == "log" and kw.get("epoch") == die[1]) and kill()
    class Shake:
        def __repr__(self): return "Shake"
        def __call__(self, x, g): seen.append(0); (die[0] == "batch" and len(seen) == die[1]) and kill(); return (x + .02*torch.randn(x.shape, generator=g)).clamp(0, 1)
    if die[0] == "write":
        import mammo_nb.gans.checkpoint as G
        save = G.write_json
        def write_json(path, obj): (obj.get("step") == die[1]) and kill(); return save(path, obj)
        G.write_json = write_json           # tensors written, the JSON that makes them count is not
    fit(config, epochs=5, folder=folder, checkpoint_every_s=0, log=log, augment=Shake())
    os._exit(0)
for name, config in (("cnn", CNN), ("swin", SWIN)):
    whole, torn = f"{{sys.argv[1]}}/{{name}}_whole", f"{{sys.argv[1]}}/{{name}}_torn"
    assert child(whole, config, ("never", 0)) == 0
    for die in (("log", 0), ("batch", 7), ("write", 3), ("log", 3)): assert child(torn, config, die) == signal.SIGKILL
    assert child(torn, config, ("never", 0)) == 0
"""

def test_killed_and_resumed_is_byte_equal(tmp_path):
    script = tmp_path/"killed.py"; script.write_text(KILLED.format(tests=os.path.dirname(__file__)))
    r = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS":"1"}, timeout=300)
    assert r.returncode == 0, r.stderr[-2000:]
    for name in ("cnn", "swin"):
        whole, torn = ({p.name: p.read_bytes() for p in (tmp_path/f"{name}_{k}").iterdir()} for k in ("whole", "torn"))
        assert sorted(whole) == ["classifier.json", "classifier.safetensors"] and whole == torn
        assert len(json.loads(whole["classifier.json"])["history"]["score"]) == 5

def stop_at(epoch):
    def log(**kw):
        if kw.get("epoch") == epoch: raise KeyboardInterrupt
    return log

def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    with pytest.raises(KeyboardInterrupt): fit(CNN, epochs=4, folder=tmp_path, checkpoint_every_s=0, log=stop_at(2))
    newest = sorted(tmp_path.glob("checkpoint-*.safetensors"))[-1]; newest.write_bytes(newest.read_bytes()[:-7])
    said = []
    with pytest.warns(UserWarning, match="passed over"): m, r = fit(CNN, epochs=4, folder=tmp_path, checkpoint_every_s=0, log=lambda **kw: said.append(kw))
    assert [k["epoch"] for k in said if k["stage"] == "fit"] == [1, 2, 3]
    m2, r2 = fit(CNN, epochs=4)
    assert same(m, m2) and r.history.equals(r2.history)

def test_finished_folder(tmp_path):
    m, r = fit(CNN, folder=tmp_path)
    said = []; m2, r2 = fit(CNN, folder=tmp_path, log=lambda **kw: said.append(kw))
    assert not said and same(m, m2) and r2.history.equals(r.history) and r2.best_epoch == r.best_epoch
    with pytest.raises(RunError, match="epochs: 3 then, 4 now"): fit(CNN, folder=tmp_path, epochs=4)
    with pytest.raises(RunError, match="train: "): fit(CNN, folder=tmp_path, train=spots(36, 1))
    w = tmp_path/"classifier.safetensors"; w.write_bytes(w.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="cut off"): load_classifier(tmp_path)
    with pytest.raises(WeightsError, match="cut off"): fit(CNN, folder=tmp_path)

def test_patience_survives_a_kill(tmp_path):
    kw = dict(epochs=30, lr=1e-9, patience=2, monitor="accuracy")
    _, r = fit(CNN, **kw); n = len(r.history)
    assert n < 30
    with pytest.raises(KeyboardInterrupt): fit(CNN, **kw, folder=tmp_path, checkpoint_every_s=0, log=stop_at(n-2))
    _, r2 = fit(CNN, **kw, folder=tmp_path, checkpoint_every_s=0)
    assert r2.history.equals(r.history)

# --- chance, memory ---------------------------------------------------------------------------------------------------------
def test_global_chance_is_untouched():
    torch.manual_seed(5); np.random.seed(5); a, b = torch.get_rng_state(), np.random.get_state()[1].copy()
    m1, _ = fit(CNN)
    assert torch.equal(a, torch.get_rng_state()) and (b == np.random.get_state()[1]).all()
    torch.manual_seed(6); m2, _ = fit(CNN)
    assert same(m1, m2)

def test_logging_moves_nothing():
    m1, _ = fit(SWIN); m2, _ = fit(SWIN, log=lambda **kw: (torch.rand(3), np.random.rand()))
    assert same(m1, m2)

def test_patches_leave_memory_after_a_fit(monkeypatch):
    made = []
    class Seen(PatchLoader):
        def __init__(self, *a, **kw): super().__init__(*a, **kw); made.append(weakref.ref(self))
    monkeypatch.setattr(T, "PatchLoader", Seen); fit(CNN, epochs=1)
    assert len(made) == 2 and all(r() is None for r in made)

# --- the authors' switches ----------------------------------------------------------------------------------------------------
def test_authors_sampler_never_sees_synthetic_pixels():
    def mixed(value): return join([TRAIN, patch_arrays(np.full((30,16,16), value, np.uint8), target=1, synthetic=True)])
    a, b = (fit(CNN, train=mixed(v), skip_synthetic=True)[0] for v in (0, 255)); assert same(a, b)
    a, b = (fit(CNN, train=mixed(v))[0] for v in (0, 255)); assert not same(a, b)

def test_authors_score_changes_the_choice_only_for_logits():
    h = lambda c,s: fit(c, score=s, epochs=4)[1].history.score
    assert np.allclose(h(CNN, "softmax"), h(CNN, "exp_logit"))
    assert not np.allclose(h(SWIN, "softmax"), h(SWIN, "exp_logit"))

def test_eval_mode_is_never_left():
    m1, m2 = (fit(CNN, monitor="last", eval_after_first_val=e)[0] for e in (False, True))
    first, _ = fit(CNN, monitor="last", epochs=1)
    assert torch.equal(m2.features[0][1].running_var, first.features[0][1].running_var) and not same(m1, m2)
    assert not torch.equal(m2.features[0][0].weight, first.features[0][0].weight)        # it does go on learning

# --- patch sets, sizes, errors --------------------------------------------------------------------------------------------------
def test_patch_set_of_the_data_modules():
    from mammo_nb.data.patches import COLUMNS, PatchSet
    t = pd.DataFrame({c: [np.nan]*4 for c in COLUMNS}).assign(patch_id=list("abcd"), target=[1,0,1,0], synthetic=[False,False,True,False])
    px = rng(0, "px").integers(0, 255, (4,2,8,8), dtype=np.uint8); ps = PatchSet(px, t)
    a = patch_arrays(ps)
    assert a.target.tolist() == [1,0,1,0] and a.synthetic.tolist() == [False,False,True,False] and (a.view0() == px[:,0]).all()
    mix = training_mix(ps.subset([0]), ps.subset([1,3]), synthetic=ps.subset([2]), extra_healthy=ps.subset([1]))
    assert mix.target.tolist() == [1,0,0,1,0] and mix.synthetic.tolist() == [False,False,False,True,False]
    with pytest.raises(DataError, match="1 of 4 patches have no class"): patch_arrays(PatchSet(px, t.assign(target=[1,0,np.nan,0])))

def test_memory_mapped_pixels(tmp_path):
    f = tmp_path/"px.npy"; np.save(f, TRAIN.pixels.reshape(37,3,16,16))
    mapped = patch_arrays(np.load(f, mmap_mode="r"), target=TRAIN.target)
    assert mapped.key() == TRAIN.key() and same(fit(CNN, train=mapped)[0], fit(CNN)[0])

def test_patches_of_another_size_are_resized_by_area():
    big = np.kron(VALID.view0(), np.ones((2,2), np.uint8))
    m, _ = fit(CNN, epochs=1)
    assert np.allclose(predict_proba(m, big), predict_proba(m, VALID), atol=1e-5)

def test_bf16_is_near_fp32():
    a, b = (fit(CNN, precision=p)[1].history.valid_loss for p in ("fp32", "bf16"))
    assert np.allclose(a, b, atol=.05) and not np.allclose(a, b, atol=1e-7)

def test_three_classes():
    g = rng(3, "three"); y = np.arange(60) % 3; px = (g.integers(40, 60, (60,16,16)) + 60*y[:,None,None]).astype(np.uint8)
    d = patch_arrays(px, target=y)
    m, r = fit(dict(CNN, classes=3), train=d, valid=d, classes=("healthy","benign","malignant"), monitor="auroc", epochs=6, lr=.05)
    assert predict_proba(m, d).shape == (60,3) and r.best_score > .9
    with pytest.raises(ParameterError, match="network that knows 2"): fit(CNN, train=d, valid=d, classes=("healthy","benign","malignant"))
    with pytest.raises(DataError, match="class 2 found"): fit(CNN, train=d)

@pytest.mark.parametrize("part", ["train", "valid"])
def test_one_class_missing_is_said(part):
    with pytest.raises(DataError, match="got 18 lesion and 0 healthy" if part == "train" else "got 10 lesion and 0 healthy"):
        fit(CNN, **{part: (TRAIN if part == "train" else VALID).subset((TRAIN if part == "train" else VALID).target == 1)})

def test_no_half_result_after_nan(tmp_path):
    with pytest.raises(RunError, match="not a number in epoch 0.*smaller learning rate"): fit(CNN, lr=1e30, folder=tmp_path, checkpoint_every_s=0)
    assert not list(tmp_path.iterdir())

@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    a, b = (fit({**CNN, "dropout": 0.}, device=d)[1].history for d in ("cpu", "cuda"))         # dropout draws other numbers on a GPU
    assert np.allclose(a.train_loss, b.train_loss, atol=.02)

def graphed(config, recipe):
    "Weights of the same training with its steps replayed, and with none captured."
    def trained():
        model, _ = fit(config, recipe=recipe, epochs=4, device="cuda", lr_decay=.5)
        return {k: v.cpu() for k, v in model.state_dict().items()}
    replayed = trained()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Engine, "WARMUP", 10**9)
        return replayed, trained()

@pytest.mark.gpu
@pytest.mark.parametrize("config", [CNN, SWIN], ids=["cnn", "swin"])
@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_replayed_steps_equal_eager_ones(config, optimiser):
    with kernels("tf32"): replayed, eager = graphed(config, change(SHARING, optimiser=optimiser))
    assert all(torch.equal(replayed[k], eager[k]) for k in eager)

def swin_gradients(device, size=64, **form):
    "Gradients of one batch of Swin-T's blocks, 49 tokens a window, and the operators of attention that made them."
    from torch.utils._python_dispatch import TorchDispatchMode
    class Attention(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = Counter()
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "attention" in func.__name__: self.found[func.__name__.split(".")[0]] += 1
            return func(*args, **(kwargs or {}))
    model = build_classifier(dict(kind="swin", size=size, drop_path=0., **form), seed=0).to(device)
    x = torch.from_numpy(rng(0, "x").normal(size=(4, 3, size, size)).astype(np.float32)).to(device)
    with kernels("float32"), Attention() as seen: model(x).square().sum().backward()
    return [p.grad.cpu() for p in model.parameters()], seen.found

@pytest.mark.gpu
def test_swin_on_a_gpu_takes_the_fused_kernel_and_repeats():
    (a, fused), (b, _), (cpu, plain) = map(swin_gradients, ("cuda", "cuda", "cpu"))
    assert fused == {"_scaled_dot_product_efficient_attention": 12, "_scaled_dot_product_efficient_attention_backward": 12} and not plain      # of twelve blocks
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert all((x - y).norm() <= 1e-3*y.norm() + 1e-5 for x, y in zip(a, cpu))

def test_swin_by_the_one_call_is_swin_by_products(monkeypatch):
    "What CUDA calls, on the CPU: the same gradients."
    products, _ = swin_gradients("cpu", size=16, patch=4, embed=8, depths=(2, 2), heads=(2, 2), window=2)
    monkeypatch.setattr(swin, "attend", lambda q, k, v, bias: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    called, _ = swin_gradients("cpu", size=16, patch=4, embed=8, depths=(2, 2), heads=(2, 2), window=2)
    assert all((x - y).norm() <= 1e-5*y.norm() + 1e-6 for x, y in zip(called, products))
