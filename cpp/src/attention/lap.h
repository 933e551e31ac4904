// Where a thread's time in a decode step goes.
#pragma once

#include <chrono>
#include <cstdint>

#include "louver/decode.h"

namespace louver {

// Adds the time since the last mark to a field of PhaseTimes. Costs a branch where nobody wants to know.
class Lap {
  public:
    explicit Lap(PhaseTimes * times) : times_(times) {
        if (times_ != nullptr) {
            last_ = Clock::now();
        }
    }

    void mark(int64_t PhaseTimes::*field) {
        if (times_ != nullptr) {
            const Clock::time_point now = Clock::now();
            times_->*field += std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_).count();
            last_ = now;
        }
    }

  private:
    using Clock = std::chrono::steady_clock;
    PhaseTimes * times_;
    Clock::time_point last_;
};

}  // namespace louver
