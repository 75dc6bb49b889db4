// One token through all blocks of a decoder: norms, products, attention over the keys and values of the tokens before it,
// and the MLP. So little arithmetic that one call for all of it takes half of what a call for each part takes.
#pragma once

#include <cmath>

#include "activation.hpp"
#include "decode.hpp"

namespace SPARSAE_ISA {

using sparsae::Norm;
using sparsae::Token;
using sparsae::TokenBlock;

SPARSAE_INLINE float sum_of(Vec v) {
    float lane[LANES], sum = 0;
    store(lane, v);
    for (int j = 0; j < LANES; j++) sum += lane[j];
    return sum;
}

SPARSAE_INLINE float dot(const float* a, const float* b, std::int64_t n) {
    Vec s = broadcast(0.0f);
    std::int64_t i = 0;
    for (; i + LANES <= n; i += LANES) s = load(a + i) * load(b + i) + s;
    float sum = sum_of(s);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// y += w x
SPARSAE_INLINE void add_times(float w, const float* x, float* y, std::int64_t n) {
    std::int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, fma(w, load(x + i), load(y + i)));
    for (; i < n; i++) y[i] += w * x[i];
}

inline void normalize(const Norm& norm, const float* x, float* y, std::int64_t n) {
    float mean = 0;
    if (norm.centered) {
        Vec s = broadcast(0.0f);
        std::int64_t i = 0;
        for (; i + LANES <= n; i += LANES) s = s + load(x + i);
        mean = sum_of(s);
        for (; i < n; i++) mean += x[i];
        mean /= static_cast<float>(n);
    }
    for (std::int64_t i = 0; i < n; i++) y[i] = x[i] - mean;
    const float factor = 1.0f / std::sqrt(dot(y, y, n) / static_cast<float>(n) + norm.epsilon);
    for (std::int64_t i = 0; i < n; i++) y[i] = y[i] * factor * norm.scale[i] + (norm.bias ? norm.bias[i] : 0.0f);
}

// Norm and rotation of each head of queries or keys, in place.
inline void prepare_heads(const Token& t, const Norm& norm, float* x, std::int64_t heads) {
    const std::int64_t half = t.head_size / 2;
    const float* cos = t.cos ? t.cos + t.position * t.head_size : nullptr;
    const float* sin = t.sin ? t.sin + t.position * t.head_size : nullptr;
    for (std::int64_t h = 0; h < heads; h++, x += t.head_size) {
        if (norm.scale) normalize(norm, x, x, t.head_size);
        if (!cos) continue;
        for (std::int64_t i = 0; i < half; i++) {
            const float a = x[i], b = x[i + half];
            x[i] = a * cos[i] - b * sin[i];
            x[i + half] = b * cos[i + half] + a * sin[i + half];
        }
    }
}

// One head: softmax(q K^T scale) V over positions [0, t.position]. scores: as many floats.
inline void attend(const Token& t, const TokenBlock& block, std::int64_t head, const float* q, float* scores, float* out) {
    const std::int64_t size = t.head_size, length = t.position + 1, group = t.heads / t.kv_heads;
    const float* keys = block.keys + head / group * t.context * size;
    const float* values = block.values + head / group * t.context * size;
    float most = -INFINITY;
    for (std::int64_t p = 0; p < length; p++) {
        scores[p] = dot(q, keys + p * size, size) * block.scale;
        most = scores[p] > most ? scores[p] : most;
    }
    for (std::int64_t p = 0; p < length; p++) scores[p] = exponential(scores[p] - most);
    float total = 0;
    for (std::int64_t p = 0; p < length; p++) total += scores[p];
    std::memset(out, 0, static_cast<std::size_t>(size) * sizeof(float));
    for (std::int64_t p = 0; p < length; p++) add_times(scores[p] / total, values + p * size, out, size);
}

inline void token_block(const Token& t, const TokenBlock& block) {
    const std::int64_t size = t.head_size;
    normalize(block.norm_1, t.x, t.normed, t.width);
    for (std::int64_t i = 0; i < block.projection_count; i++) forward_few(block.projections[i]);
    float* q = t.projected;
    float* k = q + t.heads * size;
    const float* v = k + t.kv_heads * size;
    prepare_heads(t, block.query_norm, q, t.heads);
    prepare_heads(t, block.key_norm, k, t.kv_heads);
    for (std::int64_t h = 0; h < t.kv_heads; h++) {
        const std::int64_t at = (h * t.context + t.position) * size;
        std::memcpy(block.keys + at, k + h * size, static_cast<std::size_t>(size) * sizeof(float));
        std::memcpy(block.values + at, v + h * size, static_cast<std::size_t>(size) * sizeof(float));
    }
    const int threads = (t.position + 1) * t.heads * size > 65536 ? block.output.threads : 1;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t h = 0; h < t.heads; h++)
        attend(t, block, h, q + h * size, t.scores + h * t.context, t.attended + h * size);
    forward_few(block.output);
    add_times(1.0f, t.added, t.x, t.width);
    normalize(block.norm_2, t.x, t.normed, t.width);
    forward_few(block.up);
    const Activation f = activation(block.activation);
    if (block.gated) {
        forward_few(block.gate);
        f.activate(t.gate, t.hidden, t.hidden, block.up.out);
    } else {
        f.activate(t.hidden, nullptr, t.hidden, block.up.out);
    }
    forward_few(block.down);
    add_times(1.0f, t.added, t.x, t.width);
}

inline void token(const Token& t) {
    for (std::int64_t i = 0; i < t.count; i++) token_block(t, t.blocks[i]);
}

}  // namespace SPARSAE_ISA
