// Row maps that need more of a row than one sum: thresholds, entropies, ranges. See attention_rows.hpp.

#pragma once

#include "attention_rows.hpp"

namespace {

// Constants: 1 to divide by max(|sum|, 1).
struct Identity {
    static float plain_sum(const float* z, const Row& row) {
        return sum(row.n, [&](int64_t i) { return load(z + i); });
    }
    static float forward(float* z, const Row& row) {
        return row.given[0] == 0 ? 1 : 1 / std::max(1.0f, std::fabs(plain_sum(z, row)));
    }
    static void backward(float* z, float* g, const Row& row) {
        if (row.given[0] == 0) return;
        const float whole = plain_sum(z, row), size = std::fabs(whole), factor = 1 / std::max(1.0f, size);
        float inner = 0;
        if (size >= 1) {
            inner = factor * sum(row.n, [&](int64_t i) { return load(z + i) * load(g + i); });
            inner = whole > 0 ? inner : -inner;
        }
        each(row.n, [&](int64_t i) { store(g + i, (load(g + i) - inner) * factor); });
        times(z, row.n, factor);
    }
};

// Constants: epsilon.
struct Softpick {
    // z becomes (exp(z) - 1) exp(-c), c > 0 where exp would overflow; returns the divisor, and exp(-c) in `floor`.
    static float raised(float* z, const Row& row, float& floor) {
        const float top = std::max(0.0f, maximum(z, row.n)), c = std::max(0.0f, top - 75.0f);
        floor = std::exp(-c);
        const float offset = std::expm1(-c);
        return row.given[0] * std::exp(top - c) + sum(row.n, [&](int64_t i) {
            const vf y = exponential_minus_one(load(z + i) - c) - offset;
            store(z + i, y);
            return absolute(y);
        });
    }
    static float forward(float* z, const Row& row) {
        float floor;
        const float divisor = raised(z, row, floor);
        each(row.n, [&](int64_t i) { store(z + i, larger(vf{}, load(z + i))); });
        return 1 / divisor;
    }
    static void backward(float* z, float* g, const Row& row) {
        float floor;
        const float factor = 1 / raised(z, row, floor);
        const float inner = factor * sum(row.n, [&](int64_t i) {
            return larger(vf{}, load(z + i)) * load(g + i);
        });
        each(row.n, [&](int64_t i) {
            const vf y = load(z + i), signed_one = y > 0.0f ? load(g + i) - inner : all(inner);
            store(g + i, (y + floor) * signed_one * factor);
            store(z + i, larger(vf{}, y) * factor);
        });
    }
};

// w = relu((alpha - 1) z - tau)^(1 / (alpha - 1)). Constants: alpha. POWER: that of the formula, 0 for any.
template <int POWER>
struct Entmax {
    static vi candidate(vf x, int64_t left) { return (x > -1.0f) & lanes(left); }

    // Calls f(i, x, s) for all vectors of z, s from the list of candidates where x is one of them, 0 elsewhere.
    template <class F>
    static void spread(const float* z, const Row& row, F f) {
        const float* next = row.spare;
        each(row.n, [&](int64_t i) {
            const vf x = load(z + i);
            const vi kept = candidate(x, row.n - i);
#if defined(__AVX512F__)
            const __mmask16 mask = _mm512_test_epi32_mask((__m512i)kept, (__m512i)kept);
            f(i, x, (vf)_mm512_maskz_expand_ps(mask, (__m512)load(next)));
            next += __builtin_popcount(mask);
#else
            vf s{};
            for (int j = 0; j < W; ++j)
                if (kept[j]) s[j] = *next++;
            f(i, x, s);
#endif
        });
    }
    // z becomes x = (alpha - 1) (z - max z); the candidates, x > -1, are listed. Returns tau, which Newton's method finds
    // from below; for any power, the list then holds (x - tau)^(p - 1).
    static float solve(float* z, const Row& row, float p) {
        const float scale = row.given[0] - 1, top = maximum(z, row.n);
        float* list = row.spare;
        int64_t count = 0;
        each(row.n, [&](int64_t i) {
            const vf x = (load(z + i) - top) * scale;
            store(z + i, x);
            const vi kept = candidate(x, row.n - i);
#if defined(__AVX512F__)
            const __mmask16 mask = _mm512_test_epi32_mask((__m512i)kept, (__m512i)kept);
            store(list + count, (vf)_mm512_maskz_compress_ps(mask, (__m512)x));
            count += __builtin_popcount(mask);
#else
            for (int j = 0; j < W; ++j) {
                list[count] = x[j];
                count -= kept[j];
            }
#endif
        });
        float tau = -1;
        for (int step = 0; step < 30; ++step) {
            const Totals both = sums(count, [&](int64_t i) {
                const vf above = larger(load(list + i) - tau, vf{});
                if (POWER == 1) return Two{above, above > 0.0f ? all(1.0f) : vf{}};
                if (POWER == 2) return Two{above * above, above * 2.0f};
                const vf lower = power_of(above, p - 1);
                return Two{lower * above, lower * p};
            });
            const float move = (both.a - 1) / std::max(both.b, 1e-37f);
            tau += std::max(0.0f, move);
            if (!(move > 4.8e-7f)) break;
        }
        tau = std::min(tau, -1.2e-7f);
        if (POWER == 0)
            each(count, [&](int64_t i) {
                store(list + i, power_of(larger(load(list + i) - tau, vf{}), p - 1));
            });
        return tau;
    }
    // How fast a weight grows with its score, up to a factor: w^(2 - alpha) on the support.
    static vf slope(vf above, vf listed) {
        return POWER == 0 ? listed : POWER == 2 ? above : above > 0.0f ? all(1.0f) : vf{};
    }
    static vf weight(vf above, vf s) { return POWER == 1 ? above : above * s; }

