// A vector of LANES floats, and the few operations on it that the kernels need.
//
// The including file defines SPARSAE_LANES (4, 8 or 16) and SPARSAE_ISA, the namespace, and SPARSAE_NEON where NEON's own
// intrinsics are to be used; it is compiled with the flags of that instruction set. Everything lives in that namespace, so
// that no two instruction sets ever share a function.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX__) || defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(SPARSAE_NEON)
#include <arm_neon.h>
#endif

#if defined(__GNUC__) || defined(__clang__)
#define SPARSAE_INLINE inline __attribute__((always_inline))
#define SPARSAE_OUTLINE __attribute__((noinline))
#define SPARSAE_LAMBDA __attribute__((always_inline))
#if defined(SPARSAE_SMALL_CODE)  // for sanitizers, which check every unrolled access
#define SPARSAE_UNROLL
#else
#define SPARSAE_UNROLL _Pragma("GCC unroll 16")
#endif
#else
#define SPARSAE_INLINE inline
#define SPARSAE_OUTLINE
#define SPARSAE_LAMBDA
#define SPARSAE_UNROLL
#endif

namespace SPARSAE_ISA {

constexpr int LANES = SPARSAE_LANES;

#if defined(SPARSAE_NEON)

typedef float32x4_t Vec;

SPARSAE_INLINE Vec load(const float* p) { return vld1q_f32(p); }
SPARSAE_INLINE void store(float* p, Vec v) { vst1q_f32(p, v); }
SPARSAE_INLINE Vec fma(float w, Vec x, Vec a) { return vfmaq_n_f32(a, x, w); }
SPARSAE_INLINE Vec fma(Vec w, Vec x, Vec a) { return vfmaq_f32(a, w, x); }
SPARSAE_INLINE Vec larger_lanes(Vec a, Vec b) { return vmaxq_f32(a, b); }

#elif defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float UnalignedVec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

SPARSAE_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
SPARSAE_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
SPARSAE_INLINE Vec fma(float w, Vec x, Vec a) { return w * x + a; }
SPARSAE_INLINE Vec fma(Vec w, Vec x, Vec a) { return w * x + a; }
SPARSAE_INLINE Vec larger_lanes(Vec a, Vec b) { return a > b ? a : b; }

template <class Pattern, std::size_t... J>
SPARSAE_INLINE Vec shuffle(Vec a, Vec b, std::index_sequence<J...>) {
    return __builtin_shufflevector(a, b, Pattern::at(static_cast<int>(J))...);
}

#else  // any C++17 compiler

struct Vec {
    float lane[LANES];
};

SPARSAE_INLINE Vec load(const float* p) {
    Vec v;
    std::memcpy(v.lane, p, sizeof v.lane);
    return v;
}
SPARSAE_INLINE void store(float* p, const Vec& v) { std::memcpy(p, v.lane, sizeof v.lane); }
SPARSAE_INLINE Vec operator+(const Vec& a, const Vec& b) {
    Vec v;
    for (int j = 0; j < LANES; j++) v.lane[j] = a.lane[j] + b.lane[j];
    return v;
}
SPARSAE_INLINE Vec operator*(const Vec& a, const Vec& b) {
    Vec v;
    for (int j = 0; j < LANES; j++) v.lane[j] = a.lane[j] * b.lane[j];
    return v;
}
SPARSAE_INLINE Vec fma(float w, const Vec& x, const Vec& a) {
    Vec v;
    for (int j = 0; j < LANES; j++) v.lane[j] = w * x.lane[j] + a.lane[j];
    return v;
}
SPARSAE_INLINE Vec fma(const Vec& w, const Vec& x, const Vec& a) { return w * x + a; }
SPARSAE_INLINE Vec larger_lanes(const Vec& a, const Vec& b) {
    Vec v;
    for (int j = 0; j < LANES; j++) v.lane[j] = a.lane[j] > b.lane[j] ? a.lane[j] : b.lane[j];
    return v;
}

template <class Pattern, std::size_t... J>
SPARSAE_INLINE Vec shuffle(const Vec& a, const Vec& b, std::index_sequence<J...>) {
    const auto pick = [&](int from) { return from < LANES ? a.lane[from] : b.lane[from - LANES]; };
    return Vec{{pick(Pattern::at(static_cast<int>(J)))...}};
}

#endif

SPARSAE_INLINE Vec broadcast(float w) {
    alignas(64) float lane[LANES];
    SPARSAE_UNROLL
    for (int j = 0; j < LANES; j++) lane[j] = w;
    return load(lane);
}

// Keeps a loaded vector in its register: where it is used twice, compilers would rather load it twice.
SPARSAE_INLINE Vec loaded_once(Vec v) {
#if (defined(__GNUC__) || defined(__clang__)) && defined(__AVX512F__)
    asm("" : "+v"(v));
#elif (defined(__GNUC__) || defined(__clang__)) && defined(__SSE2__)
    asm("" : "+x"(v));
#elif defined(SPARSAE_NEON)
    asm("" : "+w"(v));
#endif
    return v;
}

// A weight that meets several vectors: NEON multiplies by one lane of a register, the others by a vector full of it.
#if defined(SPARSAE_NEON)
using Weight = float;
SPARSAE_INLINE Weight load_weight(const float* p) { return *p; }
#else
using Weight = Vec;
SPARSAE_INLINE Weight load_weight(const float* p) { return loaded_once(broadcast(*p)); }
#endif

// Which lane of (a, b) each lane of the result comes from; b's lanes are numbered from LANES on. The first four work
// within chunks of four lanes, the last two exchange whole chunks at distance S: each is one instruction.
struct UnpackLow {
    static constexpr int at(int j) { return j / 4 * 4 + j % 4 / 2 + (j & 1) * LANES; }
};
struct UnpackHigh {
    static constexpr int at(int j) { return j / 4 * 4 + 2 + j % 4 / 2 + (j & 1) * LANES; }
};
struct MoveLow {
    static constexpr int at(int j) { return j % 4 < 2 ? j : LANES + j - 2; }
};
struct MoveHigh {
    static constexpr int at(int j) { return j % 4 < 2 ? j + 2 : LANES + j; }
};
template <int S>
struct ChunkLow {
    static constexpr int at(int j) { return (j / 4 & S) == 0 ? j : LANES + j - 4 * S; }
};
template <int S>
struct ChunkHigh {
    static constexpr int at(int j) { return (j / 4 & S) == 0 ? j + 4 * S : LANES + j; }
};

#if defined(SPARSAE_NEON)
// Written out, so that they do not depend on what a compiler makes of a general shuffle.
template <class Pattern>
Vec shuffle(Vec a, Vec b);
template <>
SPARSAE_INLINE Vec shuffle<UnpackLow>(Vec a, Vec b) {
    return vzip1q_f32(a, b);
}
template <>
SPARSAE_INLINE Vec shuffle<UnpackHigh>(Vec a, Vec b) {
    return vzip2q_f32(a, b);
}
template <>
SPARSAE_INLINE Vec shuffle<MoveLow>(Vec a, Vec b) {
    return vreinterpretq_f32_f64(vzip1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}
template <>
SPARSAE_INLINE Vec shuffle<MoveHigh>(Vec a, Vec b) {
    return vreinterpretq_f32_f64(vzip2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}
#else
template <class Pattern>
SPARSAE_INLINE Vec shuffle(Vec a, Vec b) {
    return shuffle<Pattern>(a, b, std::make_index_sequence<LANES>());
}
#endif

template <int S>
SPARSAE_INLINE void exchange_chunks(Vec (&r)[LANES]) {
    SPARSAE_UNROLL
    for (int i = 0; i < LANES; i++) {
        if ((i / 4 & S) == 0) {
            const Vec a = r[i], b = r[i + 4 * S];
            r[i] = shuffle<ChunkLow<S>>(a, b);
            r[i + 4 * S] = shuffle<ChunkHigh<S>>(a, b);
        }
    }
}

// LANES vectors as the rows of a square matrix, transposed in place.
SPARSAE_INLINE void transpose(Vec (&r)[LANES]) {
    SPARSAE_UNROLL
    for (int i = 0; i < LANES; i += 4) {
        const Vec t0 = shuffle<UnpackLow>(r[i], r[i + 1]), t1 = shuffle<UnpackHigh>(r[i], r[i + 1]);
        const Vec t2 = shuffle<UnpackLow>(r[i + 2], r[i + 3]), t3 = shuffle<UnpackHigh>(r[i + 2], r[i + 3]);
        r[i] = shuffle<MoveLow>(t0, t2);
        r[i + 1] = shuffle<MoveHigh>(t0, t2);
        r[i + 2] = shuffle<MoveLow>(t1, t3);
        r[i + 3] = shuffle<MoveHigh>(t1, t3);
    }
    if constexpr (LANES >= 8) exchange_chunks<1>(r);
    if constexpr (LANES >= 16) exchange_chunks<2>(r);
}

template <int S>
SPARSAE_INLINE Vec add_chunks(Vec a, Vec b) {
    return shuffle<ChunkLow<S>>(a, b) + shuffle<ChunkHigh<S>>(a, b);
}

// In each chunk of four lanes, the sums of that chunk of a, b, c and d.
SPARSAE_INLINE Vec chunk_sums(Vec a, Vec b, Vec c, Vec d) {
#if defined(SPARSAE_NEON)
    return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
#else
    const Vec u = shuffle<UnpackLow>(a, b) + shuffle<UnpackHigh>(a, b);
    const Vec v = shuffle<UnpackLow>(c, d) + shuffle<UnpackHigh>(c, d);
    return shuffle<MoveLow>(u, v) + shuffle<MoveHigh>(u, v);
#endif
}

// The first four lanes of the result are the sums over all chunks.
SPARSAE_INLINE Vec fold_chunks(Vec q) {
    if constexpr (LANES >= 16) q = q + shuffle<ChunkHigh<2>>(q, q);
    if constexpr (LANES >= 8) q = q + shuffle<ChunkHigh<1>>(q, q);
    return q;
}

// Lane i of the result is the sum of the lanes of product(i), added in the same order for every i.
template <class Product>
SPARSAE_INLINE Vec sums(const Product& product) {
    Vec q[LANES / 4];
    SPARSAE_UNROLL
    for (int g = 0; g < LANES / 4; g++) {
        const Vec a = product(4 * g), b = product(4 * g + 1), c = product(4 * g + 2), d = product(4 * g + 3);
        q[g] = chunk_sums(a, b, c, d);
    }
    if constexpr (LANES == 4) return q[0];
    if constexpr (LANES == 8) return add_chunks<1>(q[0], q[LANES / 8]);
    if constexpr (LANES == 16)
        return add_chunks<2>(add_chunks<1>(q[0], q[LANES / 16]), add_chunks<1>(q[LANES / 8], q[3 * LANES / 16]));
}

// A store that does not read the line into the cache, where there is one (NEON has none, and its cores need none for
// whole lines); p must be aligned to the vector.
SPARSAE_INLINE void stream(float* p, Vec v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__)
    _mm256_stream_ps(p, (__m256)v);
#else
    store(p, v);
#endif
}

SPARSAE_INLINE void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

SPARSAE_INLINE void prefetch(const void* p) {
#if defined(__GNUC__) || defined(__clang__)
    __builtin_prefetch(p, 0, 2);
#else
    (void)p;
#endif
}

// bfloat16 is the upper half of a float; rounding is to nearest even, NaN stays NaN.
struct BFloat16 {
    std::uint16_t bits;
};

SPARSAE_INLINE float to_float(float value) { return value; }
SPARSAE_INLINE float to_float(BFloat16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}
SPARSAE_INLINE void from_float(float value, float& out) { out = value; }
SPARSAE_INLINE void from_float(float value, BFloat16& out) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    out.bits = static_cast<std::uint16_t>(nan ? (bits >> 16 | 0x40u) : rounded);
}

SPARSAE_INLINE Vec load_as_float(const float* p) { return load(p); }
SPARSAE_INLINE Vec load_as_float(const BFloat16* p) {
#if defined(SPARSAE_NEON)
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16));
#else
    alignas(64) float lane[LANES];
    for (int j = 0; j < LANES; j++) lane[j] = to_float(p[j]);
    return load(lane);
#endif
}
SPARSAE_INLINE void store_from_float(float* p, Vec v) { store(p, v); }
SPARSAE_INLINE void store_from_float(BFloat16* p, Vec v) {
#if defined(SPARSAE_NEON)
    const uint32x4_t bits = vreinterpretq_u32_f32(v), upper = vshrq_n_u32(bits, 16);
    const uint32x4_t up = vaddq_u32(vandq_u32(upper, vdupq_n_u32(1)), vdupq_n_u32(0x7fff));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, up), 16), quiet = vorrq_u32(upper, vdupq_n_u32(0x40));
    vst1_u16(&p->bits, vmovn_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet)));
#else
    alignas(64) float lane[LANES];
    store(lane, v);
    for (int j = 0; j < LANES; j++) from_float(lane[j], p[j]);
#endif
}

}  // namespace SPARSAE_ISA
