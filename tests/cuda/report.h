// Counts what was checked, and says what failed.
#pragma once

#include <cstdio>
#include <string>

namespace louver::checks {

class Report {
  public:
    void section(const std::string & name) {
        section_ = name;
        std::printf("%s\n", name.c_str());
        std::fflush(stdout);
    }
    // Each failure is printed, the first few of a section only.
    void expect(bool holds, const std::string & what) {
        ++n_checks_;
        if (!holds) {
            ++n_failed_;
            if (said_ != section_) {
                said_ = section_;
                n_said_ = 0;
            }
            if (++n_said_ <= 12) {
                std::printf("  FAILED: %s\n", what.c_str());
                std::fflush(stdout);
            }
        }
    }
    int finish() const {
        std::printf("%lld checks, %lld failed\n", static_cast<long long>(n_checks_), static_cast<long long>(n_failed_));
        return n_failed_ == 0 ? 0 : 1;
    }

  private:
    std::string section_;
    std::string said_;
    int n_said_ = 0;
    long n_checks_ = 0;
    long n_failed_ = 0;
};

}  // namespace louver::checks
