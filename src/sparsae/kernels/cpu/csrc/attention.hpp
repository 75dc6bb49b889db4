// Causal attention over whole sequences, softmax(scale Q K^T) V, and all its gradients. A block of queries meets a tile of
// keys at a time, so that no probabilities ever reach memory: backward computes them again from the sum that forward kept
// of each row. Everything of a head (keys, values and their gradients) stays in a level-2 cache meanwhile.
#pragma once

#include <cmath>
#include <limits>

#include "reductions.hpp"

namespace SPARSAE_ISA {

using sparsae::Attention;
using sparsae::Heads;

constexpr std::int64_t QUERIES = 64;       // rows of a block
constexpr std::int64_t KEYS = 256;         // columns of a tile, a multiple of PANEL
constexpr std::int64_t ROW = KEYS + CHUNK;  // from a tile's row to the next: not a power of two, whose lines would share a cache's sets
constexpr int PANEL_VECTORS = REGISTERS / 8;
constexpr std::int64_t PANEL = PANEL_VECTORS * LANES;  // keys that are transposed together

constexpr std::int64_t FULL = std::int64_t{1} << 40;  // beyond every sequence

SPARSAE_INLINE std::int64_t up_to(std::int64_t n, std::int64_t step) { return (n + step - 1) / step * step; }

// A matrix that is read one number at a time: (i, k) lies at data + i * row + k * column. Where it is of probabilities, they
// are zeros for k >= i + above (of queries by keys) or for k < i - below (of keys by queries).
struct Left {
    const float* data;
    std::int64_t row, column;
    std::int64_t above = FULL, below = FULL;
};

// C (R, V * LANES) = A B, or C + A B. B's and C's rows are contiguous, ldb and ldc apart.
template <int R, int V>
SPARSAE_INLINE void multiply_block(std::int64_t inner, const float* a, std::int64_t a_row, std::int64_t a_column,
                                   const float* b, std::int64_t ldb, float* c, std::int64_t ldc, bool add) {
    Vec sum[R][V];
    SPARSAE_UNROLL
    for (int r = 0; r < R; r++) {
        SPARSAE_UNROLL
        for (int v = 0; v < V; v++) sum[r][v] = add ? load(c + r * ldc + v * LANES) : broadcast(0.0f);
    }
    for (std::int64_t k = 0; k < inner; k++, a += a_column, b += ldb) {
        Vec x[V];
        SPARSAE_UNROLL
        for (int v = 0; v < V; v++) x[v] = load(b + v * LANES);
        SPARSAE_UNROLL
        for (int r = 0; r < R; r++) {
            const Weight w = load_weight(a + r * a_row);
            SPARSAE_UNROLL
            for (int v = 0; v < V; v++) sum[r][v] = fma(w, x[v], sum[r][v]);
        }
    }
    SPARSAE_UNROLL
    for (int r = 0; r < R; r++) {
        SPARSAE_UNROLL
        for (int v = 0; v < V; v++) store(c + r * ldc + v * LANES, sum[r][v]);
    }
}

template <int R, int V>
SPARSAE_INLINE std::int64_t multiply_rows(std::int64_t first, std::int64_t rows, std::int64_t inner, const Left& a,
                                          const float* b, std::int64_t ldb, float* c, std::int64_t ldc, bool add) {
    for (; first + R <= rows; first += R) {
        const std::int64_t k = smaller(inner, larger(0, first - a.below)), end = smaller(inner, first + R - 1 + a.above);
        multiply_block<R, V>(end - k, a.data + first * a.row + k * a.column, a.row, a.column, b + k * ldb, ldb,
                             c + first * ldc, ldc, add);
    }
    return first;
}

// C (rows, V * LANES): blocks of as many rows as the registers hold sums for, beside V vectors of B and a weight.
template <int V>
SPARSAE_OUTLINE void multiply_columns(std::int64_t rows, std::int64_t inner, const Left& a, const float* b,
                                      std::int64_t ldb, float* c, std::int64_t ldc, bool add) {
    constexpr int most = (REGISTERS - V - 1) / V, R = most < 12 ? most : 12;
    std::int64_t done = multiply_rows<R, V>(0, rows, inner, a, b, ldb, c, ldc, add);
    done = multiply_rows<4, V>(done, rows, inner, a, b, ldb, c, ldc, add);
    multiply_rows<1, V>(done, rows, inner, a, b, ldb, c, ldc, add);
}

// C (rows, columns), columns being a multiple of LANES.
inline void multiply(std::int64_t rows, std::int64_t columns, std::int64_t inner, const Left& a, const float* b,
                     std::int64_t ldb, float* c, std::int64_t ldc, bool add) {
    std::int64_t j = 0;
    for (; j + PANEL <= columns; j += PANEL)
        multiply_columns<PANEL_VECTORS>(rows, inner, a, b + j, ldb, c + j, ldc, add);
    if constexpr (PANEL_VECTORS > 3)
        if (columns - j == 3 * LANES) return multiply_columns<3>(rows, inner, a, b + j, ldb, c + j, ldc, add);
    if constexpr (PANEL_VECTORS > 2)
        if (columns - j == 2 * LANES) return multiply_columns<2>(rows, inner, a, b + j, ldb, c + j, ldc, add);
    if (columns > j) multiply_columns<1>(rows, inner, a, b + j, ldb, c + j, ldc, add);
}

// Rows [0, rows) of a head from token `first` on, times `scale`, filled up to `width` features with zeros.
inline void take_rows(const Heads& from, const float* head, std::int64_t first, std::int64_t rows, std::int64_t size,
                      std::int64_t width, float scale, float* to) {
    for (std::int64_t t = 0; t < rows; t++) {
        const float* row = head + (first + t) * from.token;
        for (std::int64_t f = 0; f < size; f++) to[t * width + f] = scale * row[f];
        for (std::int64_t f = size; f < width; f++) to[t * width + f] = 0.0f;
    }
}

inline void give_rows(const float* from, std::int64_t width, const Heads& to, float* head, std::int64_t first,
                      std::int64_t rows, std::int64_t size, float scale) {
    for (std::int64_t t = 0; t < rows; t++)
        for (std::int64_t f = 0; f < size; f++) head[(first + t) * to.token + f] = scale * from[t * width + f];
}

// Panels of a head's tokens, transposed; tokens beyond the last are zeros.
inline void take_panels(const Heads& from, const float* head, std::int64_t tokens, std::int64_t size, float* panels) {
    for (std::int64_t t = 0; t < tokens; t += PANEL, panels += PANEL * size)
        pack<PANEL_VECTORS>(head + t * from.token, from.token, smaller(PANEL, tokens - t), size, panels);
}

// C (rows, PANEL) of queries and one panel, of which row i sees the first `seen` + i keys: the rows that see up to V vectors
// of them, and more than V - 1; what lies behind those is left as it is.
template <int V>
SPARSAE_INLINE void multiply_seen(const float* rows_of_a, std::int64_t width, std::int64_t rows, const float* panel,
                                  std::int64_t size, std::int64_t seen, float* c) {
    const std::int64_t first = larger(0, (V - 1) * LANES + 1 - seen);
    const std::int64_t end = V == PANEL_VECTORS ? rows : smaller(rows, V * LANES + 1 - seen);
    if (first < end)
        multiply_columns<V>(end - first, size, Left{rows_of_a + first * width, width, 1}, panel, PANEL, c + first * ROW, ROW,
                            false);
    if constexpr (V > 1) multiply_seen<V - 1>(rows_of_a, width, rows, panel, size, seen, c);
}

// C (rows, keys) of queries and the panels from key `first` on, of which row i sees `seen` + i keys.
inline void multiply_panels(const float* rows_of_a, std::int64_t width, std::int64_t rows, const float* panels,
                            std::int64_t size, std::int64_t first, std::int64_t keys, std::int64_t seen, float* c) {
    for (std::int64_t j = 0; j < keys; j += PANEL)
        multiply_seen<PANEL_VECTORS>(rows_of_a, width, rows, panels + (first + j) * size, size, seen - j, c + j);
}

// A pass over a head's blocks of queries and, for each, over its tiles of keys: what lies where.
struct Tiling {
    std::int64_t tokens, size, width, keys;  // features as they are, and filled up; keys filled up to whole panels

