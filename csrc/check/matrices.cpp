/* Random matrices of every kind, and products with them. */
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "check.h"

namespace {

std::mt19937 dice(1);

/* y = x w^T + bias in plain sums; rows of x are ldx apart. */
std::vector<float> product(const Matrix &m, const std::vector<float> &x, int64_t ldx, int64_t rows) {
    std::vector<float> y(static_cast<size_t>(rows * m.w.n));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < m.w.n; j++) {
            const float *row = x.data() + r * ldx, *weights = m.values.data() + j * m.w.k;
            float sum = m.bias.empty() ? 0.0f : m.bias[static_cast<size_t>(j)];
            for (int64_t i = 0; i < m.w.k; i++) sum += row[i] * weights[i];
            y[static_cast<size_t>(r * m.w.n + j)] = sum;
        }
    return y;
}

/* Of rows a that are lda apart from rows b that follow each other. */
double distance(const float *a, int64_t lda, const std::vector<float> &b, int64_t columns) {
    double apart = 0, length = static_cast<double>(b.size());  // a product of few numbers may be small by chance
    for (size_t i = 0; i < b.size(); i++) {
        const auto row = static_cast<int64_t>(i) / columns, column = static_cast<int64_t>(i) % columns;
        apart += std::pow(static_cast<double>(a[row * lda + column]) - static_cast<double>(b[i]), 2);
        length += std::pow(static_cast<double>(b[i]), 2);
    }
    return std::sqrt(apart / length);
}

void check_products(const char *backend, const Matrix &m, int64_t rows) {
    const int64_t n = m.w.n, k = m.w.k, ldx = k + 3, ldy = n + 5;
    const auto values = [](int64_t count, int64_t stride, int64_t width) {
        return static_cast<size_t>((count - 1) * stride + width);  // nothing beyond the last row's end
    };
    std::vector<float> x = random_floats(static_cast<int64_t>(values(rows, ldx, k)));
    std::vector<float> y(values(rows, ldy, n), 0.0f), half(values(rows, ldy, n / 2));
    const std::vector<float> wanted = product(m, x, ldx, rows);
    for (const int32_t adds : {0, 1}) {
        kq_linear(&m.w, x.data(), ldx, rows, y.data(), ldy, adds);
        if (adds) for (float &value : y) value /= 2;
        expect(distance(y.data(), ldy, wanted, n) < 0.03, "linear", backend, rows, k);
    }
    if (n % 32) return;
    kq_linear_swiglu(&m.w, x.data(), ldx, rows, half.data(), ldy);
    std::vector<float> gated(static_cast<size_t>(rows * n / 2));
    for (size_t i = 0; i < gated.size(); i++) {
        const auto columns = static_cast<size_t>(n / 2), row = i / columns, column = i % columns;
        const float gate = wanted[row * 2 * columns + column], up = wanted[row * 2 * columns + columns + column];
        gated[i] = gate / (1.0f + std::exp(-gate)) * up;
    }
    expect(distance(half.data(), ldy, gated, n / 2) < 0.05, "swiglu", backend, rows, k);
}

void check_rows(const char *backend, const Matrix &m) {
    const std::vector<int64_t> ids = {0, m.w.n - 1, m.w.n / 2};
    std::vector<float> out(3 * static_cast<size_t>(m.w.k));
    kq_gather_rows(&m.w, ids.data(), 3, out.data());
    for (size_t i = 0; i < out.size(); i++) {
        const auto row = ids[i / static_cast<size_t>(m.w.k)], column = static_cast<int64_t>(i) % m.w.k;
        const float wanted = m.values[static_cast<size_t>(row * m.w.k + column)];
        expect(std::fabs(out[i] - wanted) < 1e-3f, "gather", backend, row, column);
    }
    const std::vector<float> gain(static_cast<size_t>(m.w.k), 2.0f);
    std::vector<float> normed(out.size());
    kq_rms_norm(out.data(), gain.data(), 1e-6f, 3, m.w.k, normed.data());
    float squares = 0;
    for (const float value : normed) squares += value * value;
    expect(squares < 4.1f * static_cast<float>(normed.size()), "rms_norm", backend);
}

}  // namespace

void expect(bool holds, const char *what, const char *backend, long a, long b) {
    if (holds) return;
    std::printf("%s: %s (%ld, %ld)\n", backend, what, a, b);
    std::exit(1);
}