    template <class F>
    static void every(const float* z, const Row& row, float tau, F f) {
        if (POWER == 0)
            spread(z, row, [&](int64_t i, vf x, vf s) { f(i, larger(vf{}, x - tau), s); });
        else
            each(row.n, [&](int64_t i) { f(i, larger(vf{}, load(z + i) - tau), vf{}); });
    }
    static float forward(float* z, const Row& row) {
        const float tau = solve(z, row, 1 / (row.given[0] - 1));
        every(z, row, tau, [&](int64_t i, vf above, vf s) {
            store(z + i, weight(above, slope(above, s)));
        });
        return 1;
    }
    static void backward(float* z, float* g, const Row& row) {
        const float tau = solve(z, row, 1 / (row.given[0] - 1));
        vf whole{}, product{};
        every(z, row, tau, [&](int64_t i, vf above, vf listed) {
            const vf s = lanes(row.n - i) ? slope(above, listed) : vf{};
            whole += s;
            product += s != 0.0f ? s * load(g + i) : vf{};
        });
        const float size = total(whole), mean = size == 0 ? 0 : total(product) / size;
        every(z, row, tau, [&](int64_t i, vf above, vf listed) {
            const vf s = slope(above, listed);
            store(g + i, (load(g + i) - mean) * s);
            store(z + i, weight(above, s));
        });
    }
};

inline float entmax_forward(float* z, const Row& row) {
    if (row.given[0] == 2) return Entmax<1>::forward(z, row);
    return row.given[0] == 1.5f ? Entmax<2>::forward(z, row) : Entmax<0>::forward(z, row);
}

inline void entmax_backward(float* z, float* g, const Row& row) {
    if (row.given[0] == 2) return Entmax<1>::backward(z, g, row);
    return row.given[0] == 1.5f ? Entmax<2>::backward(z, g, row) : Entmax<0>::backward(z, g, row);
}

// Softmax with a factor that depends on the entropy of the plain softmax. Constants: gate, where `long` starts, 1 to
// differentiate the factor, the number of coefficients of the polynomial and of `long`, the coefficients.
struct Adaptive {
    static constexpr float tiny = 1e-9f;

