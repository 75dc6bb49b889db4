// dX = dY W, dW = dY^T X at the active units, and dY summed over the tokens, fused: the threads share the columns of W, and one load of a row of the
// dY tile serves both products.
#pragma once

#include "problem.hpp"
#include "tiles.hpp"

namespace SPARSAE_ISA {

using sparsae::Problem;

// The columns of W, single weights. A column's units are numbered from column * grid_rows on.
template <class Index>
struct WeightColumns {
    static constexpr int MOST_VECTORS_OF_TILE = MOST_VECTORS;
    static constexpr std::int64_t STRIP = 256;  // columns that are packed and worked on together, at most

    const std::int32_t* col_ptr;
    const Index* indices;
    const float* values;
    std::int64_t grid_rows;

    // Columns [first, last): their dx, V * LANES each, from the dY tile g, and the sums of their weights with x over the
    // tokens.
    template <int V, bool DX, bool DW>
    SPARSAE_INLINE void multiply(std::int64_t first, std::int64_t last, const float* g, const float* x, float* dx,
                                 float* dvalues, bool first_tile) const {
        for (std::int64_t c = first; c < last; c++, x += V * LANES, dx += V * LANES)
            column<V, DX, DW>(c, g, x, dx, dvalues, first_tile);
    }

    // Products are summed LANES at a time, then four at a time; the last of fewer than four are filled up with zero weights
    // at a row that is there already.
    template <int V, bool DX, bool DW>
    SPARSAE_OUTLINE void column(std::int64_t c, const float* g, const float* x, float* dx, float* dvalues,
                                bool first) const {
        const Index base = static_cast<Index>(c * grid_rows);
        const Index* const rows = indices;
        const float* const weights = values;
        const Vec zero = broadcast(0.0f);
        Vec a[V], xs[V];
        SPARSAE_UNROLL
        for (int v = 0; v < V; v++) {
            a[v] = zero;
            xs[v] = DW ? load(x + v * LANES) : zero;
        }
        const auto product = [&](std::int64_t at, float w) SPARSAE_LAMBDA {
            const float* row = g + std::int64_t{rows[at] - base} * (V * LANES);
            Vec sum = zero;
            SPARSAE_UNROLL
            for (int v = 0; v < V; v++) {
                const Vec loaded = loaded_once(load(row + v * LANES));
                if (DX) a[v] = fma(w, loaded, a[v]);
                if (DW) sum = v ? xs[v] * loaded + sum : xs[v] * loaded;
            }
            return sum;
        };
        std::int64_t k = col_ptr[c];
        const std::int64_t end = col_ptr[c + 1];
        if (!DW) {
            for (; k < end; k++) product(k, weights[k]);
        } else {
            for (; k + LANES <= end; k += LANES) {
                const Vec total = sums([&](int i) SPARSAE_LAMBDA { return product(k + i, DX ? weights[k + i] : 0.0f); });
                store(dvalues + k, first ? total : load(dvalues + k) + total);
            }
            for (; k < end; k += 4) {
                const std::int64_t n = smaller(4, end - k);
                Vec p[4];
                SPARSAE_UNROLL
                for (int i = 0; i < 4; i++) p[i] = product(i < n ? k + i : k, DX && i < n ? weights[k + i] : 0.0f);
                alignas(64) float lane[LANES];
                store(lane, fold_chunks(chunk_sums(p[0], p[1], p[2], p[3])));
                for (std::int64_t i = 0; i < n; i++) dvalues[k + i] = first ? lane[i] : dvalues[k + i] + lane[i];
            }
        }
        if (DX) {
            SPARSAE_UNROLL
            for (int v = 0; v < V; v++) store(dx + v * LANES, a[v]);
        }
    }
};

// The columns of W, blocks.
template <class Index>
struct BlockColumns {
    static constexpr int MOST_VECTORS_OF_TILE = 8;  // the more, the less the sums over lanes weigh
    static constexpr std::int64_t STRIP = CHUNK;

    const std::int32_t* col_ptr;
    const Index* indices;
    const float* values;
    std::int64_t grid_rows;
    std::int64_t unit_out, unit_in;

    // As WeightColumns::multiply, for columns of the grid.
    template <int V, bool DX, bool DW>
    SPARSAE_INLINE void multiply(std::int64_t first, std::int64_t last, const float* g, const float* x, float* dx,
                                 float* dvalues, bool first_tile) const {
        for (std::int64_t c = first; c < last; c++, x += unit_in * V * LANES, dx += unit_in * V * LANES) {
            std::int64_t j = 0;
            if (DX) {
                for (; j + 4 <= unit_in; j += 4) some_columns<V, 4>(c, j, g, dx + j * V * LANES);
                for (; j < unit_in; j++) some_columns<V, 1>(c, j, g, dx + j * V * LANES);
            }
            if (DW) {
                for (std::int64_t k = col_ptr[c]; k < col_ptr[c + 1]; k++)
                    gradient<V>(row_tile<V>(c, k, g), x, dvalues + k * unit_out * unit_in, first_tile);
            }
        }
    }

