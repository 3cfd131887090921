"""Words to token ids, as the hub's CLIP tokenizer makes them, and words that are learned."""
import re

import torch

START, END = 49406, 49407  # <|startoftext|> and <|endoftext|> in CLIP's vocabulary
_tokenizer = None


def word_pattern(words):
    """The pattern of any of the words, standing alone ('sks' is not in 'desks'), in whatever case:
    the tokenizer lower-cases."""
    words = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    return rf"(?i:(?<!\w)({words})(?!\w))"


def has_word(prompt, word):
    """Whether a prompt has a word standing alone."""
    return re.search(word_pattern([word]), prompt) is not None


def words_to_ids(prompt, learned=None):
    """A prompt's token ids, without start and end; learned: {word: its ids} of learned words."""
    global _tokenizer
    if learned:
        known, ids = {word.lower(): its for word, its in learned.items()}, []
        for part in re.split(word_pattern(learned), prompt):
            ids += known[part.lower()] if part.lower() in known else words_to_ids(part)
        return ids
    if _tokenizer is None:
        from open_clip.tokenizer import SimpleTokenizer  # here, because it takes seconds to import

        _tokenizer = SimpleTokenizer()
    pieces = [_tokenizer.encode(piece) for piece in prompt.split("!")]
    return pieces[0] + [t for piece in pieces[1:] for t in [0, *piece]]


def tokenize(prompts, length=77, learned=None):
    """list of str -> ids (B, length), as the hub's tokenizer makes them: start, text, end, zeros.

    Its padding token is "!", whose id is 0; so every "!" of a prompt is 0 too, where open_clip's
    own rule would give 256. Longer prompts are cut, with the end token kept.
    """
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens = [START, *words_to_ids(prompt, learned)[: length - 2], END]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids
