/* Drives the C interface over odd shapes with every backend of this processor, for sanitizers to watch. All buffers are
 * of exact size, on the heap. Results are compared with plain sums, loosely: exactness is the tests' business. */
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../kiloq.h"

namespace {

std::mt19937 dice(1);

float normal() { return std::normal_distribution<float>()(dice); }
int below(int limit) { return static_cast<int>(dice() % static_cast<unsigned>(limit)); }

std::vector<float> random_floats(int64_t count, float scale = 1.0f) {
    std::vector<float> out(static_cast<size_t>(count));
    for (float &x : out) x = normal() * scale;
    return out;
}

uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x8000u) >> 16);
}

void expect(bool holds, const char *what, const char *backend, long a = 0, long b = 0) {
    if (holds) return;
    std::printf("%s: %s (%ld, %ld)\n", backend, what, a, b);
    std::exit(1);
}

/* A packed matrix with everything it points to, and the numbers that it stands for. */
struct Matrix {
    kq_weight w{};
    std::unique_ptr<void, void (*)(void *)> memory{nullptr, std::free};
    std::vector<float> bias, values;
    std::vector<int32_t> order;
};

void make_matrix(Matrix *m, int32_t kind, int32_t group, bool zeros, int64_t n, int64_t k, bool extras) {
    const int64_t groups = group ? k / group : 1;
    const float step = 1.0f / (4 * std::sqrt(static_cast<float>(k)));
    std::vector<uint8_t> codes(static_cast<size_t>(n * k * (kind == KQ_BF16 ? 2 : 1))), zero;
    std::vector<float> scales(static_cast<size_t>(n * groups), kind == KQ_INT8 ? step / 16 : 0.0078125f);
    if (zeros) zero.resize(static_cast<size_t>(n * groups));
    for (uint8_t &z : zero) z = static_cast<uint8_t>(below(16));
    m->values.resize(static_cast<size_t>(n * k));
    m->order.resize(extras && kind != KQ_BF16 ? static_cast<size_t>(k) : 0);
    for (size_t i = 0; i < m->order.size(); i++) m->order[i] = static_cast<int32_t>(m->order.size() - 1 - i);
    for (int64_t j = 0; j < n; j++) {
        for (int64_t i = 0; i < k; i++) {
            const int64_t at = j * k + i, g = j * groups + (group ? i / group : 0);
            float value;
            if (kind == KQ_BF16) {
                const uint16_t bits = to_bf16(normal() * step);
                const uint32_t wide = static_cast<uint32_t>(bits) << 16;
                std::memcpy(&codes[static_cast<size_t>(2 * at)], &bits, 2);
                std::memcpy(&value, &wide, 4);
            } else if (kind == KQ_INT8) {
                const int code = below(255) - 127;
                codes[static_cast<size_t>(at)] = static_cast<uint8_t>(code);
                value = static_cast<float>(code) * scales[static_cast<size_t>(g)];
            } else {
                const int code = below(16);
                codes[static_cast<size_t>(at)] = static_cast<uint8_t>(code);
                value = static_cast<float>(code - (zeros ? zero[static_cast<size_t>(g)] : 8)) * scales[static_cast<size_t>(g)];
            }
            m->values[static_cast<size_t>(j * k + (m->order.empty() ? i : m->order[static_cast<size_t>(i)]))] = value;
        }
    }
    if (extras) m->bias = random_floats(n);
    m->w = {kind, group, zeros, 0, n, k, nullptr, extras ? m->bias.data() : nullptr, m->order.empty() ? nullptr : m->order.data()};
    const int64_t bytes = kq_packed_bytes(&m->w);
    expect(bytes > 0, "a possible shape is refused", "pack", n, k);
    m->memory.reset(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)));
    m->w.packed = m->memory.get();
    expect(kq_pack(&m->w, codes.data(), scales.data(), zeros ? zero.data() : nullptr) == 0, "pack", "pack", n, k);
    std::vector<uint8_t> codes_back(codes.size()), zero_back(zero.size());
    std::vector<float> scales_back(scales.size());
    kq_unpack(&m->w, codes_back.data(), scales_back.data(), zeros ? zero_back.data() : nullptr);
    expect(codes_back == codes && zero_back == zero, "unpack gives other codes", "pack", n, k);
}

/* y = x w^T + bias in plain sums. */
std::vector<float> product(const Matrix &m, const std::vector<float> &x, int64_t rows) {
    std::vector<float> y(static_cast<size_t>(rows * m.w.n));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < m.w.n; j++) {
            double sum = m.bias.empty() ? 0.0 : static_cast<double>(m.bias[static_cast<size_t>(j)]);
            for (int64_t i = 0; i < m.w.k; i++)
                sum += static_cast<double>(x[static_cast<size_t>(r * m.w.k + i)]) * static_cast<double>(m.values[static_cast<size_t>(j * m.w.k + i)]);
            y[static_cast<size_t>(r * m.w.n + j)] = static_cast<float>(sum);
        }
    return y;
}

double distance(const std::vector<float> &a, const std::vector<float> &b) {
    double apart = 0, length = 0.06 * static_cast<double>(a.size());  // about that of the products, for few numbers
    for (size_t i = 0; i < a.size(); i++) {
        apart += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
        length += std::pow(static_cast<double>(b[i]), 2);
    }
    return std::sqrt(apart / length);
}

void check_pool(const char *backend) {
    for (const int threads : {1, 2, 5, 3}) {
        kq_set_threads(threads);
        for (int64_t count = 0; count < 200; count += 7) {
            std::vector<int32_t> visits(static_cast<size_t>(count));
            kq_visit(count, 1 + count % 6, visits.data());
            for (const int32_t n : visits) expect(n == 1, "an item is not visited once", backend, threads, count);
        }
        std::vector<std::thread> callers;
        for (int i = 0; i < 3; i++) callers.emplace_back([backend] {
            for (int round = 0; round < 100; round++) {
                std::vector<int32_t> visits(50);
                kq_visit(50, 1, visits.data());
                for (const int32_t n : visits) expect(n == 1, "callers disturb each other", backend);
            }
        });
        for (std::thread &caller : callers) caller.join();
    }
}

void check_linear(const char *backend) {
    const struct { int32_t kind, group; bool zeros; } kinds[] = {
        {KQ_BF16, 0, false}, {KQ_INT8, 0, false}, {KQ_INT4, 32, false}, {KQ_INT4, 64, true}, {KQ_INT4, 128, false}};
    const struct { int64_t n, k; } shapes[] = {{1, 128}, {50, 384}, {160, 640}};
    for (const auto &kind : kinds)
        for (const auto &shape : shapes)
            for (const bool extras : {false, true}) {
                Matrix m;
                make_matrix(&m, kind.kind, kind.group, kind.zeros, shape.n, shape.k, extras);
                for (const int64_t rows : {1, 2, 7, 16, 33, 70}) {
                    const std::vector<float> x = random_floats(rows * shape.k);
                    std::vector<float> y(static_cast<size_t>(rows * shape.n));
                    kq_linear(&m.w, x.data(), shape.k, rows, y.data(), shape.n, 0);
                    expect(distance(y, product(m, x, rows)) < 0.03, "linear", backend, rows, shape.k);
                    if (shape.n % 32) continue;
                    std::vector<float> half(static_cast<size_t>(rows * shape.n / 2));
                    kq_linear_swiglu(&m.w, x.data(), shape.k, rows, half.data(), shape.n / 2);
                }
                std::vector<int64_t> ids = {0, shape.n - 1, shape.n / 2};
                std::vector<float> out(static_cast<size_t>(3 * shape.k));
                kq_gather_rows(&m.w, ids.data(), 3, out.data());
                for (int64_t i = 0; i < shape.k; i++)
                    expect(std::fabs(out[static_cast<size_t>(shape.k + i)] -
                                     m.values[static_cast<size_t>((shape.n - 1) * shape.k + i)]) < 1e-3f,
                           "gather", backend, i, shape.k);
            }
}

struct Size { int heads, kv_heads, dim, rotary; };

/* A model of two layers in every kind of matrix, taken through prompts, parts of prompts and single tokens. */
void check_step(const char *backend, int32_t kind, int32_t cache_kind, Size size) {
    constexpr int64_t kHidden = 96, kMlp = 64, kVocab = 75, kBlocks = 24, kBlock = 16, kLayers = 2;
    const int64_t q = size.heads * size.dim, kv = size.kv_heads * size.dim, slots = kBlocks * kBlock;
    const int32_t group = kind == KQ_INT4 ? 32 : 0;
    Matrix parts[kLayers][4], embed;
    make_matrix(&embed, kind, group, false, kVocab, kHidden, false);
    const std::vector<float> gain(static_cast<size_t>(kHidden), 1.0f), head_gain(static_cast<size_t>(size.dim), 1.0f);
    const std::vector<float> key_bias = random_floats(kv, 3.0f);
    const int64_t width = cache_kind == KQ_CACHE_INT8 ? 1 : cache_kind == KQ_CACHE_BF16 ? 2 : 4;
    std::vector<std::vector<uint8_t>> kept(kLayers * 4);
    kq_layer layers[kLayers] = {};
    for (int64_t i = 0; i < kLayers; i++) {
        const int32_t out_group = q % 32 ? 0 : group;
        make_matrix(&parts[i][0], kind, group, false, q + 2 * kv, kHidden, false);
        make_matrix(&parts[i][1], kind == KQ_INT4 && !out_group ? static_cast<int32_t>(KQ_INT8) : kind, out_group, false, kHidden, q, false);
        make_matrix(&parts[i][2], kind, group, false, 2 * kMlp, kHidden, false);
        make_matrix(&parts[i][3], kind, group, false, kHidden, kMlp, false);
        for (size_t j = 0; j < 2; j++) kept[static_cast<size_t>(i) * 4 + j].resize(static_cast<size_t>(slots * kv * width));
        for (size_t j = 2; j < 4; j++) kept[static_cast<size_t>(i) * 4 + j].resize(static_cast<size_t>(slots * size.kv_heads * 2));
        uint8_t *memory[4];
        for (size_t j = 0; j < 4; j++) memory[j] = kept[static_cast<size_t>(i) * 4 + j].data();
        const bool is_int8 = cache_kind == KQ_CACHE_INT8;
        const kq_cache cache = {cache_kind, kBlock, size.heads, size.kv_heads, size.dim, size.rotary, memory[0], memory[1],
                                is_int8 ? memory[2] : nullptr, is_int8 ? memory[3] : nullptr,
                                is_int8 ? key_bias.data() : nullptr};
        layers[i] = {parts[i][0].w, parts[i][1].w, parts[i][2].w, parts[i][3].w, gain.data(), gain.data(),
                     head_gain.data(), head_gain.data(), cache, i ? 20 : 0, 0};
    }
    const kq_model model = {kLayers, kHidden, kMlp, 1e-6f, 0, layers, embed.w, embed.w, gain.data()};
    const int64_t half = size.rotary / 2, longest = 128;
    std::vector<float> cos(static_cast<size_t>(longest * half)), sin(cos.size());
    for (size_t i = 0; i < cos.size(); i++) {
        cos[i] = std::cos(0.1f * static_cast<float>(i));
        sin[i] = std::sin(0.1f * static_cast<float>(i));
    }
    std::vector<int32_t> blocks[2];
    for (int32_t i = 0; i < 8; i++) {
        blocks[0].push_back(2 * i);
        blocks[1].push_back(17 - 2 * i);
    }
    const struct { int64_t stops[2]; } steps[] = {{{40, 0}}, {{41, 35}}, {{75, 36}}, {{76, 37}}, {{76, 90}}};
    int64_t done[2] = {0, 0};
    for (const auto &step : steps) {
        std::vector<kq_span> spans;
        std::vector<int64_t> ids, wanted;
        std::vector<float> row_cos, row_sin;
        for (int s = 0; s < 2; s++) {
            const int64_t start = done[s], stop = step.stops[s];
            if (stop <= start) continue;
            spans.push_back({static_cast<int64_t>(ids.size()), start, stop, blocks[s].data(), cos.data(), sin.data()});
            for (int64_t at = start; at < stop; at++) {
                ids.push_back(below(kVocab));
                row_cos.insert(row_cos.end(), cos.begin() + at * half, cos.begin() + (at + 1) * half);
                row_sin.insert(row_sin.end(), sin.begin() + at * half, sin.begin() + (at + 1) * half);
            }
            wanted.push_back(static_cast<int64_t>(ids.size()) - 1);
            done[s] = stop;
        }
        std::vector<float> logits(wanted.size() * kVocab), hidden(wanted.size() * kHidden);
        const kq_step work = {ids.data(),
                              {static_cast<int64_t>(ids.size()), row_cos.data(), row_sin.data(), nullptr,
                               static_cast<int64_t>(spans.size()), spans.data()},
                              static_cast<int64_t>(wanted.size()), wanted.data(), logits.data(), hidden.data()};
        expect(kq_run_step(&model, &work) == 0, "a step is refused", backend);
        for (const float x : logits) expect(std::isfinite(x), "a logit is no number", backend, kind, cache_kind);
        ids[0] = kVocab;
        expect(kq_run_step(&model, &work) == -1, "an id beyond the vocabulary is taken", backend);
    }
}

}  // namespace

int main() {
    for (const char *backend : {"amx", "avx512", "avxvnni", "avx2"}) {
        if (kq_choose(backend) != 0) continue;
        check_pool(backend);
        for (const int threads : {1, 3}) {
            kq_set_threads(threads);
            check_linear(backend);
            for (const int32_t kind : {KQ_BF16, KQ_INT8, KQ_INT4})
                for (const int32_t cache : {KQ_CACHE_BF16, KQ_CACHE_INT8, KQ_CACHE_F32})
                    for (const Size size : {Size{4, 2, 32, 32}, Size{3, 1, 24, 12}, Size{2, 2, 40, 40}})
                        check_step(backend, kind, cache, size);
        }
        std::printf("%s: sound\n", backend);
    }
    kq_set_threads(1);
}
