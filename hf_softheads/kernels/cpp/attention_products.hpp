// Products of small matrices in registers, and the layouts that they read.
//
// A product is a sum over "words": one fp32 number, or two neighbouring bf16 numbers where the machine multiplies those.
// Weights are fp32: as words of bf16 each pair of them becomes two, the numbers rounded and what the rounding took off.

#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>

#include "vector.hpp"

namespace {

constexpr int M = 6;  // rows of a tile
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int N = 4;  // vectors of a tile
#else
constexpr int N = 2;
#endif
constexpr int64_t PANEL = N * W;  // keys of a panel

inline int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

typedef uint16_t vh __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef uint32_t vu __attribute__((vector_size(W * 4)));

inline vf numbers_at(const float* p) { return load(p); }
inline vf numbers_at(const uint16_t* p) {
    return (vf)(__builtin_convertvector(*reinterpret_cast<const vh*>(p), vu) << 16);
}

struct Full {
    typedef float Number;
    static constexpr int64_t numbers = 1;  // of a word
    static constexpr int64_t parts = 1;    // words that a word of weights becomes
    static vf product(vf a, vf b, vf c) { return fma(a, b, c); }
    static void split(float*, int64_t, int64_t) {}
};

#if defined(__AVX512BF16__) && defined(__AVX512F__)
struct Half {
    typedef uint16_t Number;
    static constexpr int64_t numbers = 2, parts = 2;
    static vf product(vf a, vf b, vf c) {
        return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
    }
    // Weights low … high (even) of a row, in place: word k is that of the pair k / 2, odd ones what was taken off.
    static void split(float* row, int64_t low, int64_t high) {
        const __m512i zip = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        for (int64_t i = low; i < high; i += W) {
            const __m512 x = (__m512)load(row + i);
            const __m256i first = (__m256i)_mm512_cvtneps_pbh(x);
            const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(first), 16);
            const __m256i second = (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(x, (__m512)wide));
            store(row + i, (vf)_mm512_permutex2var_epi32(_mm512_castsi256_si512(first), zip,
                                                         _mm512_castsi256_si512(second)));
        }
    }
};
constexpr bool HALF = true;
#else
typedef Full Half;  // never given bf16 numbers
constexpr bool HALF = false;
#endif

// c[m][j] = scale * sum_k a[m * rows + k * words] b[k * width + j] for M rows and n vectors, added to c or not.
template <class Op, int n>
inline void tile(const float* a, int64_t rows, int64_t words, const float* b, int64_t width, int64_t count, float* c,
                 int64_t stride, bool add, float scale) {
    vf sums[M][n] = {};
    for (int64_t k = 0; k < count; ++k, a += words, b += width) {
        vf right[n];
#pragma GCC unroll 4
        for (int j = 0; j < n; ++j) right[j] = load(b + j * W);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            const vf left = all(a[m * rows]);
#pragma GCC unroll 4
            for (int j = 0; j < n; ++j) sums[m][j] = Op::product(left, right[j], sums[m][j]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int j = 0; j < n; ++j) {
            float* to = c + m * stride + j * W;
            store(to, add ? load(to) + sums[m][j] * scale : sums[m][j] * scale);
        }
}

// The same for any `width`, a multiple of W.
template <class Op>
void strip(const float* a, int64_t rows, int64_t words, const float* b, int64_t width, int64_t count, float* c,
           int64_t stride, bool add, float scale) {
    for (int64_t j = 0; j < width;) {
        const int64_t left = (width - j) / W;
        if (left >= N) {
            tile<Op, N>(a, rows, words, b + j, width, count, c + j, stride, add, scale);
            j += PANEL;
        } else if (left >= 2) {
            tile<Op, 2>(a, rows, words, b + j, width, count, c + j, stride, add, scale);
            j += 2 * W;
        } else {
            tile<Op, 1>(a, rows, words, b + j, width, count, c + j, stride, add, scale);
            j += W;
        }
    }
}

struct Free {
    void operator()(float* p) const { std::free(p); }
};

class Buffer {  // uninitialised
   public:
    explicit Buffer(int64_t count)
        : memory(static_cast<float*>(std::aligned_alloc(64, up(count * 4 + 64, 64)))) {}
    operator float*() const { return memory.get(); }

   private:
    std::unique_ptr<float, Free> memory;
};

// Word k of a row of n numbers.
inline float word(const float* row, int64_t k, int64_t) { return row[k]; }
inline float word(const uint16_t* row, int64_t k, int64_t n) {
    const uint16_t pair[2] = {row[2 * k], 2 * k + 1 < n ? row[2 * k + 1] : uint16_t{0}};
    float both;
    std::memcpy(&both, pair, 4);
    return both;
}

template <class T>
int64_t words_of(int64_t n) {
    return (n * static_cast<int64_t>(sizeof(T)) + 3) / 4;
}

// Rows of n numbers as `width` words, zeros after the last one, transposed in panels: to[row / PANEL][word][row % PANEL],
// zeros after the last row.
template <class T>
void pack_panels(const T* from, int64_t stride, int64_t rows, int64_t n, int64_t width, float* to) {
    const int64_t words = words_of<T>(n);
    for (int64_t first = 0; first < rows; first += PANEL, to += width * PANEL)
        for (int64_t k = 0; k < width; ++k)
            for (int64_t r = 0; r < PANEL; ++r)
                to[k * PANEL + r] = k < words && first + r < rows ? word(from + (first + r) * stride, k, n) : 0.0f;
}

// The same without transposition, zeros in the rows from `rows` to `padded`.
template <class T>
void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t n, int64_t width, int64_t padded, float* to) {
    const int64_t words = words_of<T>(n);
    for (int64_t r = 0; r < padded; ++r, to += width)
        for (int64_t k = 0; k < width; ++k) to[k] = r < rows && k < words ? word(from + r * stride, k, n) : 0.0f;
}

// Rows as above, up to an even number of them, but a word holds the same column of neighbouring rows.
inline void pack_columns(const float* from, int64_t stride, int64_t rows, int64_t n, int64_t width, float* to) {
    pack_rows(from, stride, rows, n, width, up(rows, 2), to);
}
inline void pack_columns(const uint16_t* from, int64_t stride, int64_t rows, int64_t n, int64_t width, float* to) {
    for (int64_t r = 0; r < rows; r += 2, to += width)
        for (int64_t k = 0; k < width; ++k) {
            const uint16_t pair[2] = {k < n ? from[r * stride + k] : uint16_t{0},
                                      k < n && r + 1 < rows ? from[(r + 1) * stride + k] : uint16_t{0}};
            std::memcpy(to + k, pair, 4);
        }
}

}  // namespace
