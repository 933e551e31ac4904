#include "index/exact_score.h"

#include <array>
#include <cmath>

#include "louver/types.h"

namespace louver {
namespace {

// A sum as components that do not overlap, of rising magnitude, none of them 0 (Shewchuk, 2.3 and 2.4). Neither overflow nor
// underflow can happen: a term is 0 or between 2^-298 and 2^256, or tau.
class Expansion {
  public:
    // GROW-EXPANSION with zero elimination.
    void add(double term) {
        int kept = 0;
        for (int i = 0; i < n_; ++i) {
            // TWO-SUM: sum + error is exactly term + component.
            const double component = component_[static_cast<size_t>(i)];
            const double sum = term + component;
            const double virtual_component = sum - term;
            const double error = (term - (sum - virtual_component)) + (component - virtual_component);
            if (error != 0) {
                component_[static_cast<size_t>(kept++)] = error;
            }
            term = sum;
        }
        if (term != 0) {
            component_[static_cast<size_t>(kept++)] = term;
        }
        n_ = kept;
    }

    int sign() const {
        if (n_ == 0) {
            return 0;
        }
        return component_[static_cast<size_t>(n_ - 1)] > 0 ? 1 : -1;  // the largest outweighs the others
    }

    // The components from the largest down, until one no longer fits; then half a unit may be decided by what follows.
    double rounded() const {
        if (n_ == 0) {
            return 0;
        }
        int i = n_ - 1;
        double high = component_[static_cast<size_t>(i)];
        double low = 0;
        while (i > 0 && low == 0) {
            const double next = component_[static_cast<size_t>(--i)];
            const double sum = high + next;
            low = next - (sum - high);
            high = sum;
        }
        // A tie that went to even although more follows in the direction of low goes the other way.
        if (i > 0 && (low > 0) == (component_[static_cast<size_t>(i - 1)] > 0)) {
            const double twice = 2 * low;
            const double sum = high + twice;
            high = sum - high == twice ? sum : high;
        }
        return high;
    }

  private:
    std::array<double, kMaxDim + 1> component_;
    int n_ = 0;
};

Expansion sum_of_products(const float * a, const float * b, int n) {
    Expansion sum;
    for (int i = 0; i < n; ++i) {
        sum.add(static_cast<double>(a[i]) * b[i]);
    }
    return sum;
}

}  // namespace

double exact_dot(const float * a, const float * b, int n) { return sum_of_products(a, b, n).rounded(); }

int compare_dot(const float * a, const float * b, int n, double tau) {
    Expansion sum = sum_of_products(a, b, n);
    sum.add(-tau);
    return sum.sign();
}

}  // namespace louver
