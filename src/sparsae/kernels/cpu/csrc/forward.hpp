// Y = X W^T + b: token tiles over the threads, each walking the rows of W.
#pragma once

#include "problem.hpp"
#include "tiles.hpp"

namespace SPARSAE_ISA {

using sparsae::Problem;

// The rows of W, single weights, in blocks of columns, of which one of a tile stays in a level-1 cache while all rows of a
// strip read it: a copy, made anew at each pass, since the parameter has changed. A segment is what a row has in a block. They
// follow each other by block, group of rows and number of weights, so that a processor foresees where loops over them end.
struct WeightRows {
    static constexpr int MOST_VECTORS_OF_TILE = MOST_VECTORS;
    static constexpr std::int64_t STRIP = 256;  // rows that go through all blocks together
    static constexpr std::int64_t GROUP = 64;   // rows that change places among each other

    std::int64_t rows = 0, block = 1, blocks = 0;  // columns of a block; how many blocks
    float* values = nullptr;
    std::uint16_t* columns = nullptr;  // within the block
    std::int32_t* starts = nullptr;    // of segments, and where the last one ends
    std::uint8_t* order = nullptr;     // which row of its group a segment is of
    const float* bias = nullptr;

    WeightRows() = default;

    WeightRows(const Problem& p, std::int64_t width, float* memory)
        : rows(p.out), block(block_of(p, width)), blocks(larger(1, (p.in + block - 1) / block)), values(memory), bias(p.bias) {
        const std::int64_t segments = blocks * rows;
        columns = reinterpret_cast<std::uint16_t*>(memory += padded(p.count));
        starts = reinterpret_cast<std::int32_t*>(memory += padded((p.count + 1) / 2));
        order = reinterpret_cast<std::uint8_t*>(memory += padded(segments + 1));
        auto* const next = reinterpret_cast<std::int32_t*>(memory += padded((segments + 3) / 4));
        p.indices_wide ? copy<std::int64_t>(p, next) : copy<std::int32_t>(p, next);
    }

    // Floats of memory that it takes.
    static std::int64_t memory(const Problem& p, std::int64_t width) {
        const std::int64_t block = block_of(p, width), segments = larger(1, (p.in + block - 1) / block) * p.out;
        return padded(p.count) + padded((p.count + 1) / 2) + padded(segments + 1) + padded((segments + 3) / 4) +
               padded(segments);
    }

    // What the cache holds, but so much that a row has some weights in each block, and no more than 16 bits count. It
    // does not depend on the number of threads, since blocks decide in which order is summed.
    static std::int64_t block_of(const Problem& p, std::int64_t width) {
        constexpr std::int64_t budget = 48 << 10, least = 16, most = 65536;
        const std::int64_t wanted = larger(budget / (width * 4), least * p.out * p.in / larger(1, p.count));
        const std::int64_t blocks = larger(1, larger((p.in + most - 1) / most, (p.in + wanted / 2) / wanted));
        return larger(1, (p.in + blocks - 1) / blocks);
    }

    // A counting sort by segments. next: room for where the next weight of each goes, by block and row.
    template <class Index>
    void copy(const Problem& p, std::int32_t* next) const {
        const auto* indices = static_cast<const Index*>(p.indices);
        const auto each = [&](const auto& visit) {
            for (std::int64_t c = 0; c < p.in; c++)
                for (std::int32_t k = p.col_ptr[c]; k < p.col_ptr[c + 1]; k++)
                    visit(c / block * rows + indices[k] - c * rows, k, c % block);
        };
        if (blocks == 1) {
            for (std::int64_t r = 0; r < rows; r++) next[r] = p.row_ptr[r + 1] - p.row_ptr[r];
        } else {
            std::memset(next, 0, static_cast<std::size_t>(blocks * rows) * sizeof(std::int32_t));
            each([&](std::int64_t segment, std::int32_t, std::int64_t) { next[segment]++; });
        }
        arrange(next);
        each([&](std::int64_t segment, std::int32_t k, std::int64_t column) {
            const std::int32_t at = next[segment]++;
            values[at] = p.values[k];
            columns[at] = static_cast<std::uint16_t>(column);
        });
    }

