/* What the parts of the driver share. Sanitizers watch them; results are compared loosely, for exactness is the tests'
 * business. All buffers are of exact size, on the heap. */
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../kiloq.h"

/* Ends the program with one line if it does not hold. */
void expect(bool holds, const char *what, const char *backend, long a = 0, long b = 0);

float normal();
int below(int limit);
std::vector<float> random_floats(int64_t count, float scale = 1.0f);
uint16_t to_bf16(float x);

/* A packed matrix with everything it points to, and the numbers that it stands for. */
struct Matrix {
    kq_weight w{};
    std::unique_ptr<void, void (*)(void *)> memory{nullptr, std::free};
    std::vector<float> bias, values;
    std::vector<int32_t> order;
};
/* Random codes, packed, and unpacked again to see that they are the same. extras: a bias, and an order of columns. */
void make_matrix(Matrix *m, int32_t kind, int32_t group, bool zeros, int64_t n, int64_t k, bool extras);

struct Size { int heads, kv_heads, dim, rotary; };

/* The cache of one layer. Slots that nobody has written hold numbers as large as they come. */
struct Layer {
    kq_cache cache{};
    std::vector<uint8_t> keys, values, key_scales, value_scales;
    std::vector<float> key_bias;
};
void make_layer(Layer *layer, int32_t kind, Size size, int64_t slots, int32_t block_size, bool has_bias);

/* Sequences that grow from step to step, and what a call is told of them. */
struct Sequences {
    int64_t half;
    std::vector<float> cos, sin;               // of every position
    std::vector<std::vector<int32_t>> blocks;  // of each sequence
    std::vector<int64_t> done;
    std::vector<kq_span> spans;
    std::vector<float> row_cos, row_sin, q_scale;
    kq_places places;
};
void start_sequences(Sequences *s, int count, int64_t longest, int64_t half, int32_t block_size);
/* Each sequence up to its stop; those that have it already stand aside. */
void advance(Sequences *s, const std::vector<int64_t> &stops, bool scales);

void check_pool(const char *backend);
void check_linear(const char *backend);
void check_attention(const char *backend);
void check_step(const char *backend);
void check_draw(const char *backend);