    explicit Tiling(const Attention& p)
        : tokens(p.tokens), size(p.size), width(up_to(p.size, LANES)), keys(up_to(p.tokens, PANEL)) {}

    std::int64_t rows(std::int64_t first) const { return smaller(QUERIES, tokens - first); }
    // Keys of the tile from c on that any query of the block sees, in whole panels.
    std::int64_t columns(std::int64_t first, std::int64_t c) const {
        return smaller(KEYS, up_to(first + rows(first), PANEL) - c);
    }
};

// e^(x - shift) of the first `seen` of n scores, zeros for the others.
SPARSAE_INLINE void probabilities(float* x, std::int64_t n, std::int64_t seen, float shift) {
    exponentials(x, up_to(seen, LANES), shift, x);
    for (std::int64_t i = seen; i < n; i++) x[i] = 0.0f;
}

// One head forward. kt: panels of keys, v: rows of values.
inline void attend(const Attention& p, const Tiling& t, std::int64_t b, std::int64_t h, const float* kt, const float* v,
                   float* memory) {
    float *q = memory, *y = q + QUERIES * t.width, *s = y + QUERIES * t.width;
    float top[QUERIES], sum[QUERIES];
    for (std::int64_t first = 0; first < t.tokens; first += QUERIES) {
        const std::int64_t rows = t.rows(first);
        take_rows(p.q, p.q.head_of(b, h), first, rows, t.size, t.width, p.scale, q);
        for (std::int64_t c = 0; c < first + rows; c += KEYS) {
            const std::int64_t keys = t.columns(first, c);
            multiply_panels(q, t.width, rows, kt, t.size, c, keys, first + 1 - c, s);
            for (std::int64_t i = 0; i < rows; i++) {
                float* row = s + i * ROW;
                const std::int64_t seen = smaller(keys, first + i + 1 - c);
                const std::int64_t end = up_to(seen, LANES);
                for (std::int64_t j = seen; j < end; j++) row[j] = -std::numeric_limits<float>::infinity();
                float most = largest_of(row, end);
                if (c > 0) {
                    most = top[i] > most ? top[i] : most;
                    const float factor = exponential(top[i] - most);
                    scale_row(y + i * t.width, t.width, factor);
                    sum[i] *= factor;
                }
                probabilities(row, keys, seen, most);
                top[i] = most;
                sum[i] = (c > 0 ? sum[i] : 0.0f) + sum_of(row, end);
            }
            multiply(rows, t.width, keys, Left{s, ROW, 1, first + 1 - c}, v + c * t.width, t.width, y, t.width, c > 0);
        }
        float* kept = p.logsum + (b * p.heads + h) * t.tokens + first;
        for (std::int64_t i = 0; i < rows; i++) {
            kept[i] = top[i] + std::log(sum[i]);
            give_rows(y + i * t.width, t.width, p.y, p.y.head_of(b, h), first + i, 1, t.size, 1.0f / sum[i]);
        }
    }
}

// What one head of queries adds to the gradients of its keys and values, and the gradient of its queries.
inline void attend_backward(const Attention& p, const Tiling& t, std::int64_t b, std::int64_t h, const float* kt,
                            const float* k, const float* vt, float* dk, float* dv, float* memory) {
    float *q = memory, *dy = q + QUERIES * t.width, *dq = dy + QUERIES * t.width;
    float *s = dq + QUERIES * t.width, *ds = s + QUERIES * ROW;
    float inner[QUERIES];
    for (std::int64_t first = 0; first < t.tokens; first += QUERIES) {
        const std::int64_t rows = t.rows(first);
        take_rows(p.q, p.q.head_of(b, h), first, rows, t.size, t.width, p.scale, q);
        take_rows(p.dy, p.dy.head_of(b, h), first, rows, t.size, t.width, 1.0f, dy);
        for (std::int64_t i = 0; i < rows; i++) {
            const float* y = p.y.head_of(b, h) + (first + i) * p.y.token;
            inner[i] = product_of(y, dy + i * t.width, t.size);
        }
        const float* logsum = p.logsum + (b * p.heads + h) * t.tokens + first;
        for (std::int64_t c = 0; c < first + rows; c += KEYS) {
            const std::int64_t keys = t.columns(first, c);
            multiply_panels(q, t.width, rows, kt, t.size, c, keys, first + 1 - c, s);
            multiply_panels(dy, t.width, rows, vt, t.size, c, keys, first + 1 - c, ds);
            for (std::int64_t i = 0; i < rows; i++) {
                float *row = s + i * ROW, *drow = ds + i * ROW;
                const std::int64_t seen = smaller(keys, first + i + 1 - c), end = up_to(seen, LANES);
                probabilities(row, keys, seen, logsum[i]);
                for (std::int64_t j = 0; j < end; j++) drow[j] = row[j] * (drow[j] - inner[i]);
                for (std::int64_t j = end; j < keys; j++) drow[j] = 0.0f;
            }
            multiply(rows, t.width, keys, Left{ds, ROW, 1, first + 1 - c}, k + c * t.width, t.width, dq, t.width, c > 0);
            const std::int64_t below = first - c;
            multiply(keys, t.width, rows, Left{s, 1, ROW, FULL, below}, dy, t.width, dv + c * t.width, t.width, true);
            multiply(keys, t.width, rows, Left{ds, 1, ROW, FULL, below}, q, t.width, dk + c * t.width, t.width, true);
        }
        give_rows(dq, t.width, p.dq, p.dq.head_of(b, h), first, rows, t.size, p.scale);
    }
}

// Each head of keys is one thread's, with the heads of queries that share it: sums never depend on the number of threads.
template <class Head>
void over_heads(const Attention& p, std::int64_t per_thread, const Head& head) {
    const std::int64_t all = p.batch * p.kv_heads;
    const int threads = static_cast<int>(larger(1, smaller(p.threads, all)));
    float* scratch = sparsae::workspace(threads * per_thread);
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t i = 0; i < all; i++) head(i / p.kv_heads, i % p.kv_heads, scratch + thread_number() * per_thread);
}

