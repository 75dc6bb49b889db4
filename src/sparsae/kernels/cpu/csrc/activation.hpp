// The activations of transformers' MLPs and their derivatives, over rows of a tile.
//
// Written for one number without a branch, so that compilers turn the loops over a row into vectors.
#pragma once

#include <cstdint>
#include <cstring>

#include "vector.hpp"

namespace SPARSAE_ISA {

// e^x to float32 rounding: x = n log 2 + r with |r| <= log(2) / 2, a polynomial for e^r (its Taylor series to r^7), and
// 2^n put into the exponent. Clamped where float32 ends.
SPARSAE_INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    float n = x * 1.44269504f + rounder;
    std::uint32_t bits;
    std::memcpy(&bits, &n, 4);
    n -= rounder;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float e = 1.0f / 5040;
    e = e * r + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    bits = (bits << 23) + 0x3f800000u;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return e * scale;
}

struct Relu {
    static SPARSAE_INLINE void at(float z, float& a, float& da) {
        a = z < 0 ? 0.0f : z;  // NaN stays NaN
        da = z > 0 ? 1.0f : 0.0f;
    }
};

// z sigmoid(z)
struct Silu {
    static SPARSAE_INLINE void at(float z, float& a, float& da) {
        const float s = 1.0f / (1.0f + exponential(-z));
        a = z * s;
        da = s + a * (1.0f - s);
    }
};

// z sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3): GPT-2's tanh form, since (1 + tanh u) / 2 = sigmoid(2 u).
struct GeluTanh {
    static SPARSAE_INLINE void at(float z, float& a, float& da) {
        constexpr float c = 1.59576912f, d = 0.044715f;  // c = 2 sqrt(2 / pi)
        const float s = 1.0f / (1.0f + exponential(-c * z * (1.0f + d * z * z)));
        a = z * s;
        da = s + a * (1.0f - s) * c * (1.0f + 3.0f * d * z * z);
    }
};

// z Phi(z), with erf to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
struct Gelu {
    static SPARSAE_INLINE void at(float z, float& a, float& da) {
        const float y = (z < 0 ? -z : z) * 0.707106781f;
        const float t = 1.0f / (1.0f + 0.3275911f * y);
        const float gauss = exponential(-y * y);
        const float tail = 0.5f * gauss * t *
                           (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
        const float phi = z < 0 ? tail : 1.0f - tail;
        a = z * phi;
        da = phi + z * gauss * 0.398942280f;
    }
};

// a = f(z), or f(z) up for a gated MLP.
template <class F>
SPARSAE_OUTLINE void activate_as(const float* z, const float* up, float* a, std::int64_t n) {
    float unused;
    if (up == nullptr)
        for (std::int64_t i = 0; i < n; i++) F::at(z[i], a[i], unused);
    else
        for (std::int64_t i = 0; i < n; i++) {
            float f;
            F::at(z[i], f, unused);
            a[i] = f * up[i];
        }
}

// f(z) and f'(z).
template <class F>
SPARSAE_OUTLINE void differentiate_as(const float* z, float* f, float* df, std::int64_t n) {
    for (std::int64_t i = 0; i < n; i++) F::at(z[i], f[i], df[i]);
}

struct Activation {
    void (*activate)(const float* z, const float* up, float* a, std::int64_t n);
    void (*differentiate)(const float* z, float* f, float* df, std::int64_t n);
};

// In the order of `Mlp::activation`.
inline Activation activation(std::int32_t number) {
    constexpr Activation all[] = {
        {activate_as<GeluTanh>, differentiate_as<GeluTanh>},
        {activate_as<Gelu>, differentiate_as<Gelu>},
        {activate_as<Relu>, differentiate_as<Relu>},
        {activate_as<Silu>, differentiate_as<Silu>},
    };
    return all[number];
}

}  // namespace SPARSAE_ISA
