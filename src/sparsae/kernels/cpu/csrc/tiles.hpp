// Between row-major activations and tiles.
//
// A tile holds V * LANES tokens transposed: feature f of all its tokens lies at tile + f * V * LANES, so that a weight
// meets V vectors of tokens at once. Tiles are always float32; other types are converted on the way in and out.
#pragma once

#include "vector.hpp"

namespace SPARSAE_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

// Vectors of tokens that a weight meets at once with the sums in registers: with four lanes in as many as fit, since index
// and address cost the same for each weight. A block's four rows or columns are worked on together.
constexpr int MOST_VECTORS = LANES == 4 && REGISTERS == 32 ? 8 : 4;
constexpr int MOST_BLOCK_VECTORS = REGISTERS / 8;

constexpr int CHUNK = 16;  // features that are transposed and written together: a cache line of float32

SPARSAE_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
SPARSAE_INLINE std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
SPARSAE_INLINE std::int64_t padded(std::int64_t features) { return (features + CHUNK - 1) / CHUNK * CHUNK; }

// Features [0, features) of `tokens` rows at src, which are ld apart, into a tile. Missing tokens become zeros; the tile
// has room for padded(features) features.
template <int V, class Element>
SPARSAE_OUTLINE void pack(const Element* src, std::int64_t ld, std::int64_t tokens, std::int64_t features, float* tile) {
    constexpr int width = V * LANES;
    const std::int64_t whole = features / LANES * LANES;
    for (int group = 0; group < V; group++) {
        const std::int64_t n = smaller(larger(tokens - group * LANES, 0), LANES);
        const Element* rows = src + group * LANES * ld;
        float* to = tile + group * LANES;
        if (n == LANES) {
            for (std::int64_t f = 0; f < whole; f += LANES) {
                Vec r[LANES];
                SPARSAE_UNROLL
                for (int i = 0; i < LANES; i++) r[i] = load_as_float(rows + i * ld + f);
                transpose(r);
                SPARSAE_UNROLL
                for (int i = 0; i < LANES; i++) store(to + (f + i) * width, r[i]);
            }
        }
        for (std::int64_t f = n == LANES ? whole : 0; f < features; f++) {
            for (std::int64_t i = 0; i < n; i++) to[f * width + i] = to_float(rows[i * ld + f]);
            for (std::int64_t i = n; i < LANES; i++) to[f * width + i] = 0.0f;
        }
    }
}

SPARSAE_INLINE bool streamable(const float* p, std::int64_t ld) {
    return reinterpret_cast<std::uintptr_t>(p) % (CHUNK * 4) == 0 && ld % CHUNK == 0;
}
SPARSAE_INLINE bool streamable(const BFloat16*, std::int64_t) { return false; }
SPARSAE_INLINE void stream_out(float* p, Vec v) { stream(p, v); }
SPARSAE_INLINE void stream_out(BFloat16* p, Vec v) { store_from_float(p, v); }

// The inverse of pack. Whole cache lines go past the cache.
template <int V, class Element>
SPARSAE_OUTLINE void unpack(const float* tile, std::int64_t features, Element* dst, std::int64_t ld,
                            std::int64_t tokens) {
    constexpr int width = V * LANES;
    const bool past_cache = streamable(dst, ld);
    for (std::int64_t f = 0; f < features; f += CHUNK) {
        for (int group = 0; group < V; group++) {
            const std::int64_t n = smaller(larger(tokens - group * LANES, 0), LANES);
            const float* from = tile + f * width + group * LANES;
            Element* rows = dst + group * LANES * ld + f;
            if (n < LANES || f + CHUNK > features) {
                const std::int64_t m = smaller(features - f, CHUNK);
                for (std::int64_t i = 0; i < n; i++)
                    for (std::int64_t j = 0; j < m; j++) from_float(from[j * width + i], rows[i * ld + j]);
                continue;
            }
            for (int part = 0; part < CHUNK; part += LANES) {
                Vec r[LANES];
                SPARSAE_UNROLL
                for (int i = 0; i < LANES; i++) r[i] = load(from + (part + i) * width);
                transpose(r);
                if (past_cache) {
                    SPARSAE_UNROLL
                    for (int i = 0; i < LANES; i++) stream_out(rows + i * ld + part, r[i]);
                } else {
                    SPARSAE_UNROLL
                    for (int i = 0; i < LANES; i++) store_from_float(rows + i * ld + part, r[i]);
                }
            }
        }
    }
}

// Adds the sums over the tokens of a tile's features [f0, f1) to dbias, or sets them; nothing where there is no dbias.
template <int V>
void add_sums(const float* tile, std::int64_t f0, std::int64_t f1, float* dbias, bool first) {
    for (std::int64_t f = f0; dbias != nullptr && f < f1; f++) {
        const float* row = tile + f * V * LANES;
        Vec total = load(row);
        SPARSAE_UNROLL
        for (int v = 1; v < V; v++) total = total + load(row + v * LANES);
        alignas(64) float lane[LANES];
        store(lane, total);
        float sum = 0;
        for (int i = 0; i < LANES; i++) sum += lane[i];
        dbias[f] = first ? sum : dbias[f] + sum;
    }
}

}  // namespace SPARSAE_ISA
