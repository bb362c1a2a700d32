// Blocks of queries: what each of them sees, their scores, weights and products. See attention.cpp.

#pragma once

#include "attention_products.hpp"
#include "attention_top.hpp"
#include "attention_wholes.hpp"

struct Call {  // mirrored in attention.py
    const void *query, *key, *value;
    const uint8_t* keep;  // null: causal, the last query sees all keys
    const float *slopes, *constants;  // slopes null: none
    float* out;
    const float* grad;
    float *dquery, *dkey, *dvalue;
    int64_t batch, heads, kv_heads, queries, keys, dim, value_dim;
    int64_t query_strides[3], key_strides[3], value_strides[3], keep_strides[4];
    int64_t map, half, window, causal, threads;  // window 0: none
    float scaling, softcap;                      // softcap 0: none
};

namespace {

struct Map {
    const char* name;
    float (*forward)(float*, const Row&);
    void (*backward)(float*, float*, const Row&);
};

template <class T>
constexpr Map map_of(const char* name) {
    return {name, T::forward, T::backward};
}

inline constexpr Map MAPS[] = {
    map_of<Softmax<PLAIN>>("softmax"),
    map_of<Softmax<RECTIFIED>>("rectified"),
    map_of<Softmax<ONE_MORE>>("softmax1"),
    map_of<TopK>("top_k"),
    map_of<Scaled<Sigmoid<false>>>("sigmoid"),
    map_of<Scaled<Sigmoid<true>>>("sigmoid_shifted"),
    map_of<Scaled<ReLU<1>>>("relu"),
    map_of<Scaled<ReLU<2>>>("relu_squared"),
    map_of<Scaled<ELU>>("elu"),
    map_of<Scaled<StableMax>>("stablemax"),
    map_of<Scaled<Softplus>>("softplus"),
    map_of<Reweighted>("reweighted"),
    map_of<Identity>("identity"),
    map_of<Softpick>("softpick"),
    {"entmax", entmax_forward, entmax_backward},
    map_of<Adaptive>("adaptive_temperature"),
    map_of<SelfAdjusting>("sa_softmax"),
};

constexpr int64_t ROWS = 48;         // queries of a block; fewer where the keys are many
constexpr int64_t SCORES = 1 << 17;  // of a block, half a megabyte
constexpr int64_t CHUNK = 128;       // keys whose values stay in the nearest cache

struct Span {  // what a query sees
    int64_t first, last, count, own;  // own: index of its own key
    const uint8_t* keep;              // null where all keys from first to last are seen
};

inline Span span_of(const Call& c, int64_t b, int64_t h, int64_t q) {
    const int64_t own = q + c.keys - c.queries;
    if (!c.keep) {
        const int64_t first = c.window ? std::max<int64_t>(0, own - c.window + 1) : 0;
        return {first, own + 1, own + 1 - first, own, nullptr};
    }
    const int64_t step = c.keep_strides[3];
    const uint8_t* keep =
        c.keep + b * c.keep_strides[0] + h * c.keep_strides[1] + q * c.keep_strides[2];
    Span span{0, c.keys, 0, own, nullptr};
    while (span.last > 0 && !keep[(span.last - 1) * step]) --span.last;
    if (c.causal) span.own = span.last - 1;
    if (c.window) span.first = std::max<int64_t>(0, span.own - c.window + 1);
    while (span.first < span.last && !keep[span.first * step]) ++span.first;
    int32_t count = 0;
    if (step == 1)
        for (int64_t k = span.first; k < span.last; ++k) count += keep[k];
    else
        for (int64_t k = span.first; k < span.last; ++k) count += keep[k * step];
    span.count = count;
    if (count == 0) span.first = span.last = 0;
    if (count < span.last - span.first) span.keep = keep;
    return span;
}

struct Scratch {
    Buffer spare, scores, grads;
    explicit Scratch(int64_t keys)
        : spare(keys + 3 * W), scores(keys + 3 * W), grads(keys + 3 * W) {}
};

inline void gather(const Call& c, const Span& span, const float* row, float* to) {
    for (int64_t k = span.first, n = 0; k < span.last; ++k)
        if (span.keep[k * c.keep_strides[3]]) to[n++] = row[k];
}

inline void scatter(const Call& c, const Span& span, const float* from, float* row) {
    for (int64_t k = span.first, n = 0; k < span.last; ++k)
        row[k] = span.keep[k * c.keep_strides[3]] ? from[n++] : 0.0f;
}

inline void clear(float* row, const Span& span, int64_t low, int64_t high) {
    std::fill(row + low, row + std::max(low, span.first), 0.0f);
    std::fill(row + std::max(low, span.last), row + high, 0.0f);
}

// Products with the keys become scores; `capped` (or null) gets them as they are between soft cap and slopes.
inline void finish(const Call& c, int64_t h, const Span& span, float* row, float* capped) {
    float* z = row + span.first;
    if (c.softcap != 0)
        each(span.last - span.first, [&](int64_t i) {
            const vf x = tangent(load(z + i) / c.softcap) * c.softcap;
            store(z + i, x);
            if (capped) store(capped + span.first + i, x);
        });
    if (c.slopes)
        for (int64_t k = span.first; k < span.last; ++k)
            row[k] += c.slopes[h] * static_cast<float>(span.own - k);
}

// The row's weights, from number `low` to `high`, up to the factor that is returned.
inline float weigh(const Call& c, int64_t h, const Span& span, float* row, int64_t low, int64_t high, const Scratch& scratch) {
    float factor = 0;
    if (span.count) {
        finish(c, h, span, row, nullptr);
        const Row known{span.count, c.constants, scratch.spare};
        if (span.keep) {
            gather(c, span, row, scratch.scores);
            factor = MAPS[c.map].forward(scratch.scores, known);
            scatter(c, span, scratch.scores, row);
        } else {
            factor = MAPS[c.map].forward(row + span.first, known);
        }
    }
    clear(row, span, low, high);
    return factor;
}

// `row` becomes the weights and `grad`, theirs, that of the products with the keys.
inline void weigh_back(const Call& c, int64_t h, const Span& span, float* row, float* grad, float* capped, int64_t low,
                int64_t high, const Scratch& scratch) {
    if (span.count) {
        finish(c, h, span, row, capped);
        const Row known{span.count, c.constants, scratch.spare};
        if (span.keep) {
            gather(c, span, row, scratch.scores);
            gather(c, span, grad, scratch.grads);
            MAPS[c.map].backward(scratch.scores, scratch.grads, known);
            scatter(c, span, scratch.scores, row);
            scatter(c, span, scratch.grads, grad);
        } else {
            MAPS[c.map].backward(row + span.first, grad + span.first, known);
        }
        if (c.softcap != 0)
            each(span.last - span.first, [&](int64_t i) {
                const vf t = load(capped + span.first + i) / c.softcap;
                store(grad + span.first + i, load(grad + span.first + i) * (1.0f - t * t));
            });
    }
    clear(row, span, low, high);
    clear(grad, span, low, high);
}

// Queries of one head, with what they see: numbers low … high in the block, and in each tile of M queries.
struct Block {
    int64_t rows, low, high, lows[ROWS / M], highs[ROWS / M];
    Span spans[ROWS];

