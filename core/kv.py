"""The KV cache as bytes: the shape of a page, and runs of neighbouring pages.

Layout is page-major (decided in docs/decisions/0002-page-major-kv.md): one page holds all layers of `page_tokens`
tokens as ``[layer, K|V, kv_head, token, dim]``, contiguous, so that neighbouring pages are neighbouring bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from core.errors import LocalError
from core.quick import quick_init

ITEM_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one page of KV cache looks like; equal shapes can exchange pages byte for byte."""

    layers: int
    kv_heads: int
    head_dim: int
    page_tokens: int
    dtype: str
    """One of `ITEM_NBYTES`."""

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_NBYTES:
            raise LocalError(f"kv dtype: got {self.dtype!r}, want one of {sorted(ITEM_NBYTES)}")
        for field in ("layers", "kv_heads", "head_dim", "page_tokens"):
            if getattr(self, field) < 1:
                raise LocalError(f"kv {field}: got {getattr(self, field)}, want at least 1")

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row: one token of one head of K or V in one layer."""
        return self.head_dim * ITEM_NBYTES[self.dtype]

    @property
    def rows(self) -> int:
        """Rows in a page."""
        return self.layers * 2 * self.kv_heads * self.page_tokens

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page, all layers."""
        return self.rows * self.row_nbytes

    @property
    def token_nbytes(self) -> int:
        """Bytes of KV that one token takes over all layers."""
        return self.page_nbytes // self.page_tokens

    def pages_for_branches(self, prompt: int, max_tokens: int, n: int) -> int:
        """Pages of `n` continuations of one prompt: they share its pages and copy the one that is only partly full."""
        whole = self.pages_for(prompt + max_tokens)
        return whole if n == 1 else self.pages_for(prompt) + n * (whole - prompt // self.page_tokens)

    def most_tokens(self, room: int, prompt: int, n: int) -> int:
        """The largest `max_tokens` for which `pages_for_branches` fit into room for `room` tokens; below 1 if none."""
        if n == 1:
            return room - prompt
        own = (room // self.page_tokens - self.pages_for(prompt)) // n
        return (prompt // self.page_tokens + own) * self.page_tokens - prompt

    def names(self, prefix: tuple[int, ...], of_tokens: int) -> tuple[int, ...]:
        """The names of a prompt's pages of this size, given those of its pages of `of_tokens` tokens (0: this many).

        A chained hash stands for all tokens before it, so each k-th name is that of a page k times as large. Names of
        pages that ours are no multiple of name none of ours.
        """
        if of_tokens in (0, self.page_tokens):
            return prefix
        step, rest = divmod(self.page_tokens, of_tokens)
        return () if rest else prefix[step - 1 :: step]

    def pages_for(self, tokens: int) -> int:
        """Pages needed for `tokens` tokens."""
        return -(-tokens // self.page_tokens)


@quick_init
@dataclass(frozen=True, slots=True, order=True)
class PageRun:
    """`count` neighbouring pages from page `start` on."""

    start: int
    count: int

    @property
    def stop(self) -> int:
        """First page after the run."""
        return self.start + self.count


def page_runs(pages: Sequence[int]) -> tuple[PageRun, ...]:
    """The pages in their given order, joined where the next page is the next number."""
    if pages and pages[-1] - pages[0] == len(pages) - 1 and tuple(range(pages[0], pages[-1] + 1)) == tuple(pages):
        return (PageRun(pages[0], len(pages)),)
    runs: list[PageRun] = []
    start = stop = -1
    for page in pages:
        if page != stop:
            if stop >= 0:
                runs.append(PageRun(start, stop - start))
            start = page
        stop = page + 1
    if stop >= 0:
        runs.append(PageRun(start, stop - start))
    return tuple(runs)


def pages_of(runs: Iterable[PageRun]) -> tuple[int, ...]:
    """The page numbers of `runs`, in order: the inverse of `page_runs`."""
    return tuple(page for run in runs for page in range(run.start, run.stop))
