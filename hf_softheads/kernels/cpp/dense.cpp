// Some rows of a bf16 matrix times a hidden state, products in fp32: out[b][m] = sum_j weight[token[b][m]][j] * x[b][j].

#include <cstring>

#include "threads.hpp"

namespace {

constexpr int64_t LANES = 64;  // partial sums, so that the compiler may use vectors

}  // namespace

extern "C" const char* instructions() {
#if defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#else
    return "plain";
#endif
}

extern "C" void dense_score(const uint16_t* weight, int64_t dim, const int64_t* token, int64_t candidates, const float* x,
                            int64_t batch, float* out, int64_t threads) {
    share(batch * candidates, 32, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const uint16_t* row = weight + token[i] * dim;
            // rows lie anywhere: ask for the next but one while this one is multiplied
            const uint16_t* ahead = i + 2 < end ? weight + token[i + 2] * dim : row;
            const float* state = x + i / candidates * dim;
            float sums[LANES] = {};
            int64_t j = 0;
            for (; j + LANES <= dim; j += LANES) {
                __builtin_prefetch(ahead + j);
                __builtin_prefetch(ahead + j + LANES / 2);
                for (int64_t k = 0; k < LANES; ++k) {
                    const uint32_t bits = static_cast<uint32_t>(row[j + k]) << 16;
                    float value;
                    std::memcpy(&value, &bits, 4);
                    sums[k] += value * state[j + k];
                }
            }
            for (int64_t half = LANES / 2; half; half /= 2)
                for (int64_t k = 0; k < half; ++k) sums[k] += sums[k + half];
            for (; j < dim; ++j) {
                const uint32_t bits = static_cast<uint32_t>(row[j]) << 16;
                float value;
                std::memcpy(&value, &bits, 4);
                sums[0] += value * state[j];
            }
            out[i] = sums[0];
        }
    });
}
