"""A trained run put to use: perplexity, generated text, and export to other libraries."""
