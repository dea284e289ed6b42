"A killed training goes on and ends with the same bytes; damaged checkpoints are found; stops, full disks and NaN lose nothing."
import errno, json, os, signal, subprocess, sys, textwrap
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from mammo_nb.core import RunError, file_hash, stepwise, rng
from mammo_nb.gans.dcgan import DCGAN, RECIPES
from mammo_nb.gans.share import load_generator
from mammo_nb.gans.train import Checkpoint, Game, train_gan
from mammo_nb.gans import wgangp  # noqa: F401 - adds its recipe
from mammo_nb.runs import Job, take_turns

SMALL = dict(size=8, width=1/16, nz=4, batch=8)
SETTINGS = {"dcgan": ("sharing_dcgan", dict(ema=.9, jitter=.05)), "thesis": ("thesis_dcgan", {}), "wgangp": ("sharing_wgangp", {}), "ahead": ("sharing_wgangp", dict(ahead=True))}


def recipe_of(which):
    name, change = SETTINGS[which]
    return RECIPES[name].small(**SMALL, **change)


def patches(): return rng(0, "patches").integers(0, 256, (20, 2, 8, 8), dtype=np.uint8)


def train(folder, which="dcgan", epochs=4, **kw):
    kw = dict(checkpoint_every_s=0, seed=1) | kw
    return train_gan(recipe_of(which), patches(), folder=folder, epochs=epochs, **kw)


def content(folder):
    "Every file a finished training leaves, by its bytes."
    return {p.relative_to(folder).as_posix(): file_hash(p) for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.suffix != ".lock"}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    "Content of an uninterrupted run of each kind."
    out = {}
    for which in SETTINGS: train(tmp_path_factory.mktemp("whole")/which, which); out[which] = content(next(tmp_path_factory.getbasetemp().glob(f"whole*/{which}")))
    return out


KILLER = textwrap.dedent("""
    "Train in forked children; each is killed with SIGKILL at a random event until one gets through. Prints the kills of each kind."
    import os, signal, sys
    sys.path.insert(0, sys.argv[1])
    import test_resume_gans as T
    from mammo_nb.core import rng
    from mammo_nb.gans import train as trainer

    T.train(os.path.join(sys.argv[2], "warm"), epochs=1)     # what torch loads late is loaded once
    left = [0]
    def counted(f): # The n-th call of any counted function never happens
        def inner(*a, **kw):
            left[0] -= 1
            if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
            return f(*a, **kw)
        return inner
    os.replace, os.fsync, trainer.real_batch = counted(os.replace), counted(os.fsync), counted(trainer.real_batch)
    for which in T.SETTINGS:
        chance, kills, through = rng(0, "kill", which), 0, False
        while not through:
            left[0] = int(chance.integers(1, 40))
            if not (pid := os.fork()):
                T.train(os.path.join(sys.argv[2], which), which); os._exit(0)
            status = os.waitpid(pid, 0)[1]
            through = status == 0
            assert through or os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
            kills += not through
            assert kills < 100, "a run does not get on"
        print(which, kills)
""")


