// The kernels against the naive product, on many shapes and every instruction set of this machine: a program of its own,
// so that it can be compiled with sanitizers. It links api.cpp and the isa_*.cpp files.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "problem.hpp"
#include "selftest.hpp"

// The kernels' headers once more, in a namespace of the test's own, for what they decide.
#define SPARSAE_ISA sparsae_selftest
#define SPARSAE_LANES 4
#include "kernels.hpp"

extern "C" int sparsae_select_isa(const char*);
extern "C" int sparsae_index(const void*, int, std::int64_t, std::int64_t, std::int64_t, std::int32_t*, std::int32_t*,
                             void*, int, std::int32_t*);
extern "C" int sparsae_forward(const sparsae::Problem*);
extern "C" int sparsae_backward(const sparsae::Problem*);
extern "C" int sparsae_mlp_forward(const sparsae::Mlp*);
extern "C" int sparsae_mlp_backward(const sparsae::Mlp*);
extern "C" int sparsae_attention_forward(const sparsae::Attention*);
extern "C" int sparsae_attention_backward(const sparsae::Attention*);
extern "C" int sparsae_losses(const sparsae::Losses*);

namespace {

// One token over weights in row order, rows filled up to whole steps.
template <class Column, class Element>
void check_decoding(sparsae::Problem p, std::vector<Element>& y, const std::vector<double>& exact) {
    std::vector<std::vector<std::size_t>> rows(p.out);
    const auto unit = [&](std::size_t k) {
        return p.indices_wide ? static_cast<const std::int64_t*>(p.indices)[k] : static_cast<const std::int32_t*>(p.indices)[k];
    };
    for (std::size_t k = 0; k < static_cast<std::size_t>(p.count); k++) rows[unit(k) % p.out].push_back(k);
    std::vector<std::int32_t> row_ptr{0};
    std::vector<Column> columns;
    std::vector<float> values;
    for (const auto& row : rows) {
        for (const std::size_t k : row) columns.push_back(static_cast<Column>(unit(k) / p.out)), values.push_back(p.values[k]);
        while (columns.size() % sparsae::ROW_STEP) columns.push_back(columns.back()), values.push_back(0.0f);
        row_ptr.push_back(static_cast<std::int32_t>(columns.size()));
    }
    p.row_ptr = row_ptr.data(), p.columns = columns.data(), p.row_values = values.data();
    if (sparsae_forward(&p) != 0) failures++;
    if (p.count) compare("y of rows", floats(y), exact, static_cast<double>(p.in), p.bfloat16);
}

template <class Index, class Column, class Element = float>
void check(std::int64_t rows, std::int64_t cols, std::int64_t b_out, std::int64_t b_in, std::int64_t tokens,
           double density, int threads) {
    sparsae::Problem p{};
    p.tokens = tokens, p.out = rows * b_out, p.in = cols * b_in, p.unit_out = b_out, p.unit_in = b_in;
    p.threads = threads, p.bfloat16 = sizeof(Element) == 2, p.indices_wide = sizeof(Index) == 8, p.columns_narrow = sizeof(Column) == 2;
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
    const auto x_in = elements<Element>(random_floats(tokens * p.in));
    const auto dy_in = elements<Element>(random_floats(tokens * p.out));
    const auto x = floats(x_in), dy = floats(dy_in);
    // Exactly as large as they have to be, so that AddressSanitizer sees any step beyond.
    std::vector<Element> y(tokens * p.out), dx(tokens * p.in);
    std::vector<float> dvalues(values.size()), dbias(p.out);
    std::vector<double> exact_y(y.size()), exact_dx(dx.size()), exact_dvalues(values.size()), exact_dbias(p.out);
    for (std::int64_t t = 0; t < tokens; t++)
        for (std::int64_t o = 0; o < p.out; o++) {
            exact_y[t * p.out + o] = bias[o];
            exact_dbias[o] += dy[t * p.out + o];
        }
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
    p.source = source.data(), p.values = values.data(), p.bias = bias.data(), p.x = x_in.data(), p.dy = dy_in.data();
    p.y = y.data(), p.dx = dx.data(), p.dvalues = dvalues.data(), p.dbias = dbias.data();
    if (sparsae_forward(&p) != 0 || sparsae_backward(&p) != 0) failures++;
    compare("y", floats(y), exact_y, static_cast<double>(p.in), p.bfloat16);
    if (tokens == 1 && b_out * b_in == 1 && p.columns_narrow) check_decoding<Column>(p, y, exact_y);
    compare("dx", floats(dx), exact_dx, static_cast<double>(p.out), p.bfloat16);
    compare("dvalues", dvalues, exact_dvalues, static_cast<double>(tokens));
    compare("dbias", dbias, exact_dbias, static_cast<double>(tokens));
}

// One weight of an MLP with everything that its Problem points at.
struct Weight {
    std::vector<std::int32_t> indices, col_ptr, row_ptr, source;
    std::vector<std::uint16_t> columns;
    std::vector<float> values, bias, dvalues, dbias;
    std::vector<double> dense;  // (out, in)

