// A sparse MLP, Y = f(X Wu^T + bu) Wd^T + bd, or gated: (f(X Wg^T + bg) * (X Wu^T + bu)) Wd^T + bd. A tile of tokens goes
// through all of it while it is in the cache, so that the hidden layer never exists in memory: backward computes it again, or
// reads what forward kept of it.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "activation.hpp"
#include "backward.hpp"
#include "forward.hpp"
#include "kept.hpp"

namespace SPARSAE_ISA {

using sparsae::Mlp;

// Row-order views of the three weights.
template <class Rows>
struct MlpRows {
    Rows up, gate, down;
};

// scratch: for each thread tiles of the input, of the hidden layer (two where gated), and a strip of the output.
template <int V, class Element, class Rows>
void mlp_forward_tiles(const Mlp& m, const MlpRows<Rows>& rows, float* scratch, std::int64_t per_thread, int threads) {
    constexpr int width = V * LANES;
    const Problem &up = m.up, &down = m.down;
    const std::int64_t tiles = (up.tokens + width - 1) / width;
    const std::int64_t strip = larger(1, Rows::STRIP / down.unit_out);
    const Activation f = activation(m.activation);
    const auto* x = static_cast<const Element*>(up.x);
    auto* y = static_cast<Element*>(down.y);
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t t = 0; t < tiles; t++) {
        float* tile = scratch + thread_number() * per_thread;
        float* hidden = tile + padded(up.in) * width;
        float* gate = hidden + padded(up.out) * width;
        float* out = m.gated ? gate + padded(up.out) * width : gate;
        const std::int64_t first = t * width, n = smaller(width, up.tokens - first);
        pack<V>(x + first * up.in, up.in, n, up.in, tile);
        const NextTile<Element> next(x + (first + n) * up.in, up.in, smaller(width, up.tokens - first - n));
        rows.up.template multiply<V>(0, up.grid_rows(), tile, hidden);
        if (m.gated) rows.gate.template multiply<V>(0, m.gate.grid_rows(), tile, gate);
        const KeptTile<V> kept(m, first, n);
        kept.write(hidden, gate);
        f.activate(m.gated ? gate : hidden, m.gated ? hidden : nullptr, hidden, up.out * width);
        for (std::int64_t r0 = 0; r0 < down.grid_rows(); r0 += strip) {
            const std::int64_t r1 = smaller(r0 + strip, down.grid_rows());
            next.fetch(r0 / strip, (down.grid_rows() + strip - 1) / strip);
            rows.down.template multiply<V>(r0, r1, hidden, out);
            unpack<V>(out, (r1 - r0) * down.unit_out, y + first * down.out + r0 * down.unit_out, down.out, n);
        }
        stream_fence();
    }
}

// Column-order views of the three weights.
template <class Columns>
struct MlpColumns {
    Columns up, gate, down;
};

// The hidden features [h0, h1) of a tile, whole units of all weights: read or computed again, and turned in place into the
// gradients of what goes into the activation. hidden (and gate) are tiles of all hidden features; strips: 4 * (h1 - h0)
// features.
template <int V, class Rows, class Columns>
void hidden_backward(const Mlp& m, const MlpRows<Rows>& rows, const MlpColumns<Columns>& columns, const Activation& f,
                     const KeptTile<V>& kept, std::int64_t h0, std::int64_t h1, const float* x, const float* dy,
                     float* hidden, float* gate, float* strips, bool first) {
    constexpr int width = V * LANES;
    const std::int64_t b_out = m.up.unit_out, b_in = m.down.unit_in, size = (h1 - h0) * width;
    if (m.kept) {
        kept.read(h0, h1, hidden, gate);
    } else {
        rows.up.template multiply<V>(h0 / b_out, h1 / b_out, x, hidden + h0 * width);
        if (m.gated) rows.gate.template multiply<V>(h0 / b_out, h1 / b_out, x, gate + h0 * width);
    }
    float *fz = strips, *dfz = fz + size, *da = dfz + size, *product = da + size;
    float *z = (m.gated ? gate : hidden) + h0 * width, *up = hidden + h0 * width;
    f.differentiate(z, fz, dfz, size);
    const float* a = fz;
    if (m.gated) {
        for (std::int64_t i = 0; i < size; i++) product[i] = fz[i] * up[i];
        a = product;
    }
    columns.down.template multiply<V, true, true>(h0 / b_in, h1 / b_in, dy, a, da, m.down.dvalues, first);
    if (m.gated)
        for (std::int64_t i = 0; i < size; i++) {
            z[i] = da[i] * up[i] * dfz[i];
            up[i] = da[i] * fz[i];
        }
    else
        for (std::int64_t i = 0; i < size; i++) z[i] = da[i] * dfz[i];
    add_sums<V>(hidden, h0, h1, m.up.dbias, first);
    if (m.gated) add_sums<V>(gate, h0, h1, m.gate.dbias, first);
}

