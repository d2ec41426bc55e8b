"""A machine and what came of it through JSON, which are given the same from then on and must answer alike."""

from __future__ import annotations

import json
from typing import Any

from core.state import dump, load


def written(machine: object) -> dict:
    """A machine as it would stand in a file."""
    return json.loads(json.dumps(dump(machine), allow_nan=False))


def sets_sorted(document: dict) -> dict:
    """The same document whatever the order of its sets."""
    objects = [["set", sorted(each[1], key=repr)] if each[0] == "set" else each for each in document["objects"]]
    return {**document, "objects": objects}


class Twins:
    """Calls of both must give the same; attributes are those of the first."""

    def __init__(self, *pair: object) -> None:
        self.pair = pair

    def __getattr__(self, name: str):
        one, other = (getattr(each, name) for each in self.pair)
        if not callable(one):
            return one

        def call(*args, **kwargs):
            said = one(*args, **kwargs)
            assert other(*args, **kwargs) == said, f"{name}{args}: the restored one answers otherwise"
            return said

        return call

    def __len__(self) -> int:
        return self.__getattr__("__len__")()


def doubled(machine: Any, ledger: Any = None) -> tuple:
    """The machine beside a copy through JSON, and likewise its ledger, if it has one; a copy before is copied on."""
    first = machine.pair[0] if isinstance(machine, Twins) else machine
    last = machine.pair[-1] if isinstance(machine, Twins) else machine
    document = written(last)
    copy = load(document, type(first))
    assert sets_sorted(written(copy)) == sets_sorted(document)
    if ledger is None:
        return Twins(first, copy), None
    own = ledger.pair[0] if isinstance(ledger, Twins) else ledger
    return Twins(first, copy), Twins(own, copy._ledger)
