// Scores of a product_vq head: y[b][v] = sum_g table[b][g][code_vg], table[b][g][c] = sum_d book[g][c][d] * x[b][g][d].
//
// Tables of at most 256 sums are rounded to 8 bits, blocks of BLOCK groups with a scale of their own (the sum of the
// smallest entries is kept apart and exact), and looked up in registers: 64 codes at once with AVX-512 VBMI; where codes
// have 4 bits, 32 with AVX2. Other processors look fp32 sums up one by one. Sums of 8-bit entries are exact.
//
// Codes come in tiles of 512 tokens, so that tables are read half as often as codes: [tile][group][token] of a byte
// each, or, where codes have at most 4 bits, two groups in a byte, the first in its low half.

#include <numeric>
#include <vector>

#include "threads.hpp"
#include "vector.hpp"

namespace {

constexpr int64_t TILE = 512, BLOCK = 32, AHEAD = 16384;  // tokens; groups; bytes brought near

#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
constexpr int64_t REGISTERS = 256;  // entries of the largest table that is looked up in registers
#elif defined(__AVX2__)
constexpr int64_t REGISTERS = 16;
#else
constexpr int64_t REGISTERS = 0;
#endif

struct Tables {
    int64_t batch, groups, entries, blocks;
    std::vector<float> sums;        // [b][group][entry], the smallest entry of each table subtracted, or, where
    std::vector<uint8_t> rounded;   // registers hold a table, the same in steps
    std::vector<float> step, base;  // [b][block]; [b]

    // books: [group][width][code]; x: [b][group * width]
    Tables(const float* books, const float* x, int64_t batch, int64_t groups, int64_t codes, int64_t width,
           int64_t entries, int64_t threads)
        : batch(batch), groups(groups), entries(entries), blocks((groups + BLOCK - 1) / BLOCK),
          sums(entries > REGISTERS ? batch * groups * entries : 0),
          rounded(entries > REGISTERS ? 0 : batch * groups * entries + 64), step(batch * blocks), base(batch) {
        std::vector<float> smallest(batch * groups);
        share(blocks, 1, threads, [&](int64_t block, int64_t) {
            const int64_t first = block * BLOCK, last = std::min(groups, first + BLOCK);
            std::vector<float> room(sums.empty() ? BLOCK * entries : 0);
            for (int64_t b = 0; b < batch; ++b) {
                float* block_sums = sums.empty() ? room.data() : sums.data() + (b * groups + first) * entries;
                float widest = 0;
                for (int64_t g = first; g < last; ++g) {
                    float* to = block_sums + (g - first) * entries;
                    std::fill_n(to, codes, 0.0f);
                    for (int64_t d = 0; d < width; ++d) {
                        const float value = x[(b * groups + g) * width + d];
                        const float* from = books + (g * width + d) * codes;
                        for (int64_t c = 0; c < codes; ++c) to[c] += value * from[c];
                    }
                    const float low = minimum(to, codes);
                    for (int64_t c = 0; c < codes; ++c) to[c] -= low;
                    smallest[b * groups + g] = low;
                    widest = std::max(widest, maximum(to, codes));
                }
                float& s = step[b * blocks + block];
                s = widest > 0 ? widest / 255 : 1;
                if (rounded.empty()) continue;
                const float inverse = 1 / s;
                uint8_t* to = rounded.data() + (b * groups + first) * entries;
                for (int64_t i = 0; i < (last - first) * entries; ++i) to[i] = static_cast<uint8_t>(block_sums[i] * inverse + 0.5f);
            }
        });
        for (int64_t b = 0; b < batch; ++b)
            base[b] = static_cast<float>(std::accumulate(smallest.begin() + b * groups, smallest.begin() + (b + 1) * groups, 0.0));
    }
};

// What follows adds the entries of groups first … last - 1 of one block to total[TILE].

[[maybe_unused]] void look_up(const Tables& t, int64_t b, const uint8_t* tile, bool halves, int64_t first, int64_t last, float* total) {
    for (int64_t g = first; g < last; ++g) {
        const float* table = t.sums.data() + (b * t.groups + g) * t.entries;
        const uint8_t* codes = tile + (halves ? g / 2 : g) * TILE;
        const int shift = halves ? g % 2 * 4 : 0, mask = halves ? 15 : 255;
        for (int64_t i = 0; i < TILE; ++i) total[i] += table[codes[i] >> shift & mask];
    }
}

#if defined(__AVX512VBMI__) && defined(__AVX512BW__)

constexpr const char* INSTRUCTIONS = "AVX-512";

// Sums of bytes in 16 bits: `even` holds all sums (what odd bytes add to them is taken off at the end), `odd` those of
// odd bytes.
inline void add(__m512i& even, __m512i& odd, __m512i bytes) {
    even = _mm512_add_epi16(even, bytes);
    odd = _mm512_add_epi16(odd, _mm512_srli_epi16(bytes, 8));
}

inline void flush(__m512i even, __m512i odd, float step, float* total) {  // 64 tokens
    even = _mm512_sub_epi16(even, _mm512_slli_epi16(odd, 8));
    const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
    alignas(64) uint16_t sums[64];
    // unpacking works within lanes: token 16 l + i is word 8 l + i of `low` for i < 8, of `high` for i >= 8
    _mm512_store_si512(sums, _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high));
    _mm512_store_si512(sums + 32, _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high));
    const __m512 s = _mm512_set1_ps(step);
    for (int i = 0; i < 64; i += 16) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(sums + i)));
        _mm512_storeu_ps(total + i, _mm512_fmadd_ps(s, _mm512_cvtepi32_ps(wide), _mm512_loadu_ps(total + i)));
    }
}

