"""Small tokenizers of the families that exist, made here: no model is downloaded for a test."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps, the fox runs!",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "naïve café, résumé; 東京都 と 大阪府; 안녕하세요 세계; привет, мир",
    "emoji: 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️ and symbols → ∑ √ ≈",
    "def f(x):\n    return x + 1  # code\n\n\n",
]
SPECIAL = ["<|bos|>", "<|eos|>", "<|user|>"]


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3 and Qwen: every byte has a token, merges of bytes on top."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False),
    )
    made.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", made.token_to_id("<|bos|>"))]
    )
    # Not special, so part of the text; one of letters of the byte alphabet, one of others.
    made.add_tokens([AddedToken("Ġdéjà"), AddedToken("日本 語"), AddedToken("\ufffd")])
    return made


def byte_fallback(*, strip: bool = True) -> tokenizers.Tokenizer:
    """As Llama 2, Mistral and Gemma: pieces with a mark for spaces, single bytes for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", ""]
    letters = sorted({char for line in CORPUS[:2] for char in line.replace(" ", "▁")} - set(pieces))
    words = ["▁the", "▁fox", "ou", "ow", "er", "▁d", "og", "ö"]
    vocabulary = {piece: n for n, piece in enumerate(dict.fromkeys([*pieces, *letters, *words]))}
    merges = [("▁", "▁"), ("o", "u"), ("o", "w"), ("e", "r"), ("▁", "d"), ("o", "g")]
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    made.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    return made


def metaspace() -> tokenizers.Tokenizer:
    """As T5 and older SentencePiece conversions."""
    made = tokenizers.Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("▁the", -2.0), ("a", -3.0), ("b", -3.0)], 0)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["</s>"])
    return made


def word_piece() -> tokenizers.Tokenizer:
    """As BERT: continuations are marked, and the decoder tidies spaces before punctuation."""
    words = ["[UNK]", "the", "fox", "##es", "##y", ".", ",", "n't", "do", "'", "s"]
    made = tokenizers.Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(["[SEP]"])
    return made


def bpe_suffix() -> tokenizers.Tokenizer:
    """As the first GPT and CLIP: the end of a word is marked."""
    words = ["a", "b", "a</w>", "b</w>", "ab</w>"]
    made = tokenizers.Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [], end_of_word_suffix="</w>"))
    made.decoder = decoders.BPEDecoder()
    return made


def words_only() -> tokenizers.Tokenizer:
    """No decoder at all: words joined by spaces."""
    return tokenizers.Tokenizer(models.WordLevel({"one": 0, "two": 1, "three": 2}, unk_token="one"))


MADE = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "byte fallback without strip": lambda: byte_fallback(strip=False),
    "metaspace": metaspace,
    "word piece": word_piece,
    "bpe suffix": bpe_suffix,
    "words only": words_only,
}


def save(made: tokenizers.Tokenizer, folder: Path, config: dict[str, object] | None = None) -> Path:
    """A model directory that holds only this tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
