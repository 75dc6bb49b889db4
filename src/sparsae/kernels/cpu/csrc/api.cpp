// The C interface: which instruction set runs, the index structures, and the workspace.
//
// SPARSAE_X86 is defined where the AVX2 and AVX-512 kernels were compiled too, SPARSAE_ARM64 where those for NEON were.
// Functions return 0, or an error code that the Python side turns into an exception.
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>

#include "problem.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(_WIN32)
#define SPARSAE_EXPORT extern "C" __declspec(dllexport)
#else
#define SPARSAE_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace sparsae {
namespace {

enum Status { OK = 0, OUT_OF_RANGE = 1, NOT_ASCENDING = 2, NO_MEMORY = 3 };

// Fresh memory is given out page by page at its first use, which for a large result costs more than computing it at high
// sparsity; huge pages make it cheap. Nothing happens where the system does not know them.
void use_huge_pages(void* begin, std::int64_t bytes) {
#if defined(__linux__)
    constexpr std::uintptr_t page = std::uintptr_t{1} << 21;
    const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(begin);
    const std::uintptr_t first = (at + page - 1) / page * page, last = (at + static_cast<std::uintptr_t>(bytes)) / page * page;
    if (begin != nullptr && last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)begin, (void)bytes;
#endif
}

// Memory of one thread, kept from call to call: fresh pages would cost more than many a kernel.
class Arena {
public:
    float* take(std::size_t n) {
        constexpr std::size_t page = std::size_t{1} << 21;
        const std::size_t bytes = (n * sizeof(float) + page - 1) / page * page;
        if (bytes > size_) {
            data_.reset();
            size_ = 0;
            void* fresh = ::operator new(bytes, std::align_val_t{page}, std::nothrow);
            if (fresh == nullptr) throw std::bad_alloc();
            data_.reset(static_cast<float*>(fresh));
            size_ = bytes;
            use_huge_pages(fresh, static_cast<std::int64_t>(bytes));
        }
        return data_.get();
    }

private:
    struct Free {
        void operator()(float* p) const { ::operator delete(p, std::align_val_t{std::size_t{1} << 21}); }
    };
    std::unique_ptr<float, Free> data_;
    std::size_t size_ = 0;
};

bool runs(const char* name) {
#if defined(SPARSAE_X86)
    if (std::strcmp(name, "avx512") == 0)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (std::strcmp(name, "avx2") == 0) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(SPARSAE_ARM64)
    if (std::strcmp(name, "neon") == 0) return true;  // every 64-bit Arm processor has it
#endif
    return std::strcmp(name, "portable") == 0;
}

const Kernels* find(const char* name) {
    if (!runs(name)) return nullptr;
#if defined(SPARSAE_X86)
    if (std::strcmp(name, "avx512") == 0) return &kernels_avx512();
    if (std::strcmp(name, "avx2") == 0) return &kernels_avx2();
#elif defined(SPARSAE_ARM64)
    if (std::strcmp(name, "neon") == 0) return &kernels_neon();
#endif
    return &kernels_portable();
}

const Kernels* best() {
    if (const char* forced = std::getenv("SPARSAE_ISA"))
        if (const Kernels* kernels = find(forced)) return kernels;
    for (const char* name : {"avx512", "avx2", "neon"})
        if (const Kernels* kernels = find(name)) return kernels;
    return &kernels_portable();
}

const Kernels*& selected() {
    static const Kernels* kernels = best();
    return kernels;
}

// col_ptr from ascending indices, which are checked on the way.
template <class Index>
int point_columns(const Index* indices, std::int64_t count, std::int64_t rows, std::int64_t cols,
                  std::int32_t* col_ptr) {
    std::int64_t column = 0;
    col_ptr[0] = 0;
    Index previous = -1;
    for (std::int64_t k = 0; k < count; k++) {
        const Index index = indices[k];
        if (index < 0 || static_cast<std::int64_t>(index) >= rows * cols) return OUT_OF_RANGE;
        if (index <= previous) return NOT_ASCENDING;
        previous = index;
        while (index >= (column + 1) * rows) col_ptr[++column] = static_cast<std::int32_t>(k);
    }
    while (column < cols) col_ptr[++column] = static_cast<std::int32_t>(count);
    return OK;
}

// Row order by counting: row_ptr first holds counts, then the next free place of each row, then where each row starts.
template <class Index, class Column>
void order_by_rows(const Index* indices, std::int64_t rows, std::int64_t cols, const std::int32_t* col_ptr,
                   std::int32_t* row_ptr, Column* columns, std::int32_t* source) {
    const std::int32_t count = col_ptr[cols];
    std::memset(row_ptr, 0, static_cast<std::size_t>(rows + 1) * sizeof(std::int32_t));
    for (std::int64_t c = 0; c < cols; c++)
        for (std::int32_t k = col_ptr[c]; k < col_ptr[c + 1]; k++) row_ptr[indices[k] - c * rows]++;
    std::int32_t start = 0;
    for (std::int64_t r = 0; r < rows; r++) {
        const std::int32_t n = row_ptr[r];
        row_ptr[r] = start;
        start += n;
    }
    if (columns == nullptr) {
        row_ptr[rows] = count;
        return;
    }
    for (std::int64_t c = 0; c < cols; c++)
        for (std::int32_t k = col_ptr[c]; k < col_ptr[c + 1]; k++) {
            const std::int32_t at = row_ptr[indices[k] - c * rows]++;
            columns[at] = static_cast<Column>(c);
            if (source != nullptr) source[at] = k;
        }
    for (std::int64_t r = rows; r > 0; r--) row_ptr[r] = row_ptr[r - 1];
    row_ptr[0] = 0;
    row_ptr[rows] = count;
}

template <class Index>
int make_index(const Index* indices, std::int64_t count, std::int64_t rows, std::int64_t cols, std::int32_t* col_ptr,
               std::int32_t* row_ptr, void* columns, int narrow, std::int32_t* source) {
    const int status = point_columns(indices, count, rows, cols, col_ptr);
    if (status != OK || row_ptr == nullptr) return status;
    if (narrow)
        order_by_rows(indices, rows, cols, col_ptr, row_ptr, static_cast<std::uint16_t*>(columns), source);
    else
        order_by_rows(indices, rows, cols, col_ptr, row_ptr, static_cast<std::int32_t*>(columns), source);
    return OK;
}

}  // namespace

