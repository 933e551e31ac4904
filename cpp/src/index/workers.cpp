#include "index/workers.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace louver {
namespace {

// A thread that has nothing to do looks for more this often before it sleeps: searches come in rows, and waking a thread takes
// as long as a small one.
constexpr int kSpins = 4000;

void relax() {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
}

class Workers {
  public:
    explicit Workers(int n) {
        for (int i = 0; i < n; ++i) {
            std::thread([this, i] { run(i); }).detach();
        }
        size_ = n;
    }

    int size() const { return size_; }

    // The caller holds the mutex. A worker that wakes up after all has been dealt out is not waited for.
    void work(int64_t n, int n_helpers, const std::function<void(int64_t)> & f) {
        f_ = &f;
        n_ = n;
        n_helpers_ = n_helpers;
        next_.store(0, std::memory_order_relaxed);
        open_.store(true);
        round_.fetch_add(1);
        round_.notify_all();
        take();
        open_.store(false);
        for (int spins = 0; busy_.load() != 0; ++spins) {
            spins < kSpins ? relax() : std::this_thread::yield();
        }
        if (failure_ != nullptr) {
            std::rethrow_exception(std::exchange(failure_, nullptr));
        }
    }

    std::mutex mutex;

  private:
    void take() {
        try {
            for (int64_t i = next_.fetch_add(1, std::memory_order_relaxed); i < n_;
                 i = next_.fetch_add(1, std::memory_order_relaxed)) {
                (*f_)(i);
            }
        } catch (...) {
            const std::lock_guard lock(failing_);
            failure_ = std::current_exception();
            next_.store(n_, std::memory_order_relaxed);
        }
    }

    [[noreturn]] void run(int rank) {
        for (uint32_t seen = 0;;) {
            for (int spins = 0; spins < kSpins && round_.load(std::memory_order_acquire) == seen; ++spins) {
                relax();
            }
            round_.wait(seen, std::memory_order_acquire);
            seen = round_.load(std::memory_order_acquire);
            // First counted, then looked: whoever closes the round sees one of the two.
            busy_.fetch_add(1);
            if (open_.load() && rank < n_helpers_) {
                take();
            }
            busy_.fetch_sub(1);
        }
    }

    int size_ = 0;
    const std::function<void(int64_t)> * f_ = nullptr;
    int64_t n_ = 0;
    int n_helpers_ = 0;
    std::mutex failing_;
    std::exception_ptr failure_;  // one of those that f threw
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<bool> open_{false};
    alignas(64) std::atomic<int> busy_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
};

// The process's workers, made when they are first needed. Never destroyed, for they may still wait while the process ends. A
// child process has none of its parent's threads: it makes its own.
Workers & workers() {
    static std::mutex making;
    static std::atomic<Workers *> made{nullptr};
    static std::atomic<pid_t> owner{0};
    const pid_t self = getpid();
    if (owner.load(std::memory_order_acquire) != self) {
        const std::lock_guard lock(making);
        if (owner.load(std::memory_order_relaxed) != self) {
            made.store(new Workers(hardware_threads() - 1), std::memory_order_relaxed);
            owner.store(self, std::memory_order_release);
        }
    }
    return *made.load(std::memory_order_relaxed);
}

}  // namespace

int hardware_threads() {
    static const int n = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));  // a system call each time
    return n;
}

void parallel_for(int64_t n, int n_threads, const std::function<void(int64_t)> & f) {
    if (n > 1 && n_threads > 1 && hardware_threads() > 1) {
        Workers & others = workers();
        const std::unique_lock lock(others.mutex, std::try_to_lock);
        if (lock.owns_lock()) {
            const int64_t most = std::min<int64_t>(n_threads, n) - 1;
            others.work(n, static_cast<int>(std::min<int64_t>(most, others.size())), f);
            return;
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        f(i);
    }
}

}  // namespace louver
