// Row maps: the scores of the keys that one query sees become weights. No map knows of masks, blocks or types.
//
//   float forward(float* z, const Row&)             z becomes the weights up to the factor that is returned
//   void backward(float* z, float* g, const Row&)   z becomes the weights, g (their gradient) the gradient of z
//
// z and g hold n numbers and may be read and written up to W - 1 numbers further.

#pragma once

#include <cstring>

#include "vector.hpp"

namespace {

struct Row {
    int64_t n;           // keys that the query sees, at least 1
    const float* given;  // the variant's constants
    float* spare;        // n numbers and a vector
};

inline void times(float* z, int64_t n, float factor) {
    each(n, [&](int64_t i) { store(z + i, load(z + i) * factor); });
}

// z becomes exp(z - top); returns the sum.
inline float raise(float* z, int64_t n, float top) {
    return sum(n, [&](int64_t i) {
        const vf e = exponential(load(z + i) - top);
        store(z + i, e);
        return e;
    });
}

// The softmax of all keys, of those with `z >= 0`, or of all and one more of score 0 whose weight is dropped.
enum { PLAIN, RECTIFIED, ONE_MORE };

template <int KIND>
struct Softmax {
    static float forward(float* z, const Row& row) {
        const float highest = maximum(z, row.n), top = KIND == ONE_MORE ? std::max(highest, 0.0f) : highest;
        const float whole = (KIND == ONE_MORE ? std::exp(-top) : 0.0f) + sum(row.n, [&](int64_t i) {
            const vf x = load(z + i), raised = exponential(x - top);
            const vf e = KIND == RECTIFIED ? (x < 0.0f ? vf{} : raised) : raised;
            store(z + i, e);
            return e;
        });
        return KIND == RECTIFIED && whole == 0 ? 0 : 1 / whole;
    }
    static void backward(float* z, float* g, const Row& row) {
        const float factor = forward(z, row);
        const float inner = factor * sum(row.n, [&](int64_t i) { return load(z + i) * load(g + i); });
        each(row.n, [&](int64_t i) {
            const vf w = load(z + i) * factor;
            store(z + i, w);
            store(g + i, (load(g + i) - inner) * w);
        });
    }
};

// w = s(z) times a factor. Constants: how the factor is made, a number, then those of s.
//   0: 1 / number    1: n^-number    2: 1 / (sum of s(z) + number)
template <class S>
struct Scaled {
    static float factor(const Row& row, float total) {
        const float number = row.given[1];
        if (row.given[0] == 0) return 1 / number;
        if (row.given[0] == 1) return std::pow(static_cast<float>(row.n), -number);
        return 1 / (total + number);
    }
    static float forward(float* z, const Row& row) {
        const S s(z, row);
        return factor(row, sum(row.n, [&](int64_t i) {
            const vf y = s.value(load(z + i));
            store(z + i, y);
            return y;
        }));
    }
    static void backward(float* z, float* g, const Row& row) {
        const S s(z, row);
        float f, inner = 0;
        if (row.given[0] == 2) {
            const Totals both = sums(row.n, [&](int64_t i) {
                const vf y = s.value(load(z + i));
                return Two{y, y * load(g + i)};
            });
            f = factor(row, both.a);
            inner = f * both.b;
        } else {
            f = factor(row, 0);
        }
        const float moved = sum(row.n, [&](int64_t i) {
            const vf x = load(z + i), y = s.value(x);
            const vf gradient = (load(g + i) - inner) * s.slope(x, y) * f;
            store(g + i, gradient);
            if (!S::shifted) store(z + i, y * f);
            return gradient;
        });
        if (!S::shifted) return;
        each(row.n, [&](int64_t i) {  // through the row's log-sum-exp
            const vf x = load(z + i);
            store(g + i, load(g + i) - exponential(x - s.shift) * moved);
            store(z + i, s.value(x) * f);
        });
    }
};

// Constants: bias, and what else is added: 0 nothing, 1 -log n, 2 -log-sum-exp(z).
template <bool SHIFTED>
struct Sigmoid {
    static constexpr bool shifted = SHIFTED;
    float bias, shift = 0;
    Sigmoid(const float* z, const Row& row) : bias(row.given[2]) {
        if (row.given[3] == 1) bias -= std::log(static_cast<float>(row.n));
        if (!SHIFTED) return;
        const float top = maximum(z, row.n);
        shift = top + std::log(sum(row.n, [&](int64_t i) { return exponential(load(z + i) - top); }));
        bias -= shift;
    }
    vf value(vf x) const { return sigmoid(x + bias); }
    vf slope(vf, vf y) const { return y * (1.0f - y); }
};

template <int POWER>
struct ReLU {
    static constexpr bool shifted = false;
    static constexpr float shift = 0;
    ReLU(const float*, const Row&) {}
    vf value(vf x) const {
        const vf y = larger(vf{}, x);
        return POWER == 2 ? y * y : y;
    }
    vf slope(vf x, vf) const {
        return POWER == 2 ? larger(vf{}, x) * 2.0f : (x > 0.0f ? all(1.0f) : vf{});
    }
};

struct ELU {
    static constexpr bool shifted = false;
    static constexpr float shift = 0;
    ELU(const float*, const Row&) {}
    vf value(vf x) const { return x > 0.0f ? x + 1.0f : exponential(smaller(vf{}, x)); }
    vf slope(vf x, vf y) const { return x > 0.0f ? all(1.0f) : y; }
};

struct StableMax {
    static constexpr bool shifted = false;
    static constexpr float shift = 0;
    StableMax(const float*, const Row&) {}
    vf value(vf x) const { return x >= 0.0f ? x + 1.0f : 1.0f / (1.0f - smaller(vf{}, x)); }
    vf slope(vf x, vf y) const { return x >= 0.0f ? all(1.0f) : y * y; }
};

struct Softplus {  // of log n times the score
    static constexpr bool shifted = false;
    static constexpr float shift = 0;
    float log_n;
    Softplus(const float*, const Row& row) : log_n(std::log(static_cast<float>(row.n))) {}
    vf value(vf x) const { return softplus(x * log_n); }
    vf slope(vf x, vf) const { return sigmoid(x * log_n) * log_n; }
};

// Constants: p, those of the softplus weights.
struct Reweighted {
    static Row inner_row(const Row& row) { return {row.n, row.given + 1, row.spare}; }
    // z, softplus weights up to `factor`, becomes r up to the factor that is returned.
    static float reweight(float* z, const Row& row, float factor) {
        const float n = static_cast<float>(row.n), offset = row.n > 3 ? 1 : 0, p = row.given[0];
        each(row.n, [&](int64_t i) {
            store(z + i, larger(vf{}, load(z + i) * factor * n - offset));
        });
        const float top = maximum(z, row.n), unit = top == 0 ? 1 : 1 / top;
        return 1 / (row.given[2] * std::pow(unit, p) + sum(row.n, [&](int64_t i) {
            const vf y = power_of(load(z + i) * unit, p);
            store(z + i, y);
            return y;
        }));
    }
    static float forward(float* z, const Row& row) {
        return reweight(z, row, Scaled<Softplus>::forward(z, inner_row(row)));
    }
    static void backward(float* z, float* g, const Row& row) {
        const float n = static_cast<float>(row.n), offset = row.n > 3 ? 1 : 0, p = row.given[0];
        const Softplus s(z, row);
        const Row inner = inner_row(row);
        each(row.n, [&](int64_t i) { store(row.spare + i, load(z + i)); });
        const float factor = Scaled<Softplus>::forward(z, inner);
        times(z, row.n, factor);  // z: the weights of the softplus; spare: the scores
        const float top = std::max(0.0f, maximum(z, row.n) * n - offset), unit = top == 0 ? 1 : 1 / top;
        auto powered = [&](vf x) { return power_of(larger(vf{}, x * n - offset) * unit, p); };
        const Totals both = sums(row.n, [&](int64_t i) {
            const vf y = powered(load(z + i));
            return Two{y, y * load(g + i)};
        });
        const float share = 1 / (row.given[2] * std::pow(unit, p) + both.a), mean = share * both.b;
        const float moved = sum(row.n, [&](int64_t i) {
            const vf x = load(z + i), above = larger(vf{}, x * n - offset);
            const vf steep = above > 0.0f ? powered(x) / above * (p * n * share) : vf{};
            const vf gradient = (load(g + i) - mean) * steep;
            store(g + i, gradient);
            return gradient * x;
        });
        each(row.n, [&](int64_t i) {
            const vf x = load(row.spare + i);
            store(g + i, (load(g + i) - moved) * s.slope(x, x) * factor);
            store(z + i, powered(load(z + i)) * share);
        });
    }
};

}  // namespace
