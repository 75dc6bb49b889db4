"""One token through all blocks of a decoder in one call of the library (csrc/token.hpp), over weights that stay."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsae.kernels.backend import TokenBlock, TokenNorm, TokenShape, Weight
from sparsae.kernels.cpu import library
from sparsae.kernels.cpu.native import ACTIVATIONS, Product, index_of


class Blocks:
    """Called with x (1, width) and a position, it returns what the last block gives, the same buffer every time.

    cache: (layer, 2, 1, kv head, position, head size), keys and values, which it reads up to the position and writes
    there. Raises ValueError for a weight that does not fit the shape, or the other weights of its block.
    """

    def __init__(self, blocks: Sequence[TokenBlock], shape: TokenShape, cache: Tensor) -> None:
        hidden = max(block.up.layout.shape[0] for block in blocks)
        queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        sizes = {
            "x": shape.width, "normed": shape.width, "added": shape.width, "projected": queries + 2 * keys,
            "attended": queries, "hidden": hidden, "gate": hidden, "scores": shape.heads * shape.context,
        }  # fmt: skip
        self._buffers = {name: torch.zeros(size, dtype=torch.float32, device="cpu") for name, size in sizes.items()}
        self._keeps: list[Any] = [blocks, shape, cache]
        self._x = self._buffers["x"][None]
        starts = [0] if len(blocks[0].projections) == 1 else [0, queries, queries + keys]
        table = (library.TokenBlock * len(blocks))(
            *(self._block(block, starts, cache[number]) for number, block in enumerate(blocks))
        )
        self._keeps.append(table)
        self._token = library.Token(
            blocks=ctypes.addressof(table), count=len(blocks), width=shape.width, heads=shape.heads,
            kv_heads=shape.kv_heads, head_size=shape.head_size, context=shape.context,
            cos=None if shape.cos is None else shape.cos.data_ptr(),
            sin=None if shape.sin is None else shape.sin.data_ptr(),
            **{name: buffer.data_ptr() for name, buffer in self._buffers.items()},
        )  # fmt: skip
        self._context = shape.context
        self._call, self._argument = library.library().sparsae_token, ctypes.byref(self._token)

    def __call__(self, x: Tensor, position: int) -> Tensor:
        """Raises ValueError for a position that the cache has no room for."""
        if not 0 <= position < self._context:
            raise ValueError(f"position {position} is not below the context, {self._context}")
        self._x.copy_(x)
        self._token.position = position
        if self._call(self._argument):
            raise MemoryError("no memory left for the native kernels' workspace")
        return self._x

    def _block(self, block: TokenBlock, starts: Sequence[int], cache: Tensor) -> library.TokenBlock:
        buffers = {name: buffer.data_ptr() for name, buffer in self._buffers.items()}
        size = self._buffers["x"].element_size()

        hidden = block.up.layout.shape[0]
        widths = {name: buffer.numel() for name, buffer in self._buffers.items()} | {"hidden": hidden, "gate": hidden}

        def problem(weight: Weight, x: str, y: str, start: int = 0) -> library.Problem:
            out_features, in_features = weight.layout.shape
            end = next((after for after in starts if after > start), widths[y]) if y == "projected" else widths[y]
            if (out_features, in_features) != (end - start, widths[x]):
                raise ValueError(f"a weight is {out_features}x{in_features} where {end - start}x{widths[x]} fits")
            product = Product(weight.values, weight.layout, index_of(weight.layout), weight.bias)
            self._keeps.append(product)
            made = product.problem
            made.x, made.y = buffers[x], buffers[y] + start * size
            return made

        projections = [
            problem(weight, "normed", "projected", start)
            for weight, start in zip(block.projections, starts, strict=True)
        ]
        query_norm, key_norm = block.head_norms or (None, None)
        return library.TokenBlock(
            norm_1=_norm(block.norm_1), norm_2=_norm(block.norm_2), query_norm=_norm(query_norm),
            key_norm=_norm(key_norm), projections=(library.Problem * 3)(*projections),
            output=problem(block.output, "attended", "added"), up=problem(block.up, "normed", "hidden"),
            gate=library.Problem() if block.gate is None else problem(block.gate, "normed", "gate"),
            down=problem(block.down, "hidden", "added"), keys=cache[0].data_ptr(), values=cache[1].data_ptr(),
            scale=block.scale, projection_count=len(projections), activation=ACTIVATIONS.index(block.activation),
            gated=block.gate is not None,
        )  # fmt: skip


def _norm(norm: TokenNorm | None) -> library.Norm:
    if norm is None:
        return library.Norm()
    bias = None if norm.bias is None else norm.bias.data_ptr()
    return library.Norm(norm.scale.data_ptr(), bias, norm.epsilon, norm.centered)
