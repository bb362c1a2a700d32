// Coded rows as numbers again, fp32 or bf16, for matrix products with many hidden states.

#include <cstring>
#include <vector>

#include "threads.hpp"
#include "vector.hpp"

namespace {

typedef uint32_t vu __attribute__((vector_size(W * 4)));

inline vf numbers_at(const uint8_t* codes) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
#else
    vf numbers;
    for (int i = 0; i < W; ++i) numbers[i] = codes[i];
    return numbers;
#endif
}

inline void put(vf value, float* to) { store(to, value); }

inline void put(vf value, uint16_t* to) {  // bf16, rounded to the nearest
#if defined(__AVX512BF16__)
    const __m256bh half = _mm512_cvtneps_pbh((__m512)value);
    std::memcpy(to, &half, sizeof half);
#else
    const vi bits = (vi)value, half = (vi)((vu)(bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)half));
#elif defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32((__m256i)half, (__m256i)half);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8)));
#else
    for (int i = 0; i < W; ++i) to[i] = static_cast<uint16_t>(half[i]);
#endif
#endif
}

inline float number(float value) { return value; }

inline float number(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// to[i] = f(i, codes[i]); of codes a last vector may reach past n.
template <class T, class F>
inline void convert(const uint8_t* codes, int64_t n, F f, T* to) {
    int64_t i = 0;
    for (; i + W <= n; i += W) put(f(i, numbers_at(codes + i)), to + i);
    if (i == n) return;
    T rest[W];
    put(f(i, numbers_at(codes + i)), rest);
    std::copy_n(rest, n - i, to + i);
}

// code = code * 2^WIDTH + the next WIDTH bits of n packed bytes.
template <int WIDTH>
void append(const uint8_t* __restrict packed, int64_t n, uint8_t* __restrict codes) {
    constexpr int places = 8 / WIDTH, mask = (1 << WIDTH) - 1;
    int64_t i = 0;
#if defined(__AVX512BW__)
    for (; i + 8 * WIDTH <= n; i += 8 * WIDTH) {  // every byte to as many bytes as it has codes, then each its own bits
        const auto* from = reinterpret_cast<const __m128i*>(packed + i);
        __m512i v;
        if (WIDTH == 8) {
            v = _mm512_loadu_si512(from);
        } else if (WIDTH == 4) {
            v = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
            v = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi16(v, 4)), _mm512_set1_epi8(mask));
        } else if (WIDTH == 2) {
            v = _mm512_cvtepu8_epi32(_mm_loadu_si128(from));
            v = _mm512_or_si512(v, _mm512_slli_epi32(v, 6));
            v = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi32(v, 12)), _mm512_set1_epi8(mask));
        } else {
            uint64_t bits;
            std::memcpy(&bits, from, 8);
            v = _mm512_maskz_set1_epi8(bits, 1);
        }
        uint8_t* to = codes + i * places;  // codes below 2^(8 - WIDTH): the shift stays within bytes
        if (WIDTH < 8) v = _mm512_or_si512(v, _mm512_slli_epi16(_mm512_loadu_si512(to), WIDTH));
        _mm512_storeu_si512(to, v);
    }
#endif
    for (; i < n; ++i)
        for (int place = 0; place < places; ++place) {
            uint8_t& code = codes[i * places + place];
            code = static_cast<uint8_t>(code << (WIDTH % 8) | (packed[i] >> (place * WIDTH) & mask));
        }
}

void append(int64_t width, const uint8_t* packed, int64_t n, uint8_t* codes) {
    switch (width) {
        case 8: return append<8>(packed, n, codes);
        case 4: return append<4>(packed, n, codes);
        case 2: return append<2>(packed, n, codes);
        default: return append<1>(packed, n, codes);
    }
}

// The codes of row `first`, `first + 1`, … of some planes, the highest bits first, are given to work(row, codes).
template <class Work>
void each_row(const uint8_t* const* codes, const int64_t* widths, int64_t n_planes, int64_t columns, int64_t first,
              int64_t rows, int64_t threads, Work work) {
    share(rows, 64, threads, [&](int64_t begin, int64_t end) {
        std::vector<uint8_t> row(columns + 8 + W);
        for (int64_t r = begin; r < end; ++r) {
            std::fill(row.begin(), row.end(), 0);
            for (int64_t i = 0; i < n_planes; ++i) {
                const int64_t bytes = (columns * widths[i] + 7) / 8;
                append(widths[i], codes[i] + (first + r) * bytes, bytes, row.data());
            }
            work(r, row.data());
        }
    });
}

template <class T>
void quantized(const uint8_t* const* codes, const int64_t* widths, int64_t n_planes, float middle, const float* scale,
               int64_t group, int64_t dim, int64_t first, int64_t rows, T* out, int64_t threads) {
    const int64_t groups = dim / group;
    each_row(codes, widths, n_planes, dim, first, rows, threads, [&](int64_t r, const uint8_t* row) {
        for (int64_t g = 0; g < groups; ++g) {
            const float s = scale[(first + r) * groups + g];
            convert(row + g * group, group, [=](int64_t, vf code) { return (code - middle) * s; }, out + r * dim + g * group);
        }
    });
}

struct Span {  // rows of a tier that follow one another
    int64_t tier, first, rows, gain;  // first: in the tier; gain: where their gains begin
};