    // Orders the segments, by how many weights each has, and turns these numbers into where it starts.
    void arrange(std::int32_t* numbers) const {
        constexpr std::int32_t most = 255;  // above it the end of a loop is little beside the loop
        std::int32_t at = 0;
        std::int64_t slot = 0;
        for (std::int64_t b = 0; b < blocks; b++)
            for (std::int64_t r = 0; r < rows; r += GROUP) {
                const std::int64_t n = smaller(GROUP, rows - r);
                std::int32_t* const of = numbers + b * rows + r;
                std::uint8_t places[most + 2] = {};
                for (std::int64_t i = 0; i < n; i++) places[smaller(of[i], most) + 1]++;
                for (std::int32_t number = 0; number < most; number++) places[number + 1] += places[number];
                for (std::int64_t i = 0; i < n; i++) order[slot + places[smaller(of[i], most)]++] = static_cast<std::uint8_t>(i);
                for (std::int64_t i = 0; i < n; i++, slot++) {
                    std::int32_t& number = of[order[slot]];
                    starts[slot] = at;
                    at += number;
                    number = starts[slot];
                }
            }
        starts[slot] = at;
    }

    // Rows [first, last) times a tile, into as many features of `out`.
    template <int V>
    SPARSAE_INLINE void multiply(std::int64_t first, std::int64_t last, const float* tile, float* out) const {
        constexpr int width = V * LANES;
        for (std::int64_t b = 0; b < blocks; b++)
            for (std::int64_t group = first / GROUP * GROUP; group < last; group += GROUP)
                for (std::int64_t s = group; s < smaller(group + GROUP, rows); s++) {
                    const std::int64_t row = group + order[b * rows + s];
                    if (row >= first && row < last)
                        segment<V>(b, b * rows + s, row, tile + b * block * width, out + (row - first) * width);
                }
    }

    // Adds what one block gives to one row. Even and odd weights are summed apart, in two chains of additions.
    template <int V>
    SPARSAE_INLINE void segment(std::int64_t b, std::int64_t slot, std::int64_t row, const float* tile, float* out) const {
        constexpr int width = V * LANES;
        Vec even[V], odd[V];
        const Vec start = broadcast(bias ? bias[row] : 0.0f), zero = broadcast(0.0f);
        SPARSAE_UNROLL
        for (int v = 0; v < V; v++) even[v] = b ? load(out + v * LANES) : start, odd[v] = zero;
        std::int64_t k = starts[slot];
        const std::int64_t end = starts[slot + 1];
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
    static constexpr std::int64_t STRIP = CHUNK;

    const std::int32_t* row_ptr;
    const Column* columns;
    const std::int32_t* source;
    const float* values;
    const float* bias;
    std::int64_t unit_out, unit_in;

    // Rows [first, last) of the grid times a tile, into as many units of features of `out`.
    template <int V>
    SPARSAE_INLINE void multiply(std::int64_t first, std::int64_t last, const float* tile, float* out) const {
        for (std::int64_t row = first; row < last; row++, out += unit_out * V * LANES) {
            std::int64_t i = 0;
            for (; i + 4 <= unit_out; i += 4) some_rows<V, 4>(row, i, tile, out + i * V * LANES);
            for (; i < unit_out; i++) some_rows<V, 1>(row, i, tile, out + i * V * LANES);
        }
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
    const std::int64_t strip = larger(1, Rows::STRIP / p.unit_out);
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
            rows.template multiply<V>(r0, r1, tile, out);
            unpack<V>(out, (r1 - r0) * p.unit_out, y + first * p.out + r0 * p.unit_out, p.out, n);
        }
        stream_fence();
    }
}

}  // namespace SPARSAE_ISA
