// Products of rounded hidden states with codes in tiles of 64 rows.
//
// Of each row a word is 4 bytes, a byte holds 8 / WIDTH codes; a tile is [word][row][4 bytes]. A vector holds the same
// word of as many rows as it has 32-bit lanes, so that sums need no reduction over lanes. Code `place` of byte c of
// word i belongs to column (4 i + c) * 8 / WIDTH + place: the order of packed rows.

#pragma once

#include "integers.hpp"
#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t TILE = 64, AHEAD = 8192;  // rows; bytes brought near

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
constexpr int64_t LOOKED_UP = 2;  // codes up to so many bits are looked up, half a byte at a time
#else
constexpr int64_t LOOKED_UP = 0;
#endif

#if defined(__AMX_INT8__) && defined(__linux__)
inline bool matrix_unit() {  // the system must allow its registers
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
    return allowed;
}
#else
inline bool matrix_unit() { return false; }
#endif

constexpr int64_t MANY = 8;  // states that are worth the matrix unit

inline const char* instructions_of_tiles() { return matrix_unit() ? "AVX-512, AMX" : INSTRUCTIONS; }

// The matrix unit's registers, 16 rows of 64 bytes, as long as this lives and a thread multiplies many states.
class Registers {
    bool used;

public:
    explicit Registers(int64_t batch) : used(batch >= MANY && matrix_unit()) {
#if defined(__AMX_INT8__) && defined(__linux__)
        if (!used) return;
        alignas(64) uint8_t layout[64] = {1};  // bytes of a row from 16 on, two bytes each; rows from 48 on
        for (int i = 0; i < 8; ++i) layout[16 + 2 * i] = 64, layout[48 + i] = 16;
        _tile_loadconfig(layout);
#endif
    }
    ~Registers() {
#if defined(__AMX_INT8__) && defined(__linux__)
        if (used) _tile_release();
#endif
    }
};

// Rounded states as `products` meets them: integers that are multiplied, [pair of states][word][place][state of the
// pair][4 high, 4 low], or, for narrow codes, their products with all that half a byte can hold, less the smallest of
// them: [state][word][first half: high, low bytes; second half: high, low bytes][byte of the word][16]. For the matrix
// unit: [high, low][state][place][word][4], filled up to 16 states and 64 bytes.
struct States {
    int64_t batch, words;
    bool matrix;
    int64_t padded;  // bytes of a state for the matrix unit
    Lines bytes;
    std::vector<float> step;    // value of an integer, of each state
    std::vector<int32_t> base;  // what is added to its sums

    // x(b, column); the columns meet the first codes of a row, less `middle`, the codes after them count nothing.
    template <class X>
    States(int64_t batch, int64_t columns, int64_t words, int64_t width, float middle, X x)
        : batch(batch), words(words), matrix(batch >= MANY && matrix_unit()), padded((words * 32 / width + 63) / 64 * 64),
          bytes(matrix               ? 2 * (batch + 15) / 16 * 16 * padded
                : width <= LOOKED_UP ? batch * words * 256
                                     : batch * words * 64 / width),
          step(batch), base(batch) {
        if (matrix || width > LOOKED_UP) split(columns, width, middle, x);
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
        else if (width == 2) tabulate<2>(columns, middle, x);
        else tabulate<1>(columns, middle, x);
#endif
    }

