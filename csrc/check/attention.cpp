/* Paged attention and whole steps: prompts, parts of prompts, single tokens and several guessed ones, two at a time. */
#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"

namespace {

constexpr int64_t kHidden = 96, kMlp = 64, kVocab = 75, kLayers = 2;

/* Attention is a weighted mean of values. Values are at most 3 here, and kept to about a hundredth. */
void expect_means(const std::vector<float> &out, const char *backend, long kind, long rows) {
    for (const float x : out) expect(std::fabs(x) < 3.1f, "attention is no mean of values", backend, kind, rows);
}

void attend(const char *backend, Layer *layer, Sequences *s, bool norms, int32_t window) {
    const kq_cache *cache = &layer->cache;
    const int64_t width = static_cast<int64_t>(cache->num_heads + 2 * cache->num_kv_heads) * cache->head_dim;
    const std::vector<float> gain(static_cast<size_t>(cache->head_dim), 1.0f);
    std::vector<float> qkv = random_floats(s->places.rows * width);
    for (float &x : qkv) x = std::min(std::max(x, -3.0f), 3.0f);
    std::vector<float> out(static_cast<size_t>(s->places.rows) * static_cast<size_t>(cache->num_heads * cache->head_dim), NAN);
    kq_attention(cache, &s->places, qkv.data(), norms ? gain.data() : nullptr, norms ? gain.data() : nullptr, 1e-6f,
                 window, out.data());
    expect_means(out, backend, cache->kind, static_cast<long>(s->places.rows));
}

/* One layer under every window. A cache of int8 keeps keys with their bias, and without. */
void check_layer(const char *backend, int32_t kind, Size size, int32_t block_size, bool has_bias) {
    for (const int32_t window : {0, 1, 20, 70}) {
        Layer layer;
        Sequences s;
        start_sequences(&s, 3, 160, size.rotary / 2, block_size);
        make_layer(&layer, kind, size, 3 * 160, block_size, has_bias);
        const std::vector<std::vector<int64_t>> steps = {{40, 0, 0}, {41, 3, 66}, {75, 6, 67}, {76, 7, 68}, {77, 150, 72}};
        for (const std::vector<int64_t> &stops : steps) {
            advance(&s, stops, window == 20);
            attend(backend, &layer, &s, !has_bias, window);
        }
    }
}

/* A context of several parts, read by one token, by a few, and by a block of rows. */
void check_long(const char *backend, int32_t kind, Size size, bool has_bias) {
    Layer layer;
    Sequences s;
    start_sequences(&s, 1, 1120, size.rotary / 2, 16);
    make_layer(&layer, kind, size, 1120, 16, has_bias);
    for (const int64_t stop : {1040, 1041, 1044, 1068}) {
        advance(&s, {stop}, false);
        attend(backend, &layer, &s, !has_bias, 0);
    }
}

struct Model {
    Matrix parts[kLayers][4], embed;
    Layer caches[kLayers];
    kq_layer layers[kLayers];
    std::vector<float> gain, head_gain;
    kq_model model;
};

void make_model(Model *m, int32_t kind, int32_t cache_kind, Size size) {
    const int64_t q = size.heads * size.dim, kv = size.kv_heads * size.dim;
    const int32_t group = kind == KQ_INT4 ? 32 : 0, out_group = q % 32 ? 0 : group;
    const int32_t out_kind = kind == KQ_INT4 && !out_group ? static_cast<int32_t>(KQ_INT8) : kind;
    const bool has_bias = cache_kind == KQ_CACHE_INT8;
    make_matrix(&m->embed, kind, group, false, kVocab, kHidden, false);
    m->gain.assign(static_cast<size_t>(kHidden), 1.0f);
    m->head_gain.assign(static_cast<size_t>(size.dim), 1.0f);
    for (int64_t i = 0; i < kLayers; i++) {
        Matrix *parts = m->parts[i];
        make_matrix(&parts[0], kind, group, false, q + 2 * kv, kHidden, false);
        make_matrix(&parts[1], out_kind, out_group, false, kHidden, q, false);
        make_matrix(&parts[2], kind, group, false, 2 * kMlp, kHidden, false);
        make_matrix(&parts[3], kind, group, false, kHidden, kMlp, false);
        make_layer(&m->caches[i], cache_kind, size, 2 * 128, 16, has_bias);
        const float *norm = has_bias ? nullptr : m->head_gain.data();
        m->layers[i] = {parts[0].w, parts[1].w, parts[2].w, parts[3].w, m->gain.data(), m->gain.data(), norm, norm,
                        m->caches[i].cache, i ? 20 : 0, 0};
    }
    m->model = {kLayers, kHidden, kMlp, 1e-6f, 0, m->layers, m->embed.w, m->embed.w, m->gain.data()};
}

/* Low-rank updates of some of a model's matrices, of odd ranks. */
struct Updates {
    Matrix parts[kLayers][4][2];
    kq_layer_updates layers[kLayers];
    int64_t rank = 0;
};

void make_updates(Updates *u, const Model *m, int64_t rank) {
    for (int64_t i = 0; i < kLayers; i++) {
        kq_update *into[] = {&u->layers[i].qkv, &u->layers[i].out, &u->layers[i].gate_up, &u->layers[i].down};
        for (int64_t j = 0; j < 4; j++) {
            *into[j] = {};
            if ((i + j + rank) % 3 == 0) continue;
            const kq_weight *w = &m->parts[i][j].w;
            make_matrix(&u->parts[i][j][0], KQ_BF16, 0, false, rank + j, w->k, false);
            make_matrix(&u->parts[i][j][1], KQ_BF16, 0, false, w->n, rank + j, false);
            *into[j] = {u->parts[i][j][0].w, u->parts[i][j][1].w};
            u->rank = std::max(u->rank, rank + j);
        }
    }
}

void check_model(const char *backend, int32_t kind, int32_t cache_kind, Size size) {
    Model m;
    Sequences s;
    make_model(&m, kind, cache_kind, size);
    Updates updates[2];  // the second has a larger rank than any matrix has columns
    make_updates(&updates[0], &m, 1);
    make_updates(&updates[1], &m, 2 * kMlp + 3);
    start_sequences(&s, 2, 128, size.rotary / 2, 16);
    const std::vector<std::vector<int64_t>> steps = {{40, 0}, {41, 35}, {75, 36}, {76, 37}, {76, 90}};
    for (const std::vector<int64_t> &stops : steps) {
        advance(&s, stops, false);
        std::vector<int64_t> ids(static_cast<size_t>(s.places.rows)), wanted;
        for (int64_t &id : ids) id = below(kVocab);
        for (const kq_span &span : s.spans) wanted.push_back(span.first_row + span.stop - span.start - 1);
        std::vector<float> logits(wanted.size() * kVocab, NAN), hidden(wanted.size() * kHidden, NAN);
        const int64_t split = s.places.rows / 2;  // in the middle of a sequence
        const std::vector<kq_adapted> adapted = {{0, split, updates[0].rank, updates[0].layers},
                                                 {split, s.places.rows - split, updates[1].rank, updates[1].layers}};
        kq_step step = {ids.data(), s.places, static_cast<int64_t>(wanted.size()), wanted.data(), logits.data(),
                        hidden.data(), 0, nullptr};
        expect(kq_run_step(&m.model, &step) == 0, "a step is refused", backend);
        for (const float x : logits) expect(std::isfinite(x), "a logit is no number", backend, kind, cache_kind);
        for (const float x : hidden) expect(std::isfinite(x), "a hidden number is none", backend, kind, cache_kind);
        const std::vector<float> plain = logits;
        step.adapted = adapted.data();
        for (step.num_adapted = 2; step.num_adapted > 0; step.num_adapted--) {
            expect(kq_run_step(&m.model, &step) == 0, "a step with updates is refused", backend);
            for (const float x : logits) expect(std::isfinite(x), "an updated logit is no number", backend, kind, cache_kind);
            expect(step.num_adapted == 1 || logits != plain, "updates change nothing", backend, kind, cache_kind);
        }
        step.num_adapted = 2;
        step.num_logits = 0;  // keys and values only: the same ones again
        expect(kq_run_step(&m.model, &step) == 0, "a step without logits is refused", backend);
        ids[0] = kVocab;
        expect(kq_run_step(&m.model, &step) == -1, "an id beyond the vocabulary is taken", backend);
    }
}

}  // namespace

