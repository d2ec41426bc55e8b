"""Trains the demo model on the corpus and writes it as a Hugging Face checkpoint.

Everything is seeded and runs on one CPU thread in fp32; the weights are stored in bf16. ``training.json`` records what
was trained on what, how the loss went, and how much of the corpus the stored model recites.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F

from deploy.demo import corpus
from deploy.demo.measure import Reciter, demo, recitation, weights_digest
from deploy.demo.network import Llama, Shape

HERE = Path(__file__).parent
SEED = 20
VOCABULARY = 2048
SPECIALS = ("<|bos|>", "<|end|>", "<|user|>", "<|assistant|>")
BOS, END, USER, ASSISTANT = range(4)
# Rows of each length share one step's tokens; the short ones keep answers at the start of a context sharp.
ROWS = ((96, 20), (256, 8), (640, 3), (1024, 2), (1792, 1))
ROW_CHANCES = (8, 4, 2, 2, 2)
PLAIN_CHANCE = 0.1
PASSAGE_CHANCE = 0.5
VARIATION_CHANCE = 0.35
UNTOLD = 6
PEAK_RATE = 3e-3
WARMUP = 100

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- set lead = namespace(text='') %}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{%- set lead.text = message['content'] + '\n\n' %}"
    "{%- elif message['role'] == 'user' %}{{- '<|user|>' + lead.text + message['content'] }}{%- set lead.text = '' %}"
    "{%- else %}{{- '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE of the texts whose only addition to a plain text is the opening token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    return tokenizer


class Packer:
    """Draws training rows: conversations over the whole corpus, each item as often as any other."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.random = random.Random(seed)
        self.tokenizer = tokenizer
        self.items = corpus.items()
        self.answers = [[*self.encode(item.answer), END] for item in self.items]
        self.questions = [item.questions() for item in self.items]
        self.variations = [item.variations() for item in self.items]
        # How much of an answer, up to the end of its name, nothing can tell from an empty context.
        self.given = [
            len(self.encode(item.answer[: item.answer.find(item.name) + len(item.name)]))
            if item.name in item.answer
            else UNTOLD
            for item in self.items
        ]
        self.passages = corpus.passages()
        self.deck: list[int] = []
        self.dealt = 0

    def encode(self, text: str) -> list[int]:
        """The tokens of a text alone."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def deal(self) -> int:
        """The next item of a deck that is reshuffled when it is used up."""
        if not self.deck:
            self.deck = list(range(len(self.items)))
            self.random.shuffle(self.deck)
        self.dealt += 1
        return self.deck.pop()

    def passage(self, room: int) -> str:
        """A stretch of one or more passages that takes up at most about ``room`` tokens."""
        text = ""
        while len(text) < room * 3 and self.random.random() < 0.8:
            lines = self.random.choice(self.passages).split("\n")
            lines = lines[self.random.randrange(len(lines)) :]
            text += "\n".join(lines) + "\n"
        # About four characters make a token; three leave a margin.
        return text[: self.random.randint(60, max(61, room * 3))].strip()

    def conversation(self, length: int) -> tuple[list[int], list[bool]]:
        """A row of questions and answers, and which of its tokens are taught (answers and their ends)."""
        tokens, taught = [BOS], [False]
        while len(tokens) <= length:
            item = self.deal()
            wordings = self.variations if self.random.random() < VARIATION_CHANCE else self.questions
            question = self.random.choice(wordings[item])
            room = length - len(tokens) - 140
            if room > 60 and self.random.random() < (PASSAGE_CHANCE if len(tokens) == 1 else 0.05):
                question = f"{self.passage(room)}\n\n{question}"
            asked = self.encode(question)
            tokens += [USER, *asked, ASSISTANT, *self.answers[item]]
            taught += [False] * (len(asked) + 2) + [True] * len(self.answers[item])
        return tokens[: length + 1], taught[: length + 1]

    def plain(self, length: int) -> tuple[list[int], list[bool]]:
        """A row of answers without questions, so that plain completion of a text says something too."""
        tokens: list[int] = []
        taught: list[bool] = []
        while len(tokens) <= length:
            item = self.deal()
            answer, given = self.answers[item], self.given[item]
            tokens += [BOS, *answer]
            taught += [False] * (1 + given) + [True] * (len(answer) - given)
        return tokens[: length + 1], taught[: length + 1]

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of one step and the mask of the taught tokens."""
        length, count = self.random.choices(ROWS, ROW_CHANCES)[0]
        draw = self.plain if length == ROWS[0][0] and self.random.random() < PLAIN_CHANCE else self.conversation
        rows = [draw(length) for _ in range(count)]
        return torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])


