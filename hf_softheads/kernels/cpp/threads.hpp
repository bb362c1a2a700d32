// A loop over independent tiles, shared by threads that take the next tile when they are done with one.
//
// The threads are torch's own: this library links against torch's OpenMP. Others would have to share the cores with
// those of torch, which keep spinning for a while after every operation.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace {

// work(begin, end) for ranges of at most `grain` that cover 0 … count.
template <class Work>
void share(int64_t count, int64_t grain, int64_t threads, Work work) {
    std::atomic<int64_t> next{0};
    const int useful = static_cast<int>(std::min(threads, (count + grain - 1) / grain));
#pragma omp parallel num_threads(useful) if (useful > 1)
    for (int64_t begin; (begin = next.fetch_add(grain)) < count;) work(begin, std::min(count, begin + grain));
}

}  // namespace
