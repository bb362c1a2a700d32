// Products of rounded hidden states with codes in tiles of 64 rows.
//
// Of each row a word is 4 bytes, a byte holds 8 / WIDTH codes; a tile is [word][row][4 bytes]. A vector holds the same
// word of as many rows as it has 32-bit lanes, so that sums need no reduction over lanes. Code `place` of byte c of
// word i belongs to column (4 i + c) * 8 / WIDTH + place: the order of packed rows.

#pragma once

#include "integers.hpp"

namespace {

constexpr int64_t TILE = 64;

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

template <int WIDTH>
void products(const uint8_t* tile, const States& x, float* sum) {
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