// The input's gradient and the weights' of up and gate, for strips of input features.
template <int V, class Element, class Columns>
void input_backward(const Mlp& m, const MlpColumns<Columns>& columns, std::int64_t c0, std::int64_t c1,
                    const float* x, const float* hidden, const float* gate, float* strip, Element* dx, std::int64_t n,
                    bool first) {
    constexpr int width = V * LANES;
    const std::int64_t b_in = m.up.unit_in, features = (c1 - c0) * b_in;
    float* second = strip + features * width;
    const float* xs = x + c0 * b_in * width;
    columns.up.template multiply<V, true, true>(c0, c1, hidden, xs, strip, m.up.dvalues, first);
    if (m.gated) columns.gate.template multiply<V, true, true>(c0, c1, gate, xs, second, m.gate.dvalues, first);
    if (m.gated)
        for (std::int64_t i = 0; i < features * width; i++) strip[i] += second[i];
    unpack<V>(strip, features, dx + c0 * b_in, m.up.in, n);
}

// Where part `part` of `parts` begins among `total` steps of work, which `before` counts.
template <class Before>
std::int64_t balanced(std::int64_t total, int part, int parts, const Before& before) {
    if (part == parts) return total;
    const std::int64_t target = before(total) * part / parts;
    std::int64_t low = 0, high = total;
    while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (before(middle) < target)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// Hidden features that threads share out: whole units of the weights on both sides.
inline std::int64_t hidden_strip(const Mlp& m) {
    std::int64_t strip = std::lcm(m.up.unit_out, m.down.unit_in);
    while (strip < CHUNK && m.up.out % (2 * strip) == 0) strip *= 2;
    return strip;
}

// Backward works on so many hidden features of a thread together, and on so many columns of the input: what the caches of
// one core hold beside the tiles.
inline std::int64_t hidden_together(const Mlp& m) {
    return larger(1, (m.up.blocks() ? CHUNK : 64) / hidden_strip(m)) * hidden_strip(m);
}
inline std::int64_t input_together(const Mlp& m) { return larger(1, (m.up.blocks() ? CHUNK : 64) / m.up.unit_in); }

// scratch: two input tiles (one where one thread works), a tile of dY, one of the hidden layer (two where gated), then
// the strips of each thread.
template <int V, class Element, class Rows, class Columns>
void mlp_backward_tiles(const Mlp& m, const MlpRows<Rows>& rows, const MlpColumns<Columns>& columns, float* scratch,
                        std::int64_t per_thread, int threads) {
    constexpr int width = V * LANES;
    const Problem &up = m.up, &gate = m.gate, &down = m.down;
    const Activation f = activation(m.activation);
    const std::int64_t x_size = padded(up.in) * width, dy_size = padded(down.out) * width, h_size = padded(up.out) * width;
    float* dy_tile = scratch + 2 * x_size;
    float* hidden = dy_tile + dy_size;
    float* gates = hidden + h_size;
    const auto* x = static_cast<const Element*>(up.x);
    const auto* dy = static_cast<const Element*>(down.dy);
    auto* dx = static_cast<Element*>(up.dx);
    const std::int64_t hs = hidden_strip(m), h_strips = up.out / hs;
    const std::int64_t cs = larger(1, CHUNK / up.unit_in), c_strips = (up.grid_cols() + cs - 1) / cs;
    const std::int64_t h_most = hidden_together(m), c_most = input_together(m);
    const auto hidden_work = [&](std::int64_t s) {
        const std::int64_t h = s * hs, row = m.kept ? 0 : h / up.unit_out;
        return std::int64_t{up.row_ptr[row]} + (m.gated ? gate.row_ptr[row] : 0) + 2 * down.col_ptr[h / down.unit_in] + 8 * s;
    };
    const auto input_work = [&](std::int64_t s) {
        const std::int64_t c = smaller(s * cs, up.grid_cols());
        return std::int64_t{up.col_ptr[c]} + (m.gated ? gate.col_ptr[c] : 0) + 4 * s;
    };
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int parts = team_size(), part = thread_number();
        const std::int64_t hs0 = balanced(h_strips, part, parts, hidden_work);
        const std::int64_t hs1 = balanced(h_strips, part + 1, parts, hidden_work);
        const std::int64_t cs0 = balanced(c_strips, part, parts, input_work);
        const std::int64_t cs1 = balanced(c_strips, part + 1, parts, input_work);
        const auto share = [&](std::int64_t features, int at) {
            return smaller(padded(features) / CHUNK * at / parts * CHUNK, features);
        };
        const std::int64_t x0 = share(up.in, part), x1 = share(up.in, part + 1);
        const std::int64_t y0 = share(down.out, part), y1 = share(down.out, part + 1);
        float* strips = scratch + 2 * x_size + dy_size + (m.gated ? 2 : 1) * h_size + part * per_thread;
        for (std::int64_t at = 0, t = 0; at < up.tokens; at += width, t++) {
            const std::int64_t n = smaller(width, up.tokens - at);
            const KeptTile<V> kept(m, at, n);
            // Two input tiles in turn: others may still read the last one.
            float* x_tile = scratch + (parts > 1 ? t % 2 : 0) * x_size;
            if (x1 > x0) pack<V>(x + at * up.in + x0, up.in, n, x1 - x0, x_tile + x0 * width);
            if (y1 > y0) pack<V>(dy + at * down.out + y0, down.out, n, y1 - y0, dy_tile + y0 * width);
#pragma omp barrier
            for (std::int64_t h = hs0 * hs; h < hs1 * hs; h += h_most)
                hidden_backward<V>(m, rows, columns, f, kept, h, smaller(h + h_most, hs1 * hs), x_tile, dy_tile, hidden,
                                   gates, strips, t == 0);
#pragma omp barrier
            const std::int64_t last = smaller(cs1 * cs, up.grid_cols());
            for (std::int64_t c = cs0 * cs; c < last; c += c_most)
                input_backward<V>(m, columns, c, smaller(c + c_most, last), x_tile, hidden, gates, strips, dx + at * up.in,
                                  n, t == 0);
        }
        stream_fence();
    }
}

