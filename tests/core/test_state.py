"""Objects through JSON: what is shared stays shared, and nothing is made of what nobody wrote."""

from __future__ import annotations

import json
import math
from collections import OrderedDict, deque

import pytest

from core.errors import LocalError, StateError
from core.kv import KvShape, PageRun, page_runs
from core.pages import Owner, Pages
from core.prefix import Piece
from core.ranked import Ranked
from core.request import Ticket
from core.state import FORMAT, VERSION, dump, load
from core.worker import Identity

A = Identity("a", 1)


def there_and_back(root):
    document = json.loads(json.dumps(dump(root), allow_nan=False))
    again = load(document, type(root))
    assert dump(again) == document
    return again


@pytest.mark.parametrize(
    "root",
    [
        [None, True, 1, 0.5, "ä", -0.0, 1e-320],
        [2**53, -(2**64) + 1, 2**53 - 1],
        [math.inf, -math.inf],
        ((), (1, (2, (3,))), [[]]),
        {1: "a", "1": "b", (1, 2): {}, None: [], A: A},
        OrderedDict([("b", 1), ("a", 2)]),
        deque([1, 2]),
        {3, 1, 2},
        [Owner.DECODING, Owner.FREE],
        Ticket(A, 1, 2, A, Identity("b", 2)),
        KvShape(1, 1, 2, 4, "float32"),
        page_runs((1, 2, 5)),
    ],
)
def test_values_come_back_as_they_were(root):
    again = there_and_back(root)
    assert (type(again), again) == (type(root), root)
    assert repr(again) == repr(root)


def test_what_is_one_thing_stays_one_thing():
    pair = ("a", 1)
    again = there_and_back([pair, [pair], {pair: A}, {"x": A}])
    assert again[0] is again[1][0] is next(iter(again[2]))
    assert again[2][pair] is again[3]["x"]


def test_things_may_contain_each_other():
    root = Piece(None, [], [], 0)
    child = Piece(root, [1], [(0, 1)], 1)
    root.children[1] = child
    child.owner = (root, [child])
    again = there_and_back(root)
    assert again.children[1].parent is again
    assert again.children[1].owner[0] is again
    assert again.children[1].owner[1][0] is again.children[1]


def test_a_chain_of_any_length_is_no_recursion():
    root: tuple = ()
    for _ in range(20_000):
        root = (root,)
    again = load(json.loads(json.dumps(dump(root))), tuple)
    depth = 0
    while again:
        again, depth = again[0], depth + 1
    assert depth == 20_000


def test_a_queue_whose_entries_are_known_by_identity_goes_on():
    ranked = Ranked([("a", 2.0), ("b", 1.0)])
    ranked.put("b", 3.0)
    again = there_and_back(ranked)
    assert [again.pop(), again.pop(), again.pop()] == ["a", "b", None]


def test_a_ledger_with_prefixes_goes_on():
    pages = Pages(10)
    pages.bind("x", 4, Owner.PREFILLING)
    pages.name("x", (11, 12, 13))
    pages.share("y", (11, 12), Owner.DECODING)
    pages.release("x")
    pages.check()  # it looks up what is then remembered
    again = there_and_back(pages)
    for each in (pages, again):
        assert each.share("z", (11, 12, 13), Owner.DECODING) == 3
        assert each.bind("z", 3, Owner.DECODING)
        each.check()
    assert (again.pages("z"), again.counts()) == (pages.pages("z"), pages.counts())


def test_a_deque_keeps_its_bound():
    assert there_and_back(deque([1], maxlen=3)).maxlen == 3


def test_methods_and_functions_of_ours_are_known_by_name():
    ranked = Ranked([("a", 1.0)])
    one, again, runs = there_and_back([ranked, ranked.pop, page_runs])
    assert again() == "a"
    assert len(one) == 0
    assert runs is page_runs


@pytest.mark.parametrize("alien", [lambda: 0, len, object(), iter([]), Owner, json, b"", 1j])
def test_what_has_no_place_in_a_policy_is_not_written(alien):
    with pytest.raises(LocalError, match="state: got "):
        dump([alien])


