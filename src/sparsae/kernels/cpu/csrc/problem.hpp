// What the kernels are asked to compute: plain pointers and sizes, shared by the C interface and every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsae {

constexpr int ROW_STEP = 8;

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
    const void* columns;         // of blocks, and beside row_values; uint16 where columns_narrow, else int32
    const std::int32_t* source;  // of blocks only, else null
    const float* values;
    // The values in row order where the caller has them (of single weights), else null. Each row is then filled up to a multiple
    // of ROW_STEP with zero weights, which row_ptr and columns count too.
    const float* row_values;
    const float* bias;  // null, or (out,)
    const void* x;      // (tokens, in), element
    const void* dy;     // (tokens, out)
    void* y;            // (tokens, out)
    void* dx;           // (tokens, in) or null
    float* dvalues;     // as values, or null
    float* dbias;       // (out,) or null; of an MLP only of its hidden layer
    std::int32_t indices_wide, columns_narrow;
    std::int32_t bfloat16;  // element type of x, y, dx, dy: 0 float32, 1 bfloat16
    std::int32_t threads;

    std::int64_t grid_rows() const { return out / unit_out; }
    std::int64_t grid_cols() const { return in / unit_in; }
    std::int64_t element_size() const { return bfloat16 ? 2 : 4; }
    bool blocks() const { return unit_out != 1 || unit_in != 1; }
};

// up and gate: (hidden, in), down: (out, hidden), all over the same units. up.x is the input, down.y the output; backward
// reads up.x and down.dy and writes up.dx, and dvalues and dbias of each.
struct Mlp {
    Problem up, gate, down;
    std::int32_t activation;  // 0 GELU in its tanh form, 1 GELU, 2 ReLU, 3 SiLU
    std::int32_t gated;       // else `gate` is not read
    // Null, or tokens * hidden elements (twice that where gated) that forward writes and backward of the same instruction
    // set reads: what goes into the activation, in the kernels' own order.
    void* kept;
    std::int32_t kept_bfloat16;  // its element type: 0 float32, 1 bfloat16
};

// Float32 of all heads: element (b, h, t, f) lies at data + b * batch + h * head + t * token + f.
struct Heads {
    float* data;
    std::int64_t batch, head, token;

    float* head_of(std::int64_t b, std::int64_t h) const { return data + b * batch + h * head; }
};

// Causal attention over whole sequences: y = softmax(scale q k^T) v, each query with the keys up to its own. `heads` heads of
// queries share `kv_heads` heads of keys and values, as many in a row as go into it. Forward writes y and logsum (batch,
// heads, tokens), the logarithm of the sum of each row's exponentials; backward reads them and dy, and writes dq, dk and dv.
struct Attention {
    std::int64_t batch, heads, kv_heads, tokens, size;
    Heads q, k, v, y, dy, dq, dk, dv;
    float* logsum;
    float scale;
    std::int32_t threads;
};

// Rows of logits (tokens, vocabulary) and of a teacher's (taught, vocabulary), of the first tokens. sums: (2, tokens), of each
// token -log softmax(logits)[target] and sum softmax(teacher) (log softmax(teacher) - log softmax(logits)), both 0 where the
// target is `ignored`. gradient: of ce_weight times the former and kl_weight times the latter, or null.
struct Losses {
    std::int64_t tokens, vocabulary, taught, ignored;
    const float *logits, *teacher;
    const std::int64_t* targets;
    float *sums, *gradient;
    float ce_weight, kl_weight;
    std::int32_t threads;
};

// x to (x - m) scale / sqrt(mean square of that + epsilon) + bias, where m is the mean if centered, else 0.
struct Norm {
    const float* scale;  // null: no norm
    const float* bias;   // or null
    float epsilon;
    std::int32_t centered;
};

// A block of a decoder: x + attention(norm_1(x)), then that + mlp(norm_2(that)). Problems are of one token of float32, with
// x and y in the buffers of `Token`. keys and values: (kv_heads, context, head_size), those of the tokens before.
struct TokenBlock {
    Norm norm_1, norm_2, query_norm, key_norm;
    Problem projections[3], output, up, gate, down;
    float* keys;
    float* values;
    float scale;  // of queries times keys
    std::int32_t projection_count;  // 1 where one gives queries, keys and values
    std::int32_t activation, gated;
};

// One token at a position. x: (width,), before the first block and after the last. The rest are buffers: normed and added
// (width,), projected ((heads + 2 kv_heads) head_size,), attended (heads head_size,), hidden and gate (hidden features,),
// scores (heads, context). cos and sin: (context, head_size), or null where positions are not rotary.
struct Token {
    const TokenBlock* blocks;
    std::int64_t count, width, heads, kv_heads, head_size, context, position;
    const float *cos, *sin;
    float *x, *normed, *added, *projected, *attended, *hidden, *gate, *scores;
};

struct Kernels {
    const char* name;
    void (*forward)(const Problem&);
    void (*backward)(const Problem&);
    void (*mlp_forward)(const Mlp&);
    void (*mlp_backward)(const Mlp&);
    void (*attention_forward)(const Attention&);
    void (*attention_backward)(const Attention&);
    void (*losses)(const Losses&);
    void (*token)(const Token&);
    double (*multiply_add)(std::int64_t rounds, int threads);
    void (*triad)(float* a, const float* b, const float* c, std::int64_t n, int threads);
};

// One function for each instruction set that was compiled.
const Kernels& kernels_portable();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_neon();

// At least n floats, aligned to a cache line, that belong to the calling thread until its next call. Null where there is
// no memory left.
float* workspace(std::size_t n);

}  // namespace sparsae
