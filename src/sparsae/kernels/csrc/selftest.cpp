// The kernels against the naive product, on many shapes and every instruction set of this machine: a program of its own,
// so that it can be compiled with sanitizers. It links api.cpp and the isa_*.cpp files.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "problem.hpp"

extern "C" int sparsae_select_isa(const char*);
extern "C" int sparsae_index(const void*, int, std::int64_t, std::int64_t, std::int64_t, std::int32_t*, std::int32_t*,
                             void*, int, std::int32_t*);
extern "C" int sparsae_forward(const sparsae::Problem*);
extern "C" int sparsae_backward(const sparsae::Problem*);

namespace {

std::mt19937 rng(1);
int failures = 0;

std::vector<float> random_floats(std::size_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> values(n);
    for (float& value : values) value = normal(rng);
    return values;
}

void compare(const char* what, const std::vector<float>& got, const std::vector<double>& want, double terms) {
    for (std::size_t i = 0; i < want.size(); i++) {
        if (!(std::fabs(got[i] - want[i]) <= 1e-5 * (std::fabs(want[i]) + std::sqrt(terms) + 1))) {
            std::printf("%s[%zu] is %g, not %g\n", what, i, got[i], want[i]);
            failures++;
            return;
        }
    }
}

template <class Index, class Column>
void check(std::int64_t rows, std::int64_t cols, std::int64_t b_out, std::int64_t b_in, std::int64_t tokens,
           double density, int threads) {
    sparsae::Problem p{};
    p.tokens = tokens, p.out = rows * b_out, p.in = cols * b_in, p.unit_out = b_out, p.unit_in = b_in;
    p.threads = threads, p.indices_wide = sizeof(Index) == 8, p.columns_narrow = sizeof(Column) == 2;
    std::vector<Index> indices;
    std::uniform_real_distribution<double> uniform;
    for (std::int64_t unit = 0; unit < rows * cols; unit++)
        if (uniform(rng) < density) indices.push_back(static_cast<Index>(unit));
    p.count = static_cast<std::int64_t>(indices.size());
    std::vector<std::int32_t> col_ptr(cols + 1), row_ptr(rows + 1), source(p.count);
    std::vector<Column> columns(p.count);
    if (sparsae_index(indices.data(), p.indices_wide, p.count, rows, cols, col_ptr.data(), row_ptr.data(),
                      columns.data(), p.columns_narrow, source.data()) != 0) {
        std::printf("the index structures were refused\n");
        failures++;
        return;
    }
    const auto values = random_floats(p.count * b_out * b_in), bias = random_floats(p.out);
    const auto x = random_floats(tokens * p.in), dy = random_floats(tokens * p.out);
    // Exactly as large as they have to be, so that AddressSanitizer sees any step beyond.
    std::vector<float> y(tokens * p.out), dx(tokens * p.in), dvalues(values.size());
    std::vector<double> exact_y(y.size()), exact_dx(dx.size()), exact_dvalues(values.size());
    for (std::int64_t t = 0; t < tokens; t++)
        for (std::int64_t o = 0; o < p.out; o++) exact_y[t * p.out + o] = bias[o];
    for (std::int64_t k = 0; k < p.count; k++)
        for (std::int64_t i = 0; i < b_out; i++)
            for (std::int64_t j = 0; j < b_in; j++)
                for (std::int64_t t = 0; t < tokens; t++) {
                    const std::int64_t o = t * p.out + indices[k] % rows * b_out + i;
                    const std::int64_t c = t * p.in + indices[k] / rows * b_in + j, w = (k * b_out + i) * b_in + j;
                    exact_y[o] += double{values[w]} * x[c];
                    exact_dx[c] += double{values[w]} * dy[o];
                    exact_dvalues[w] += double{dy[o]} * x[c];
                }
    p.indices = indices.data(), p.col_ptr = col_ptr.data(), p.row_ptr = row_ptr.data(), p.columns = columns.data();
    p.source = source.data(), p.values = values.data(), p.bias = bias.data(), p.x = x.data(), p.dy = dy.data();
    p.y = y.data(), p.dx = dx.data(), p.dvalues = dvalues.data();
    if (sparsae_forward(&p) != 0 || sparsae_backward(&p) != 0) failures++;
    compare("y", y, exact_y, static_cast<double>(p.in));
    compare("dx", dx, exact_dx, static_cast<double>(p.out));
    compare("dvalues", dvalues, exact_dvalues, static_cast<double>(tokens));
}

}  // namespace

int main() {
    for (const char* isa : {"portable", "avx2", "avx512"}) {
        if (sparsae_select_isa(isa) != 0) continue;
        for (const std::int64_t tokens : {0, 1, 5, 16, 63, 64, 130})
            for (const double density : {0.0, 0.1, 0.6, 1.0})
                for (const int threads : {1, 2}) {
                    check<std::int32_t, std::uint16_t>(1, 1, 1, 1, tokens, density, threads);
                    check<std::int32_t, std::uint16_t>(37, 21, 1, 1, tokens, density, threads);
                    check<std::int64_t, std::int32_t>(16, 48, 1, 1, tokens, density, threads);
                    check<std::int32_t, std::uint16_t>(1, 50, 1, 1, tokens, density, threads);
                    check<std::int32_t, std::uint16_t>(50, 1, 1, 1, tokens, density, threads);
                    check<std::int32_t, std::int32_t>(5, 6, 4, 4, tokens, density, threads);
                    check<std::int32_t, std::uint16_t>(3, 4, 16, 16, tokens, density, threads);
                    check<std::int64_t, std::uint16_t>(4, 7, 3, 5, tokens, density, threads);
                    check<std::int32_t, std::uint16_t>(2, 2, 6, 9, tokens, density, threads);
                }
        std::printf("%s: %d failures\n", isa, failures);
    }
    return failures != 0;
}
