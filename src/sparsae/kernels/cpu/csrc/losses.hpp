// Cross entropy of rows of logits, their divergence from a teacher's, and the gradient of both. Each logit's exponential is
// taken once, where its gradient goes.
#pragma once

#include <cmath>

#include "reductions.hpp"

namespace SPARSAE_ISA {

using sparsae::Losses;

constexpr std::int64_t PIECE = 2048;  // numbers of a row that stay in a level-1 cache from one loop over them to the next

// log softmax(x) is x - largest - log_sum: in this order, which loses nothing where all of x is far from zero.
struct Normalizer {
    float largest, sum, log_sum;  // sum: of the exponentials of x - largest

    SPARSAE_INLINE float log_probability(float x) const { return (x - largest) - log_sum; }
};

// Of n logits. Their exponentials, less the largest, are left in `to`, where there is one; else in PIECE floats of scratch.
inline Normalizer normalizer_of(const float* x, std::int64_t n, float* to, float* scratch) {
    const float largest = largest_of(x, n);
    float sum = 0;
    for (std::int64_t i = 0; i < n; i += PIECE) {
        const std::int64_t m = smaller(PIECE, n - i);
        float* e = to ? to + i : scratch;
        exponentials(x + i, m, largest, e);
        sum += sum_of(e, m);
    }
    return {largest, sum, std::log(sum)};
}

// q = softmax(y), of a teacher's logits, and terms = q (log q - log softmax(x)). What has no probability to speak of adds
// nothing, though its logarithm be infinite.
SPARSAE_OUTLINE inline void divergences(const float* x, const Normalizer& own, const float* y, const Normalizer& theirs,
                                        std::int64_t n, float* q, float* terms) {
    for (std::int64_t i = 0; i < n; i++) {
        const float log_q = theirs.log_probability(y[i]), e = exponential(log_q);
        const bool none = log_q < -87.0f;
        q[i] = none ? 0.0f : e;
        terms[i] = none ? 0.0f : e * (log_q - own.log_probability(x[i]));
    }
}

SPARSAE_OUTLINE inline void subtract_scaled(float* g, const float* q, std::int64_t n, float factor) {
    for (std::int64_t i = 0; i < n; i++) g[i] -= factor * q[i];
}

// scratch: 2 PIECE floats.
inline void losses_of_row(const Losses& p, std::int64_t t, float* scratch) {
    const std::int64_t n = p.vocabulary, target = p.targets[t];
    const float *x = p.logits + t * n, *y = t < p.taught ? p.teacher + t * n : nullptr;
    float* g = p.gradient ? p.gradient + t * n : nullptr;
    float &cross_entropy = p.sums[t], &divergence = p.sums[p.tokens + t];
    cross_entropy = divergence = 0.0f;
    if (target == p.ignored) {
        for (std::int64_t i = 0; g && i < n; i++) g[i] = 0.0f;
        return;
    }
    const Normalizer own = normalizer_of(x, n, g, scratch);
    cross_entropy = -own.log_probability(x[target]);
    if (g) scale_row(g, n, (p.ce_weight + (y ? p.kl_weight : 0.0f)) / own.sum);
    if (y) {
        const Normalizer theirs = normalizer_of(y, n, nullptr, scratch);
        float *q = scratch, *terms = scratch + PIECE;
        for (std::int64_t i = 0; i < n; i += PIECE) {
            const std::int64_t m = smaller(PIECE, n - i);
            divergences(x + i, own, y + i, theirs, m, q, terms);
            divergence += sum_of(terms, m);
            if (g) subtract_scaled(g + i, q, m, p.kl_weight);
        }
    }
    if (g) g[target] -= p.ce_weight;
}

inline void losses(const Losses& p) {
    if (p.tokens == 0) return;
    const int threads = static_cast<int>(larger(1, smaller(p.threads, p.tokens)));
    float* scratch = sparsae::workspace(threads * 2 * PIECE);
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t t = 0; t < p.tokens; t++) losses_of_row(p, t, scratch + thread_number() * 2 * PIECE);
}

}  // namespace SPARSAE_ISA