float* workspace(std::size_t n) {
    thread_local Arena arena;
    return arena.take(n);
}

}  // namespace sparsae

// The instruction set that runs.
SPARSAE_EXPORT const char* sparsae_isa() { return sparsae::selected()->name; }

// Choose one by name; 1 where this machine does not have it, or it was not compiled.
SPARSAE_EXPORT int sparsae_select_isa(const char* name) {
    const sparsae::Kernels* kernels = sparsae::find(name);
    if (kernels == nullptr) return 1;
    sparsae::selected() = kernels;
    return 0;
}

// What both sides must agree on. This counts up whenever what a function reads or writes changes its meaning.
SPARSAE_EXPORT int sparsae_interface() { return 5; }

// Bytes of the argument structures.
SPARSAE_EXPORT std::int64_t sparsae_problem_size() { return sizeof(sparsae::Problem); }
SPARSAE_EXPORT std::int64_t sparsae_mlp_size() { return sizeof(sparsae::Mlp); }
SPARSAE_EXPORT std::int64_t sparsae_attention_size() { return sizeof(sparsae::Attention); }
SPARSAE_EXPORT std::int64_t sparsae_losses_size() { return sizeof(sparsae::Losses); }
SPARSAE_EXPORT std::int64_t sparsae_token_size() { return sizeof(sparsae::Token) + sizeof(sparsae::TokenBlock); }