    const int8_t* at(int64_t first, int64_t width) const { return bytes.data<int8_t>() + first * words * (64 / width); }
    const int8_t* half(int64_t which, int64_t first) const {
        return bytes.data<int8_t>() + (which * ((batch + 15) / 16 * 16) + first) * padded;
    }
    const uint8_t* tables(int64_t b) const { return bytes.data() + b * words * 256; }

private:
    template <class X>
    void split(int64_t columns, int64_t width, float middle, X x) {
        const Rounded rounded(batch, columns, x);
        const int64_t places = 8 / width;
        step = rounded.step;
        for (int64_t b = 0; b < batch; ++b) {
            base[b] = std::isnan(step[b]) ? 0 : static_cast<int32_t>(std::lrintf(-middle * rounded.total[b]));
            const int64_t first = b / 2 * 2, size = std::min<int64_t>(2, batch - first);
            int8_t* to = bytes.data<int8_t>() + (first * words * places + (b - first)) * 8;
            for (int64_t j = 0; j < columns; ++j) {
                const int64_t byte = j / places, place = j % places;
                if (matrix) {
                    const int64_t where = place * words * 4 + byte;
                    const_cast<int8_t*>(half(0, b))[where] = rounded.high[b * columns + j];
                    const_cast<int8_t*>(half(1, b))[where] = rounded.low[b * columns + j];
                    continue;
                }
                int8_t* here = to + ((byte / 4) * places + place) * size * 8 + byte % 4;
                here[0] = rounded.high[b * columns + j];
                here[4] = rounded.low[b * columns + j];
            }
        }
    }

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
    template <int WIDTH, class X>
    void tabulate(int64_t columns, float middle, X x) {
        constexpr int64_t size = 4 / WIDTH;  // columns in half a byte
        constexpr int32_t mask = (1 << WIDTH) - 1;
        const int64_t halves = words * 8;
        std::vector<float> values(halves * size);
        for (int64_t b = 0; b < batch; ++b) {
            for (int64_t j = 0; j < columns; ++j) values[j] = x(b, j);
            float widest = 0, zero = 0;
            for (int64_t n = 0; n < halves; ++n) {
                float width = 0;
                EACH(k, size) width += std::fabs(values[n * size + k]);
                widest = std::max(widest, width);
                zero += width * 0;
            }
            if (zero != 0) {  // as in `Rounded`
                step[b] = NAN;
                continue;
            }
            // entries fit 16 bits: each of at most 12 products of a half may be rounded up by a half
            step[b] = widest > 0 ? widest * mask / 65520.0f : 1.0f;
            const float inverse = 1 / step[b];
            int64_t total = 0;
            for (int64_t n = 0; n < halves; ++n) {
                __m512i entries = _mm512_setzero_si512();
                int32_t smallest = 0;
                EACH(k, size) {
                    const int32_t value = static_cast<int32_t>(std::lrintf(values[n * size + k] * inverse));
                    smallest += std::min(0, value * mask);
                    total += value;
                    const __m512i codes = field<WIDTH>(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), k);
                    entries = _mm512_add_epi32(entries, _mm512_mullo_epi32(codes, _mm512_set1_epi32(value)));
                }
                base[b] += smallest;
                entries = _mm512_sub_epi32(entries, _mm512_set1_epi32(smallest));
                auto* to = reinterpret_cast<__m128i*>(bytes.data() + (b * words + n / 8) * 256 + n % 2 * 128 + n % 8 / 2 * 16);
                _mm_store_si128(to, _mm512_cvtepi32_epi8(_mm512_srli_epi32(entries, 8)));
                _mm_store_si128(to + 4, _mm512_cvtepi32_epi8(entries));
            }
            base[b] -= static_cast<int32_t>(std::lrintf(middle * static_cast<float>(total)));
        }
    }
#endif
};

// sum[s][row] += factor[row] * step[s] * (base[s] + Σ codes * integers of state s), `SIZE` states at once.
template <int WIDTH, int SIZE>
void products(const uint8_t* tile, const States& x, int64_t first, const float* factor, float* sum) {
    constexpr int places = 8 / WIDTH, size = LANES * 4;
    for (int64_t part = 0; part < TILE; part += LANES * VECTORS) {
        Words high[SIZE][VECTORS], low[SIZE][VECTORS];
        EACH(s, SIZE) EACH(v, VECTORS) high[s][v] = low[s][v] = zero();
        const uint8_t* from = tile + part * 4;
        const int8_t* state = x.at(first, WIDTH);
        for (int64_t i = 0; i < x.words; ++i, from += TILE * 4) {
            Words packed[VECTORS], codes[VECTORS];
            EACH(v, VECTORS) packed[v] = load(from + v * size);
            EACH(place, places) {
                EACH(v, VECTORS) codes[v] = field<WIDTH>(packed[v], place);
                EACH(s, SIZE) {
                    const Words h = all(state + 8 * s), l = all(state + 8 * s + 4);
                    EACH(v, VECTORS) {
                        high[s][v] = dot<WIDTH>(high[s][v], codes[v], h);
                        low[s][v] = dot<WIDTH>(low[s][v], codes[v], l);
                    }
                }
                state += SIZE * 8;
            }
        }
        EACH(s, SIZE) {
            int32_t h[LANES * VECTORS], l[LANES * VECTORS];
            EACH(v, VECTORS) {
                store(h + v * LANES, high[s][v]);
                store(l + v * LANES, low[s][v]);
            }
            const int32_t base = x.base[first + s] >> 7, rest = x.base[first + s] & 127;
            for (int r = 0; r < LANES * VECTORS; ++r)
                sum[s * TILE + part + r] += factor[part + r] * x.step[first + s] *
                                            (128.0f * static_cast<float>(h[r] + base) + static_cast<float>(l[r] + rest));
        }
    }
}

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)