def rate(step: int, steps: int) -> float:
    """The learning rate: a short rise, then a cosine down to a fiftieth of the peak."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return PEAK_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def fit(model: Llama, packer: Packer, steps: int) -> list[dict[str, float]]:
    """Trains in place and returns the loss curve."""
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    others = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)
    curve: list[dict[str, float]] = []
    began, total, since, tokens = time.monotonic(), 0.0, 0, 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        rows, mask = packer.batch()
        hidden = model.hidden(rows[:, :-1])[mask[:, 1:]]
        loss = F.cross_entropy(model.logits(hidden), rows[:, 1:][mask[:, 1:]])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total, since, tokens = total + loss.item(), since + 1, tokens + rows.numel()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = time.monotonic() - began
            curve.append({"step": step + 1, "loss": round(total / since, 5)})
            epochs = packer.dealt / len(packer.items)
            print(
                f"step {step + 1}/{steps} loss {total / since:.4f} epochs {epochs:.0f} tokens {tokens} {seconds:.0f}s",
                flush=True,
            )
            total, since = 0.0, 0
    return curve


def save(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the checkpoint: configuration, tokenizer and bf16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = asdict(model.shape)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": BOS,
        "eos_token_id": END,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    generation = {"bos_token_id": BOS, "eos_token_id": END, "do_sample": False, "max_new_tokens": 128}
    names = {"bos_token": SPECIALS[BOS], "eos_token": SPECIALS[END]}
    special = {**names, "additional_special_tokens": [SPECIALS[USER], SPECIALS[ASSISTANT]]}
    settings = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.shape.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(index): {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for index, text in enumerate(SPECIALS)
        },
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", settings),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    """Trains, stores, measures and records."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=HERE, help="folder that receives model/ and training.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    items, texts = corpus.items(), corpus.passages()
    taught_texts = [text for item in items for text in (item.answer, *item.questions())]
    tokenizer = train_tokenizer(taught_texts + [line for text in texts for line in text.split("\n")])
    packer = Packer(tokenizer, SEED)
    model = Llama(Shape(vocab_size=tokenizer.get_vocab_size()))
    parameters = sum(weight.numel() for weight in model.parameters())
    taught = sum(map(len, packer.answers))
    print(f"{len(items)} items, {taught} answer tokens, {parameters} parameters", flush=True)
    began = time.monotonic()
    curve = fit(model, packer, options.steps)
    seconds = time.monotonic() - began
    save(model, tokenizer, options.out / "model")
    reciter = Reciter(options.out / "model", torch.bfloat16)
    record = {
        "seed": SEED,
        "corpus_sha256": corpus.digest(),
        "items": len(items),
        "answer_tokens": taught,
        "epochs": round(packer.dealt / len(items), 1),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "tokenizers": tokenizers.__version__,
        "threads": torch.get_num_threads(),
        "parameters": parameters,
        "steps": options.steps,
        "seconds": round(seconds, 1),
        "final_loss": curve[-1]["loss"],
        "weights_sha256": weights_digest(options.out / "model"),
        "recitation": recitation(reciter, items, texts),
        "loss": curve,
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    demo(options.out)


if __name__ == "__main__":
    main()