// Checks indices and makes the structures of `Problem`; with row_ptr null only col_ptr, with columns null no row order, with
// source null none of that.
SPARSAE_EXPORT int sparsae_index(const void* indices, int wide, std::int64_t count, std::int64_t rows, std::int64_t cols,
                                 std::int32_t* col_ptr, std::int32_t* row_ptr, void* columns, int narrow,
                                 std::int32_t* source) {
    using namespace sparsae;
    return wide ? make_index(static_cast<const std::int64_t*>(indices), count, rows, cols, col_ptr, row_ptr, columns,
                             narrow, source)
                : make_index(static_cast<const std::int32_t*>(indices), count, rows, cols, col_ptr, row_ptr, columns,
                             narrow, source);
}

SPARSAE_EXPORT int sparsae_forward(const sparsae::Problem* problem) try {
    sparsae::use_huge_pages(problem->y, problem->tokens * problem->out * problem->element_size());
    sparsae::selected()->forward(*problem);
    return sparsae::OK;
} catch (const std::bad_alloc&) {
    return sparsae::NO_MEMORY;
}

SPARSAE_EXPORT int sparsae_backward(const sparsae::Problem* problem) try {
    sparsae::use_huge_pages(problem->dx, problem->tokens * problem->in * problem->element_size());
    sparsae::selected()->backward(*problem);
    return sparsae::OK;
} catch (const std::bad_alloc&) {
    return sparsae::NO_MEMORY;
}

SPARSAE_EXPORT int sparsae_mlp_forward(const sparsae::Mlp* mlp) try {
    const sparsae::Problem& down = mlp->down;
    sparsae::use_huge_pages(down.y, down.tokens * down.out * down.element_size());
    sparsae::use_huge_pages(mlp->kept, down.tokens * down.in * (mlp->gated ? 2 : 1) * (mlp->kept_bfloat16 ? 2 : 4));
    sparsae::selected()->mlp_forward(*mlp);
    return sparsae::OK;
} catch (const std::bad_alloc&) {
    return sparsae::NO_MEMORY;
}

SPARSAE_EXPORT int sparsae_mlp_backward(const sparsae::Mlp* mlp) try {
    const sparsae::Problem& up = mlp->up;
    sparsae::use_huge_pages(up.dx, up.tokens * up.in * up.element_size());
    sparsae::selected()->mlp_backward(*mlp);
    return sparsae::OK;
} catch (const std::bad_alloc&) {
    return sparsae::NO_MEMORY;
}

SPARSAE_EXPORT int sparsae_attention_forward(const sparsae::Attention* attention) try {
    sparsae::selected()->attention_forward(*attention);
    return sparsae::OK;
} catch (const std::bad_alloc&) {
    return sparsae::NO_MEMORY;
}

SPARSAE_EXPORT int sparsae_attention_backward(const sparsae::Attention* attention) try {
    sparsae::selected()->attention_backward(*attention);
    return sparsae::OK;
} catch (const std::bad_alloc&) {
    return sparsae::NO_MEMORY;
}

SPARSAE_EXPORT int sparsae_losses(const sparsae::Losses* losses) try {
    sparsae::use_huge_pages(losses->gradient, losses->tokens * losses->vocabulary * 4);
    sparsae::selected()->losses(*losses);
    return sparsae::OK;
} catch (const std::bad_alloc&) {
    return sparsae::NO_MEMORY;
}

SPARSAE_EXPORT int sparsae_token(const sparsae::Token* token) try {
    sparsae::selected()->token(*token);
    return sparsae::OK;
} catch (const std::bad_alloc&) {
    return sparsae::NO_MEMORY;
}

// Multiply-adds in registers only; returns how many operations were done.
SPARSAE_EXPORT double sparsae_multiply_add(std::int64_t rounds, int threads) {
    return sparsae::selected()->multiply_add(rounds, threads);
}

// a = b + 3 c over n floats, through memory.
SPARSAE_EXPORT void sparsae_triad(float* a, const float* b, const float* c, std::int64_t n, int threads) {
    sparsae::selected()->triad(a, b, c, n, threads);
}
