"""From text to batches: sources, tokenizer, prepared shards, windows."""

from sparsae.data.batches import Batches, evenly_spaced, left_over
from sparsae.data.corpus import Corpus, Progress, refuse_unread, tokenize_text
from sparsae.data.mixture import Mixture
from sparsae.data.prepare import prepare
from sparsae.data.sources import documents
from sparsae.data.tokenizer import Tokenizer, load_tokenizer
from sparsae.data.unigram import unigram_perplexity

__all__ = [
    "Batches",
    "Corpus",
    "Mixture",
    "Progress",
    "Tokenizer",
    "documents",
    "evenly_spaced",
    "left_over",
    "load_tokenizer",
    "prepare",
    "refuse_unread",
    "tokenize_text",
    "unigram_perplexity",
]