void scan(const Tables& t, int64_t b, const uint8_t* tile, bool halves, int64_t first, int64_t last, float* total) {
    __m512i even[8] = {}, odd[8] = {};
    for (int64_t g = first; g < last; ++g) {
        const uint8_t* table = t.rounded.data() + (b * t.groups + g) * t.entries;
        if (halves) {
            const __m512i sixteen = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
            const uint8_t* codes = tile + g / 2 * TILE;
            const int shift = g % 2 * 4;
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                const __m512i c = _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(codes + 64 * i), shift), _mm512_set1_epi8(15));
                if (b == 0 && shift == 0) __builtin_prefetch(codes + 64 * i + AHEAD);
                add(even[i], odd[i], _mm512_shuffle_epi8(sixteen, c));
            }
        } else {
            const __m512i p = _mm512_loadu_si512(table), q = _mm512_loadu_si512(table + 64);
            const __m512i r = _mm512_loadu_si512(table + 128), s = _mm512_loadu_si512(table + 192);
            const uint8_t* codes = tile + g * TILE;
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                const __m512i c = _mm512_loadu_si512(codes + 64 * i);
                if (b == 0) __builtin_prefetch(codes + 64 * i + AHEAD);
                const __m512i below = _mm512_permutex2var_epi8(p, c, q), above = _mm512_permutex2var_epi8(r, c, s);
                add(even[i], odd[i], _mm512_mask_mov_epi8(below, _mm512_movepi8_mask(c), above));
            }
        }
    }
    const float step = t.step[b * t.blocks + first / BLOCK];
    for (int i = 0; i < 8; ++i) flush(even[i], odd[i], step, total + 64 * i);
}

#elif defined(__AVX2__)

constexpr const char* INSTRUCTIONS = "AVX2";

void scan(const Tables& t, int64_t b, const uint8_t* tile, bool halves, int64_t first, int64_t last, float* total) {
    if (!halves) return look_up(t, b, tile, halves, first, last, total);
    const float step = t.step[b * t.blocks + first / BLOCK];
    const __m256i mask = _mm256_set1_epi8(15), low_byte = _mm256_set1_epi16(255);
    for (int64_t i = 0; i < TILE; i += 32) {
        __m256i even = _mm256_setzero_si256(), odd = even;  // bytes are tokens i, i + 1, …
        for (int64_t g = first; g < last; ++g) {
            const uint8_t* table = t.rounded.data() + (b * t.groups + g) * 16;
            const __m256i sixteen = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
            const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + g / 2 * TILE + i));
            const __m256i codes = _mm256_and_si256(g % 2 ? _mm256_srli_epi16(packed, 4) : packed, mask);
            const __m256i found = _mm256_shuffle_epi8(sixteen, codes);
            even = _mm256_add_epi16(even, _mm256_and_si256(found, low_byte));
            odd = _mm256_add_epi16(odd, _mm256_srli_epi16(found, 8));
        }
        alignas(32) uint16_t e[16], o[16];
        _mm256_store_si256(reinterpret_cast<__m256i*>(e), even);
        _mm256_store_si256(reinterpret_cast<__m256i*>(o), odd);
        for (int64_t k = 0; k < 16; ++k) {
            total[i + 2 * k] += step * e[k];
            total[i + 2 * k + 1] += step * o[k];
        }
    }
}

#else

constexpr const char* INSTRUCTIONS = "plain";

void scan(const Tables& t, int64_t b, const uint8_t* tile, bool halves, int64_t first, int64_t last, float* total) {
    look_up(t, b, tile, halves, first, last, total);
}

#endif

}  // namespace

extern "C" const char* instructions() { return INSTRUCTIONS; }

extern "C" void product_vq_scores(const uint8_t* tiles, int64_t vocab, const float* books, int64_t groups, int64_t codes,
                                  int64_t width, const float* x, int64_t batch, float* out, int64_t threads) {
    const bool halves = codes <= 16;
    const Tables tables(books, x, batch, groups, codes, width, halves ? 16 : 256, threads);
    const int64_t size = (halves ? (groups + 1) / 2 : groups) * TILE;
    share((vocab + TILE - 1) / TILE, 4, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> total(batch * TILE);
        for (int64_t k = begin; k < end; ++k) {
            const int64_t first = k * TILE, count = std::min(TILE, vocab - first);
            for (int64_t b = 0; b < batch; ++b) std::fill_n(total.data() + b * TILE, TILE, tables.base[b]);
            for (int64_t g = 0; g < groups; g += BLOCK)  // a block of codes stays near while all states use it
                for (int64_t b = 0; b < batch; ++b)
                    scan(tables, b, tiles + k * size, halves, g, std::min(groups, g + BLOCK), total.data() + b * TILE);
            for (int64_t b = 0; b < batch; ++b)
                std::copy_n(total.data() + b * TILE, count, out + b * vocab + first);
        }
    });
}