def document(*objects, root=None, **changed):
    return {"format": FORMAT, "version": VERSION, "root": root or {"#": 0}, "objects": list(objects), **changed}


RUN = ["core.kv:PageRun", {"start": 0, "count": 1}]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (None, "format"),
        ([], "format"),
        ({"format": "baton.other"}, "format: got"),
        (document(RUN, version=VERSION + 1), f"version: got {VERSION + 1}, want {VERSION}"),
        (document(RUN, objects=3), "objects: got 3"),
        (document(RUN, root={"#": 1}), "root: got"),
        (document(RUN, root={"#": True}), "root: got"),
        (document(RUN, root=[1]), "root: got"),
        (document(RUN, root={"int": "x"}), "root: got"),
        (document(RUN, root={"float": "1"}), "root: got"),
        (document(RUN, root="a"), "root: got str, want PageRun"),
        (document("x"), "object 0: got 'x'"),
        (document(["list"]), "object 0"),
        (document(["list", {}]), "object 0: got {}, want a list"),
        (document(["list", [{"#": 5}]]), "object 0: got {'#': 5}"),
        (document(["bag", []]), "object 0: got 'bag', want a class"),
        (document(["tuple", [{"#": 0}]]), "not in itself"),
        (document(["tuple", [{"#": 1}]], ["tuple", [{"#": 0}]]), "not in itself"),
        (document(["named", "core.worker:Identity", ["a"]]), "a named tuple of 1"),
        (document(["named", "core.kv:PageRun", [0, 1]]), "a named tuple of 2"),
        (document(["named", "core.worker:Identity", {}]), "a list"),
        (document(["core.worker:Identity", {"name": "a", "incarnation": 1}]), "a named tuple by its values"),
        (document(["dict", [[1]]]), "want keys and values"),
        (document(["dict", [[{"#": 0}, 1]]]), "want keys and values"),
        (document(["set", [{"#": 0}]]), "have a hash"),
        (document(["deque", [], -1]), "want the most entries"),
        (document(["enum", "core.pages:Owner", "gone"]), "a value of core.pages:Owner"),
        (document(["core.pages:Owner", {"_value_": "free"}]), "an enum by its value"),
        (document(["core.kv:PageRun", {"start": 0}]), "attributes of core.kv:PageRun: start, count"),
        (document(["core.kv:PageRun", {"start": 0, "count": 1, "more": 1}]), "attributes of"),
        (document(["core.prefix:Piece", {"parent": None}]), "attributes of core.prefix:Piece"),
        (document(["core.worker:Gone", {}]), "a class of the pure rooms"),
        (document(["core.gone:Identity", {}]), "a class of the pure rooms"),
        (document(["core.errors:LocalError", {}]), "a class of the pure rooms"),
        (document(["core.state:OrderedDict", {}]), "a class of the pure rooms"),
        (document(["subprocess:Popen", {}]), "a class of the pure rooms"),
        (document(["transfer.nixl:Nixl", {}]), "a class of the pure rooms"),
        (document(["builtins:object", {}]), "a class of the pure rooms"),
        (document(["function", "os:system"]), "a function of the pure rooms"),
        (document(["function", "core.state:importlib"]), "a function of the pure rooms"),
        (document(["method", {"#": 1}, "popitem"], ["dict", []]), "a method of dict"),
        (document(["method", {"#": 1}, "gone"], RUN), "a method of PageRun"),
    ],
)
def test_what_nobody_wrote_is_refused_in_one_sentence(wrong, said):
    with pytest.raises(StateError) as caught:
        load(wrong, PageRun)
    assert str(caught.value).startswith("state: ")
    assert said in str(caught.value)


def test_whole_numbers_that_other_readers_would_round_are_text():
    assert dump([2**53 - 1, -(2**53)])["objects"] == [["list", [2**53 - 1, {"int": str(-(2**53))}]]]
