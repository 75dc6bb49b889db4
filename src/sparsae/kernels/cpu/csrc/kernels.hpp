// All kernels for one instruction set: included once by each isa_*.cpp.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace SPARSAE_ISA {
#if defined(_OPENMP)
inline int thread_number() { return omp_get_thread_num(); }
inline int team_size() { return omp_get_num_threads(); }
#else
inline int thread_number() { return 0; }
inline int team_size() { return 1; }
#endif
}  // namespace SPARSAE_ISA

#include "backward.hpp"
#include "decode.hpp"
#include "forward.hpp"
#include "roofline.hpp"

namespace SPARSAE_ISA {

// Tokens of a tile, in vectors: as many as keep `features` features of it in a level-2 cache and the accumulators in
// registers, and no more than there are tokens for. It depends on the problem alone, never on the number of threads, because
// gradients are summed tile by tile.
inline int tile_vectors(std::int64_t features, std::int64_t tokens, int most) {
    constexpr std::int64_t budget = 1 << 20;
    int vectors = most;
    while (vectors > 1 && (features * vectors * LANES * 4 > budget || (vectors / 2) * LANES >= tokens)) vectors /= 2;
    return vectors;
}

template <class Element, class Rows>
void forward_as(const Problem& p, const Rows& rows, float* scratch, std::int64_t per_thread, int threads, int vectors) {
    if (vectors == 8)
        forward_tiles<Rows::MOST_VECTORS_OF_TILE, Element>(p, rows, scratch, per_thread, threads);
    else if (vectors == 4)
        forward_tiles<4, Element>(p, rows, scratch, per_thread, threads);
    else if (vectors == 2)
        forward_tiles<2, Element>(p, rows, scratch, per_thread, threads);
    else
        forward_tiles<1, Element>(p, rows, scratch, per_thread, threads);
}

// `make` makes the rows, in `memory` floats of scratch.
template <class Rows, class Make>
void forward_over(const Problem& p, int vectors, std::int64_t memory, const Make& make) {
    const std::int64_t width = vectors * LANES;
    const std::int64_t tiles = (p.tokens + width - 1) / width;
    const int threads = static_cast<int>(larger(1, smaller(p.threads, tiles)));
    const std::int64_t per_thread = (padded(p.in) + padded(larger(Rows::STRIP, p.unit_out))) * width;
    float* scratch = sparsae::workspace(threads * per_thread + memory);
    const Rows rows = make(scratch + threads * per_thread);
    p.bfloat16 ? forward_as<BFloat16>(p, rows, scratch, per_thread, threads, vectors)
               : forward_as<float>(p, rows, scratch, per_thread, threads, vectors);
}

template <class Column>
void forward_blocks(const Problem& p) {
    using Rows = BlockRows<Column>;
    forward_over<Rows>(p, tile_vectors(p.in, p.tokens, Rows::MOST_VECTORS_OF_TILE), 0, [&](float*) {
        return Rows{p.row_ptr, static_cast<const Column*>(p.columns), p.source, p.values, p.bias, p.unit_out, p.unit_in};
    });
}

inline void forward_weights(const Problem& p) {
    constexpr int most = WeightRows::MOST_VECTORS_OF_TILE;
    const int vectors = tile_vectors(WeightRows::block_of(p, most * LANES), p.tokens, most);
    const std::int64_t width = vectors * LANES;
    forward_over<WeightRows>(p, vectors, WeightRows::memory(p, width),
                             [&](float* memory) { return WeightRows(p, width, memory); });
}

inline void forward(const Problem& p) {
    if (p.tokens == 0 || p.out == 0) return;
    if (p.tokens <= FEW_TOKENS) return forward_few(p);
    if (!p.blocks()) return forward_weights(p);
    p.columns_narrow ? forward_blocks<std::uint16_t>(p) : forward_blocks<std::int32_t>(p);
}

// Tiles between two barriers of the threads: the more, the less one that is held up holds up the others, but no more than a
// shared cache takes.
inline std::int64_t group_tiles(std::int64_t tile_size, std::int64_t tiles) {
    constexpr std::int64_t budget = std::int64_t{1} << 20;  // floats
    return larger(1, smaller(budget / tile_size, tiles));
}

template <int V, class Element, class Columns>
void backward_vectors(const Problem& p, const Columns& columns, float* scratch, std::int64_t group, std::int64_t together,
                      int threads) {
    if (p.dx && p.dvalues)
        backward_tiles<V, Element, true, true>(p, columns, scratch, group, together, threads);
    else if (p.dx)
        backward_tiles<V, Element, true, false>(p, columns, scratch, group, together, threads);
    else if (p.dvalues)
        backward_tiles<V, Element, false, true>(p, columns, scratch, group, together, threads);
    else
        backward_tiles<V, Element, false, false>(p, columns, scratch, group, together, threads);
}

template <class Element, class Columns>
void backward_as(const Problem& p, const Columns& columns) {
    constexpr int most = Columns::MOST_VECTORS_OF_TILE;
    const int vectors = tile_vectors(p.out, p.tokens, most);
    const std::int64_t width = vectors * LANES;
    const std::int64_t strip = larger(1, CHUNK / p.unit_in);
    const std::int64_t strips = (p.grid_cols() + strip - 1) / strip;
    const int threads = static_cast<int>(larger(1, smaller(p.threads, strips)));
    const std::int64_t tile_size = padded(p.out) * width;
    // A tile of dY that takes most of a level-2 cache leaves little to the columns.
    const std::int64_t together = tile_size > (128 << 10) ? CHUNK : Columns::STRIP;
    const std::int64_t strip_size = padded(larger(together, p.unit_in)) * width;
    const std::int64_t group = threads > 1 ? group_tiles(tile_size, (p.tokens + width - 1) / width) : 1;
    float* scratch = sparsae::workspace(2 * group * tile_size + threads * 2 * strip_size);
    if (vectors == 8)
        backward_vectors<most, Element>(p, columns, scratch, group, together, threads);
    else if (vectors == 4)
        backward_vectors<4, Element>(p, columns, scratch, group, together, threads);
    else if (vectors == 2)
        backward_vectors<2, Element>(p, columns, scratch, group, together, threads);
    else
        backward_vectors<1, Element>(p, columns, scratch, group, together, threads);
}

template <class Index>
void backward_indices(const Problem& p) {
    const auto* indices = static_cast<const Index*>(p.indices);
    if (p.blocks()) {
        const BlockColumns<Index> columns{p.col_ptr, indices, p.values, p.grid_rows(), p.unit_out, p.unit_in};
        p.bfloat16 ? backward_as<BFloat16>(p, columns) : backward_as<float>(p, columns);
    } else {
        const WeightColumns<Index> columns{p.col_ptr, indices, p.values, p.grid_rows()};
        p.bfloat16 ? backward_as<BFloat16>(p, columns) : backward_as<float>(p, columns);
    }
}

inline void backward(const Problem& p) {
    if (!p.dx && !p.dvalues && !p.dbias) return;
    if (p.tokens == 0) {
        if (p.dvalues) std::memset(p.dvalues, 0, static_cast<std::size_t>(p.count * p.unit_out * p.unit_in) * 4);
        if (p.dbias) std::memset(p.dbias, 0, static_cast<std::size_t>(p.out) * 4);
        return;
    }
    p.indices_wide ? backward_indices<std::int64_t>(p) : backward_indices<std::int32_t>(p);
}

}  // namespace SPARSAE_ISA

#include "attention.hpp"
#include "losses.hpp"
#include "mlp.hpp"
#include "token.hpp"