void make_layer(Layer *layer, int32_t kind, Size size, int64_t slots, int32_t block_size, bool has_bias) {
    const bool is_int8 = kind == KQ_CACHE_INT8;
    const int64_t width = is_int8 ? 1 : kind == KQ_CACHE_BF16 ? 2 : 4;
    const auto numbers = static_cast<size_t>(slots * size.kv_heads * size.dim * width);
    // 0x7f7f is the largest power of bf16, near that of fp32, 127 in int8, and no number in fp16.
    layer->keys.assign(numbers, 0x7f);
    layer->values.assign(numbers, 0x7f);
    layer->key_scales.assign(is_int8 ? static_cast<size_t>(slots * size.kv_heads * 2) : 0, 0x7f);
    layer->value_scales = layer->key_scales;
    if (has_bias) layer->key_bias = random_floats(size.kv_heads * size.dim, 3.0f);
    layer->cache = {kind, block_size, size.heads, size.kv_heads, size.dim, size.rotary,
                    layer->keys.data(), layer->values.data(), is_int8 ? layer->key_scales.data() : nullptr,
                    is_int8 ? layer->value_scales.data() : nullptr, has_bias ? layer->key_bias.data() : nullptr};
}

void start_sequences(Sequences *s, int count, int64_t longest, int64_t half, int32_t block_size) {
    s->half = half;
    s->cos.resize(static_cast<size_t>(longest * half));
    s->sin.resize(s->cos.size());
    for (size_t i = 0; i < s->cos.size(); i++) {
        s->cos[i] = std::cos(0.1f * static_cast<float>(i));
        s->sin[i] = std::sin(0.1f * static_cast<float>(i));
    }
    // Blocks of one are neither in order nor neighbours.
    const auto each = static_cast<int32_t>(longest / block_size);
    for (int32_t sequence = 0; sequence < count; sequence++) {
        s->blocks.emplace_back();
        for (int32_t i = each - 1; i >= 0; i--) s->blocks.back().push_back(i * count + sequence);
    }
    s->done.assign(static_cast<size_t>(count), 0);
}

