// Y = X W^T + b for a few tokens, as when a model generates: bound by reading W, which is walked once. Single weights are
// read in row order where a caller who comes back token by token has brought them there, else in the parameter's order.
#pragma once

#include <algorithm>
#include <cstring>

#include "problem.hpp"
#include "tiles.hpp"

namespace SPARSAE_ISA {

using sparsae::Problem;

// Beyond so many tokens the tiles of forward.hpp are faster.
constexpr std::int64_t FEW_TOKENS = 2;

// Adds grid columns [first, last) of W times one token, x, to sums: one for each weight of a unit and each grid row, so
// that nothing is added across lanes before the end.
template <class Index>
struct AddColumns {
    const Problem& p;
    const Index* indices;

    // Single weights. The rows of a column differ, so that four sums may be under way.
    SPARSAE_OUTLINE void weights(std::int64_t first, std::int64_t last, const float* x, float* sums) const {
        for (std::int64_t c = first; c < last; c++) {
            const float xc = x[c];
            float* const column = sums - c * p.out;
            const std::int64_t end = p.col_ptr[c + 1];
            std::int64_t k = p.col_ptr[c];
            for (; k + 4 <= end; k += 4) {
                const Index i0 = indices[k], i1 = indices[k + 1], i2 = indices[k + 2], i3 = indices[k + 3];
                const float s0 = column[i0] + p.values[k] * xc, s1 = column[i1] + p.values[k + 1] * xc;
                const float s2 = column[i2] + p.values[k + 2] * xc, s3 = column[i3] + p.values[k + 3] * xc;
                column[i0] = s0, column[i1] = s1, column[i2] = s2, column[i3] = s3;
            }
            for (; k < end; k++) column[indices[k]] += p.values[k] * xc;
        }
    }

    // Blocks of SIZE weights, 0 for any. `repeated` has room for the inputs that the weights of a block meet.
    template <int SIZE>
    SPARSAE_OUTLINE void blocks(std::int64_t first, std::int64_t last, const float* x, float* sums,
                                float* repeated) const {
        const std::int64_t size = SIZE ? SIZE : p.unit_out * p.unit_in;
        for (std::int64_t c = first; c < last; c++) {
            for (std::int64_t i = 0; i < p.unit_out; i++)
                std::memcpy(repeated + i * p.unit_in, x + c * p.unit_in,
                            static_cast<std::size_t>(p.unit_in) * sizeof(float));
            for (std::int64_t k = p.col_ptr[c]; k < p.col_ptr[c + 1]; k++) {
                const float* w = p.values + k * size;
                float* sum = sums + (std::int64_t{indices[k]} - c * p.grid_rows()) * size;
                std::int64_t e = 0;
                for (; e + LANES <= size; e += LANES) store(sum + e, load(w + e) * load(repeated + e) + load(sum + e));
                for (; e < size; e++) sum[e] += w[e] * repeated[e];
            }
        }
    }

