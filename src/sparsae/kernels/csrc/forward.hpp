// Y = X W^T + b: token tiles over the threads, each walking the rows of W.
#pragma once

#include "problem.hpp"
#include "tiles.hpp"

namespace SPARSAE_ISA {

using sparsae::Problem;

// The rows of W, single weights: the values in row order beside the columns.
template <class Column>
struct WeightRows {
    static constexpr int MOST_VECTORS_OF_TILE = MOST_VECTORS;

    const std::int32_t* row_ptr;
    const Column* columns;
    const float* values;
    const float* bias;

    // Row `row` times a tile, into out[V * LANES]. Even and odd weights are summed apart, in two chains of additions.
    template <int V>
    SPARSAE_INLINE void multiply(std::int64_t row, const float* tile, float* out) const {
        constexpr int width = V * LANES;
        Vec even[V], odd[V];
        const Vec start = broadcast(bias ? bias[row] : 0.0f), zero = broadcast(0.0f);
        SPARSAE_UNROLL
        for (int v = 0; v < V; v++) even[v] = start, odd[v] = zero;
        std::int64_t k = row_ptr[row];
        const std::int64_t end = row_ptr[row + 1];
        for (; k + 2 <= end; k += 2) {
            const float *x0 = tile + std::int64_t{columns[k]} * width, *x1 = tile + std::int64_t{columns[k + 1]} * width;
            const float w0 = values[k], w1 = values[k + 1];
            SPARSAE_UNROLL
            for (int v = 0; v < V; v++) {
                even[v] = fma(w0, load(x0 + v * LANES), even[v]);
                odd[v] = fma(w1, load(x1 + v * LANES), odd[v]);
            }
        }
        if (k < end) {
            const float* x0 = tile + std::int64_t{columns[k]} * width;
            SPARSAE_UNROLL
            for (int v = 0; v < V; v++) even[v] = fma(values[k], load(x0 + v * LANES), even[v]);
        }
        SPARSAE_UNROLL
        for (int v = 0; v < V; v++) store(out + v * LANES, even[v] + odd[v]);
    }
};

// The rows of W, blocks: read where the parameter has them, through `source`.
template <class Column>
struct BlockRows {
    static constexpr int MOST_VECTORS_OF_TILE = MOST_BLOCK_VECTORS;

    const std::int32_t* row_ptr;
    const Column* columns;
    const std::int32_t* source;
    const float* values;
    const float* bias;
    std::int64_t unit_out, unit_in;

    template <int V>
    SPARSAE_INLINE void multiply(std::int64_t row, const float* tile, float* out) const {
        std::int64_t i = 0;
        for (; i + 4 <= unit_out; i += 4) some_rows<V, 4>(row, i, tile, out + i * V * LANES);
        for (; i < unit_out; i++) some_rows<V, 1>(row, i, tile, out + i * V * LANES);
    }

    // Weight rows [first, first + N) of the blocks of one grid row.
    template <int V, int N>
    SPARSAE_INLINE void some_rows(std::int64_t row, std::int64_t first, const float* tile, float* out) const {
        constexpr int width = V * LANES;
        Vec a[N][V];
        SPARSAE_UNROLL
        for (int i = 0; i < N; i++) {
            const Vec start = broadcast(bias ? bias[row * unit_out + first + i] : 0.0f);
            SPARSAE_UNROLL
            for (int v = 0; v < V; v++) a[i][v] = start;
        }
        for (std::int64_t k = row_ptr[row]; k < row_ptr[row + 1]; k++) {
            const float* x = tile + columns[k] * unit_in * width;
            const float* w = values + (source[k] * unit_out + first) * unit_in;
            for (std::int64_t j = 0; j < unit_in; j++, x += width, w++) {
                Vec loaded[V];
                SPARSAE_UNROLL
                for (int v = 0; v < V; v++) loaded[v] = load(x + v * LANES);
                SPARSAE_UNROLL
                for (int i = 0; i < N; i++) {
                    const Weight weight = load_weight(w + i * unit_in);
                    SPARSAE_UNROLL
                    for (int v = 0; v < V; v++) a[i][v] = fma(weight, loaded[v], a[i][v]);
                }
            }
        }
        SPARSAE_UNROLL
        for (int i = 0; i < N; i++) {
            SPARSAE_UNROLL
            for (int v = 0; v < V; v++) store(out + i * width + v * LANES, a[i][v]);
        }
    }
};

// Fetches the rows of the next tile while this one is worked on, a slice at a time.
template <class Element>
struct NextTile {
    const char* at;
    std::int64_t bytes;

    NextTile(const Element* x, std::int64_t features, std::int64_t tokens)
        : at(reinterpret_cast<const char*>(x)), bytes(larger(tokens, 0) * features * sizeof(Element)) {}

    SPARSAE_INLINE void fetch(std::int64_t slice, std::int64_t slices) const {
        for (std::int64_t b = bytes * slice / slices; b < bytes * (slice + 1) / slices; b += 64) prefetch(at + b);
    }
};

// scratch: per_thread floats for each thread.
template <int V, class Element, class Rows>
void forward_tiles(const Problem& p, const Rows& rows, float* scratch, std::int64_t per_thread, int threads) {
    constexpr int width = V * LANES;
    const std::int64_t tiles = (p.tokens + width - 1) / width;
    const std::int64_t strip = larger(1, CHUNK / p.unit_out);
    const std::int64_t strips = (p.grid_rows() + strip - 1) / strip;
    const auto* x = static_cast<const Element*>(p.x);
    auto* y = static_cast<Element*>(p.y);
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t t = 0; t < tiles; t++) {
        float* tile = scratch + thread_number() * per_thread;
        float* out = tile + padded(p.in) * width;
        const std::int64_t first = t * width, n = smaller(width, p.tokens - first);
        pack<V>(x + first * p.in, p.in, n, p.in, tile);
        const NextTile<Element> next(x + (first + n) * p.in, p.in, smaller(width, p.tokens - first - n));
        for (std::int64_t s = 0; s < strips; s++) {
            const std::int64_t r0 = s * strip, r1 = smaller(r0 + strip, p.grid_rows());
            next.fetch(s, strips);
            for (std::int64_t r = r0; r < r1; r++)
                rows.template multiply<V>(r, tile, out + (r - r0) * p.unit_out * width);
            unpack<V>(out, (r1 - r0) * p.unit_out, y + first * p.out + r0 * p.unit_out, p.out, n);
        }
        stream_fence();
    }
}

}  // namespace SPARSAE_ISA
