"""The benchmark on the played CUDA device of mock_cuda.py: every loop runs in its arithmetic, each of ours is held against the plain loop of the same one. Times are not looked at."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from mock_cuda import mock_cuda
from mammo_nb import bench
from mammo_nb.core import KERNELS
from mammo_nb.gans.dcgan import RECIPES
from mammo_nb.gans.singan import SinGANRecipe

TINY = RECIPES["sharing_dcgan"].small(size=16, width=1/16, nz=4, batch=4)
LIMITS = dict(float32=1., tf32=2., bf16=4.)
THREE = ("float32", "tf32", "bf16")

@pytest.fixture
def gpu():
    with mock_cuda() as machine: yield machine

def chosen():
    conv, product = torch.backends.cudnn, torch.backends.cuda.matmul
    return conv.deterministic, conv.allow_tf32, product.allow_tf32

def held(rows): # (variant, what) -> value
    return pd.DataFrame(rows).set_index(["variant", "what"]).value


def test_a_gan_against_the_loop_of_its_arithmetic(gpu):
    recipe = RECIPES["sharing_wgangp"].small(size=16, width=1/16, nz=4, batch=4)
    before = chosen()
    r = held(bench.bench_gan("toy", recipe, device="cuda", steps=5, rounds=1, limits=LIMITS))
    assert chosen() == before
    ours = {"exact": "float32", "tf32": "tf32", "fast": "bf16", "exact without graph": "float32"}
    for variant, kind in ours.items():
        plain = bench.named("textbook", kind)
        assert np.isclose(r[variant, bench.SAME], r[plain, "a step"]/r[variant, "a step"])
        assert np.isclose(r[variant, bench.TEXTBOOK], r["textbook", "a step"]/r[variant, "a step"])
        assert np.isclose(r[variant, "share of the product's, same arithmetic"], r[variant, "arithmetic"]/LIMITS[kind])
    assert {v for v, what in r.index if what == "a step"} == {*ours, *(bench.named("textbook", k) for k in THREE)}


@pytest.mark.parametrize("kind", THREE)
def test_a_plain_loop_computes_in_what_its_name_says(gpu, kind, monkeypatch):
    seen, real = [], torch.nn.Conv2d.forward
    def forward(self, x):
        out = real(self, x)
        seen.append((chosen(), out.dtype))
        return out
    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    bench.textbook_gan(TINY, bench.noise_patches(8, 16), "cuda", kind)()
    tf32 = KERNELS[kind].tf32_conv
    assert set(seen) == {((False, tf32, tf32), torch.bfloat16 if kind == "bf16" else torch.float32)}
    seen.clear()
    with pytest.raises(ZeroDivisionError):                       # a step that fails puts the kernels back, too
        before = chosen()
        with bench.plain_kernels(kind): 1/0
    assert chosen() == before


def test_classifiers_tell_the_seconds_of_an_epoch(gpu, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(bench, "clock", lambda device: float(next(ticks)))
    given = dict(config=dict(kind="cnn", size=16, widths=(4,), hidden=4), bs=4)
    data = np.zeros((16, 16, 16), np.uint8), np.arange(16) % 2
    assert bench.own_fit(given["config"], data, bs=4, device="cuda", arithmetic="tf32")() == 1.    # one tick an epoch
    monkeypatch.undo()
    r = held(bench.bench_fit("toy", **given, batches=6, device="cuda", rounds=1, limits=LIMITS))
    assert {v for v, _ in r.index} == {bench.named(w, k) for w in ("ours", "textbook") for k in THREE}
    for kind in THREE:
        speed = {w: r[bench.named(w, kind), "speed"] for w in ("ours", "textbook")}
        assert np.isclose(r[bench.named("ours", kind), bench.SAME], speed["ours"]/speed["textbook"])


def test_what_was_not_compiled_has_no_speed(gpu):
    "torch.compile steps aside under a dispatch mode, as the played device is one, and runs the networks as they are."
    told, = bench.bench_compiled("toy", TINY, device="cuda", steps=1, rounds=1, backend="aot_eager")
    assert told["what"] == "not measured" and "left the networks" in told["note"]


def test_no_kernel_is_no_number(gpu):
    told = bench.bench_launches("toy", TINY, device="cuda", textbook=False)
    assert {r["note"] for r in told} == {"the profiler saw no kernel"} and all(np.isnan(r["value"]) for r in told)
    assert {r["variant"] for r in told} == {"exact", "fast", "tf32", "exact without graph"}


@pytest.mark.slow
def test_singan_in_tf32_and_what_has_no_bf16(gpu):
    recipe = SinGANRecipe(min_size=14, width=4, max_width=4)
    rows = pd.DataFrame(bench.bench_singan(18, recipe, device="cuda", rounds=1, scales=[0], steps=1, mode="tf32"))
    assert set(rows.variant) == {"ours tf32", "published loop tf32", "convolutions alone tf32"} and (rows.value > 0).all()


def test_operations_are_the_same_on_either_device(gpu):
    "Counted where the benchmark runs: whole published steps took minutes of a CPU."
    S = bench.SETUPS["demo"]
    asked = [(bench.sized(name, S), None) for name in ("sharing_dcgan", "sharing_wgangp")] + [(recipe, np.arange(64) % k) for recipe, _, k in bench.later_gans(S)]
    for recipe, classes in asked:
        there = None if classes is None else torch.as_tensor(classes).to("cuda")
        assert bench.step_flops(recipe, classes) == bench.step_flops(recipe, there, device="cuda") > 0


def test_several_on_a_gpu_are_not_timed_in_float32(gpu):
    rows = bench.bench_together("toy", TINY, device="cuda", games=2, steps=1, rounds=1)
    assert {r["variant"] for r in rows} == {"tf32", "fast"}


def test_the_bill_of_predictions_is_whole():
    "Every committed prediction is answered by a line that this benchmark writes at the published size, or says by what."
    told, S = bench.predictions(), bench.SETUPS["published"]
    lines = pd.DataFrame([bench.line(p.section, p.network, p.variant, p.quantity, p.predicted, p.unit)
                          for p in told.itertuples() if p.section])
    assert not lines.duplicated(["section", "item", "variant", "what"]).any()
    held = bench.compare_predictions(told, lines, S, "cuda")
    assert set(held.verdict[told.section != ""]) == {"within"} and held.verdict[told.section == ""].str.startswith("by ").all()
    assert set(bench.compare_predictions(told, lines, replace(S, rounds=1), "cuda").verdict) == set(held.verdict)