    Weight(sparsae::Problem& p, std::int64_t out, std::int64_t in, std::int64_t unit, std::int64_t tokens, int threads) {
        p.tokens = tokens, p.out = out, p.in = in, p.unit_out = p.unit_in = unit;
        p.threads = threads, p.columns_narrow = 1;
        const std::int64_t rows = out / unit, cols = in / unit;
        for (std::int64_t k = 0; k < rows * cols; k++)
            if (rng() % 3 == 0) indices.push_back(static_cast<std::int32_t>(k));
        p.count = static_cast<std::int64_t>(indices.size());
        col_ptr.resize(cols + 1), row_ptr.resize(rows + 1), source.resize(p.count), columns.resize(p.count);
        sparsae_index(indices.data(), 0, p.count, rows, cols, col_ptr.data(), row_ptr.data(), columns.data(), 1,
                      source.data());
        values = random_floats(p.count * unit * unit), bias = random_floats(out);
        for (float& value : values) value *= 0.3f;
        dvalues.resize(values.size()), dbias.resize(out), dense.resize(out * in);
        for (std::size_t w = 0; w < values.size(); w++) dense[place(p, w)] = values[w];
        p.indices = indices.data(), p.col_ptr = col_ptr.data(), p.row_ptr = row_ptr.data(), p.columns = columns.data();
        p.source = source.data(), p.values = values.data(), p.bias = bias.data();
        p.dvalues = dvalues.data(), p.dbias = dbias.data();
    }

    // Where weight w lies in the dense matrix.
    std::size_t place(const sparsae::Problem& p, std::size_t w) const {
        const std::int64_t size = p.unit_out * p.unit_in, k = indices[w / size], e = static_cast<std::int64_t>(w) % size;
        return (k % p.grid_rows() * p.unit_out + e / p.unit_in) * p.in + k / p.grid_rows() * p.unit_in + e % p.unit_in;
    }

