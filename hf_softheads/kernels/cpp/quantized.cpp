// Scores of a quantized head without unpacking it: y[b][v] = scale[v] * sum_j (q[v][j] - middle) * x[b][j].
//
// Rows are read once, a few at a time, for all hidden states. For many states codes that are cut into planes are
// put together first, so that each is multiplied once.

#include "integers.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t CHUNK = LANES * 4;
constexpr int ROWS = VECTORS, AHEAD = 8;  // rows

struct Plane {
    const uint8_t* codes;
    int64_t width, bytes;  // of a row
    int shift;
};

inline int64_t chunks(int64_t bytes) { return (bytes + CHUNK - 1) / CHUNK; }

// Rounded states as a packed row meets them: [pair of states][chunk][place][state of the pair][CHUNK high, CHUNK low].
struct States {
    int64_t batch, size;  // bytes of one state
    Lines halves;

    States(const Rounded& x, int64_t width)
        : batch(x.batch), size(chunks((x.columns * width + 7) / 8) * 8 / width * 2 * CHUNK), halves(batch * size) {
        const int64_t places = 8 / width;
        for (int64_t b = 0; b < batch; ++b) {
            const int64_t first = b / 2 * 2, pair = std::min<int64_t>(2, batch - first);
            for (int64_t j = 0; j < x.columns; ++j) {
                const int64_t byte = j / places, place = j % places;
                int8_t* to = at(first) + byte % CHUNK +
                             (((byte / CHUNK) * places + place) * pair + (b - first)) * 2 * CHUNK;
                to[0] = x.high[b * x.columns + j];
                to[CHUNK] = x.low[b * x.columns + j];
            }
        }
    }
    int8_t* at(int64_t first) const { return halves.data<int8_t>() + first * size; }
};

// out[s][r] = Σ codes * integers for COUNT of ROWS rows that are `stride` bytes apart and filled up to whole chunks. For
// the first states the rows that come later are brought near, in the order in which they lie in memory.
template <int WIDTH, int SIZE, int COUNT>
void dots(const uint8_t* rows, int64_t stride, int64_t n, const int8_t* x, float* out, bool first) {
    Words high[SIZE][COUNT], low[SIZE][COUNT], packed[COUNT];
    EACH(s, SIZE) EACH(r, COUNT) high[s][r] = low[s][r] = zero();
    for (int64_t k = 0; k < n; ++k) {
        EACH(r, COUNT) packed[r] = load(rows + r * stride + k * CHUNK);
        if (first) EACH(r, COUNT) __builtin_prefetch(rows + AHEAD * stride + (k * COUNT + r) * CHUNK);
        EACH(place, 8 / WIDTH) {
            EACH(s, SIZE) {
                Words h = load(x + 2 * s * CHUNK), l = load(x + (2 * s + 1) * CHUNK);
                keep(h);
                keep(l);
                EACH(r, COUNT) {
                    const Words codes = field<WIDTH>(packed[r], place);
                    high[s][r] = dot<WIDTH>(high[s][r], codes, h);
                    low[s][r] = dot<WIDTH>(low[s][r], codes, l);
                }
            }
            x += SIZE * 2 * CHUNK;
        }
    }
    EACH(s, SIZE) EACH(r, COUNT) out[s * ROWS + r] = 128.0f * total(high[s][r]) + total(low[s][r]);
}

// Few states wait for memory, which likes few streams; many want each of their loads to meet many rows.
template <int WIDTH>
void dots(const uint8_t* rows, int64_t stride, int64_t n, const States& x, float* out) {
    constexpr int COUNT = WIDTH >= 4 ? ROWS / 2 : ROWS;
    if (x.batch <= 2) {
        for (int64_t r = 0; r < ROWS; r += COUNT) {
            if (x.batch == 2) dots<WIDTH, 2, COUNT>(rows + r * stride, stride, n, x.at(0), out + r, true);
            else dots<WIDTH, 1, COUNT>(rows + r * stride, stride, n, x.at(0), out + r, true);
        }
        return;
    }
    int64_t b = 0;
    for (; b + 2 <= x.batch; b += 2) dots<WIDTH, 2, ROWS>(rows, stride, n, x.at(b), out + b * ROWS, b == 0);
    if (b < x.batch) dots<WIDTH, 1, ROWS>(rows, stride, n, x.at(b), out + b * ROWS, false);
}

