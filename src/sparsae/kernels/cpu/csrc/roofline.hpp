// What this machine can do at most: multiply-adds in registers, and streams through memory. Included by kernels.hpp.
#pragma once

#include "problem.hpp"
#include "vector.hpp"

namespace SPARSAE_ISA {

// `rounds` of multiply-adds on as many independent accumulators as hide the latency and still fit the registers, on each
// of `threads` threads. The accumulator is a factor, so that no product can be moved out of the loop. Returns the
// operations of all threads, two for each lane.
inline double multiply_add(std::int64_t rounds, int threads) {
    constexpr int CHAINS = 12;
    float kept = 0;
#pragma omp parallel num_threads(threads) reduction(+ : kept)
    {
        Vec a[CHAINS];
        const Vec x = broadcast(1e-3f);
        SPARSAE_UNROLL
        for (int j = 0; j < CHAINS; j++) a[j] = broadcast(static_cast<float>(j));
        for (std::int64_t i = 0; i < rounds; i++) {
            SPARSAE_UNROLL
            for (int j = 0; j < CHAINS; j++) a[j] = loaded_once(fma(0.5f, a[j], x));
        }
        float lane[LANES];
        for (int j = 0; j < CHAINS; j++) {
            store(lane, a[j]);
            kept += lane[0];
        }
    }
    // A sum that is looked at: without it the loop would be removed.
    return kept < 0 ? 0.0 : 2.0 * LANES * CHAINS * static_cast<double>(rounds) * threads;
}

// a = b + 3 c over n floats (the triad of McCalpin's STREAM), written past the caches; a is aligned to a cache line.
inline void triad(float* a, const float* b, const float* c, std::int64_t n, int threads) {
    (void)threads;
    const std::int64_t vectors = n / LANES;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t i = 0; i < vectors; i++) stream(a + i * LANES, fma(3.0f, load(c + i * LANES), load(b + i * LANES)));
    stream_fence();
    for (std::int64_t i = vectors * LANES; i < n; i++) a[i] = b[i] + 3.0f * c[i];
}

}  // namespace SPARSAE_ISA
