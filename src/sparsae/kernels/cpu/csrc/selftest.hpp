// What the checks of selftest.cpp share: random numbers, bfloat16, and comparison with numbers in float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

namespace {

std::mt19937 rng(1);
int failures = 0;

std::vector<float> random_floats(std::size_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> values(n);
    for (float& value : values) value = normal(rng);
    return values;
}

// bfloat16 is the upper half of a float.
float widened(std::uint16_t upper) {
    const std::uint32_t bits = std::uint32_t{upper} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

std::uint16_t narrowed(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Float values as an element type, and back.
template <class Element>
std::vector<Element> elements(const std::vector<float>& values) {
    std::vector<Element> result;
    for (const float value : values)
        if constexpr (sizeof(Element) == 2)
            result.push_back(narrowed(value));
        else
            result.push_back(value);
    return result;
}

template <class Element>
std::vector<float> floats(const std::vector<Element>& values) {
    std::vector<float> result;
    for (const Element value : values)
        if constexpr (sizeof(Element) == 2)
            result.push_back(widened(value));
        else
            result.push_back(value);
    return result;
}

void compare(const char* what, const std::vector<float>& got, const std::vector<double>& want, double terms,
             bool bfloat16 = false) {
    for (std::size_t i = 0; i < want.size(); i++) {
        const double rounded = bfloat16 ? std::fabs(want[i]) / 256 : 0.0;
        if (!(std::fabs(got[i] - want[i]) <= rounded + 1e-5 * (std::fabs(want[i]) + std::sqrt(terms) + 1))) {
            std::printf("%s[%zu] is %g, not %g\n", what, i, got[i], want[i]);
            failures++;
            return;
        }
    }
}

// By the norm of what is off, where each number is made of numbers that were rounded to 8 bits.
void compare_norms(const char* what, const std::vector<float>& got, const std::vector<double>& want) {
    double off = 0, whole = 0;
    for (std::size_t i = 0; i < want.size(); i++) {
        off += (got[i] - want[i]) * (got[i] - want[i]);
        whole += want[i] * want[i];
    }
    if (!(std::sqrt(off) <= 0.01 * std::sqrt(whole))) {
        std::printf("%s is off by %g of a norm of %g\n", what, std::sqrt(off), std::sqrt(whole));
        failures++;
    }
}

}  // namespace
