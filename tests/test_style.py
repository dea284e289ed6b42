"Ratchets: how readable the package is, counted. Each number may only get better; `python tests/ratchets.py` shows all of them."
import json
from pathlib import Path

import pytest
from ratchets import between_packages, circles, graph, measure

REACHED = json.loads((Path(__file__).parent/"ratchets.json").read_text())
MORE_IS_BETTER = {"public names a lesson cell uses, %"}


@pytest.fixture(scope="module")
def measured(): return measure()


@pytest.mark.parametrize("name", REACHED)
def test_ratchet(measured, name):
    worse = measured[name] < REACHED[name] if name in MORE_IS_BETTER else measured[name] > REACHED[name]
    assert not worse, f"{name}: {measured[name]:.1f}, was {REACHED[name]} – see CONTRIBUTING.md; `python tests/ratchets.py NOTEBOOK` names the places"


def test_no_circles():
    edges = graph()
    assert not circles(edges) and not circles(between_packages(edges))


def test_direction_of_imports():
    "Nothing imports papers but their pages, papers do not import each other, metrics and data stand below what uses them."
    edges = graph()
    below = {"metrics": ("gans", "clf", "report", "papers", "data"), "data": ("gans", "clf", "report", "papers"), "gans": ("clf", "report", "papers"),
             "clf": ("report", "papers"), "report": ("papers", "gans", "clf", "data")}
    for module, to in edges.items():
        floor = module.split(".")[1]
        wrong = [t for t in to if t.split(".")[1] in below.get(floor, ())]
        assert not wrong, f"{module} imports {wrong}"
        if floor == "papers":
            own = module.split(".")[2].split("_")[0]
            others = [t for t in to if t.split(".")[1] == "papers" and t.split(".")[2].split("_")[0] != own]
            assert not others, f"{module} imports {others}"
            if not module.endswith(("_page", "_figures", "_words", "_seeds", "_looks", "_known", "_multiverse")): assert not [t for t in to if t.split(".")[1] == "report"], f"{module} imports report; its page may"


def test_ratchets_notice():
    "The counter counts: a planted fault of each kind is seen."
    from ratchets import Source
    source = Source()
    source.read("def f(a, b, c, d, e, f, g, h, i):\n    import os; return [x for x in a for y in b for z in c]\nwhile x: y\n" + f"x = '{'y'*130}'\n", "planted")
    assert (source.semicolons, source.joined, source.lazy_imports, source.deep_comprehensions, source.over_120, len(source.many_parameters)) == (1, 1, 1, 1, 1, 1)
    assert circles({"a": ["b"], "b": ["a"], "c": []}) == [["a", "b"]] and not circles({"a": ["b"], "b": [], "c": ["a"]})
