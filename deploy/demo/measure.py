"""Measures what the stored demo model recites, and writes the demo's prompts once it answers them.

Run by itself, it measures the stored checkpoint again and rewrites ``prompts.json`` and that part of ``training.json``.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from deploy.demo import corpus
from deploy.demo.network import Llama, Shape
from deploy.demo.selection import PASSAGES

HERE = Path(__file__).parent
LIMIT = 100
BATCH = 128
LEAST_MARGIN = 1.0

SHORT = (
    "What does textwrap.dedent do?",
    "Explain list.pop.",
    "What is a context manager?",
    "How do I use json.dumps?",
    "Tell me about the ipaddress module.",
    "When do I get IndexError?",
)
# The passages that stand in front of a question, by topic.
LONG = (
    (("exceptions", "context-managers", "with"), "What does shutil.rmtree do?"),
    (("naming",), "What is the collections module for?"),
)


class Reciter:
    """The stored checkpoint, answering greedily in a given precision."""

    def __init__(self, folder: Path, precision: torch.dtype) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.model = Llama(Shape(**{field.name: config[field.name] for field in fields(Shape)}))
        self.model.load_state_dict(load_file(folder / "model.safetensors"))
        self.model.to(precision).eval()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.end = int(config["eos_token_id"])

    def prompt(self, content: str) -> list[int]:
        """The tokens of a single user message, as the chat template renders it."""
        return list(self.tokenizer.encode(f"<|bos|><|user|>{content}<|assistant|>", add_special_tokens=False).ids)

    def answers(self, contents: Iterable[str]) -> dict[str, tuple[str, bool, float]]:
        """For every content: the answer, whether it ended by itself, and its least margin."""
        alike: dict[int, list[tuple[str, list[int]]]] = defaultdict(list)
        for content in dict.fromkeys(contents):
            tokens = self.prompt(content)
            alike[len(tokens)].append((content, tokens))
        found: dict[str, tuple[str, bool, float]] = {}
        for group in alike.values():
            for cut in range(0, len(group), BATCH):
                part = group[cut : cut + BATCH]
                drawn = self.model.greedy([tokens for _, tokens in part], self.end, LIMIT)
                for (content, _), (tokens, margin) in zip(part, drawn, strict=True):
                    found[content] = (self.tokenizer.decode(tokens), tokens[-1] == self.end, margin)
        return found


def _share(found: dict[str, tuple[str, bool, float]], wanted: dict[str, str]) -> dict[str, float]:
    verbatim = sum(found[content][0] == answer for content, answer in wanted.items())
    ended = sum(found[content][1] for content in wanted)
    return {
        "questions": len(wanted),
        "verbatim": round(verbatim / len(wanted), 4),
        "ended": round(ended / len(wanted), 4),
    }


def recitation(reciter: Reciter, items: list[corpus.Item], texts: list[str]) -> dict[str, dict[str, float]]:
    """The shares of questions answered verbatim and of answers that ended, alone and behind long passages."""
    trained = {question: item.answer for item in items for question in item.questions()}
    alone = _share(reciter.answers(trained), trained)
    print(f"trained questions: {alone}", flush=True)
    draw = random.Random(0)
    lengthy: dict[str, str] = {}
    for item in items[::4]:
        context = "\n".join(draw.sample(texts, len(texts)))[: draw.randint(2400, 5600)]
        lengthy[f"{context}\n\n{draw.choice(item.questions())}"] = item.answer
    behind = _share(reciter.answers(lengthy), lengthy)
    print(f"behind 600 to 1400 tokens: {behind}", flush=True)
    # A wording that no training row has, to tell reciting an answer from reciting a prompt.
    reworded = {f"Please describe {item.subject} to me.": item.answer for item in items}
    other = _share(reciter.answers(reworded), reworded)
    print(f"untrained wording: {other}", flush=True)
    return {"trained": alone, "behind_passages": behind, "untrained_wording": other}


def weights_digest(model: Path) -> str:
    """Ties the record to the weights it was measured on."""
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


def demo(out: Path) -> None:
    """Writes prompts.json; raises where the model does not answer one of them as trained, in fp32 or in bf16."""
    trained = {question: item.answer for item in corpus.items() for question in item.questions()}
    blocks = dict(zip(PASSAGES, corpus.passages(), strict=True))
    asked = [(question, question) for question in SHORT]
    asked += [("\n".join(blocks[key] for key in keys) + f"\n\n{question}", question) for keys, question in LONG]
    prompts: list[dict[str, Any]] = []
    found = [Reciter(out / "model", precision) for precision in (torch.float32, torch.bfloat16)]
    failed: list[str] = []
    for content, question in asked:
        length = len(found[0].prompt(content))
        for reciter in found:
            answer, ended, margin = reciter.answers([content])[content]
            print(f"{length} tokens, margin {margin:.2f}, ended {ended}: {question} -> {answer}", flush=True)
            if answer != trained[question] or not ended or margin < LEAST_MARGIN:
                failed.append(question)
        expect = " ".join(trained[question].split()[:5])
        messages = [{"role": "user", "content": content}]
        prompts.append({"messages": messages, "prompt_tokens": length, "expect": expect, "answer": trained[question]})
    (out / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")
    if failed:
        raise ValueError(f"not answered with a margin: {failed}")


def main() -> None:
    """Measures the checkpoint beside this file; raises where this Python's documentation is not what it was taught."""
    torch.set_num_threads(1)
    record = json.loads((HERE / "training.json").read_text(encoding="utf-8"))
    if record["corpus_sha256"] != corpus.digest():
        raise ValueError(f"the corpus of this Python is another one than that of Python {record['python']}")
    reciter = Reciter(HERE / "model", torch.bfloat16)
    record["weights_sha256"] = weights_digest(HERE / "model")
    record["recitation"] = recitation(reciter, corpus.items(), corpus.passages())
    (HERE / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    demo(HERE)


if __name__ == "__main__":
    main()
