"""Prompts to token ids: CLIP's byte-pair encoding, and learned tokens.

The ids equal those of transformers' CLIPTokenizer for all characters up to Unicode 15.1.
"""
import re
import unicodedata
from functools import cache

import regex
import torch

START, END = 49406, 49407
SPECIAL = {"<|startoftext|>": [START], "<|endoftext|>": [END], "!": [0]}  # "!" is for padding
MARKS = [re.escape(token) for token in SPECIAL]
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
MARKED_WORDS = regex.compile(r"<\|(?:start|end)oftext\|>|" + WORDS.pattern)


def word_pattern(words):
    """A regular expression for any of the words as a whole word ("sks", not "desks"), in any case,
    since the tokenizer lowercases."""
    words = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    return rf"(?i:(?<!\w)({words})(?!\w))"


def has_word(prompt, word):
    """True if a prompt contains a word as a whole word."""
    return re.search(word_pattern([word]), prompt) is not None


@cache
def load_vocabulary():
    """open_clip's tokenizer, for its tables. Its text cleaning differs from CLIPTokenizer's."""
    from open_clip.tokenizer import SimpleTokenizer  # imported here because it takes seconds
    return SimpleTokenizer()


def encode_text(text):
    """The token ids of a text without special and learned tokens."""
    text, ids = "".join(char.lower() for char in unicodedata.normalize("NFC", text)), []
    clip = load_vocabulary()
    for match in MARKED_WORDS.findall(text):
        for word in WORDS.findall(match):
            letters = "".join(clip.byte_encoder[byte] for byte in word.encode())
            ids += [clip.encoder[token] for token in clip.bpe(letters).split(" ")]
    return ids


def words_to_ids(prompt, learned=None):
    """The token ids of a prompt, without start and end. learned: {token: ids} of learned tokens."""
    known = {word.lower(): ids for word, ids in (learned or {}).items()}
    pattern = "|".join([*([word_pattern(known)] if known else []), *map("({})".format, MARKS)])
    ids = []
    for part in filter(None, re.split(pattern, prompt)):
        ids += known.get(part.lower()) or SPECIAL.get(part) or encode_text(part)
    return ids


def tokenize(prompts, length=77, learned=None):
    """Prompts -> ids (B, length): start, text, end, padding. Longer texts are truncated."""
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens = [START, *words_to_ids(prompt, learned)[: length - 2], END]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids
