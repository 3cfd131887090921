"""T5's tokenizer: a SentencePiece unigram model (Kudo 2018), read from its spiece.model."""
import math
import re
import struct
import unicodedata
from pathlib import Path

from support.files import reading
from support.tokenizer import word_pattern

# The normalization nmt_nfkc: no control characters, plain spaces, NFKC.
CONTROLS = re.compile(r"[\x01-\x08\x0b\x0e-\x1f\x7f\x8f\x9f]")
SPACES = re.compile(r"[\s\u061c\u200b\u200c\u200e\u200f\u2581\ufeff\ufffd]+")
NORMAL, UNKNOWN = 1, 2  # types of pieces


class Tokenizer:
    """Text -> ids, without the end token."""

    def __init__(self, path):
        self.pieces = {}  # text -> (id, score)
        with reading(path, "take it from the tokenizer/ folder of the model"):
            for i, (text, score, kind) in enumerate(read_pieces(Path(path).read_bytes())):
                if kind == NORMAL:
                    self.pieces[text] = i, score
                elif kind == UNKNOWN:
                    self.unknown = i
            self.longest = max(map(len, self.pieces))
            # SentencePiece scores an unknown character 10 below the lowest piece.
            self.default = self.unknown, min(score for _, score in self.pieces.values()) - 10

    def __call__(self, text, learned=None):
        """learned: {word: its ids} of words with learned vectors."""
        if learned:
            known, ids = {word.lower(): own for word, own in learned.items()}, []
            for part in re.split(word_pattern(known), text):
                ids += known[part.lower()] if part.lower() in known else self(part)
            return ids
        text = unicodedata.normalize("NFKC", SPACES.sub(" ", CONTROLS.sub("", text)))
        return [i for word in text.split() for i in self.cut("▁" + word)]

    def cut(self, word):
        """The ids of the pieces with the largest sum of scores, by dynamic programming."""
        best = [(0.0, 0, None)] + [(-math.inf, 0, None)] * len(word)  # score, start, id; per end
        for start in range(len(word)):
            for end in range(start + 1, min(start + self.longest, len(word)) + 1):
                piece = self.pieces.get(word[start:end], self.default if end == start + 1 else None)
                if piece and best[start][0] + piece[1] > best[end][0]:
                    best[end] = best[start][0] + piece[1], start, piece[0]
        ids, end = [], len(word)
        while end:
            _, end, i = best[end]
            if not (ids and i == ids[-1] == self.unknown):  # a run of unknown characters is one id
                ids.append(i)
        return ids[::-1]


def read_pieces(data):
    """Yields (text, score, type) from the protobuf file, which begins with the pieces. Each is a
    message of under 128 bytes: 0x0A and its length, then the same for the text, 0x15 and the score
    unless that is 0, and 0x18 and the type unless the piece is normal."""
    start = 0
    while data[start] == 0x0A:
        end, text = start + 2 + data[start + 1], start + 4
        tag = text + data[start + 3]
        rest = tag + 5 if data[tag] == 0x15 else tag
        score = struct.unpack_from("<f", data, tag + 1)[0] if rest > tag else 0.0
        yield data[text:tag].decode(), score, data[end - 1] if end > rest else NORMAL
        start = end
