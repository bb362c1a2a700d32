// Scores of a quantized head without unpacking it: y[b][v] = scale[v] * sum_j (q[v][j] - (2^bits - 1) / 2) * x[b][j].
//
// Hidden states are rounded to 15-bit integers, x = step * (128 * high + low), so that a product of packed weights
// (u8) and both halves (s8) is exact in 32 bits; the result is nearer to fp32 than a bf16 matrix product.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace {

// Rounded hidden states in the order in which a row of weights meets them: for each group of up to 4 states, 64 bytes of
// the row and place in a byte, 64 high and 64 low halves of every state of the group.
struct Halves {
    std::vector<int8_t> values;
    int64_t chunks;
    int8_t* at(int64_t batch, int64_t places, int64_t b, int64_t place, int64_t byte) {
        const bool grouped = b / 4 * 4 + 4 <= batch;
        const int64_t first = grouped ? b / 4 * 4 : b, size = grouped ? 4 : 1;
        return values.data() + first * chunks * places * 128 +
               (((byte / 64) * places + place) * size + (b - first)) * 128 + byte % 64;
    }
};

template <int WIDTH, int BATCH>
void row(const uint8_t* w, int64_t bytes, const int8_t* x, int64_t* out) {
    constexpr int places = 8 / WIDTH;
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
    const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << WIDTH) - 1));
    __m512i high[BATCH], low[BATCH];
    for (int b = 0; b < BATCH; ++b) high[b] = low[b] = _mm512_setzero_si512();
    for (int64_t k = 0; k < bytes; k += 64) {
        const int64_t left = bytes - k;
        const __m512i packed = left >= 64 ? _mm512_loadu_si512(w + k)
                                          : _mm512_maskz_loadu_epi8((1ULL << left) - 1, w + k);
        for (int p = 0; p < places; ++p) {
            const __m512i q = WIDTH == 8 ? packed
                                         : _mm512_and_si512(_mm512_srli_epi16(packed, p * WIDTH), mask);
            for (int b = 0; b < BATCH; ++b, x += 128) {
                high[b] = _mm512_dpbusd_epi32(high[b], q, _mm512_loadu_si512(x));
                low[b] = _mm512_dpbusd_epi32(low[b], q, _mm512_loadu_si512(x + 64));
            }
        }
    }
    for (int b = 0; b < BATCH; ++b) {  // no overflow: |high| < 2^8 2^7 D, and low is half of that
        out[b] = 128LL * _mm512_reduce_add_epi32(high[b]) + _mm512_reduce_add_epi32(low[b]);
    }
#else
    int32_t high[BATCH] = {}, low[BATCH] = {};
    for (int64_t k = 0; k < bytes; k += 64) {
        const int64_t count = std::min<int64_t>(64, bytes - k);
        for (int p = 0; p < places; ++p)
            for (int b = 0; b < BATCH; ++b, x += 128)
                for (int64_t i = 0; i < count; ++i) {
                    const int32_t q = (w[k + i] >> (p * WIDTH)) & ((1 << WIDTH) - 1);
                    high[b] += q * x[i];
                    low[b] += q * x[64 + i];
                }
    }
    for (int b = 0; b < BATCH; ++b) out[b] = 128LL * high[b] + low[b];
#endif
}

template <int WIDTH>
void rows(const uint8_t* w, int64_t bytes, const Halves& x, int64_t batch, int64_t* out) {
    const int64_t size = x.chunks * (8 / WIDTH) * 128;  // of one state
    int64_t b = 0;
    for (; b + 4 <= batch; b += 4) row<WIDTH, 4>(w, bytes, x.values.data() + b * size, out + b);
    for (; b < batch; ++b) row<WIDTH, 1>(w, bytes, x.values.data() + b * size, out + b);
}

}  // namespace

extern "C" const char* instructions() {
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
    return "AVX-512";
#else
    return "plain";
#endif
}

extern "C" void quantized_scores(const uint8_t* const* planes, const int64_t* widths, int64_t n_planes,
                                 int64_t bits, const float* scale, int64_t vocab, int64_t dim, const float* hidden,
                                 int64_t batch, float* out, int64_t threads) {
    std::vector<float> step(batch);
    std::vector<int32_t> rounded(batch * dim);
    std::vector<double> total(batch, 0.0);
    for (int64_t b = 0; b < batch; ++b) {
        float largest = 0;
        for (int64_t j = 0; j < dim; ++j) largest = std::max(largest, std::fabs(hidden[b * dim + j]));
        step[b] = largest > 0 ? largest / 16256.0f : 1.0f;
        for (int64_t j = 0; j < dim; ++j) {
            rounded[b * dim + j] = static_cast<int32_t>(std::lrint(hidden[b * dim + j] / step[b]));
            total[b] += rounded[b * dim + j];
        }
    }
    std::vector<Halves> halves(n_planes);
    for (int64_t i = 0; i < n_planes; ++i) {
        const int64_t places = 8 / widths[i], bytes = (dim + places - 1) / places;
        Halves& x = halves[i];
        x.chunks = (bytes + 63) / 64;
        x.values.assign(batch * x.chunks * places * 128, 0);
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t j = 0; j < dim; ++j) {
                const int32_t value = rounded[b * dim + j];
                const int32_t high = static_cast<int32_t>(std::lrint(value / 128.0));
                int8_t* to = x.at(batch, places, b, j % places, j / places);
                to[0] = static_cast<int8_t>(high);
                to[64] = static_cast<int8_t>(value - 128 * high);
            }
    }
    const double middle = ((1 << bits) - 1) / 2.0;
    auto work = [&](int64_t begin, int64_t end) {
        std::vector<int64_t> sum(batch), part(batch);
        for (int64_t v = begin; v < end; ++v) {
            std::fill(sum.begin(), sum.end(), 0);
            int64_t below = bits;
            for (int64_t i = 0; i < n_planes; ++i) {
                const int64_t bytes = (dim * widths[i] + 7) / 8;
                const uint8_t* w = planes[i] + v * bytes;
                switch (widths[i]) {
                    case 8: rows<8>(w, bytes, halves[i], batch, part.data()); break;
                    case 4: rows<4>(w, bytes, halves[i], batch, part.data()); break;
                    case 2: rows<2>(w, bytes, halves[i], batch, part.data()); break;
                    default: rows<1>(w, bytes, halves[i], batch, part.data());
                }
                below -= widths[i];
                for (int64_t b = 0; b < batch; ++b) sum[b] += part[b] << below;
            }
            for (int64_t b = 0; b < batch; ++b)
                out[b * vocab + v] = static_cast<float>(scale[v] * step[b] * (sum[b] - middle * total[b]));
        }
    };
    const int64_t share = (vocab + threads - 1) / threads;
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; ++t)
        others.emplace_back(work, std::min(vocab, t * share), std::min(vocab, (t + 1) * share));
    work(0, std::min(vocab, share));
    for (auto& other : others) other.join();
}
