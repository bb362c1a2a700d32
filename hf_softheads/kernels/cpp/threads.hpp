// A loop over independent tiles by the calling thread and by helpers, each of which takes the next tile when it is done
// with one.
//
// The caller takes tiles too, and waits only for helpers that are at work on one: where other processes hold the cores,
// a helper that gets none costs nothing, while a barrier costs a slice of the scheduler.

#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace sharing {

class Helpers {
    std::mutex mutex;
    std::condition_variable called, left;
    void (*loop)(void*) = nullptr;  // null: nothing to do
    void* argument = nullptr;
    int64_t seats = 0, inside = 0, threads = 0;  // helpers that may still come; that are at work; that there are
    bool taken = false;                          // by a caller

    void serve() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            called.wait(lock, [this] { return loop && seats > 0; });
            --seats, ++inside;
            const auto run = loop;
            void* const with = argument;
            lock.unlock();
            run(with);
            lock.lock();
            if (--inside == 0) left.notify_one();
        }
    }

public:
    // loop(argument) here and in up to `count` helpers; here alone while another thread has them.
    void run(int64_t count, void (*function)(void*), void* with) {
        std::unique_lock<std::mutex> lock(mutex);
        if (taken) {
            lock.unlock();
            return function(with);
        }
        taken = true;
        for (; threads < count; ++threads) std::thread([this] { serve(); }).detach();
        loop = function, argument = with, seats = count;
        lock.unlock();
        for (int64_t i = 0; i < count; ++i) called.notify_one();
        function(with);
        lock.lock();
        loop = nullptr;
        left.wait(lock, [this] { return inside == 0; });
        taken = false;
    }
};

// Those of this process, of all kernels together: the linker makes one variable of all that have this name.
inline Helpers*& helpers() {
    static Helpers* found = [] {
        pthread_atfork(nullptr, nullptr, [] { helpers() = new Helpers; });  // a child has none of its parent's threads
        return new Helpers;                                                 // never deleted: its threads never end
    }();
    return found;
}

}  // namespace sharing

namespace {

// work(begin, end) for ranges of at most `grain` that cover 0 … count.
template <class Work>
void share(int64_t count, int64_t grain, int64_t threads, Work work) {
    std::atomic<int64_t> next{0};
    auto loop = [&] {
        for (int64_t begin; (begin = next.fetch_add(grain)) < count;) work(begin, std::min(count, begin + grain));
    };
    const int64_t useful = std::min(threads, (count + grain - 1) / grain);
    if (useful <= 1) return loop();
    sharing::helpers()->run(useful - 1, [](void* with) { (*static_cast<decltype(loop)*>(with))(); }, &loop);
}

}  // namespace
