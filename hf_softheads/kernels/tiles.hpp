// Products of rounded hidden states with codes in tiles of 64 rows.
//
// Of each row a word is 4 bytes, a byte holds 8 / WIDTH codes; a tile is [word][row][4 bytes]. A vector holds the same
// word of as many rows as it has 32-bit lanes, so that sums need no reduction over lanes. Code `place` of byte c of
// word i belongs to column (4 i + c) * 8 / WIDTH + place: the order of packed rows.

#pragma once

#include "integers.hpp"

namespace {

constexpr int64_t TILE = 64, AHEAD = 4096;  // rows; bytes brought near

// Rounded states as `products` meets them: [pair of states][word][place][state of the pair][4 high, 4 low].
struct States {
    int64_t batch, words;
    std::vector<int8_t> halves;

    // The rounded columns meet the first codes of a row; the codes after them count nothing.
    States(const Rounded& x, int64_t words, int64_t width)
        : batch(x.batch), words(words), halves(x.batch * words * 8 / width * 8) {
        const int64_t places = 8 / width;
        for (int64_t b = 0; b < batch; ++b) {
            const int64_t first = b / 2 * 2, size = std::min<int64_t>(2, batch - first);
            int8_t* to = halves.data() + (first * words * places + (b - first)) * 8;
            for (int64_t j = 0; j < x.columns; ++j) {
                const int64_t byte = j / places, place = j % places;
                int8_t* here = to + ((byte / 4) * places + place) * size * 8 + byte % 4;
                here[0] = x.high[b * x.columns + j];
                here[4] = x.low[b * x.columns + j];
            }
        }
    }
    const int8_t* at(int64_t first) const { return halves.data() + first * (static_cast<int64_t>(halves.size()) / batch); }
};

// sum[s][row] = Σ codes * integers of state s, `SIZE` states at once.
template <int WIDTH, int SIZE>
void products(const uint8_t* tile, int64_t words, const int8_t* x, float* sum) {
    constexpr int places = 8 / WIDTH, step = LANES * 4;
    for (int64_t part = 0; part < TILE; part += LANES * VECTORS) {
        Words high[SIZE][VECTORS], low[SIZE][VECTORS];
        EACH(s, SIZE) EACH(v, VECTORS) high[s][v] = low[s][v] = zero();
        const uint8_t* from = tile + part * 4;
        const int8_t* state = x;
        for (int64_t i = 0; i < words; ++i, from += TILE * 4) {
            Words packed[VECTORS], codes[VECTORS];
            EACH(v, VECTORS) packed[v] = load(from + v * step);
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
            for (int r = 0; r < LANES * VECTORS; ++r)
                sum[s * TILE + part + r] = 128.0f * static_cast<float>(h[r]) + static_cast<float>(l[r]);
        }
    }
}

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)

// The same for one state, without shifts: the codes of each place are multiplied where they lie in their bytes, in sums
// of their own, which are brought to scale once. As many rows at a time as leave 16 such sums.
template <int WIDTH>
void products_in_place(const uint8_t* tile, int64_t words, const int8_t* x, float* sum) {
    constexpr int places = 8 / WIDTH, vectors = WIDTH;
    for (int64_t part = 0; part < TILE; part += LANES * vectors) {
        Words high[places][vectors], low[places][vectors];
        EACH(place, places) EACH(v, vectors) high[place][v] = low[place][v] = zero();
        const uint8_t* from = tile + part * 4;
        const int8_t* state = x;
        for (int64_t i = 0; i < words; ++i, from += TILE * 4, state += places * 8) {
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
            _mm512_storeu_ps(sum + part + v * LANES, total);
        }
    }
}

#endif

template <int WIDTH>
void products(const uint8_t* tile, const States& x, float* sum) {
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
    if constexpr (WIDTH < 8)
        if (x.batch == 1) return products_in_place<WIDTH>(tile, x.words, x.at(0), sum);
#endif
    int64_t b = 0;
    for (; b + 2 <= x.batch; b += 2) products<WIDTH, 2>(tile, x.words, x.at(b), sum + b * TILE);
    if (b < x.batch) products<WIDTH, 1>(tile, x.words, x.at(b), sum + b * TILE);
}

// sum[b][row], b < x.batch, row < TILE.
inline void products(int64_t width, const uint8_t* tile, const States& x, float* sum) {
    switch (width) {
        case 8: return products<8>(tile, x, sum);
        case 4: return products<4>(tile, x, sum);
        case 2: return products<2>(tile, x, sum);
        default: return products<1>(tile, x, sum);
    }
}

}  // namespace
