// The row map that keeps the k largest scores. See attention_rows.hpp.

#pragma once

#include "attention_rows.hpp"

namespace {

// Moves the numbers of a list for which `kept` holds to its front; returns how many they are.
template <class F>
int64_t keep_only(float* list, int64_t n, F kept) {
    int64_t count = 0;
    each(n, [&](int64_t i) {
        const vf x = load(list + i);
        const vi mask = kept(x) & lanes(n - i);
#if defined(__AVX512F__)
        const __mmask16 bits = _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
        store(list + count, (vf)_mm512_maskz_compress_ps(bits, (__m512)x));
        count += __builtin_popcount(bits);
#else
        for (int j = 0; j < W; ++j) {
            list[count] = x[j];
            count -= mask[j];
        }
#endif
    });
    return count;
}

template <class F>
int64_t count_if(const float* list, int64_t n, F counted) {
    return static_cast<int64_t>(sum(n, [&](int64_t i) { return counted(load(list + i)) ? all(1.0f) : vf{}; }));
}

// The k-th largest of n numbers, 1 <= k <= n; spoils the list.
inline float largest(float* list, int64_t n, int64_t k) {
    while (n > 0) {
        const float a = list[0], b = list[n / 2], c = list[n - 1];
        const float pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
        const int64_t above = count_if(list, n, [&](vf x) { return x > pivot; });
        const int64_t not_below = count_if(list, n, [&](vf x) { return x >= pivot; });
        if (k > above && k <= not_below) return pivot;
        if (k <= above) {
            n = keep_only(list, n, [&](vf x) { return x > pivot; });
        } else {
            n = keep_only(list, n, [&](vf x) { return x < pivot; });
            k -= not_below;
        }
    }
    return -INFINITY;  // only where some are not numbers
}

// Constants: k.
struct TopK {
    // Scores that do not survive become -inf; of equal ones the first survive.
    static void drop(float* z, const Row& row) {
        const int64_t k = static_cast<int64_t>(row.given[0]);
        if (k >= row.n) return;
        each(row.n, [&](int64_t i) { store(row.spare + i, load(z + i)); });
        const float least = largest(row.spare, row.n, k);
        each(row.n, [&](int64_t i) {
            const vf x = load(z + i);
            store(z + i, x < least ? all(-INFINITY) : x);
        });
        int64_t extra = count_if(z, row.n, [&](vf x) { return x >= least; }) - k;
        for (int64_t i = row.n; extra > 0 && i--;)
            if (z[i] == least) z[i] = -INFINITY, --extra;
    }
    static float forward(float* z, const Row& row) {
        drop(z, row);
        return Softmax<PLAIN>::forward(z, row);
    }
    static void backward(float* z, float* g, const Row& row) {
        drop(z, row);
        Softmax<PLAIN>::backward(z, g, row);
    }
};

}  // namespace