    SPARSAE_INLINE void operator()(std::int64_t first, std::int64_t last, const float* x, float* sums,
                                   float* repeated) const {
        const std::int64_t size = p.unit_out * p.unit_in;
        if (size == 1)
            weights(first, last, x, sums);
        else if (size == 16)
            blocks<16>(first, last, x, sums, repeated);
        else
            blocks<0>(first, last, x, sums, repeated);
    }
};

// The columns are cut into parts of equal numbers of units, each summed on its own and then in their order: how many
// there are depends on W alone, so the result is the same for every number of threads.
template <class Element, class Index>
void forward_few_as(const Problem& p) {
    const AddColumns<Index> add{p, static_cast<const Index*>(p.indices)};
    const auto* x = static_cast<const Element*>(p.x);
    auto* y = static_cast<Element*>(p.y);
    const std::int64_t size = p.unit_out * p.unit_in;
    const std::int64_t parts = larger(1, smaller(8, p.count * size / 16384));
    const int threads = static_cast<int>(larger(1, smaller(p.threads, parts)));
    const std::int64_t token_size = padded(p.grid_rows() * size), part_size = p.tokens * token_size + padded(size);
    float* scratch = sparsae::workspace(parts * part_size + p.tokens * p.in);
    float* xs = scratch + parts * part_size;
    for (std::int64_t i = 0; i < p.tokens * p.in; i++) xs[i] = to_float(x[i]);
    const auto first_column = [&](std::int64_t part) {
        const std::int32_t* end = p.col_ptr + p.grid_cols();
        return part == parts ? p.grid_cols() : std::lower_bound(p.col_ptr, end, p.count * part / parts) - p.col_ptr;
    };
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t part = 0; part < parts; part++) {
        float* sums = scratch + part * part_size;
        float* repeated = sums + p.tokens * token_size;
        std::memset(sums, 0, static_cast<std::size_t>(p.tokens * token_size) * sizeof(float));
        const std::int64_t first = first_column(part), last = first_column(part + 1);
        for (std::int64_t t = 0; t < p.tokens; t++) add(first, last, xs + t * p.in, sums + t * token_size, repeated);
    }
    for (std::int64_t t = 0; t < p.tokens; t++)
        for (std::int64_t o = 0; o < p.out; o++) {
            float sum = p.bias ? p.bias[o] : 0.0f;
            for (std::int64_t part = 0; part < parts; part++) {
                const float* of_row = scratch + part * part_size + t * token_size + o * p.unit_in;
                for (std::int64_t j = 0; j < p.unit_in; j++) sum += of_row[j];
            }
            from_float(sum, y[t * p.out + o]);
        }
}

// Rows [first, last) of single weights times one token, in sums of which none waits for another. Rows are whole steps: the
// lengths of their ends are too irregular to be foreseen, and every wrong guess would cost as much as several weights.
template <class Element>
SPARSAE_OUTLINE void rows_of_token(const Problem& p, std::int64_t first, std::int64_t last, const float* x, Element* y) {
    const auto* columns = static_cast<const std::uint16_t*>(p.columns);
    std::int64_t k = p.row_ptr[first];
    for (std::int64_t r = first; r < last; r++) {
        float s[sparsae::ROW_STEP] = {};
        for (const std::int64_t end = p.row_ptr[r + 1]; k < end; k += sparsae::ROW_STEP) {
            SPARSAE_UNROLL
            for (int i = 0; i < sparsae::ROW_STEP; i++) s[i] += p.row_values[k + i] * x[columns[k + i]];
        }
        const float sum = ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
        from_float(p.bias ? sum + p.bias[r] : sum, y[r]);
    }
}

template <class Element>
void forward_rows_as(const Problem& p) {
    const auto* x = static_cast<const Element*>(p.x);
    auto* y = static_cast<Element*>(p.y);
    float* xs = sparsae::workspace(p.tokens * p.in);
    for (std::int64_t i = 0; i < p.tokens * p.in; i++) xs[i] = to_float(x[i]);
    const std::int64_t count = p.row_ptr[p.out];
    const int parts = static_cast<int>(larger(1, smaller(p.threads, count / 16384)));
    const auto first_row = [&](int part) {
        if (part == parts) return p.out;
        const std::int32_t* end = p.row_ptr + p.out;
        return static_cast<std::int64_t>(std::lower_bound(p.row_ptr, end, count * part / parts) - p.row_ptr);
    };
#pragma omp parallel for schedule(static) num_threads(parts) if (parts > 1)
    for (int part = 0; part < parts; part++)
        for (std::int64_t t = 0; t < p.tokens; t++)
            rows_of_token(p, first_row(part), first_row(part + 1), xs + t * p.in, y + t * p.out);
}

inline void forward_few(const Problem& p) {
    if (p.row_values && p.columns_narrow) return p.bfloat16 ? forward_rows_as<BFloat16>(p) : forward_rows_as<float>(p);
    if (p.bfloat16)
        p.indices_wide ? forward_few_as<BFloat16, std::int64_t>(p) : forward_few_as<BFloat16, std::int32_t>(p);
    else
        p.indices_wide ? forward_few_as<float, std::int64_t>(p) : forward_few_as<float, std::int32_t>(p);
}

}  // namespace SPARSAE_ISA