inline void add(float* sum, const float* factor, float step, __m512 total) {
    const __m512 value = _mm512_mul_ps(_mm512_set1_ps(step), _mm512_loadu_ps(factor));
    _mm512_storeu_ps(sum, _mm512_fmadd_ps(value, total, _mm512_loadu_ps(sum)));
}

// The same for one state, without shifts: the codes of each place are multiplied where they lie in their bytes, in sums
// of their own, which are brought to scale once. As many rows at a time as leave 16 such sums.
template <int WIDTH>
void products_in_place(const uint8_t* tile, const States& x, const float* factor, float* sum) {
    constexpr int places = 8 / WIDTH, vectors = WIDTH;
    for (int64_t part = 0; part < TILE; part += LANES * vectors) {
        Words high[places][vectors], low[places][vectors];
        EACH(place, places) EACH(v, vectors) high[place][v] = low[place][v] = zero();
        EACH(v, vectors) {
            high[0][v] = _mm512_set1_epi32(x.base[0] >> 7);
            low[0][v] = _mm512_set1_epi32(x.base[0] & 127);
        }
        const uint8_t* from = tile + part * 4;
        const int8_t* state = x.at(0, WIDTH);
        for (int64_t i = 0; i < x.words; ++i, from += TILE * 4, state += places * 8) {
            Words packed[vectors];
            EACH(v, vectors) packed[v] = load(from + v * 64);
            if (part == 0) EACH(v, 4) __builtin_prefetch(from + AHEAD + v * 64);
            EACH(place, places) {
                const Words mask = _mm512_set1_epi8(static_cast<char>(((1 << WIDTH) - 1) << (place * WIDTH)));
                const Words h = all(state + 8 * place), l = all(state + 8 * place + 4);
                EACH(v, vectors) {
                    const Words codes = _mm512_and_si512(packed[v], mask);
                    high[place][v] = dot<8>(high[place][v], codes, h);
                    low[place][v] = dot<8>(low[place][v], codes, l);
                }
            }
        }
        EACH(v, vectors) {
            Words h = high[0][v], l = low[0][v];
            for (int place = 1; place < places; ++place) {
                h = _mm512_add_epi32(h, _mm512_srai_epi32(high[place][v], place * WIDTH));
                l = _mm512_add_epi32(l, _mm512_srai_epi32(low[place][v], place * WIDTH));
            }
            const __m512 total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(h), _mm512_set1_ps(128.0f), _mm512_cvtepi32_ps(l));
            add(sum + part + v * LANES, factor + part + v * LANES, x.step[0], total);
        }
    }
}

#endif

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)

// The same by the tables of the states for the halves of a row's bytes.
template <int SIZE>
void look_up(const uint8_t* tile, const States& x, int64_t first, const float* factor, float* sum) {
    const Words mask = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1), part = _mm512_set1_epi32(0x30201000);
    Words high[SIZE][4], low[SIZE][4];
    EACH(s, SIZE) EACH(v, 4) {
        low[s][v] = _mm512_set1_epi32(x.base[first + s]);
        high[s][v] = zero();
    }
    for (int64_t i = 0; i < x.words; ++i, tile += TILE * 4) {
        if (first == 0) EACH(v, 4) __builtin_prefetch(tile + AHEAD + v * 64);
        Words table[SIZE][4];
        EACH(s, SIZE) EACH(k, 4) table[s][k] = load(x.tables(first + s) + i * 256 + k * 64);
        EACH(v, 4) {
            const Words packed = load(tile + v * 64);
            EACH(half, 2) {
                const Words here = half ? _mm512_srli_epi16(packed, 4) : packed;
                const Words index = _mm512_ternarylogic_epi32(here, mask, part, 0xEA);  // (here & mask) | part
                EACH(s, SIZE) {
                    high[s][v] = dot<8>(high[s][v], _mm512_permutexvar_epi8(index, table[s][2 * half]), ones);
                    low[s][v] = dot<8>(low[s][v], _mm512_permutexvar_epi8(index, table[s][2 * half + 1]), ones);
                }
            }
        }
    }
    EACH(s, SIZE) EACH(v, 4)
        add(sum + s * TILE + v * LANES, factor + v * LANES, x.step[first + s],
            _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[s][v], 8), low[s][v])));
}

