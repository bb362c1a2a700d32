// Rows of fp32 numbers in vectors of the widest kind this machine has; compiles to any instruction set.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef float vf_anywhere __attribute__((vector_size(W * 4), aligned(4), may_alias));

inline vf load(const float* p) { return *reinterpret_cast<const vf_anywhere*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_anywhere*>(p) = v; }
inline vf all(float x) { return vf{} + x; }

inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline vf larger(vf a, vf b) {  // b where either is not a number
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

inline vf smaller(vf a, vf b) { return a < b ? a : b; }

inline vf absolute(vf a) { return (vf)((vi)a & 0x7fffffff); }

// True in the first `count` lanes.
inline vi lanes(int64_t count) {
    vi index;
    for (int i = 0; i < W; ++i) index[i] = i;
    return index < (vi{} + static_cast<int32_t>(std::min<int64_t>(count, W)));
}

inline float total(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float parts[W];
    store(parts, v);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
    return parts[0];
#endif
}

// -- loops over a row of n numbers; the last vector may reach up to W - 1 numbers past it --

template <class F>
inline void each(int64_t n, F f) {
    for (int64_t i = 0; i < n; i += W) f(i);
}

template <class F>
inline float sum(int64_t n, F f) {
    vf a{}, b{};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        a += f(i);
        b += f(i + W);
    }
    for (; i < n; i += W) a += lanes(n - i) ? f(i) : vf{};
    return total(a + b);
}

struct Two {
    vf a, b;
};

struct Totals {
    float a, b;
};

template <class F>
inline Totals sums(int64_t n, F f) {
    vf a{}, b{};
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const Two x = f(i);
        a += x.a;
        b += x.b;
    }
    if (i < n) {
        const Two x = f(i);
        a += lanes(n - i) ? x.a : vf{};
        b += lanes(n - i) ? x.b : vf{};
    }
    return {total(a), total(b)};
}

inline float maximum(const float* z, int64_t n) {
    vf a = all(-INFINITY), b = a;
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        a = larger(load(z + i), a);
        b = larger(load(z + i + W), b);
    }
    for (; i < n; i += W) a = larger(lanes(n - i) ? load(z + i) : all(-INFINITY), a);
    a = larger(a, b);
    float best = a[0];
    for (int i = 1; i < W; ++i) best = std::max(best, a[i]);
    return best;
}

inline float minimum(const float* z, int64_t n) {  // not a number if none is
    vf a = all(INFINITY);
    each(n, [&](int64_t i) { a = smaller(a, lanes(n - i) ? load(z + i) : all(INFINITY)); });
    float best = a[0];
    for (int i = 1; i < W; ++i) best = std::min(best, a[i]);
    return best;
}

// -- functions of a vector, right to about one unit in the last place --

// expm1(r) and 2^k of x = k log 2 + r, for -87 <= x <= 88.
inline vf reduced(vf x, vf& power) {
    const vf magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const vf shifted = fma(x, all(1.44269504f), magic);
    const vf k = shifted - magic;
    power = (vf)(((vi)shifted << 23) + (127 << 23));
    vf r = fma(k, all(-0.693145752f), x);
    r = fma(k, all(-1.42860677e-6f), r);
    vf q = fma(r, all(1.0f / 5040), all(1.0f / 720));
    q = fma(q, r, all(1.0f / 120));
    q = fma(q, r, all(1.0f / 24));
    q = fma(q, r, all(1.0f / 6));
    q = fma(q, r, all(0.5f));
    return fma(q * r, r, r);
}

inline vf clamped(vf x) { return smaller(all(88.0f), larger(all(-87.0f), x)); }

inline vf exponential(vf x) {
    vf power;
    const vf part = reduced(clamped(x), power);
    return x < -87.0f ? vf{} : fma(power, part, power);
}

inline vf exponential_minus_one(vf x) {
    vf power;
    const vf part = reduced(clamped(x), power);
    return fma(power, part, power - 1.0f);
}

inline vf logarithm(vf x) {  // of a normal positive number
    const vi k = ((vi)x - 0x3f3504f3) >> 23;
    const vf f = (vf)((vi)x - (k << 23)) - 1.0f, e = __builtin_convertvector(k, vf), f2 = f * f;
    vf y = fma(f, all(7.0376836292e-2f), all(-1.1514610310e-1f));
    y = fma(y, f, all(1.1676998740e-1f));
    y = fma(y, f, all(-1.2420140846e-1f));
    y = fma(y, f, all(1.4249322787e-1f));
    y = fma(y, f, all(-1.6668057665e-1f));
    y = fma(y, f, all(2.0000714765e-1f));
    y = fma(y, f, all(-2.4999993993e-1f));
    y = fma(y, f, all(3.3333331174e-1f));
    y = fma(e, all(-2.12194440e-4f), y * f * f2);
    y = fma(f2, all(-0.5f), y);
    return fma(e, all(0.693359375f), f + y);
}

inline vf power_of(vf x, float p) {  // x >= 0, p > 0; 0 for 0
    return x < 1e-37f ? vf{} : exponential(logarithm(larger(all(1e-37f), x)) * p);
}

inline vf softplus(vf x) {
    const vf y = exponential(-absolute(x)), u = y + 1.0f;
    const vf log1p = u == 1.0f ? y : logarithm(u) * y / (u - 1.0f);
    return larger(vf{}, x) + log1p;
}

inline vf sigmoid(vf x) { return 1.0f / (exponential(-x) + 1.0f); }

inline vf tangent(vf x) {  // the hyperbolic one
    const vf e = exponential_minus_one(smaller(all(40.0f), absolute(x) * 2.0f));
    const vf y = e / (e + 2.0f);
    return x < 0.0f ? -y : y;
}

}  // namespace
