// Products of packed unsigned integers with hidden states, exact in integers: the core of the kernels for coded rows.
//
// Hidden states are rounded to 15 bits, x = step * (128 * high + low) with high and low in 8 bits, so that a product
// with codes of up to 8 bits is exact in 32 bits; the result is nearer to fp32 than a bf16 matrix product.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)  // over registers

namespace {

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)

constexpr const char* INSTRUCTIONS = "AVX-512";
constexpr int LANES = 16, VECTORS = 4;
typedef __m512i Words;
inline Words load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, Words v) { _mm512_storeu_si512(p, v); }
inline Words zero() { return _mm512_setzero_si512(); }
inline void keep(Words& v) { asm("" : "+v"(v)); }  // in a register, instead of loaded again for every use
inline Words all(const int8_t* four) {
    int32_t word;
    std::memcpy(&word, four, 4);
    return _mm512_set1_epi32(word);
}
template <int WIDTH>
inline Words field(Words packed, int place) {
    if (WIDTH == 8) return packed;
    return _mm512_and_si512(_mm512_srli_epi16(packed, place * WIDTH), _mm512_set1_epi8((1 << WIDTH) - 1));
}
template <int WIDTH>
inline Words dot(Words sum, Words codes, Words x) { return _mm512_dpbusd_epi32(sum, codes, x); }
inline float total(Words v) { return static_cast<float>(_mm512_reduce_add_epi32(v)); }
inline __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline Words quarters(const uint8_t* p, int64_t stride) {  // 16 bytes each
    Words v = _mm512_inserti32x4(_mm512_castsi128_si512(load16(p)), load16(p + stride), 1);
    v = _mm512_inserti32x4(v, load16(p + 2 * stride), 2);
    return _mm512_inserti32x4(v, load16(p + 3 * stride), 3);
}
inline Words lower32(Words a, Words b) { return _mm512_unpacklo_epi32(a, b); }
inline Words upper32(Words a, Words b) { return _mm512_unpackhi_epi32(a, b); }
inline Words lower64(Words a, Words b) { return _mm512_unpacklo_epi64(a, b); }
inline Words upper64(Words a, Words b) { return _mm512_unpackhi_epi64(a, b); }

#elif defined(__AVX2__)

constexpr const char* INSTRUCTIONS = "AVX2";
constexpr int LANES = 8, VECTORS = 2;
typedef __m256i Words;
inline Words load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, Words v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline Words zero() { return _mm256_setzero_si256(); }
inline void keep(Words& v) { asm("" : "+x"(v)); }
inline Words all(const int8_t* four) {
    int32_t word;
    std::memcpy(&word, four, 4);
    return _mm256_set1_epi32(word);
}
template <int WIDTH>
inline Words field(Words packed, int place) {
    if (WIDTH == 8) return packed;
    return _mm256_and_si256(_mm256_srli_epi16(packed, place * WIDTH), _mm256_set1_epi8((1 << WIDTH) - 1));
}
inline Words narrow(Words codes, Words x) {  // codes below 16: the sum of two products fits 16 bits
    return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1));
}
template <int WIDTH>
inline Words dot(Words sum, Words codes, Words x) {
    if (WIDTH < 8) return _mm256_add_epi32(sum, narrow(codes, x));
    const Words high = narrow(field<4>(codes, 1), x), low = narrow(field<4>(codes, 0), x);
    return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_slli_epi32(high, 4), low));
}
inline __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline Words quarters(const uint8_t* p, int64_t stride) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load16(p)), load16(p + stride), 1);
}
inline Words lower32(Words a, Words b) { return _mm256_unpacklo_epi32(a, b); }
inline Words upper32(Words a, Words b) { return _mm256_unpackhi_epi32(a, b); }
inline Words lower64(Words a, Words b) { return _mm256_unpacklo_epi64(a, b); }
inline Words upper64(Words a, Words b) { return _mm256_unpackhi_epi64(a, b); }
inline float total(Words v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_unpackhi_epi64(half, half));
    return static_cast<float>(_mm_cvtsi128_si32(half) + _mm_extract_epi32(half, 1));
}

#else

constexpr const char* INSTRUCTIONS = "plain";
constexpr int LANES = 4, VECTORS = 2;
struct Words {
    uint8_t bytes[16];
};
inline Words load(const void* p) {
    Words v;
    std::memcpy(v.bytes, p, 16);
    return v;
}
inline void store(void* p, Words v) { std::memcpy(p, v.bytes, 16); }
inline Words zero() { return Words{}; }
inline void keep(Words&) {}
inline Words all(const int8_t* four) {
    Words v;
    for (int i = 0; i < 16; ++i) v.bytes[i] = static_cast<uint8_t>(four[i % 4]);
    return v;
}
template <int WIDTH>
inline Words field(Words packed, int place) {
    for (auto& byte : packed.bytes) byte = (byte >> (place * WIDTH % 8)) & ((1 << WIDTH) - 1);
    return packed;
}
template <int WIDTH>
inline Words dot(Words sum, Words codes, Words x) {
    int32_t total[4];
    std::memcpy(total, sum.bytes, 16);
    for (int i = 0; i < 16; ++i) total[i / 4] += codes.bytes[i] * static_cast<int8_t>(x.bytes[i]);
    std::memcpy(sum.bytes, total, 16);
    return sum;
}
inline float total(Words v) {
    int32_t parts[4];
    std::memcpy(parts, v.bytes, 16);
    return static_cast<float>(parts[0] + parts[1] + parts[2] + parts[3]);
}

#endif

// Zeros that start on a cache line: a vector that lies in two lines takes twice as long to load.
class Lines {
    std::vector<uint8_t> bytes;

public:
    explicit Lines(int64_t size) : bytes(size + 64) {}
    template <class T = uint8_t>
    T* data() const {
        const auto address = reinterpret_cast<uintptr_t>(bytes.data());
        return reinterpret_cast<T*>((address + 63) / 64 * 64);
    }
};

// Rounded hidden states: value (b, column) is step[b] * (128 * high + low), at b * columns + column. Where one is not
// finite, the step is not a number.
struct Rounded {
    int64_t batch, columns;
    std::vector<int8_t> high, low;
    std::vector<float> step, total;  // of each state; the sum of its integers

    template <class X>
    Rounded(int64_t batch, int64_t columns, X x)
        : batch(batch), columns(columns), high(batch * columns), low(batch * columns), step(batch), total(batch) {
        std::vector<float> values(columns);
        for (int64_t b = 0; b < batch; ++b) {
            float largest = 0, zero = 0;
            for (int64_t j = 0; j < columns; ++j) {
                values[j] = x(b, j);
                largest = std::max(largest, std::fabs(values[j]));
                zero += values[j] * 0;
            }
            if (zero != 0) {  // a value is not a number, or infinite: nor are the scores numbers
                step[b] = total[b] = NAN;
                continue;
            }
            step[b] = largest > 0 ? largest / 16256.0f : 1.0f;
            int64_t sum = 0;
            for (int64_t j = 0; j < columns; ++j) {
                const int32_t value = static_cast<int32_t>(std::lrintf(values[j] / step[b]));
                const int32_t upper = (value + 64) >> 7;
                high[b * columns + j] = static_cast<int8_t>(upper);
                low[b * columns + j] = static_cast<int8_t>(value - 128 * upper);
                sum += value;
            }
            total[b] = static_cast<float>(sum);
        }
    }
};

}  // namespace