float normal() { return std::normal_distribution<float>()(dice); }
int below(int limit) { return static_cast<int>(dice() % static_cast<unsigned>(limit)); }

std::vector<float> random_floats(int64_t count, float scale) {
    std::vector<float> out(static_cast<size_t>(count));
    for (float &x : out) x = normal() * scale;
    return out;
}

uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x8000u) >> 16);
}

void make_matrix(Matrix *m, int32_t kind, int32_t group, bool zeros, int64_t n, int64_t k, bool extras) {
    const int64_t groups = group ? k / group : 1;
    const float step = 1.0f / (4 * std::sqrt(static_cast<float>(k)));
    std::vector<uint8_t> codes(static_cast<size_t>(n * k * (kind == KQ_BF16 ? 2 : 1))), zero;
    std::vector<float> scales(kind == KQ_BF16 ? 0 : static_cast<size_t>(n * groups), kind == KQ_INT8 ? step / 16 : 0.0078125f);
    if (zeros) zero.resize(static_cast<size_t>(n * groups));
    for (uint8_t &z : zero) z = static_cast<uint8_t>(below(16));
    m->values.resize(static_cast<size_t>(n * k));
    m->order.resize(extras && kind != KQ_BF16 ? static_cast<size_t>(k) : 0);
    for (size_t i = 0; i < m->order.size(); i++) m->order[i] = static_cast<int32_t>(m->order.size() - 1 - i);
    for (int64_t at = 0; at < n * k; at++) {
        const int64_t j = at / k, i = at % k, g = j * groups + (group ? i / group : 0);
        float value;
        if (kind == KQ_BF16) {
            const uint16_t bits = to_bf16(normal() * step);
            const uint32_t wide = static_cast<uint32_t>(bits) << 16;
            std::memcpy(&codes[static_cast<size_t>(2 * at)], &bits, 2);
            std::memcpy(&value, &wide, 4);
        } else {
            const int code = kind == KQ_INT8 ? below(255) - 127 : below(16);
            const int origin = kind == KQ_INT8 ? 0 : zeros ? zero[static_cast<size_t>(g)] : 8;
            codes[static_cast<size_t>(at)] = static_cast<uint8_t>(code);
            value = static_cast<float>(code - origin) * scales[static_cast<size_t>(g)];
        }
        m->values[static_cast<size_t>(j * k + (m->order.empty() ? i : m->order[static_cast<size_t>(i)]))] = value;
    }
    if (extras) m->bias = random_floats(n);
    m->w = {kind, group, zeros, 0, n, k, nullptr, extras ? m->bias.data() : nullptr, m->order.empty() ? nullptr : m->order.data()};
    const int64_t bytes = kq_packed_bytes(&m->w);
    expect(bytes > 0 && bytes % 64 == 0, "a possible shape is refused", "pack", n, k);
    m->memory.reset(std::aligned_alloc(64, static_cast<size_t>(bytes)));
    m->w.packed = m->memory.get();
    expect(kq_pack(&m->w, codes.data(), scales.data(), zeros ? zero.data() : nullptr) == 0, "pack", "pack", n, k);
    std::vector<uint8_t> codes_back(codes.size()), zero_back(zero.size());
    std::vector<float> scales_back(scales.size());
    kq_unpack(&m->w, codes_back.data(), scales_back.data(), zeros ? zero_back.data() : nullptr);
    expect(codes_back == codes && zero_back == zero && scales_back == scales, "unpack gives other codes", "pack", n, k);
}

void check_linear(const char *backend) {
    const struct { int32_t kind, group; bool zeros; } kinds[] = {
        {KQ_BF16, 0, false}, {KQ_INT8, 0, false}, {KQ_INT4, 32, false}, {KQ_INT4, 64, true}, {KQ_INT4, 128, false}};
    const struct { int64_t n, k; } shapes[] = {{1, 128}, {50, 384}, {160, 640}, {33, 70}, {96, 32}};
    for (const auto &kind : kinds)
        for (const auto &shape : shapes)
            for (const bool extras : {false, true}) {
                if (kind.group && shape.k % kind.group) continue;
                Matrix m;
                make_matrix(&m, kind.kind, kind.group, kind.zeros, shape.n, shape.k, extras);
                for (const int64_t rows : {1, 2, 7, 16, 33, 70}) check_products(backend, m, rows);
                check_rows(backend, m);
            }
}
