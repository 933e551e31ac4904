// A team of threads for the time of one call from Python.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "louver/decode.h"

namespace louver {

// Spins, as ggml's does: putting a thread to sleep and waking it up takes longer than a phase. After a while it gives way at each
// turn, so that a team with more threads than processors, or on a busy machine, gets on.
class SpinBarrier {
  public:
    explicit SpinBarrier(int size) : size_(size) {}

    void arrive_and_wait() {
        const int round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
            if (spins < kSpins) {
                relax();
            } else {
                std::this_thread::yield();
            }
        }
    }

  private:
    static constexpr int kSpins = 2000;

    static void relax() {
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
    }

    int size_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> round_{0};
};

// Calls f(team) in `size` threads at once, this one among them, and waits for all.
template <class F> void run_team(int size, F && f) {
    SpinBarrier barrier(size);
    const auto work = [&](int rank) {
        f(Team{rank, size, [](void * context) { static_cast<SpinBarrier *>(context)->arrive_and_wait(); }, &barrier});
    };
    std::vector<std::jthread> threads;
    for (int rank = 1; rank < size; ++rank) {
        threads.emplace_back(work, rank);
    }
    work(0);
}

}  // namespace louver
