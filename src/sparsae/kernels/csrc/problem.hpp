// What the kernels are asked to compute: plain pointers and sizes, shared by the C interface and every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsae {

// A sparse (out, in) weight over a grid of units, and the activations of `tokens` tokens, row-major.
//
// Units are numbered down the columns of the grid; `indices` holds the active ones in ascending order, and `values` their
// weights in that order, a block's row by row. The structures beside it are those that `sparsae_index` makes: where each
// grid column starts, where each grid row starts, and in row order the grid column and the position among `indices`.
struct Problem {
    std::int64_t tokens, out, in;
    std::int64_t unit_out, unit_in;
    std::int64_t count;
    const void* indices;         // int32, or int64 where indices_wide
    const std::int32_t* col_ptr;  // grid columns + 1
    const std::int32_t* row_ptr;  // grid rows + 1
    const void* columns;         // uint16 where columns_narrow, else int32
    const std::int32_t* source;  // of blocks only, else null
    const float* values;
    const float* bias;  // null, or (out,)
    const void* x;      // (tokens, in), element
    const void* dy;     // (tokens, out)
    void* y;            // (tokens, out)
    void* dx;           // (tokens, in) or null
    float* dvalues;     // as values, or null
    std::int32_t indices_wide, columns_narrow;
    std::int32_t bfloat16;  // element type of x, y, dx, dy: 0 float32, 1 bfloat16
    std::int32_t threads;

    std::int64_t grid_rows() const { return out / unit_out; }
    std::int64_t grid_cols() const { return in / unit_in; }
    std::int64_t element_size() const { return bfloat16 ? 2 : 4; }
    bool blocks() const { return unit_out != 1 || unit_in != 1; }
};

struct Kernels {
    const char* name;
    void (*forward)(const Problem&);
    void (*backward)(const Problem&);
};

// One function for each instruction set that was compiled.
const Kernels& kernels_portable();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

// At least n floats, aligned to a cache line, that belong to the calling thread until its next call. Null where there is
// no memory left.
float* workspace(std::size_t n);

}  // namespace sparsae