// codes[column] |= the bits of a packed row.
template <int WIDTH>
void put(const uint8_t* row, int64_t dim, int shift, uint8_t* codes) {
    constexpr int places = 8 / WIDTH;
    int64_t j = 0;
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
    for (; j + 64 <= dim; j += 64) {  // every byte to as many bytes as it has codes, then each its own bits
        __m512i v;
        if (WIDTH == 4) {
            v = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + j / 2)));
            v = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi16(v, 4)), _mm512_set1_epi8(15));
        } else if (WIDTH == 2) {
            v = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + j / 4)));
            v = _mm512_or_si512(v, _mm512_slli_epi32(v, 6));
            v = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi32(v, 12)), _mm512_set1_epi8(3));
        } else {
            uint64_t bits;
            std::memcpy(&bits, row + j / 8, 8);
            v = _mm512_maskz_set1_epi8(bits, 1);
        }
        store(codes + j, _mm512_or_si512(load(codes + j), _mm512_slli_epi16(v, shift)));
    }
#endif
    for (; j < dim; ++j)
        codes[j] |= static_cast<uint8_t>((row[j / places] >> (j % places * WIDTH) & ((1 << WIDTH) - 1)) << shift);
}

void put(const Plane& plane, int64_t v, int64_t dim, uint8_t* codes) {
    const uint8_t* row = plane.codes + v * plane.bytes;
    switch (plane.width) {
        case 4: return put<4>(row, dim, plane.shift, codes);
        case 2: return put<2>(row, dim, plane.shift, codes);
        default: return put<1>(row, dim, plane.shift, codes);
    }
}

void dots(int64_t width, const uint8_t* rows, int64_t stride, int64_t n, const States& x, float* out) {
    switch (width) {
        case 8: return dots<8>(rows, stride, n, x, out);
        case 4: return dots<4>(rows, stride, n, x, out);
        case 2: return dots<2>(rows, stride, n, x, out);
        default: return dots<1>(rows, stride, n, x, out);
    }
}

}  // namespace

extern "C" const char* instructions() { return INSTRUCTIONS; }

extern "C" void quantized_scores(const uint8_t* const* codes, const int64_t* widths, int64_t n_planes, int64_t bits,
                                 float middle, const float* scale, int64_t vocab, int64_t dim, const float* hidden,
                                 int64_t batch, float* out, int64_t threads) {
    const Rounded rounded(batch, dim, [&](int64_t b, int64_t j) { return hidden[b * dim + j]; });
    const bool together = n_planes > 1 && batch > 8;
    std::vector<Plane> planes;
    std::vector<States> states;
    for (int64_t i = 0; i < n_planes; ++i) {
        bits -= widths[i];
        planes.push_back({codes[i], widths[i], (dim * widths[i] + 7) / 8, static_cast<int>(bits)});
        if (!together) states.emplace_back(rounded, widths[i]);
    }
    if (together) states.emplace_back(rounded, 8);
    const int64_t room = chunks(dim) * CHUNK;
    share(vocab, 256, threads, [&](int64_t begin, int64_t end) {
        const Lines filled(ROWS * room);
        std::vector<float> sum(batch * ROWS), part(batch * ROWS);
        for (int64_t v = begin; v < end; v += ROWS) {
            const int64_t count = std::min<int64_t>(ROWS, end - v);
            if (together) {
                std::memset(filled.data(), 0, ROWS * room);
                for (const Plane& p : planes)
                    for (int64_t r = 0; r < count; ++r) put(p, v + r, dim, filled.data() + r * room);
                dots<8>(filled.data(), room, room / CHUNK, states[0], sum.data());
            } else {
                std::fill(sum.begin(), sum.end(), 0.0f);
                for (int64_t i = 0; i < n_planes; ++i) {
                    const Plane& p = planes[i];
                    const int64_t n = chunks(p.bytes);
                    const uint8_t* rows = p.codes + v * p.bytes;
                    int64_t stride = p.bytes;
                    if (p.bytes % CHUNK || count < ROWS) {
                        stride = n * CHUNK;
                        for (int64_t r = 0; r < count; ++r) std::memcpy(filled.data() + r * stride, rows + r * p.bytes, p.bytes);
                        rows = filled.data();
                    }
                    dots(p.width, rows, stride, n, states[i], part.data());
                    for (int64_t k = 0; k < batch * ROWS; ++k) sum[k] += static_cast<float>(1 << p.shift) * part[k];
                }
            }
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t r = 0; r < count; ++r)
                    out[b * vocab + v + r] =
                        scale[v + r] * rounded.step[b] * (sum[b * ROWS + r] - middle * rounded.total[b]);
        }
    });
}