void advance(Sequences *s, const std::vector<int64_t> &stops, bool scales) {
    s->spans.clear();
    s->row_cos.clear();
    s->row_sin.clear();
    int64_t rows = 0;
    for (size_t i = 0; i < stops.size(); i++) {
        const int64_t start = s->done[i], stop = stops[i];
        if (stop <= start) continue;
        s->spans.push_back({rows, start, stop, s->blocks[i].data(), s->cos.data(), s->sin.data()});
        s->row_cos.insert(s->row_cos.end(), s->cos.begin() + start * s->half, s->cos.begin() + stop * s->half);
        s->row_sin.insert(s->row_sin.end(), s->sin.begin() + start * s->half, s->sin.begin() + stop * s->half);
        s->done[i] = stop;
        rows += stop - start;
    }
    s->q_scale.assign(static_cast<size_t>(rows), 1.25f);
    s->places = {rows, s->row_cos.data(), s->row_sin.data(), scales ? s->q_scale.data() : nullptr,
                 static_cast<int64_t>(s->spans.size()), s->spans.data()};
}

void check_attention(const char *backend) {
    for (const int32_t kind : {KQ_CACHE_BF16, KQ_CACHE_INT8, KQ_CACHE_F32})
        for (const bool has_bias : {false, true}) {
            if (has_bias && kind != KQ_CACHE_INT8) continue;
            for (const Size size : {Size{4, 2, 32, 32}, Size{3, 1, 24, 12}, Size{2, 2, 40, 40}, Size{1, 1, 8, 4}})
                check_layer(backend, kind, size, 16, has_bias);
            check_layer(backend, kind, Size{7, 1, 64, 64}, 32, has_bias);
            check_layer(backend, kind, Size{1, 1, 256, 64}, 16, has_bias);
            check_long(backend, kind, Size{2, 1, 32, 32}, has_bias);
        }
}

void check_step(const char *backend) {
    for (const int32_t kind : {KQ_BF16, KQ_INT8, KQ_INT4})
        for (const int32_t cache : {KQ_CACHE_BF16, KQ_CACHE_INT8, KQ_CACHE_F32})
            for (const Size size : {Size{4, 2, 32, 32}, Size{3, 1, 24, 12}, Size{2, 2, 40, 40}})
                check_model(backend, kind, cache, size);
}
