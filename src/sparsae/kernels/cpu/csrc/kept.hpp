// What forward keeps of an MLP's hidden layer for backward: what goes into the activation.
#pragma once

#include "problem.hpp"
#include "tiles.hpp"

namespace SPARSAE_ISA {

using sparsae::Mlp;

// Of the tokens [first, first + n), a tile of both passes. Its elements begin at `first` times the hidden features (twice that
// where gated): feature f has the n tokens from f * n on, and the gate's features come after those of up.
template <int V>
class KeptTile {
public:
    KeptTile(const Mlp& m, std::int64_t first, std::int64_t n)
        : features_(m.up.out), n_(n), gated_(m.gated), bfloat16_(m.kept_bfloat16), at_(m.kept) {
        if (at_ == nullptr) return;
        at_ = static_cast<char*>(at_) + first * features_ * (gated_ ? 2 : 1) * (bfloat16_ ? 2 : 4);
    }

    // Nothing happens where nothing is kept.
    void write(const float* up, const float* gate) const {
        if (at_ == nullptr) return;
        bfloat16_ ? write_as<BFloat16>(up, gate) : write_as<float>(up, gate);
    }

    // The features [f0, f1) of up and, where gated, of the gate, back into their places.
    void read(std::int64_t f0, std::int64_t f1, float* up, float* gate) const {
        bfloat16_ ? read_as<BFloat16>(f0, f1, up, gate) : read_as<float>(f0, f1, up, gate);
    }

private:
    static constexpr int width = V * LANES;

    template <class Element>
    void write_as(const float* up, const float* gate) const {
        auto* to = static_cast<Element*>(at_);
        put(up, to);
        if (gated_) put(gate, to + features_ * n_);
    }

    template <class Element>
    void read_as(std::int64_t f0, std::int64_t f1, float* up, float* gate) const {
        const auto* from = static_cast<const Element*>(at_);
        take(from, f0, f1, up);
        if (gated_) take(from + features_ * n_, f0, f1, gate);
    }

    template <class Element>
    SPARSAE_OUTLINE void put(const float* tile, Element* to) const {
        if (n_ == width && streamable(to, width)) {
            for (std::int64_t i = 0; i < features_ * width; i += LANES) stream_out(to + i, load(tile + i));
            return;
        }
        if (n_ == width) {
            for (std::int64_t i = 0; i < features_ * width; i += LANES) store_from_float(to + i, load(tile + i));
            return;
        }
        for (std::int64_t f = 0; f < features_; f++)
            for (std::int64_t i = 0; i < n_; i++) from_float(tile[f * width + i], to[f * n_ + i]);
    }

    template <class Element>
    SPARSAE_OUTLINE void take(const Element* from, std::int64_t f0, std::int64_t f1, float* tile) const {
        if (n_ == width) {
            for (std::int64_t i = f0 * width; i < f1 * width; i += LANES) store(tile + i, load_as_float(from + i));
            return;
        }
        for (std::int64_t f = f0; f < f1; f++)
            for (std::int64_t i = 0; i < width; i++) tile[f * width + i] = i < n_ ? to_float(from[f * n_ + i]) : 0.0f;
    }

    std::int64_t features_, n_;
    bool gated_, bfloat16_;
    void* at_;
};

}  // namespace SPARSAE_ISA
