"""Sparse models of transformers' in transformers' own form, by its plug for storage formats.

A directory that `save_pretrained` writes is like any other, with three differences. The tensors of a sparse layer are
its `values` and `indices`. `config.json` has a `quantization_config` whose method is `sparsae`: nnz and unit of every
sparse layer, and the SHA-256 of the files. And it names a file of weights that there is not: transformers without
Sparsae would only warn of a method that it does not know, and draw random weights for all sparse layers; so it stops
with the name of that file, which says what to do. Files of weights have their usual names, since a Trainer resumes from
no others.

What `from_pretrained` returns is a model as `sparsify` leaves it: nothing marks it as quantized, which trainers refuse.

`plug` is imported as soon as transformers' models are (see `sparsae.on_import`), and hands both ways to transformers.
"""

METHOD = "sparsae"
FORMAT = 1
# What transformers without this package looks for, and does not find.
GUARD = "import-sparsae-before-loading.safetensors"