inline void attention_forward(const Attention& p) {
    if (p.batch * p.heads * p.tokens == 0) return;
    const Tiling t(p);
    const std::int64_t panels = up_to(t.keys * t.size, CHUNK), rows = t.keys * t.width, group = p.heads / p.kv_heads;
    over_heads(p, panels + rows + QUERIES * (2 * t.width + ROW), [&](std::int64_t b, std::int64_t g, float* memory) {
        float *kt = memory, *v = kt + panels;
        take_panels(p.k, p.k.head_of(b, g), t.tokens, t.size, kt);
        take_rows(p.v, p.v.head_of(b, g), 0, t.tokens, t.size, t.width, 1.0f, v);
        for (std::int64_t i = t.tokens * t.width; i < rows; i++) v[i] = 0.0f;
        for (std::int64_t h = g * group; h < (g + 1) * group; h++) attend(p, t, b, h, kt, v, v + rows);
    });
}

inline void attention_backward(const Attention& p) {
    if (p.batch * p.heads * p.tokens == 0) return;
    const Tiling t(p);
    const std::int64_t panels = up_to(t.keys * t.size, CHUNK), rows = t.keys * t.width, group = p.heads / p.kv_heads;
    const std::int64_t per_thread = 2 * panels + 3 * rows + QUERIES * (3 * t.width + 2 * ROW);
    over_heads(p, per_thread, [&](std::int64_t b, std::int64_t g, float* memory) {
        float *kt = memory, *vt = kt + panels, *k = vt + panels, *dk = k + rows, *dv = dk + rows;
        take_panels(p.k, p.k.head_of(b, g), t.tokens, t.size, kt);
        take_panels(p.v, p.v.head_of(b, g), t.tokens, t.size, vt);
        take_rows(p.k, p.k.head_of(b, g), 0, t.tokens, t.size, t.width, 1.0f, k);
        for (std::int64_t i = t.tokens * t.width; i < rows; i++) k[i] = 0.0f;
        for (std::int64_t i = 0; i < 2 * rows; i++) dk[i] = 0.0f;
        for (std::int64_t h = g * group; h < (g + 1) * group; h++)
            attend_backward(p, t, b, h, kt, k, vt, dk, dv, dv + rows);
        give_rows(dk, t.width, p.dk, p.dk.head_of(b, g), 0, t.tokens, t.size, 1.0f);
        give_rows(dv, t.width, p.dv, p.dv.head_of(b, g), 0, t.tokens, t.size, 1.0f);
    });
}

}  // namespace SPARSAE_ISA