def test_killed_at_random_points_ends_with_the_same_bytes(tmp_path, unbroken):
    r = subprocess.run([sys.executable, "-c", KILLER, str(Path(__file__).parent), str(tmp_path)], capture_output=True, text=True, timeout=300,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert r.returncode == 0, r.stderr[-2000:]
    kills = dict(line.split() for line in r.stdout.splitlines() if len(line.split()) == 2)
    assert sum(map(int, kills.values())) >= 12, kills
    for which in SETTINGS: assert content(tmp_path/which) == unbroken[which]


class Killed(BaseException): "Stands for a kill inside this process."


def break_at(folder, epoch, which="dcgan"):
    "Train until this epoch is logged, then stop at once."
    def log(**kw):
        if kw.get("epoch") == epoch and kw["stage"] == "gan" and "event" not in kw: raise Killed
    with pytest.raises(Killed): train(folder, which, log=log)


def damage(path, how):
    raw = path.read_bytes()
    if how == "cut": path.write_bytes(raw[:len(raw)//2])
    if how == "flip": path.write_bytes(raw[:-7] + bytes([raw[-7] ^ 1]) + raw[-6:])
    if how == "empty": path.write_bytes(b"")
    if how == "gone": path.unlink()
    if how == "number":      # still valid JSON, another number
        assert b'"epoch"' in raw
        path.write_bytes(raw.replace(b'"seed": 1', b'"seed": 2') if b'"seed": 1' in raw else raw)


@pytest.mark.parametrize("suffix, how", [(".safetensors", h) for h in ("cut", "flip", "empty", "gone")] + [(".json", h) for h in ("cut", "empty", "number")])
def test_damaged_checkpoint_is_passed_over(suffix, how, tmp_path, unbroken):
    break_at(tmp_path, epoch=3)
    files = sorted(tmp_path.glob(f"checkpoint-*{suffix}"))
    assert len(files) == 2
    damage(files[-1], how)
    said = []
    with pytest.warns(UserWarning, match="checkpoint passed over"): train(tmp_path, log=lambda **kw: said.append(kw))
    assert any("damaged" in kw for kw in said)
    assert content(tmp_path) == unbroken["dcgan"]


def test_channels_last_resumes_exactly(tmp_path):
    "Adam's moments come back in the memory layout of their weights."
    train(tmp_path/"whole", channels_last=True)
    def log(**kw):
        if kw.get("epoch") == 2 and kw["stage"] == "gan": raise Killed
    with pytest.raises(Killed): train(tmp_path/"broken", channels_last=True, log=log)
    train(tmp_path/"broken", channels_last=True)
    assert content(tmp_path/"broken") == content(tmp_path/"whole")


def test_all_checkpoints_damaged_starts_afresh(tmp_path, unbroken):
    break_at(tmp_path, epoch=3)
    for p in tmp_path.glob("checkpoint-*.safetensors"): damage(p, "cut")
    with pytest.warns(UserWarning, match="checkpoint passed over"): train(tmp_path)
    assert content(tmp_path) == unbroken["dcgan"]


def test_another_run_is_refused_and_named(tmp_path):
    break_at(tmp_path, epoch=2)
    with pytest.raises(RunError, match="seed: 1 then, 2 now"): train(tmp_path, seed=2)
    with pytest.raises(RunError, match="epochs: 4 then, 5 now"): train(tmp_path, epochs=5)
    train(tmp_path)
    with pytest.raises(RunError, match="seed: 1 then, 2 now"): train(tmp_path, seed=2)


def test_finished_training_is_read_and_a_changed_one_done_again(tmp_path, unbroken):
    run, said = train(tmp_path), []
    again = train(tmp_path, log=lambda **kw: said.append(kw))
    assert said == [] and again.snapshots == run.snapshots and again.history.equals(run.history)
    damage(run.snapshots[0]/"G.safetensors", "flip")
    with pytest.warns(UserWarning, match="done again"): train(tmp_path)
    assert content(tmp_path) == unbroken["dcgan"]


@pytest.mark.parametrize("number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, RunError)])
def test_asked_to_stop_leaves_a_checkpoint(number, error, tmp_path, unbroken):
    def log(**kw):
        if kw.get("epoch") == 2 and kw["stage"] == "gan" and "event" not in kw: os.kill(os.getpid(), number)
    before = signal.getsignal(number)
    with pytest.raises(error): train(tmp_path, checkpoint_every_s=1e9, log=log)
    assert signal.getsignal(number) == before
    last, = [json.loads(p.read_text()) for p in tmp_path.glob("checkpoint-*.json")]
    assert last["meta"] == {"epoch": 2, "batch": 1}
    train(tmp_path)
    assert content(tmp_path) == unbroken["dcgan"]


@stepwise
def in_turn(folder, which, log=None):
    yield from train_gan.steps(recipe_of(which), patches(), folder=folder/"gan", epochs=4, seed=1, checkpoint_every_s=1e9, log=log)


def together(folder, most=3, **logs):
    "Trainings of four kinds that take turns."
    def call(which): return Job(which, in_turn, "gan", given=dict(which=which)), folder/which, "exact", dict(log=logs.get(which, dict))
    return [k for k, seconds in take_turns({which: call(which) for which in SETTINGS}, most)]


def test_trainings_in_turns_end_with_the_bytes_they_have_alone(tmp_path, unbroken):
    assert sorted(together(tmp_path)) == sorted(SETTINGS)
    for which in SETTINGS: assert content(tmp_path/which/"gan") == unbroken[which]


def test_a_stop_saves_all_that_take_turns(tmp_path, unbroken):
    def log(**kw):
        if kw.get("epoch") == 2 and "event" not in kw: os.kill(os.getpid(), signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunError, match="stopped by the system"): together(tmp_path, thesis=log)
    assert signal.getsignal(signal.SIGTERM) == before
    saved = {p.parents[1].name: json.loads(p.read_text())["meta"] for p in tmp_path.rglob("checkpoint-*.json")}
    assert saved == dict(dcgan=dict(epoch=2, batch=1), thesis=dict(epoch=2, batch=1), wgangp=dict(epoch=1, batch=3))
    together(tmp_path)
    for which in SETTINGS: assert content(tmp_path/which/"gan") == unbroken[which]


class Breaking(DCGAN):
    "Losses become NaN in the fourth epoch."
    def step_g(self, game, real):
        losses = super().step_g(game, real)
        if len(game.history_probe) >= 9:
            with torch.no_grad(): next(game.G.parameters()).mul_(float("nan"))
        game.history_probe.append(1)
        return losses
    def start_epoch(self, game, epoch):
        game.__dict__.setdefault("history_probe", []); super().start_epoch(game, epoch)


def test_nan_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    recipe = Breaking(**asdict(recipe_of("dcgan")))
    with pytest.raises(RunError, match="broke down in epoch 4.*checkpoint of epoch 3 is whole"):
        train_gan(recipe, patches(), folder=tmp_path, epochs=6, checkpoint_every_s=0)
    assert Checkpoint(tmp_path).steps()
    for p in tmp_path.glob("snapshots/*"): load_generator(p)     # refuses weights that are not finite


def test_full_disk_keeps_what_was_finished(tmp_path, monkeypatch, unbroken):
    write, calls = Path.write_bytes, []
    def full(self, data):
        calls.append(self)
        if len(calls) > 12: raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError, match="disk is full"): train(tmp_path)
    monkeypatch.undo()
    assert len(Checkpoint(tmp_path).steps()) == 2 and not list(tmp_path.glob(".*part*"))
    train(tmp_path)
    assert content(tmp_path) == unbroken["dcgan"]


def test_optimiser_and_chance_are_part_of_the_state(tmp_path):
    "A resume from weights alone, as StyleGAN's snapshots allow, does not end at the same place."
    a, b = train(tmp_path/"a"), tmp_path/"b"
    break_at(b, epoch=3)
    original = Game.objects
    Game.objects = lambda self: {k: v for k, v in original(self).items() if k in ("G", "D")}
    try: run = train(b)
    finally: Game.objects = original
    assert not np.allclose(a.history.loss_d.iloc[-1], run.history.loss_d.iloc[-1], rtol=1e-6, atol=0)
    assert a.history.iloc[:2].equals(run.history.iloc[:2])