    std::vector<double> at_units(const sparsae::Problem& p, const std::vector<double>& gradient) const {
        std::vector<double> found(values.size());
        for (std::size_t w = 0; w < found.size(); w++) found[w] = gradient[place(p, w)];
        return found;
    }
};

// C (n, m) += A B with A(i, k) and B(k, j) given by functions.
template <class A, class B>
std::vector<double> product(std::int64_t n, std::int64_t m, std::int64_t inner, const A& a, const B& b) {
    std::vector<double> c(n * m);
    for (std::int64_t i = 0; i < n; i++)
        for (std::int64_t j = 0; j < m; j++)
            for (std::int64_t k = 0; k < inner; k++) c[i * m + j] += a(i, k) * b(k, j);
    return c;
}

// An MLP with SiLU, gated or not, against dense products in float64. kept: bytes of an element of the hidden layer that forward
// keeps; 0: nothing.
void check_mlp(std::int64_t in, std::int64_t hidden, std::int64_t out, std::int64_t unit, std::int64_t tokens, bool gated,
               int threads, int kept = 0) {
    sparsae::Mlp m{};
    m.activation = 3, m.gated = gated;
    Weight up(m.up, hidden, in, unit, tokens, threads), down(m.down, out, hidden, unit, tokens, threads);
    Weight gate(m.gate, hidden, in, unit, tokens, threads);
    const auto x = random_floats(tokens * in), dy = random_floats(tokens * out);
    std::vector<float> y(tokens * out), dx(tokens * in);
    std::vector<char> room(tokens * hidden * (gated ? 2 : 1) * kept);
    m.up.x = x.data(), m.down.y = y.data(), m.down.dy = dy.data(), m.up.dx = dx.data();
    if (kept) m.kept = room.data(), m.kept_bfloat16 = kept == 2;
    const auto gradient_is = [&](const char* what, const std::vector<float>& got, const std::vector<double>& want) {
        kept == 2 ? compare_norms(what, got, want) : compare(what, got, want, 1000);
    };
    if (sparsae_mlp_forward(&m) != 0 || sparsae_mlp_backward(&m) != 0) failures++;
    const auto before = [&](const Weight& w) {
        auto z = product(tokens, hidden, in, [&](auto t, auto i) { return double{x[t * in + i]}; },
                         [&](auto i, auto h) { return w.dense[h * in + i]; });
        for (std::int64_t i = 0; i < tokens * hidden; i++) z[i] += w.bias[i % hidden];
        return z;
    };
    const std::vector<double> z = before(gated ? gate : up), u = gated ? before(up) : std::vector<double>(z.size(), 1.0);
    std::vector<double> a(z.size()), dz(z.size()), du(z.size());
    const auto da = product(tokens, hidden, out, [&](auto t, auto o) { return double{dy[t * out + o]}; },
                            [&](auto o, auto h) { return down.dense[o * hidden + h]; });
    for (std::size_t i = 0; i < z.size(); i++) {
        const double s = 1 / (1 + std::exp(-z[i])), f = z[i] * s;
        a[i] = f * u[i], dz[i] = da[i] * u[i] * (s + f * (1 - s)), du[i] = da[i] * f;
    }
    auto exact_y = product(tokens, out, hidden, [&](auto t, auto h) { return a[t * hidden + h]; },
                           [&](auto h, auto o) { return down.dense[o * hidden + h]; });
    for (std::int64_t i = 0; i < tokens * out; i++) exact_y[i] += down.bias[i % out];
    compare("mlp y", y, exact_y, 100);
    const std::vector<double>& d_up = gated ? du : dz;
    auto exact_dx = product(tokens, in, hidden, [&](auto t, auto h) { return d_up[t * hidden + h]; },
                            [&](auto h, auto i) { return up.dense[h * in + i]; });
    const auto weight = [&](const char* what, const Weight& w, const sparsae::Problem& p, const std::vector<double>& d) {
        const auto gradient = product(hidden, in, tokens, [&](auto h, auto t) { return d[t * hidden + h]; },
                                      [&](auto t, auto i) { return double{x[t * in + i]}; });
        gradient_is(what, w.dvalues, w.at_units(p, gradient));
        std::vector<double> sums(hidden);
        for (std::int64_t i = 0; i < tokens * hidden; i++) sums[i % hidden] += d[i];
        gradient_is("mlp dbias", w.dbias, sums);
    };
    weight("mlp up", up, m.up, d_up);
    if (gated) {
        weight("mlp gate", gate, m.gate, dz);
        const auto more = product(tokens, in, hidden, [&](auto t, auto h) { return dz[t * hidden + h]; },
                                  [&](auto h, auto i) { return gate.dense[h * in + i]; });
        for (std::size_t i = 0; i < more.size(); i++) exact_dx[i] += more[i];
    }
    gradient_is("mlp dx", dx, exact_dx);
    const auto d_down = product(out, hidden, tokens, [&](auto o, auto t) { return double{dy[t * out + o]}; },
                                [&](auto t, auto h) { return a[t * hidden + h]; });
    gradient_is("mlp down", down.dvalues, down.at_units(m.down, d_down));
}

// Attention and its gradients against whole matrices of probabilities in float64. q, y and their gradients lie token by token,
// keys and values head by head.
void check_attention(std::int64_t batch, std::int64_t kv_heads, std::int64_t group, std::int64_t tokens, std::int64_t size,
                     int threads) {
    sparsae::Attention p{};
    const std::int64_t heads = kv_heads * group;
    p.batch = batch, p.heads = heads, p.kv_heads = kv_heads, p.tokens = tokens, p.size = size;
    p.scale = 0.7f, p.threads = threads;
    const std::size_t n = batch * heads * tokens * size, m = batch * kv_heads * tokens * size;
    auto q = random_floats(n), k = random_floats(m), v = random_floats(m), dy = random_floats(n);
    std::vector<float> y(n), dq(n), dk(m), dv(m), logsum(batch * heads * tokens);
    const auto by_token = [&](std::vector<float>& t) { return sparsae::Heads{t.data(), tokens * heads * size, size, heads * size}; };
    const auto by_head = [&](std::vector<float>& t) {
        return sparsae::Heads{t.data(), kv_heads * tokens * size, tokens * size, size};
    };
    p.q = by_token(q), p.y = by_token(y), p.dy = by_token(dy), p.dq = by_token(dq), p.logsum = logsum.data();
    p.k = by_head(k), p.v = by_head(v), p.dk = by_head(dk), p.dv = by_head(dv);
    if (sparsae_attention_forward(&p) != 0 || sparsae_attention_backward(&p) != 0) failures++;
    std::vector<double> exact_y(n), exact_dq(n), exact_dk(m), exact_dv(m), s(tokens), ds(tokens);
    for (std::int64_t b = 0; b < batch; b++)
        for (std::int64_t h = 0; h < heads; h++)
            for (std::int64_t i = 0; i < tokens; i++) {
                const std::int64_t row = ((b * tokens + i) * heads + h) * size, of = (b * kv_heads + h / group) * tokens * size;
                double sum = 0, inner = 0;
                for (std::int64_t j = 0; j <= i; j++) {
                    s[j] = ds[j] = 0;
                    for (std::int64_t f = 0; f < size; f++) {
                        s[j] += double{p.scale} * q[row + f] * k[of + j * size + f];
                        ds[j] += double{dy[row + f]} * v[of + j * size + f];
                    }
                    sum += s[j] = std::exp(s[j]);
                }
                for (std::int64_t j = 0; j <= i; j++) inner += (s[j] /= sum) * ds[j];
                for (std::int64_t j = 0; j <= i; j++)
                    for (std::int64_t f = 0; f < size; f++) {
                        const double d = p.scale * s[j] * (ds[j] - inner);
                        exact_y[row + f] += s[j] * v[of + j * size + f];
                        exact_dq[row + f] += d * k[of + j * size + f];
                        exact_dk[of + j * size + f] += d * q[row + f];
                        exact_dv[of + j * size + f] += s[j] * dy[row + f];
                    }
            }
    const auto terms = static_cast<double>(tokens * group * size);
    compare("attention y", y, exact_y, terms), compare("attention dq", dq, exact_dq, terms);
    compare("attention dk", dk, exact_dk, terms), compare("attention dv", dv, exact_dv, terms);
}

// Cross entropy, divergence and their gradient in float64; every third target is ignored.
void check_losses(std::int64_t tokens, std::int64_t vocabulary, std::int64_t taught, int threads) {
    sparsae::Losses p{};
    const auto logits = random_floats(tokens * vocabulary), teacher = random_floats(taught * vocabulary);
    std::vector<std::int64_t> targets(tokens);
    for (std::int64_t t = 0; t < tokens; t++) targets[t] = t % 3 == 2 ? -100 : (7 * t) % vocabulary;
    std::vector<float> sums(2 * tokens), gradient(logits.size());
    p.tokens = tokens, p.vocabulary = vocabulary, p.taught = taught, p.ignored = -100, p.threads = threads;
    p.logits = logits.data(), p.teacher = teacher.data(), p.targets = targets.data();
    p.sums = sums.data(), p.gradient = gradient.data(), p.ce_weight = 0.3f, p.kl_weight = 0.7f;
    if (sparsae_losses(&p) != 0) failures++;
    std::vector<double> exact_sums(sums.size()), exact_gradient(gradient.size());
    const auto log_sum = [&](const std::vector<float>& rows, std::int64_t t) {
        double sum = 0;
        for (std::int64_t i = 0; i < vocabulary; i++) sum += std::exp(double{rows[t * vocabulary + i]});
        return std::log(sum);
    };
    for (std::int64_t t = 0; t < tokens; t++) {
        if (targets[t] < 0) continue;
        const double own = log_sum(logits, t), theirs = t < taught ? log_sum(teacher, t) : 0.0;
        exact_sums[t] = own - logits[t * vocabulary + targets[t]];
        for (std::int64_t i = 0; i < vocabulary; i++) {
            const std::int64_t at = t * vocabulary + i;
            const double log_p = logits[at] - own, probability = std::exp(log_p);
            exact_gradient[at] = p.ce_weight * (probability - (i == targets[t] ? 1.0 : 0.0));
            if (t >= taught) continue;
            const double log_q = teacher[at] - theirs;
            exact_sums[tokens + t] += std::exp(log_q) * (log_q - log_p);
            exact_gradient[at] += p.kl_weight * (probability - std::exp(log_q));
        }
    }
    compare("losses", sums, exact_sums, 100), compare("losses' gradient", gradient, exact_gradient, 10);
    p.gradient = nullptr;
    std::vector<float> alone(sums.size());
    p.sums = alone.data();
    if (sparsae_losses(&p) != 0 || alone != sums) failures++;
}

// bfloat16 results are rounded to nearest even, infinities stay and NaN stays NaN: y is one product each.
void check_rounding() {
    constexpr int rows = 32, tokens = 64;
    const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
    std::vector<float> values = random_floats(rows), x = random_floats(tokens);
    values[0] = 1.00390625f, values[1] = 1.01171875f, values[2] = 3.4e38f, values[3] = -0.0f, values[4] = 1e-40f;
    x[0] = 1.0f, x[1] = nan, x[2] = infinity, x[3] = -infinity, x[4] = 1.00390625f, x[5] = 0.0f;
    std::vector<std::uint16_t> x_in = elements<std::uint16_t>(x), y(rows * tokens);
    std::vector<std::int32_t> indices(rows), col_ptr(2), row_ptr(rows + 1), source(rows), columns(rows);
    for (int i = 0; i < rows; i++) indices[i] = i;
    sparsae::Problem p{};
    p.tokens = tokens, p.out = rows, p.in = p.unit_out = p.unit_in = p.threads = p.bfloat16 = 1, p.count = rows;
    if (sparsae_index(indices.data(), 0, rows, rows, 1, col_ptr.data(), row_ptr.data(), columns.data(), 0, nullptr) != 0)
        failures++;
    p.indices = indices.data(), p.col_ptr = col_ptr.data(), p.row_ptr = row_ptr.data(), p.columns = columns.data();
    p.values = values.data(), p.x = x_in.data(), p.y = y.data();
    if (sparsae_forward(&p) != 0) failures++;
    for (int t = 0; t < tokens; t++)
        for (int o = 0; o < rows; o++) {
            const float exact = values[o] * widened(x_in[t]), got = widened(y[t * rows + o]);
            // The kernel adds the product to a zero: a product of -0 becomes +0.
            if (std::isnan(exact) ? !std::isnan(got) : y[t * rows + o] != narrowed(exact + 0.0f)) {
                std::printf("%g was rounded to %g\n", exact, got);
                failures++;
                return;
            }
        }
}

// The hidden layer of an MLP is cut into strips that threads share: of whole units, and never all of a wide layer.
void check_strips() {
    const std::int64_t cases[][4] = {{2048, 1, 1, 16}, {3072, 1, 1, 16}, {1376, 1, 1, 16}, {2048, 4, 4, 16},
                                     {1024, 16, 16, 16}, {96, 32, 32, 32}, {24, 2, 3, 24}, {15, 1, 1, 1}};
    for (const auto& [hidden, b_out, b_in, strip] : cases) {
        sparsae::Mlp m{};
        m.up.out = hidden, m.up.unit_out = b_out, m.down.unit_in = b_in;
        if (sparsae_selftest::hidden_strip(m) != strip) {
            std::printf("a hidden layer of %d is cut into strips of %d\n", static_cast<int>(hidden),
                        static_cast<int>(sparsae_selftest::hidden_strip(m)));
            failures++;
        }
    }
}

}  // namespace