    static float polynomial(const float* coefficients, int64_t n, float x, float& slope) {
        float y = 0;
        slope = 0;
        for (int64_t i = 0; i < n; ++i) {
            slope = slope * x + y;
            y = y * x + coefficients[i];
        }
        return y;
    }
    static float factor(const Row& row, float entropy, float& slope) {
        const float* c = row.given;
        const int64_t n = static_cast<int64_t>(c[3]), n_long = static_cast<int64_t>(c[4]);
        slope = 0;
        if (!(entropy > c[0])) return 1;
        float steep, y;
        if (n_long && !(entropy < c[1]))
            y = polynomial(c + 5 + n, n_long, entropy, steep);
        else
            y = polynomial(c + 5, n, entropy, steep);
        if (y >= 1) slope = c[2] * steep;
        return std::max(1.0f, y);
    }
    // The plain softmax in spare, its entropy.
    static float entropy(const float* z, const Row& row, float top) {
        each(row.n, [&](int64_t i) { store(row.spare + i, load(z + i)); });
        const float share = 1 / raise(row.spare, row.n, top);
        return -sum(row.n, [&](int64_t i) {
            const vf p = load(row.spare + i) * share;
            store(row.spare + i, p);
            return p * logarithm(p + tiny);
        });
    }
    static float raise_times(float* z, const Row& row, float top, float beta) {
        return sum(row.n, [&](int64_t i) {
            const vf e = exponential((load(z + i) - top) * beta);
            store(z + i, e);
            return e;
        });
    }
    static float forward(float* z, const Row& row) {
        const float top = maximum(z, row.n);
        float slope;
        const float beta = factor(row, entropy(z, row, top), slope);
        return 1 / raise_times(z, row, top, beta);
    }
    static void backward(float* z, float* g, const Row& row) {
        const float top = maximum(z, row.n), spread = entropy(z, row, top);
        float slope;
        const float beta = factor(row, spread, slope);
        const Totals both = sums(row.n, [&](int64_t i) {
            const vf e = exponential((load(z + i) - top) * beta);
            return Two{e, e * load(g + i)};
        });
        const float share = 1 / both.a, inner = both.b * share;
        const Totals moved = sums(row.n, [&](int64_t i) {  // of beta; and what the entropy's softmax takes off
            const vf x = load(z + i) - top, w = exponential(x * beta) * share;
            const vf dy = w * (load(g + i) - inner), p = load(row.spare + i);
            store(z + i, w);
            store(g + i, dy);
            return Two{dy * x, p * logarithm(p + tiny) + p * p / (p + tiny)};
        });
        const float dentropy = moved.a * slope;
        each(row.n, [&](int64_t i) {
            const vf p = load(row.spare + i), h = logarithm(p + tiny) + p / (p + tiny);
            store(g + i, load(g + i) * beta - p * (h - moved.b) * dentropy);
        });
    }
};

// Probabilities times scores. Constants: 1 for those moved and divided by the row's range, epsilon of the range.
struct SelfAdjusting {
    static void range(const float* z, const Row& row, float& low, float& high, float& width) {
        if (row.given[0] == 0) {
            low = 0, high = 0, width = 1;
            return;
        }
        each(row.n, [&](int64_t i) { store(row.spare + i, -load(z + i)); });
        low = std::min(0.0f, -maximum(row.spare, row.n));
        high = std::max(0.0f, maximum(z, row.n));
        width = high - low + row.given[1];
    }
    static float forward(float* z, const Row& row) {
        float low, high, width;
        range(z, row, low, high, width);
        const float top = maximum(z, row.n);
        return 1 / (width * sum(row.n, [&](int64_t i) {
            const vf x = load(z + i), e = exponential(x - top);
            store(z + i, e * (x - low));
            return e;
        }));
    }
    static void backward(float* z, float* g, const Row& row) {
        float low, high, width;
        range(z, row, low, high, width);
        const float top = maximum(z, row.n), unit = 1 / width;
        const Totals both = sums(row.n, [&](int64_t i) {
            const vf x = load(z + i), e = exponential(x - top);
            store(row.spare + i, e);
            return Two{e, e * load(g + i)};
        });
        const float share = 1 / both.a, plain = both.b * share;
        const float adjusted = share * unit * sum(row.n, [&](int64_t i) {
            return load(row.spare + i) * (load(z + i) - low) * load(g + i);
        });
        const Totals ties = sums(row.n, [&](int64_t i) {
            const vf x = load(z + i);
            return Two{x == low ? all(1.0f) : vf{}, x == high ? all(1.0f) : vf{}};
        });
        const bool moves = row.given[0] != 0;
        const float dlow = moves && low < 0 ? (adjusted - plain) * unit / ties.a : 0;
        const float dhigh = moves && high > 0 ? -adjusted * unit / ties.b : 0;
        each(row.n, [&](int64_t i) {
            const vf x = load(z + i), p = load(row.spare + i) * share, moved = (x - low) * unit;
            const vf gradient = load(g + i);
            vf dz = p * (gradient * moved - adjusted) + gradient * p * unit;
            dz += x == low ? all(dlow) : vf{};
            dz += x == high ? all(dhigh) : vf{};
            store(g + i, dz);
            store(z + i, p * moved);
        });
    }
};

}  // namespace