#endif

#if defined(__AMX_INT8__) && defined(__linux__)

// The same by the matrix unit: 16 states times the codes of 32 rows, a byte each, 64 of them at once.
template <int WIDTH>
void products_of_matrices(const uint8_t* tile, const States& x, const float* factor, float* sum) {
    static thread_local std::vector<uint8_t> room;
    room.resize(std::max<size_t>(room.size(), x.padded * TILE + 64));
    uint8_t* codes = room.data() + 64 - reinterpret_cast<uintptr_t>(room.data()) % 64;  // [place][word][row][4]
    for (int place = 0; place < 8 / WIDTH; ++place)
        for (int64_t i = 0; i < x.words * 4; ++i)
            store(codes + (place * x.words * 4 + i) * 64, field<WIDTH>(load(tile + i * 64), place));
    asm volatile("" ::: "memory");  // what follows reads memory that the compiler does not know of
    for (int64_t b = 0; b < x.batch; b += 16)
        for (int64_t row = 0; row < TILE; row += 32) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t k = 0; k < x.padded; k += 64) {
                _tile_loadd(4, x.half(0, b) + k, x.padded);
                _tile_loadd(5, x.half(1, b) + k, x.padded);
                _tile_loadd(6, codes + k * TILE + row * 4, TILE * 4);
                _tile_loadd(7, codes + k * TILE + row * 4 + 64, TILE * 4);
                _tile_dpbsud(0, 4, 6);
                _tile_dpbsud(1, 4, 7);
                _tile_dpbsud(2, 5, 6);
                _tile_dpbsud(3, 5, 7);
            }
            alignas(64) int32_t total[4][16][16];  // high of the first and last rows, low of them
            _tile_stored(0, total[0], 64);
            _tile_stored(1, total[1], 64);
            _tile_stored(2, total[2], 64);
            _tile_stored(3, total[3], 64);
            for (int64_t s = 0; s < std::min<int64_t>(16, x.batch - b); ++s) {
                const Words base = _mm512_set1_epi32(x.base[b + s] >> 7), rest = _mm512_set1_epi32(x.base[b + s] & 127);
                EACH(part, 2) {
                    const Words high = _mm512_add_epi32(load(total[part][s]), base);
                    const Words low = _mm512_add_epi32(load(total[2 + part][s]), rest);
                    const int64_t first = row + part * LANES;
                    add(sum + (b + s) * TILE + first, factor + first, x.step[b + s],
                        _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(128.0f), _mm512_cvtepi32_ps(low)));
                }
            }
        }
}

#endif

template <int WIDTH>
void products(const uint8_t* tile, const States& x, const float* factor, float* sum) {
    int64_t b = 0;
#if defined(__AMX_INT8__) && defined(__linux__)
    if (x.matrix) return products_of_matrices<WIDTH>(tile, x, factor, sum);
#endif
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
    if constexpr (WIDTH <= LOOKED_UP) {
        for (; b + 2 <= x.batch; b += 2) look_up<2>(tile, x, b, factor, sum + b * TILE);
        if (b < x.batch) look_up<1>(tile, x, b, factor, sum + b * TILE);
        return;
    }
#endif
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
    if constexpr (WIDTH < 8)
        if (x.batch == 1) return products_in_place<WIDTH>(tile, x, factor, sum);
#endif
    for (; b + 2 <= x.batch; b += 2) products<WIDTH, 2>(tile, x, b, factor, sum + b * TILE);
    if (b < x.batch) products<WIDTH, 1>(tile, x, b, factor, sum + b * TILE);
}

// sum[b][row] += factor[row] * step[b] * (base[b] + Σ codes * integers), b < x.batch, row < TILE.
inline void products(int64_t width, const uint8_t* tile, const States& x, const float* factor, float* sum) {
    switch (width) {
        case 8: return products<8>(tile, x, factor, sum);
        case 4: return products<4>(tile, x, factor, sum);
        case 2: return products<2>(tile, x, factor, sum);
        default: return products<1>(tile, x, factor, sum);
    }
}

}  // namespace
