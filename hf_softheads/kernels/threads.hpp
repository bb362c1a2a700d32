// A loop over independent tiles, shared by threads that take the next tile when they are done with one.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

// work(begin, end) for ranges of at most `grain` that cover 0 … count.
template <class Work>
void share(int64_t count, int64_t grain, int64_t threads, Work work) {
    std::atomic<int64_t> next{0};
    auto run = [&] {
        for (int64_t begin; (begin = next.fetch_add(grain)) < count;)
            work(begin, std::min(count, begin + grain));
    };
    std::vector<std::thread> others;
    for (int64_t t = 1; t < std::min(threads, (count + grain - 1) / grain); ++t) others.emplace_back(run);
    run();
    for (auto& other : others) other.join();
}

}  // namespace
