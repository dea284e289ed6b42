"What a run could decide before it is made, and studies whose truth is known."
import pandas as pd
import pytest

from mammo_nb.core import ParameterError
from mammo_nb.known import World, answers_of, repeated, study_verdicts
from mammo_nb.plan import COLUMNS, main, outlook
from mammo_nb.report.rules import claims

from conftest import ROOT


def test_more_of_everything_decides_smaller_effects():
    few = outlook("04_sharing", preset="paper", women="lesion=20,healthy=20", seeds=10).table.set_index("id")
    for more in (dict(women="lesion=200,healthy=200", seeds=10), dict(women="lesion=20,healthy=20", seeds=40)):
        t = outlook("04_sharing", preset="paper", **more).table.set_index("id")
        both = few.among.notna()
        assert both.sum() > 10 and (t.among[both] < few.among[both]).all() and (t.smallest <= t.among)[both].all()
    assert [c.id for c in claims("04_sharing")] == list(few.index)
    assert (few.why[few.among.isna()] != "").all() and (few.why[few.among.notna()] == "").all()


def test_the_published_effect_of_the_headline_needs_more_than_the_paper_had():
    row = outlook("04_sharing", preset="paper", women="lesion=17,healthy=17", seeds=3).table.set_index("id").loc["04.headline"]
    assert row.target == pytest.approx(.146) and row.smallest > .146 and row.chance < .2


@pytest.mark.parametrize("given, said", [
    (dict(), "give -p data_dir DIR"), (dict(women="lesion"), "women is 'lesion'"), (dict(women="lesion=2,healthi=3"), "no class 'healthi'"),
    (dict(women="lesion=2,healthy=3", seeds=0), "whole number"), (dict(women="lesion=2,healthy=3", presett="demo"), "no parameter 'presett'"),
    (dict(women="lesion=2,healthy=3", preset="dem"), "'dem' is not possible"), (dict(data_dir="/nowhere/at/all"), "no such folder")])
def test_bad_calls_are_refused(given, said):
    with pytest.raises(ParameterError, match=said): outlook("04_sharing", **given)


def test_the_command(tmp_path, capsys):
    assert main(["nbs/04_sharing.ipynb", "-p","women","lesion=1,healthy=40", "--csv", str(tmp_path/"p.csv")]) == 0
    out = capsys.readouterr().out
    assert "each class needs two" in out and "could the paper have known?" in out and list(pd.read_csv(tmp_path/"p.csv")) == COLUMNS
    assert main(["05_nothing"]) == 1 and "unknown paper" in capsys.readouterr().err
    assert 'mammo_plan = "mammo_nb.cli:main"' in (ROOT/"pyproject.toml").read_text()


def test_one_small_study_finds_no_gain_in_noise():
    "The whole way, small: drawn patches, trained networks, answers, verdicts."
    world = World(women=24, trainings=2, lesions=4, healthy=24, added=24, seen=120)
    t = study_verdicts("noise", answers_of(world, ("noise",), 0))
    assert len(t) == 4 and not t.verdict.str.startswith("holds").any() and t.trainings.max() <= 2


def held(found, study): return found[(found.study == study) & found.verdict.str.startswith("holds")]

def check_frequencies(found):
    "The acceptance of the design: a true gain is found, and nothing else."
    worlds = found.world.nunique()
    gain = held(found, "truth")
    assert (gain.claim == "none.auroc").sum() >= .8*worlds
    assert not len(held(found, "noise")) and not len(held(found, "shuffled"))
    assert (held(found, "exact").claim.str.startswith("copies")).sum() <= worlds/20


@pytest.mark.slow
def test_studies_with_known_truth(): check_frequencies(repeated(20))
