// The largest numbers of each row of a matrix, and the logarithm of the sum of its exponentials: what is left to do
// when all tokens have a preview.

#include <cstring>
#include <vector>

#include "threads.hpp"
#include "vector.hpp"

namespace {

constexpr int64_t BLOCK = 64;   // numbers whose largest one decides whether any of them is looked at
constexpr int64_t PART = 4096;  // numbers added up in fp32

struct Item {
    int32_t key, token;
    bool operator<(const Item& other) const { return key != other.key ? key > other.key : token < other.token; }
};

inline int32_t key_of(float x) {  // an integer that is ordered as the numbers are; what is no number has a place too
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

float largest(const float* z, int64_t n) {
    if (n % W == 0) return maximum(z, n);
    float best = -INFINITY;
    for (int64_t i = 0; i < n; ++i) best = z[i] > best ? z[i] : best;
    return best;
}

}  // namespace

extern "C" const char* instructions() { return W == 16 ? "AVX-512" : W == 8 ? "AVX2" : "plain"; }

// The `count` largest of each row of z, descending: value[b][i] and token[b][i].
extern "C" void largest_of_rows(const float* z, int64_t batch, int64_t vocab, int64_t count, float* value, int64_t* token,
                                int64_t threads) {
    const int64_t blocks = (vocab + BLOCK - 1) / BLOCK;
    share(batch, 1, threads, [&](int64_t b, int64_t) {
        const float* row = z + b * vocab;
        std::vector<float> maxima(blocks), sorted;
        for (int64_t i = 0; i < blocks; ++i) maxima[i] = largest(row + i * BLOCK, std::min(BLOCK, vocab - i * BLOCK));
        float least = -INFINITY;  // so many blocks have a number that is no smaller
        if (count <= blocks) {
            sorted = maxima;
            std::nth_element(sorted.begin(), sorted.begin() + count - 1, sorted.end(), std::greater<float>());
            least = sorted[count - 1];
        }
        std::vector<Item> found;
        for (int64_t i = 0; i < blocks; ++i)
            if (maxima[i] >= least)
                for (int64_t v = i * BLOCK; v < std::min(vocab, (i + 1) * BLOCK); ++v)
                    if (!(row[v] < least)) found.push_back({key_of(row[v]), static_cast<int32_t>(v)});
        std::nth_element(found.begin(), found.begin() + count - 1, found.end());
        std::sort(found.begin(), found.begin() + count);
        for (int64_t i = 0; i < count; ++i) {
            token[b * count + i] = found[i].token;
            value[b * count + i] = row[found[i].token];
        }
    });
}

// out[b] = log sum_v exp(z[b][v])
extern "C" void logsumexp_of_rows(const float* z, int64_t batch, int64_t vocab, float* out, int64_t threads) {
    share(batch, 1, threads, [&](int64_t b, int64_t) {
        const float* row = z + b * vocab;
        const int64_t whole = vocab / W * W;
        const float top = std::max(largest(row, whole), largest(row + whole, vocab - whole));
        if (std::isinf(top)) {
            out[b] = std::any_of(row, row + vocab, [](float x) { return std::isnan(x); }) ? NAN : top;
            return;
        }
        double sum = 0;
        for (int64_t i = 0; i < whole; i += PART) {
            vf parts{};
            for (int64_t j = i; j < std::min(whole, i + PART); j += W) parts += exponential(load(row + j) - top);
            sum += total(parts);
        }
        for (int64_t i = whole; i < vocab; ++i) sum += std::exp(row[i] - top);
        out[b] = top + static_cast<float>(std::log(sum));
    });
}