template <class T>
void transform_coded(const uint8_t* codes, const int64_t* pieces, const float* scale, const float* offset, const float* gain,
                     int64_t dim, const Span* spans, int64_t n_spans, T* out, int64_t stride, int64_t threads) {
    share(dim, 16, threads, [&](int64_t begin, int64_t end) {
        std::vector<uint8_t> column;
        T* to = out;
        for (const Span* s = spans; s < spans + n_spans; to += s->rows, ++s) {
            const int64_t skipped = s->first % 8, filled = skipped + s->rows;  // of the first byte, some rows are not wanted
            column.resize(filled + 8 + W);
            for (int64_t i = s->tier * dim + begin; i < s->tier * dim + end; ++i) {
                std::fill(column.begin(), column.end(), 0);
                for (int64_t k = 0; k < 6 && pieces[6 * i + k]; k += 2) {
                    const int64_t width = pieces[6 * i + k], start = pieces[6 * i + k + 1];
                    append(width, codes + start + (s->first - skipped) * width / 8, (filled * width + 7) / 8, column.data());
                }
                const vf times = all(scale[i]), plus = all(offset[i]);
                const float* own = gain + s->gain;
                const auto number = [=](int64_t r, vf code) { return fma(code, times, plus) * load(own + r); };
                convert(column.data() + skipped, s->rows, number, to + (i - s->tier * dim) * stride);
            }
        }
    });
}

template <int BYTES>
void look_up(const uint8_t* row, int64_t groups, int64_t entries, const uint8_t* books, uint8_t* to) {
    for (int64_t g = 0; g < groups; ++g)
        std::memcpy(to + g * BYTES, books + (g * entries + row[g]) * BYTES, BYTES);
}

}  // namespace

extern "C" const char* instructions() { return W == 16 ? "AVX-512" : W == 8 ? "AVX2" : "plain"; }

// out[row][column] = scale[row][group] * (code - middle), bf16 or fp32; codes: of each plane, the highest bits first.
extern "C" void quantized_rows(const uint8_t* const* codes, const int64_t* widths, int64_t n_planes, float middle,
                               const float* scale, int64_t group, int64_t dim, int64_t first, int64_t rows, void* out,
                               int64_t half, int64_t threads) {
    const auto run = [&](auto* to) {
        quantized(codes, widths, n_planes, middle, scale, group, dim, first, rows, to, threads);
    };
    half ? run(static_cast<uint16_t*>(out)) : run(static_cast<float*>(out));
}

// out[column][row] = gain[row] * (scale[tier][column] * code + offset[tier][column]) of the rows of some spans, the columns
// `stride` numbers apart. pieces: [tier][column][width, where in `codes` its first row is], up to three, the highest bits
// first, 0 for no more. Behind the last gain there is room for a vector.
extern "C" void transform_coded_rows(const uint8_t* codes, const int64_t* pieces, const float* scale, const float* offset,
                                     const float* gain, int64_t dim, const int64_t* spans, int64_t n_spans, void* out,
                                     int64_t stride, int64_t half, int64_t threads) {
    const auto* which = reinterpret_cast<const Span*>(spans);
    const auto run = [&](auto* to) {
        transform_coded(codes, pieces, scale, offset, gain, dim, which, n_spans, to, stride, threads);
    };
    half ? run(static_cast<uint16_t*>(out)) : run(static_cast<float*>(out));
}

// out[row][group] = books[group][code], numbers of `bytes` bytes in all.
extern "C" void product_vq_rows(const uint8_t* const* codes, const int64_t* widths, int64_t n_planes,
                                const uint8_t* books, int64_t groups, int64_t entries, int64_t bytes, int64_t first,
                                int64_t rows, uint8_t* out, int64_t threads) {
    each_row(codes, widths, n_planes, groups, first, rows, threads, [&](int64_t r, const uint8_t* row) {
        uint8_t* to = out + r * groups * bytes;
        switch (bytes) {
            case 4: return look_up<4>(row, groups, entries, books, to);
            case 8: return look_up<8>(row, groups, entries, books, to);
            case 16: return look_up<16>(row, groups, entries, books, to);
            case 32: return look_up<32>(row, groups, entries, books, to);
        }
        for (int64_t g = 0; g < groups; ++g) std::memcpy(to + g * bytes, books + (g * entries + row[g]) * bytes, bytes);
    });
}

// out[b][i] = scores[b][place[i]] + base[b], n numbers each, the rows of `out` `stride` apart.
template <class T>
void in_order(const T* scores, int64_t batch, int64_t n, const int32_t* place, const float* base, float* out, int64_t stride,
              int64_t threads) {
    share(batch, 8, threads, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const T* from = scores + b * n;
            float *to = out + b * stride, plus = base[b];
            for (int64_t i = 0; i < n; ++i) to[i] = number(from[place[i]]) + plus;
        }
    });
}

extern "C" void in_order(const void* scores, int64_t half, int64_t batch, int64_t n, const int32_t* place, const float* base,
                         float* out, int64_t stride, int64_t threads) {
    const auto run = [&](auto* from) { in_order(from, batch, n, place, base, out, stride, threads); };
    half ? run(static_cast<const uint16_t*>(scores)) : run(static_cast<const float*>(scores));
}
