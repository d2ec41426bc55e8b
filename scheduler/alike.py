"""Why two processes cannot be of one deployment, and why two workers cannot exchange KV. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from core.kv import KvShape
from core.worker import Member, Numerics

_NUMERICS = tuple(field.name for field in fields(Numerics))
_SAME = ("protocol", "model", "fingerprint")
"""What all processes of a deployment have in common."""
_SAME_KV = (*(f"kv.{field.name}" for field in fields(KvShape) if field.name != "page_tokens"), "transport")
"""And what all its workers have. Pages may differ in their tokens, if one is a multiple of the other."""


def stranger(ours: Member, theirs: Member) -> str | None:
    """Why two processes cannot be of one deployment, naming the field, got and wanted; None if they can."""
    return _unlike(ours, theirs, _SAME)


def mismatch(ours: Member, theirs: Member) -> str | None:
    """Why two workers cannot exchange KV, naming the field, got and wanted; None if they can."""
    if (why := _unlike(ours, theirs, _SAME + _SAME_KV)) is not None:
        return why
    if ours.kv is not None and theirs.kv is not None:
        got, want = theirs.kv.page_tokens, ours.kv.page_tokens
        if max(got, want) % min(got, want):
            who, whose = theirs.identity.name, ours.identity.name
            return f"kv.page_tokens: got {got} from {who}, want a multiple or a divisor of {want} as {whose} has"
    if any(each.numerics is not None and each.numerics.exact for each in (ours, theirs)):
        why = _unlike(ours, theirs, tuple(f"numerics.{name}" for name in _NUMERICS))
        return f"{why}, because exact mode needs the same bits everywhere" if why is not None else None
    return None


def _unlike(ours: Member, theirs: Member, names: Iterable[str]) -> str | None:
    """The first of these fields (or fields of fields) in which two members differ, as a sentence."""
    for name in names:
        outer, _, inner = name.partition(".")
        got, want = getattr(theirs, outer), getattr(ours, outer)
        if got != want and inner and got is not None and want is not None:
            got, want = getattr(got, inner), getattr(want, inner)
        if got != want:
            name = outer if got is None or want is None else name
            got, want = ("none" if value is None else value for value in (got, want))
            return f"{name}: got {got} from {theirs.identity.name}, want {want} as {ours.identity.name} has"
    return None
