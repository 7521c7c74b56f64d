/* Tokens of rows of any size, with everything that a row may ask for. */
#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"

namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

/* What one row points to, in buffers of exact size. */
struct Row {
    std::vector<float> logits;
    std::vector<int64_t> ids;
    std::vector<double> divide, add;
    std::vector<uint8_t> allowed;
    kq_draw draw;
};

void make_row(Row *row, int64_t size, int number) {
    row->logits = random_floats(size, number % 3 ? 4.0f : 0.0f);
    for (int64_t i = 1; i < size; i += 3)
        if (number % 2) row->logits[static_cast<size_t>(i)] = kNever;
    if (number % 4 > 1) row->allowed.assign(static_cast<size_t>(size), 0);
    for (uint8_t &flag : row->allowed) flag = static_cast<uint8_t>(below(2));
    if (!row->allowed.empty()) row->allowed[0] = 1;
    for (int64_t i = number; i < size && number % 5; i += 1 + number) {
        row->ids.push_back(i);
        row->divide.push_back(1.3);
        row->add.push_back(-0.5 * number);
    }
    constexpr double kTopP[] = {1.0, 0.0, 0.8, 0.9999}, kMinP[] = {0.0, 0.05, 1.0}, kHeat[] = {1.0, 0.0, 1e-9, 5.0};
    constexpr double kUniform[] = {0.0, 0.37, 1 - 1e-16};
    const int64_t top_k[] = {0, 1, 20, size - 1, size, size + 1, INT64_MAX};
    row->draw = {row->logits.data(), static_cast<int64_t>(row->ids.size()), row->ids.data(), row->divide.data(),
                 row->add.data(), row->allowed.empty() ? nullptr : row->allowed.data(), kHeat[below(4)],
                 kTopP[below(4)], kMinP[below(3)], kUniform[below(3)], top_k[below(7)]};
}

void check_size(const char *backend, int64_t size) {
    constexpr int kRows = 60;
    std::vector<Row> rows(kRows);
    std::vector<kq_draw> draws;
    for (int i = 0; i < kRows; i++) {
        make_row(&rows[static_cast<size_t>(i)], size, i);
        draws.push_back(rows[static_cast<size_t>(i)].draw);
    }
    draws.push_back(draws[0]);  // rows may share their logits
    std::vector<int64_t> tokens(draws.size(), -9);
    const auto count = static_cast<int64_t>(draws.size());
    expect(kq_draw_tokens(draws.data(), count, size, tokens.data()) == 0, "rows are refused", backend, size);
    for (size_t i = 0; i < draws.size(); i++) {
        expect(tokens[i] >= 0 && tokens[i] < size, "no token is drawn", backend, size, static_cast<long>(i));
        const auto token = static_cast<size_t>(tokens[i]);
        expect(draws[i].logits[token] > kNever, "what cannot be is drawn", backend, size, static_cast<long>(i));
        expect(!draws[i].allowed || draws[i].allowed[token], "a forbidden token is drawn", backend, size, static_cast<long>(i));
    }
}

void check_refusals(const char *backend) {
    std::vector<float> logits(70, kNever);
    std::vector<uint8_t> none(70, 0);
    const std::vector<int64_t> beyond = {70};
    const std::vector<double> one = {1.0};
    kq_draw draw{};
    draw.logits = logits.data();
    draw.top_p = draw.temperature = 1.0;
    int64_t token = -9;
    expect(kq_draw_tokens(&draw, 1, 70, &token) == 0 && token == -1, "a row of nothing is drawn from", backend);
    for (const size_t place : {size_t{0}, size_t{63}, size_t{64}, size_t{69}})
        for (const float bad : {NAN, -NAN, INFINITY}) {
            std::fill(logits.begin(), logits.end(), 0.0f);
            logits[place] = bad;
            expect(kq_draw_tokens(&draw, 1, 70, &token) == 0 && token == -1, "what is no number is drawn from", backend);
        }
    std::fill(logits.begin(), logits.end(), 0.0f);
    draw.allowed = none.data();
    expect(kq_draw_tokens(&draw, 1, 70, &token) == 0 && token == -2, "something is drawn where nothing may be", backend);
    draw.num_shifts = 1, draw.shift_ids = beyond.data(), draw.divide = draw.add = one.data();
    expect(kq_draw_tokens(&draw, 1, 70, &token) == -1, "an id beyond the row is taken", backend);
    expect(kq_draw_tokens(&draw, 1, 0, &token) == -1, "a row of no size is taken", backend);
    expect(kq_draw_tokens(&draw, 1, 1 << 22, &token) == -1, "a row beyond the scratch is taken", backend);
    expect(kq_draw_tokens(&draw, 0, 70, nullptr) == 0, "no rows are refused", backend);
}

}  // namespace

void check_draw(const char *backend) {
    for (const int64_t size : {1, 2, 15, 16, 17, 63, 64, 65, 127, 1023, 1025, 4099, 151936, 200000}) check_size(backend, size);
    check_refusals(backend);
}