    template <int V>
    SPARSAE_INLINE const float* row_tile(std::int64_t column, std::int64_t k, const float* g) const {
        return g + (std::int64_t{indices[k]} - column * grid_rows) * unit_out * V * LANES;
    }

    // Weight columns [first, first + N) of the blocks of one grid column.
    template <int V, int N>
    SPARSAE_INLINE void some_columns(std::int64_t column, std::int64_t first, const float* g, float* dx) const {
        constexpr int most = V < MOST_BLOCK_VECTORS ? V : MOST_BLOCK_VECTORS;
        for (int v = 0; v < V; v += most) part_of_columns<V, N, most>(column, first, g + v * LANES, dx + v * LANES);
    }

    // The same for PART vectors of tokens, as many as the registers hold.
    template <int V, int N, int PART>
    SPARSAE_INLINE void part_of_columns(std::int64_t column, std::int64_t first, const float* g, float* dx) const {
        constexpr int width = V * LANES;
        const Vec zero = broadcast(0.0f);
        Vec a[N][PART];
        SPARSAE_UNROLL
        for (int j = 0; j < N; j++) {
            SPARSAE_UNROLL
            for (int v = 0; v < PART; v++) a[j][v] = zero;
        }
        for (std::int64_t k = col_ptr[column]; k < col_ptr[column + 1]; k++) {
            const float* row = row_tile<V>(column, k, g);
            const float* w = values + k * unit_out * unit_in + first;
            for (std::int64_t i = 0; i < unit_out; i++, row += width, w += unit_in) {
                Vec loaded[PART];
                SPARSAE_UNROLL
                for (int v = 0; v < PART; v++) loaded[v] = load(row + v * LANES);
                SPARSAE_UNROLL
                for (int j = 0; j < N; j++) {
                    const Weight weight = load_weight(w + j);
                    SPARSAE_UNROLL
                    for (int v = 0; v < PART; v++) a[j][v] = fma(weight, loaded[v], a[j][v]);
                }
            }
        }
        SPARSAE_UNROLL
        for (int j = 0; j < N; j++) {
            SPARSAE_UNROLL
            for (int v = 0; v < PART; v++) store(dx + j * width + v * LANES, a[j][v]);
        }
    }

    // The gradient of one block: in pieces of ROWS x 4 where they fit, the rest weight by weight.
    template <int V>
    SPARSAE_INLINE void gradient(const float* g, const float* x, float* dw, bool first) const {
        constexpr int width = V * LANES;
        constexpr int rows = REGISTERS / 8;
        const std::int64_t whole_out = unit_out / rows * rows, whole_in = unit_in / 4 * 4;
        for (std::int64_t i = 0; i < whole_out; i += rows)
            for (std::int64_t j = 0; j < whole_in; j += 4)
                piece<V, rows>(g + i * width, x + j * width, dw + i * unit_in + j, first);
        for (std::int64_t i = 0; i < unit_out; i++)
            for (std::int64_t j = i < whole_out ? whole_in : 0; j < unit_in; j++)
                single<V>(g + i * width, x + j * width, dw + i * unit_in + j, first);
    }

    template <int V, int ROWS>
    SPARSAE_INLINE void piece(const float* g, const float* x, float* dw, bool first) const {
        constexpr int width = V * LANES;
        Vec p[ROWS * 4];
        SPARSAE_UNROLL
        for (int v = 0; v < V; v++) {
            Vec xs[4];
            SPARSAE_UNROLL
            for (int j = 0; j < 4; j++) xs[j] = load(x + j * width + v * LANES);
            SPARSAE_UNROLL
            for (int i = 0; i < ROWS; i++) {
                const Vec loaded = load(g + i * width + v * LANES);
                SPARSAE_UNROLL
                for (int j = 0; j < 4; j++) p[i * 4 + j] = v ? loaded * xs[j] + p[i * 4 + j] : loaded * xs[j];
            }
        }
        alignas(64) float lane[ROWS * 4];
        SPARSAE_UNROLL
        for (int part = 0; part < ROWS * 4; part += LANES)
            store(lane + part, sums([&](int i) SPARSAE_LAMBDA { return p[part + i]; }));
        SPARSAE_UNROLL
        for (int i = 0; i < ROWS; i++) {
            SPARSAE_UNROLL
            for (int j = 0; j < 4; j++) {
                float& to = dw[i * unit_in + j];
                to = first ? lane[i * 4 + j] : to + lane[i * 4 + j];
            }
        }
    }

