// Rows of numbers: their largest, their sum, their product with another row, and e to them.
#pragma once

#include "activation.hpp"
#include "tiles.hpp"

namespace SPARSAE_ISA {

SPARSAE_INLINE float sum_of_lanes(Vec v) {
    alignas(64) float lane[LANES];
    store(lane, v);
    float result = lane[0];
    for (int j = 1; j < LANES; j++) result += lane[j];
    return result;
}

// Of n > 0 numbers.
SPARSAE_OUTLINE inline float largest_of(const float* x, std::int64_t n) {
    const std::int64_t whole = n / LANES * LANES;
    float result = x[0];
    if (whole > 0) {
        Vec best = load(x);
        for (std::int64_t i = LANES; i < whole; i += LANES) best = larger_lanes(load(x + i), best);
        alignas(64) float lane[LANES];
        store(lane, best);
        for (int j = 0; j < LANES; j++) result = lane[j] > result ? lane[j] : result;
    }
    for (std::int64_t i = whole; i < n; i++) result = x[i] > result ? x[i] : result;
    return result;
}

SPARSAE_OUTLINE inline float sum_of(const float* x, std::int64_t n) {
    const std::int64_t whole = n / LANES * LANES;
    Vec total = broadcast(0.0f);
    for (std::int64_t i = 0; i < whole; i += LANES) total = total + load(x + i);
    float result = sum_of_lanes(total);
    for (std::int64_t i = whole; i < n; i++) result += x[i];
    return result;
}

SPARSAE_OUTLINE inline float product_of(const float* x, const float* y, std::int64_t n) {
    const std::int64_t whole = n / LANES * LANES;
    Vec total = broadcast(0.0f);
    for (std::int64_t i = 0; i < whole; i += LANES) total = fma(load(x + i), load(y + i), total);
    float result = sum_of_lanes(total);
    for (std::int64_t i = whole; i < n; i++) result += x[i] * y[i];
    return result;
}

// e^(x - shift), to other memory or in place: 0 below e^-87, of which products would soon be too small to be normal.
SPARSAE_OUTLINE inline void exponentials(const float* x, std::int64_t n, float shift, float* to) {
    for (std::int64_t i = 0; i < n; i++) {
        const float difference = x[i] - shift, e = exponential(difference);
        to[i] = difference < -87.0f ? 0.0f : e;
    }
}

SPARSAE_OUTLINE inline void scale_row(float* x, std::int64_t n, float factor) {
    for (std::int64_t i = 0; i < n; i++) x[i] *= factor;
}

}  // namespace SPARSAE_ISA
