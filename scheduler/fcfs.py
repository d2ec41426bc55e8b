"""First come, first served, in chunks: what a prefill worker does unless told otherwise. Pure."""

from __future__ import annotations

from scheduler.order import Job, Line


class Fcfs(Line):
    """Fills each step in order of prompts, cutting the last to fit (Sarathi-Serve, section 4.2, without its decodes).

    The order of vLLM, SGLang and DistServe's prefill workers by default. A job waits at most for what came before it:
    nobody is ever overtaken. A bounded step keeps the wait for a cancellation bounded. Parameters: those of `Line`.
    """

    def rank(self, job: Job) -> float:
        return 0.0