    template <int V>
    SPARSAE_INLINE void single(const float* g, const float* x, float* dw, bool first) const {
        Vec p = load(g) * load(x);
        SPARSAE_UNROLL
        for (int v = 1; v < V; v++) p = load(g + v * LANES) * load(x + v * LANES) + p;
        alignas(64) float lane[LANES];
        store(lane, p);
        float total = 0.0f;
        for (int i = 0; i < LANES; i++) total += lane[i];
        *dw = first ? total : *dw + total;
    }
};

// The first strip of thread `part` of `parts`, so that all have about equal work. A strip is `strip` grid columns.
template <class Columns>
std::int64_t strip_of_part(const Problem& p, const Columns& columns, std::int64_t strip, std::int64_t strips, int part,
                           int parts) {
    // Besides its units, a grid column costs its packing, about as much as four of them.
    const auto work = [&](std::int64_t s) {
        const std::int64_t column = smaller(s * strip, p.grid_cols());
        return columns.col_ptr[column] + 4 * column;
    };
    const std::int64_t target = work(strips) * part / parts;
    std::int64_t low = 0, high = strips;
    while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (work(middle) < target)
            low = middle + 1;
        else
            high = middle;
    }
    return part == parts ? strips : low;
}

// scratch: `threads` > 1 ? 2 : 1 groups of `group` tiles of dY, then for each thread two strips of `together` columns.
template <int V, class Element, bool DX, bool DW, class Columns>
void backward_tiles(const Problem& p, const Columns& columns, float* scratch, std::int64_t group, std::int64_t together,
                    int threads) {
    constexpr int width = V * LANES;
    const std::int64_t strip = larger(1, CHUNK / p.unit_in), most = larger(1, together / p.unit_in);
    const std::int64_t strips = (p.grid_cols() + strip - 1) / strip;
    const std::int64_t tile_size = padded(p.out) * width, strip_size = padded(most * p.unit_in) * width;
    const auto* dy = static_cast<const Element*>(p.dy);
    const auto* x = static_cast<const Element*>(p.x);
    auto* dx = static_cast<Element*>(p.dx);
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int parts = team_size(), part = thread_number();
        const std::int64_t first_column = strip_of_part(p, columns, strip, strips, part, parts) * strip;
        const std::int64_t last_column =
            smaller(strip_of_part(p, columns, strip, strips, part + 1, parts) * strip, p.grid_cols());
        // Each thread packs a share of the features of every dY tile.
        const std::int64_t chunks = padded(p.out) / CHUNK;
        const std::int64_t f0 = chunks * part / parts * CHUNK, f1 = smaller(chunks * (part + 1) / parts * CHUNK, p.out);
        float* x_strip = scratch + (parts > 1 ? 2 : 1) * group * tile_size + part * 2 * strip_size;
        float* dx_strip = x_strip + strip_size;
        const std::int64_t step = group * width;
        for (std::int64_t start = 0; start < p.tokens; start += step) {
            const std::int64_t stop = smaller(start + step, p.tokens);
            // Two groups in turn, so that one barrier a group is enough.
            float* const tiles = scratch + (parts > 1 ? start / step % 2 : 0) * group * tile_size;
            float* g = tiles;
            for (std::int64_t first = start; first < stop && f1 > f0; first += width, g += tile_size) {
                pack<V>(dy + first * p.out + f0, p.out, smaller(width, stop - first), f1 - f0, g + f0 * width);
                add_sums<V>(g, f0, f1, p.dbias, first == 0);
            }
#pragma omp barrier
            g = tiles;
            for (std::int64_t first = start; first < stop; first += width, g += tile_size) {
                const std::int64_t n = smaller(width, stop - first);
                for (std::int64_t c0 = first_column; c0 < last_column; c0 += most) {
                    const std::int64_t c1 = smaller(c0 + most, last_column);
                    const std::int64_t at = first * p.in + c0 * p.unit_in, features = (c1 - c0) * p.unit_in;
                    if (DW) pack<V>(x + at, p.in, n, features, x_strip);
                    columns.template multiply<V, DX, DW>(c0, c1, g, x_strip, dx_strip, p.dvalues, first == 0);
                    if (DX) unpack<V>(dx_strip, features, dx + at, p.in, n);
                }
            }
        }
        stream_fence();
    }
}

}  // namespace SPARSAE_ISA