template <class Rows, class Columns>
void mlp_as(const Mlp& m, const MlpRows<Rows>& rows, const MlpColumns<Columns>& columns, float* scratch, int vectors,
            std::int64_t per_thread, int threads, bool backward) {
    const auto tiles = [&](auto element, auto v) {
        if (backward)
            mlp_backward_tiles<v, decltype(element)>(m, rows, columns, scratch, per_thread, threads);
        else
            mlp_forward_tiles<v, decltype(element)>(m, rows, scratch, per_thread, threads);
    };
    const auto of = [&](auto element) {
        if (vectors == 4)
            tiles(element, std::integral_constant<int, 4>());
        else if (vectors == 2)
            tiles(element, std::integral_constant<int, 2>());
        else
            tiles(element, std::integral_constant<int, 1>());
    };
    m.up.bfloat16 ? of(BFloat16{}) : of(float{});
}

// Indices are 32 bits wide and columns 16: what an MLP of fewer than 65,536 features has.
inline void mlp(const Mlp& m, bool backward) {
    using Column = std::uint16_t;
    using Index = std::int32_t;
    const Problem &up = m.up, &down = m.down, &gate = m.gated ? m.gate : m.up;
    const Problem* weights[] = {&up, &down, &gate};
    const int count = m.gated ? 3 : 2;
    if (up.tokens == 0) {
        if (!backward) return;
        for (int i = 0; i < count; i++) {
            const Problem& w = *weights[i];
            std::fill_n(w.dvalues, w.count * w.unit_out * w.unit_in, 0.0f);
            if (w.dbias) std::fill_n(w.dbias, w.out, 0.0f);
        }
        return;
    }
    const bool blocks = up.blocks();
    const std::int64_t hidden = (m.gated ? 2 : 1) * padded(up.out);
    // What is gathered from at a time: the input (and dY), then the hidden layer. What is kept lies in backward's tiles.
    const std::int64_t features = larger(padded(up.in) + (backward || m.kept ? padded(down.out) : 0), hidden);
    const int vectors = tile_vectors(features, up.tokens, static_cast<int>(smaller(4, blocks ? MOST_BLOCK_VECTORS : MOST_VECTORS)));
    const std::int64_t width = vectors * LANES;
    const std::int64_t rows_together = larger(blocks ? BlockRows<Column>::STRIP : WeightRows::STRIP, down.unit_out);
    const std::int64_t strip = backward ? larger(4 * hidden_together(m), 2 * padded(input_together(m) * up.unit_in))
                                        : padded(up.in) + hidden + padded(rows_together);
    const std::int64_t steps = backward ? smaller(up.out / hidden_strip(m), up.in) : (up.tokens + width - 1) / width;
    const int threads = static_cast<int>(larger(1, smaller(up.threads, steps)));
    const std::int64_t shared = backward ? (2 * padded(up.in) + padded(down.out) + hidden) * width : 0;
    const std::int64_t per_thread = strip * width;
    // Backward does not read the rows of down, and none where the hidden layer was kept.
    const auto ordered = [&](const Problem& w) {
        return blocks || (backward && (m.kept || &w == &down)) ? 0 : WeightRows::memory(w, width);
    };
    const std::int64_t copied = ordered(up) + ordered(down) + (m.gated ? ordered(gate) : 0);
    float* scratch = sparsae::workspace(shared + threads * per_thread + copied);
    if (blocks) {
        const auto rows = [&](const Problem& w) {
            return BlockRows<Column>{w.row_ptr, static_cast<const Column*>(w.columns), w.source, w.values, w.bias,
                                     w.unit_out, w.unit_in};
        };
        const auto columns = [&](const Problem& w) {
            return BlockColumns<Index>{w.col_ptr, static_cast<const Index*>(w.indices), w.values, w.grid_rows(), w.unit_out,
                                       w.unit_in};
        };
        return mlp_as(m, MlpRows<BlockRows<Column>>{rows(up), rows(gate), rows(down)},
                      MlpColumns<BlockColumns<Index>>{columns(up), columns(gate), columns(down)}, scratch, vectors,
                      per_thread, threads, backward);
    }
    float* free = scratch + shared + threads * per_thread;
    MlpRows<WeightRows> rows;
    const auto order = [&](WeightRows& view, const Problem& w) {
        if (ordered(w) == 0) return;
        view = WeightRows(w, width, free);
        free += ordered(w);
    };
    order(rows.up, up);
    if (m.gated) order(rows.gate, gate);
    order(rows.down, down);
    const auto columns = [&](const Problem& w) {
        return WeightColumns<Index>{w.col_ptr, static_cast<const Index*>(w.indices), w.values, w.grid_rows()};
    };
    mlp_as(m, rows, MlpColumns<WeightColumns<Index>>{columns(up), columns(gate), columns(down)}, scratch, vectors, per_thread,
           threads, backward);
}

inline void mlp_forward(const Mlp& m) { mlp(m, false); }
inline void mlp_backward(const Mlp& m) { mlp(m, true); }

}  // namespace SPARSAE_ISA