// Without arguments: of all instruction sets that this processor has; else of those that are named.
int main(int count, char** names) {
    check_strips();
    for (const char* isa : {"portable", "neon", "avx2", "avx512"}) {
        const bool named = std::any_of(names + 1, names + count, [&](const char* name) { return !std::strcmp(name, isa); });
        if ((count > 1 && !named) || sparsae_select_isa(isa) != 0) continue;
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
                    check<std::int32_t, std::uint16_t, std::uint16_t>(37, 21, 1, 1, tokens, density, threads);
                    check<std::int32_t, std::uint16_t, std::uint16_t>(5, 6, 4, 4, tokens, density, threads);
                }
        for (const int threads : {1, 2}) {  // several blocks of columns, several strips
            check<std::int32_t, std::uint16_t>(300, 1700, 1, 1, 70, 0.1, threads);
            check<std::int32_t, std::uint16_t>(1700, 300, 1, 1, 70, 0.1, threads);
            check_mlp(300, 330, 290, 1, 70, threads == 2, threads);
        }
        for (const std::int64_t tokens : {0, 1, 17, 64, 130})
            for (const bool gated : {false, true})
                for (const int threads : {1, 2}) {
                    check_mlp(7, 22, 5, 1, tokens, gated, threads, 4);
                    check_mlp(16, 48, 33, 1, tokens, gated, threads);
                    check_mlp(16, 48, 33, 1, tokens, gated, threads, 2);
                    check_mlp(8, 24, 12, 4, tokens, gated, threads, threads == 1 ? 0 : 2);
                    check_mlp(9, 15, 6, 3, tokens, gated, threads, threads == 1 ? 0 : 4);
                }
        for (const std::int64_t tokens : {0, 1, 5, 64, 65, 130, 300})
            for (const std::int64_t size : {1, 7, 16, 48, 80})
                for (const int threads : {1, 2}) check_attention(1, 2, threads, tokens, size, threads);
        for (const std::int64_t tokens : {0, 1, 7})
            for (const std::int64_t vocabulary : {1, 5, 16, 33, 5000})
                for (const int threads : {1, 2}) {
                    check_losses(tokens, vocabulary, 0, threads);
                    check_losses(tokens, vocabulary, tokens < 4 ? tokens : 4, threads);
                }
        check_rounding();
        std::printf("%s: %d failures\n", isa, failures);
    }
    return failures != 0;
}