    Block(const Call& c, int64_t b, int64_t h, int64_t first, int64_t most) {
        rows = std::min(most, c.queries - first);
        low = c.keys, high = 0;
        for (int64_t t = 0; t < tiles(); ++t) {
            lows[t] = c.keys, highs[t] = 0;
            for (int64_t r = t * M; r < std::min(rows, (t + 1) * M); ++r) {
                spans[r] = span_of(c, b, h, first + r);
                if (!spans[r].count) continue;
                lows[t] = std::min(lows[t], spans[r].first / 2 * 2);
                highs[t] = std::max(highs[t], up(spans[r].last, 2));
            }
            if (!highs[t]) lows[t] = 0;  // nothing is seen
            if (highs[t]) low = std::min(low, lows[t]);
            high = std::max(high, highs[t]);
        }
        if (!high) low = 0;
    }
    int64_t tiles() const { return (rows + M - 1) / M; }

    // to[row][key] = scale * a[row] · panels[key] for all keys that a tile sees.
    template <class Op>
    void products(const float* a, int64_t words, const float* panels, int64_t count, float* to, int64_t stride,
                  float scale) const {
        for (int64_t p = low / PANEL; p * PANEL < high; ++p)
            for (int64_t t = 0; t < tiles(); ++t)
                if (lows[t] < (p + 1) * PANEL && p * PANEL < highs[t])
                    tile<Op, N>(a + t * M * words, words, 1, panels + p * count * PANEL, PANEL, count,
                                to + t * M * stride + p * PANEL, stride, false, scale);
    }

    // to[row] += sum of weights[row][key] values[key].
    template <class Op>
    void mean(const float* weights, int64_t stride, const float* values, int64_t width, float* to) const {
        constexpr int64_t n = Op::numbers;
        for (int64_t chunk = low / CHUNK * CHUNK; chunk < high; chunk += CHUNK)
            for (int64_t t = 0; t < tiles(); ++t) {
                const int64_t from = std::max(lows[t], chunk), until = std::min(highs[t], chunk + CHUNK);
                for (int64_t part = 0; part < Op::parts && from < until; ++part)
                    strip<Op>(weights + t * M * stride + from + part, stride, Op::parts, values + from / n * width,
                              width, (until - from) / n, to + t * M * width, width, true, 1);
            }
    }

    // to[key] += sum of weights[row][key] a[row].
    void transposed(const float* weights, int64_t stride, const float* a, int64_t width, float* to) const {
        int64_t skipped = 0;
        for (int64_t key = low; key < high; key += M) {
            while (skipped < rows && spans[skipped].last <= key) ++skipped;
            strip<Full>(weights + skipped * stride + key, 1, stride, a + skipped * width, width, rows - skipped,
                        to + key * width, width, true, 1);
        }
    }
};

}  // namespace
